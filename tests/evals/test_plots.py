import matplotlib
import pytest

from helmholtz.evals.plots import saved_figure


@pytest.mark.parametrize("few_colours", [False, True])
def test_a_picture_is_the_same_whatever_a_matplotlibrc_sets(tmp_path, few_colours):
    """What the file says is what the global settings hold once matplotlib is imported."""

    def draw(name):
        with saved_figure(tmp_path / name / "line.png", (2, 1), few_colours=few_colours) as figure:
            figure.subplots().plot([1, 2], label="x")
        return (tmp_path / name / "line.png").read_bytes()

    plain = draw("plain")
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "savefig.bbox": "tight"}):
        assert draw("styled") == plain
        assert matplotlib.rcParams["lines.linewidth"] == 9
