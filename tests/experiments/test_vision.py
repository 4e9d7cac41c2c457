"""Queues of vision transformers: bytes that do not hang on interruptions, measures by their formulas, digits learnt."""

import functools
import json
from dataclasses import replace

import pytest
import torch

from helmholtz.experiments.queue import FinishedRun
from helmholtz.experiments.vision import run as vision
from helmholtz.experiments.vision.data import Images, ImageSplits, digits
from helmholtz.experiments.vision.models import ViT
from helmholtz.experiments.vision.report import pilot_summary, summary
from helmholtz.experiments.vision.run import (
    compute_vision,
    confusion,
    measure,
    predict,
    recipe_of,
    vision_runs,
)
from image_cases import TINY
from study_cases import check_resumption


def bars(n, seed):
    """Images of 4 x 4 with one bright row or column: eight classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(8, (n,), generator=generator)
    pixels = 0.3 * torch.rand(n, 4, 4, generator=generator)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        (image[label] if label < 4 else image[:, label - 4]).fill_(1)
    return Images(pixels, labels)


BARS = ImageSplits("bars", tuple("abcdefgh"), bars(120, 0), bars(40, 1), bars(50, 2))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(vision, "DIGITS", TINY)


compute = functools.partial(compute_vision, data={"bars": BARS})


def test_an_interrupted_queue_leaves_the_bytes_of_one_that_was_not(tmp_path):
    found = check_resumption(tmp_path, vision_runs([BARS], ["attention", "fem"], [0, 1]), compute)
    assert len({*found.values()}) == 4


def test_a_result_holds_its_settings_and_measures():
    run = vision_runs([BARS], ["fem"], [3])[0]
    assert run.name == "bars-fem-3"
    data = run.settings["data"]
    assert (data["train"], data["validation"], data["test"], data["sha256"]) == (120, 40, 50, BARS.sha256)
    result = compute(run)
    assert sum(map(sum, result["confusion"])) == 50
    right = sum(result["confusion"][i][i] for i in range(8))
    assert result["test"]["accuracy"] == right / 50
    assert [point[0] for point in result["curve"]] == [2, 4]
    json.dumps(result, allow_nan=False)


def test_measures_are_their_formulas(monkeypatch):
    monkeypatch.setattr(vision, "BATCH_SIZE", 7)
    model = ViT(TINY.model_config(BARS, "fem")).eval()
    logits = model(BARS.test.pixels)
    torch.testing.assert_close(predict(model, BARS.test), logits)
    chosen, labels = logits.argmax(-1).tolist(), BARS.test.labels.tolist()
    counts = [
        [sum((t, p) == (i, j) for t, p in zip(labels, chosen, strict=True)) for j in range(8)]
        for i in range(8)
    ]
    assert confusion(model, BARS.test, 8).tolist() == counts
    found = measure(model, BARS.test)
    nats = [-logits[i].log_softmax(-1)[label].item() for i, label in enumerate(labels)]
    assert found["loss"] == pytest.approx(sum(nats) / 50, rel=1e-5)
    assert found["accuracy"] == sum(t == p for t, p in zip(labels, chosen, strict=True)) / 50


def test_a_pilot_leaves_the_test_images_alone(monkeypatch):
    seen = []
    original = vision.predict
    monkeypatch.setattr(
        vision, "predict", lambda model, images: seen.append(images) or original(model, images)
    )
    runs = vision_runs([BARS], ["attention"], [9], measured="validation", lrs=[1e-3, 1e-2])
    results = [compute(run) for run in runs]
    assert seen and all(images is BARS.validation for images in seen)
    assert not any("test" in result or "confusion" in result for result in results)
    rows = pilot_summary([FinishedRun(run, result, {}) for run, result in zip(runs, results, strict=True)])
    assert [(row["lr"], row["validation"]) for row in rows] == [
        (lr, r["validation"]) for lr, r in zip((1e-3, 1e-2), results, strict=True)
    ]


def test_the_summary_is_a_spread_over_seeds():
    def finished(model, seed, accuracy):
        found = {"accuracy": accuracy, "loss": 1.0}
        result = {"parameters": 7, "test": found, "validation": found}
        return FinishedRun(vision_runs([BARS], [model], [seed])[0], result, {"cpu_seconds": 2.0})

    rows = summary([finished(m, s, 0.5 + 0.1 * s) for s in (0, 1, 2) for m in ("attention", "fem")])
    assert [row["model"] for row in rows] == ["attention", "fem"]
    assert rows[1]["test_accuracy"]["mean"] == pytest.approx(0.6)
    assert rows[1]["test_accuracy"]["deviation"] == pytest.approx(0.1)
    assert (rows[0]["seeds"], rows[0]["cpu_seconds"]) == ([0, 1, 2], 6.0)


def test_larger_images_have_the_larger_recipe_and_mistakes_are_refused():
    larger = Images(torch.rand(9, 28, 28), torch.arange(9))
    assert recipe_of(ImageSplits("x", tuple("abcdefghi"), larger, larger, larger)) is vision.LARGER
    with pytest.raises(ValueError, match="models must be one of .*'attenion'; did you mean 'attention'"):
        vision_runs([BARS], ["attenion"], [0])
    with pytest.raises(ValueError, match="data must be sets whose names differ"):
        vision_runs([BARS, BARS], ["fem"], [0])
    with pytest.raises(ValueError, match="seeds must be an integer of at least 0"):
        vision_runs([BARS], ["fem"], [-1])


def test_digits_are_learnt_in_seconds(monkeypatch):
    recipe = replace(TINY, d_model=32, d_ff=64, steps=250, eval_every=250, batch_size=64, warmup_steps=20)
    monkeypatch.setattr(vision, "DIGITS", recipe)
    data = digits()
    run = vision_runs([data], ["attention"], [0], lrs=[1e-2])[0]
    assert compute_vision(run, {"digits": data})["test"]["accuracy"] > 0.9
