"""A metrics file that has lost records before the checkpoint: the resumed run says so and goes on."""

import json
from pathlib import Path

import pytest

from helmholtz.training.callbacks import JSONLMetrics


def line(step: int, kind: str = "step") -> str:
    return json.dumps({"kind": kind, "step": step})


def warned(path: Path, lines: list[str], *, start: int, log_every: int) -> tuple[list[str], list[str]]:
    path.write_text("".join(text + "\n" for text in lines))
    said: list[str] = []
    JSONLMetrics(path, start=start, log_every=log_every, warn=said.append).file.close()
    return said, path.read_text().splitlines()


FULL = [line(step) for step in range(10, 60, 10)]


@pytest.mark.parametrize(
    ("lines", "log_every", "message"),
    [
        (FULL[:-1], 10, "metrics.jsonl ends at step 40, the checkpoint is of step 50: the records between are lost"),
        ([], 10, "metrics.jsonl is empty or missing, the checkpoint is of step 50"),
        ([FULL[0], '{"kind"', *FULL[2:]], 10, "metrics.jsonl: line 2 is damaged and dropped (1 such lines)"),
    ],
)  # fmt: skip
def test_lost_records_are_told(tmp_path: Path, lines: list[str], log_every: int, message: str) -> None:
    said, kept = warned(tmp_path / "metrics.jsonl", lines, start=50, log_every=log_every)
    assert len(said) == 1 and message in said[0] and str(tmp_path) in said[0]
    assert kept == [text for text in lines if text.endswith("}")]


@pytest.mark.parametrize(
    ("lines", "start", "log_every"),
    [
        (FULL, 50, 10),
        (FULL, 55, 10),
        ([*FULL, line(60), '{"kind": "st'], 50, 10),  # killed after the checkpoint, while it wrote a line
        ([line(20), line(40)], 50, 10),  # logged more rarely before
        ([], 5, 10),
        ([line(4, "eval")], 5, 10),
        ([], 0, 10),
    ],
)
def test_a_whole_file_is_not_complained_about(
    tmp_path: Path, lines: list[str], start: int, log_every: int
) -> None:
    said, kept = warned(tmp_path / "metrics.jsonl", lines, start=start, log_every=log_every)
    assert not said
    assert kept == [text for text in lines if text.endswith("}") and json.loads(text)["step"] <= start]
