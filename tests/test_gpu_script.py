"""``tools/gpu.py`` without a GPU: every part begins and ends, and what ends a case costs that case alone."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helmholtz import kernels

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module


def run(tmp_path, *arguments):
    command = [sys.executable, str(ROOT / "tools" / "gpu.py"), "--output", str(tmp_path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def lines(tmp_path, part):
    return [json.loads(line) for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()]


def test_it_measures_goes_on_and_tells_what_ended_a_process(tmp_path):
    """One operator's cases are done, one ended its process: neither is tried again."""
    arguments = ("--device", "cpu", "--tiny", "--parts", "machine", "kernels")
    (tmp_path / "kernels.jsonl").write_text('{"case": "swiglu, halves, float32", "state": "begun"}\n{"cas')
    first = run(tmp_path, *arguments)
    assert first.returncode == 1, first.stderr
    assert "swiglu, halves, float32: ended its process, or met its limit" in first.stdout
    done = lines(tmp_path, "machine")
    assert [line["state"] for line in done] == ["begun", "done"] and done[1]["copy_bytes_per_s"] > 0
    assert "cases within their bounds" in first.stdout
    again = run(tmp_path, *arguments)
    assert lines(tmp_path, "machine") == done and again.returncode == 1
    assert {"machine", "kernels", "layers"} <= json.loads((tmp_path / "summary.json").read_text()).keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path):
    done = run(tmp_path, "--parts", "machine")
    assert (
        done.returncode == 1 and "machine: --device cuda: Torch not compiled with CUDA enabled" in done.stdout
    )
    assert not (tmp_path / "machine.jsonl").exists()


def test_where_the_budget_is_spent_nothing_begins(tmp_path):
    assert run(tmp_path, "--device", "cpu", "--tiny", "--budget", "0").returncode == 1
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_folder_goes_on_with_what_it_holds_alone(tmp_path):
    arguments = ("--device", "cpu", "--tiny", "--parts", "machine")
    (tmp_path / "setting.json").write_text('{"device": "cuda", "tiny": false, "commit": "0"}')
    (tmp_path / "machine.jsonl").write_text('{"case": "ceilings", "state": "begun"}\n')
    refused = run(tmp_path, *arguments)
    assert refused.returncode == 2 and "another --output, or --fresh" in refused.stdout
    assert run(tmp_path, *arguments, "--fresh").returncode == 0
    assert json.loads((tmp_path / "setting.json").read_text())["device"] == "cpu"
    assert lines(tmp_path, "machine")[-1]["state"] == "done"


def test_what_the_budget_cut_is_told_and_tried_again(tmp_path, tool):
    gpu = tool("gpu")
    (tmp_path / "machine.jsonl").write_text('{"case": "ceilings", "state": "begun"}\n')
    gpu.try_again(tmp_path, "machine")
    spent = run(tmp_path, "--device", "cpu", "--tiny", "--parts", "machine", "layers", "--budget", "0")
    assert spent.returncode == 1 and "NOT REACHED: layers, all of it" in spent.stdout
    done = run(tmp_path, "--device", "cpu", "--tiny", "--parts", "machine")
    assert done.returncode == 0 and "NOT REACHED" not in done.stdout


def test_every_operator_with_a_gpu_kernel_has_a_case(tool):
    cases = tool("gpu_cases").CASES
    assert not set(kernels.gpu.MODULES) - set(cases)
    assert set(cases) <= set(kernels.NAMES)


def test_a_wrong_kernel_is_told(tool, monkeypatch):
    cases = tool("gpu_cases")
    case = cases.CASES["swiglu"][0]
    assert cases.measure(case, torch.float32, torch.device("cpu"))["ok"]
    monkeypatch.setattr(kernels, "plain_forms", WrongForms)
    for wrong in (1.001, float("nan")):
        WrongForms.factor = wrong
        broken = cases.Case("x", lambda x: case.call(x) * WrongForms.now(), case.shapes)
        found = cases.measure(broken, torch.float32, torch.device("cpu"))
        assert not found["ok"] and found["error"] > 5e-4


class WrongForms:
    """In place of ``plain_forms``: the reference is right, what is measured is not."""

    depth, factor = 0, 1.0

    @classmethod
    def now(cls):
        return cls.factor if cls.depth == 0 else 1.0

    def __enter__(self):
        WrongForms.depth += 1

    def __exit__(self, *_):
        WrongForms.depth -= 1


def test_the_pages_tables_are_those_of_the_function(tool):
    budget = tool("gpu_budget")
    page = budget.PAGE.read_text()
    assert budget.MARKED.sub(lambda m: m[1] + budget.tables() + m[2], page) == page


def test_the_floor_of_attention_is_what_a_hand_counts(tool):
    """D = 768, two rows of 4 tokens: 4 D^2 weights, 12 heads of 64, a token sees 2.5 on average."""
    found = tool("gpu_budget").floor("attention", 768, 2, 4)
    assert found.parameters == 4 * 768**2
    assert found.matmul == 8 * (6 * 4 * 768**2 + 12 * 2.5 * 2 * 7 * 64)
    assert found.bytes == 12 * 4 * 768**2 + 8 * 2 * (5 * 768 + 5 * (3 * 768 + 768))


def test_parts_and_limits_have_the_same_names(tool):
    gpu, parts = tool("gpu"), tool("gpu_parts")
    assert tuple(parts.PARTS) == gpu.ORDER
    assert all(gpu.seconds_of(name) > 0 for name in gpu.ORDER)
    text = (ROOT / "tools" / "gpu.py").read_text() + (ROOT / "tools" / "gpu_parts.py").read_text()
    assert not re.search(r"helmholtz\.cli|https?://", text)


@pytest.mark.slow
def test_every_part_runs_to_its_end(tmp_path):
    done = run(tmp_path, "--device", "cpu", "--tiny", "--parts", "steps", "layers", "models", "compiled")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("steps", "layers", "models", "compiled"):
        assert {line["state"] for line in lines(tmp_path, part)[1::2]} == {"done"}
    assert "of the roofline" in done.stdout
