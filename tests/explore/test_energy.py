"""What the tab *Equilibrium* shows, without a page."""

import pytest
import torch

from equilibrium_cases import make_model
from helmholtz.data.tokenizer import ByteTokenizer
from helmholtz.evals.checkpoints import Checkpoint
from helmholtz.explore.energy import (
    clicked,
    follow,
    legend_html,
    memory_case,
    paths_html,
    picture,
    run_case,
    scene_of,
    store,
    summary_html,
)

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def scene():
    return scene_of(memory_case())


def test_a_memory_that_nothing_trained_recalls_the_corrupted_pattern(scene):
    case = scene.case
    assert (case.z - case.patterns[0]).norm() < 0.05 * case.radius
    assert (case.start - case.patterns[0]).norm() > 0.2 * case.radius
    assert len(scene.basins.attractors) > 1


def test_a_click_is_read_where_the_picture_shows_it(scene):
    image = picture(scene, "energy")
    assert image.size == (560, 520)
    radius = scene.ticks[-1].item() / scene.case.radius
    left, right, top, bottom = 0.13 * 560, 0.97 * 560, 0.05 * 520, 0.89 * 520
    assert clicked(scene, left, bottom) == pytest.approx((-radius, -radius))
    assert clicked(scene, right, top) == pytest.approx((radius, radius))
    assert clicked(scene, 0, 0) == pytest.approx((-radius, radius))
    x, y = clicked(scene, (left + right) / 2, (top + bottom) / 2)
    torch.testing.assert_close(scene.point(x, y), scene.case.z)


def test_paths_start_at_the_point_and_end_in_its_basin(scene):
    x, y = scene.ticks[[3, 24]].tolist()
    x, y = x / scene.case.radius, y / scene.case.radius
    paths = follow(scene, x, y)
    assert [path.mode for path in paths.paths] == ["alternating", "simultaneous", "cascade", "picard"]
    for path in paths.paths:
        torch.testing.assert_close(path.iterates[0], scene.point(x, y))
    plain = paths.paths[-1]
    assert (plain.iterates[-1] - scene.basins.end(24, 3).z).norm() < 0.1 * scene.case.radius
    page = paths_html(scene, paths)
    assert page.count("<tr>") == 5
    assert "plain steps" in page


def test_a_stored_point_becomes_an_attractor(scene):
    point = scene.point(0.6, -0.9)
    after = store(scene, point)
    assert len(after.case.patterns) == len(scene.case.patterns) + 1
    assert after.case.patterns.norm(dim=-1).allclose(after.case.patterns.new_tensor(after.case.radius))
    new = after.case.patterns[-1]
    before, now = (s.case.problem.energy(new.unsqueeze(0)).item() for s in (scene, after))
    assert now < before
    assert after.ticks is scene.ticks
    assert after.plane.axes is scene.plane.axes
    step = after.case.evaluate(new.unsqueeze(0))[0]
    assert step.norm() < 0.2 * after.case.radius < scene.case.evaluate(new.unsqueeze(0))[0].norm()
    page = summary_html(after, 1, scene)
    assert "5 patterns" in page and "Before 1 pattern was stored: 4 patterns" in page
    with pytest.raises(ValueError, match="a point with a direction"):
        store(scene, torch.zeros_like(point))


def test_both_views_are_drawn_with_paths(scene):
    paths = follow(scene, 0.5, 0.5)
    plain, drawn, basins = (
        picture(scene, *arguments) for arguments in (("energy",), ("energy", paths), ("basins", paths))
    )
    assert plain.tobytes() != drawn.tobytes() != basins.tobytes()
    assert "rgb(" in legend_html(scene, "basins")
    assert "downhill" in legend_html(scene, "energy")


@pytest.mark.parametrize("stability", ["contractive", "descent"])
def test_a_models_token_has_an_energy_that_can_be_drawn_and_stored_in(tmp_path, stability):
    ByteTokenizer().save(tmp_path / "tokenizer")
    model = make_model(vocab_size=257, stability=stability, n_slots=2)
    case, words = run_case(Checkpoint(tmp_path, model), "to be", 2)
    assert words == ["t", "o", "␣", "b", "e"]
    scene = scene_of(case)
    after = store(scene, scene.point(0.3, 0.4))
    assert len(after.case.patterns) == 13
    assert f"{13} patterns" in summary_html(after, 1, scene)
    with pytest.raises(ValueError, match="at most 64"):
        run_case(Checkpoint(tmp_path, model), "x" * 65, 2)
