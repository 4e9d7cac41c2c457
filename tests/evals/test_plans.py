import itertools
import json
import math
import os
import statistics
from codecs import BOM_UTF8
from dataclasses import replace

import pytest
import torch

from decoder_cases import N_BITS, make_free
from helmholtz._files import write_atomically
from helmholtz.evals.plan_figure import NamedGroup, companions, plot_plans
from helmholtz.evals.plan_file import (
    Edit,
    PlanFile,
    edit_codes,
    load_plan,
    model_fingerprint,
    read_plan,
)
from helmholtz.evals.plans import (
    agreement,
    bit_effects,
    changed,
    compare_plans,
    draw_plans,
    sample_under,
    sharing,
)
from helmholtz.models.generation import PlannedRow, generate_planned
from helmholtz.models.planning import PlanSettings
from helmholtz.models.sampling import SamplingSettings
from helmholtz.ops.binary_latent import code_to_bits
from plan_cases import deaf_to_its_plan, ruled_by_its_plan

PROMPT = [36, 3, 1, 4]
SETTINGS = SamplingSettings(max_new_tokens=12)
PLAN = PlanFile(
    n_latent_bits=N_BITS, codes=(3, 31, 0), tokens=(36, 3, 1), texts=("<end>", "c", "a"), seed=4, fingerprint=None
)  # fmt: skip


def group(*rows):
    return tuple(PlannedRow(list(row), []) for row in rows)


def test_a_plan_that_rules_the_text_is_shared_by_all_of_its_samples():
    found = compare_plans(ruled_by_its_plan(), PROMPT, SETTINGS, n_samples=4, n_plans=6)
    assert found.sharing.agreement.mean > 0.99
    assert found.sharing.common_run.mean > 0.99
    assert found.independent_sharing.agreement.mean < 0.5
    assert found.gap.mean > 0.5
    assert found.gap.mean > 8 * found.gap.standard_error
    assert min(found.sharing.curve) > 0.95 and max(found.independent_sharing.curve) < 0.6


def test_a_plan_that_nothing_reads_is_no_plan():
    """The groups have the same seeds of their tokens: without an effect of the plan they are the same groups."""
    model = deaf_to_its_plan()
    found = compare_plans(model, PROMPT, SETTINGS, n_samples=3, n_plans=3)
    assert found.sharing == found.independent_sharing
    assert found.gap.mean == found.gap.standard_error == 0
    assert [e.mean for e in bit_effects(model, PROMPT, SETTINGS, n_samples=2)] == [0] * N_BITS


def test_shared_plans_are_shared_and_independent_ones_all_differ():
    found = compare_plans(make_free(), PROMPT, replace(SETTINGS, temperature=5.0), n_samples=4, n_plans=3)
    length = len(PROMPT) + SETTINGS.max_new_tokens
    assert len(set(found.plans)) == 3
    for plan, samples in zip(found.plans, found.shared, strict=True):
        assert len(plan) == length
        assert all(tuple(row.codes) == plan for row in samples)
        assert len({tuple(row.tokens) for row in samples}) == 4
    own = [tuple(row.codes) for samples in found.independent for row in samples]
    assert len({*own, *found.plans}) == 15


def test_groups_are_reproduced_by_their_seeds():
    model = make_free()
    first = compare_plans(model, PROMPT, SETTINGS, n_samples=2, n_plans=2)
    assert compare_plans(model, PROMPT, SETTINGS, n_samples=2, n_plans=2) == first
    other = compare_plans(model, PROMPT, SETTINGS, PlanSettings(seed=99), n_samples=2, n_plans=2)
    assert not set(other.plans) & set(first.plans)
    again = compare_plans(
        model, PROMPT, replace(SETTINGS, seed=5), PlanSettings(seed=0), n_samples=2, n_plans=2
    )
    assert again.plans == first.plans
    assert again.shared != first.shared


def test_a_drawn_plan_is_that_of_a_row_that_generation_plans_itself():
    model = make_free()
    plan = PlanSettings(codes=((-1, 7),), held_bits=((2, 1),), seed=3)
    (drawn,) = draw_plans(model, PROMPT, SETTINGS, plan, n_plans=1)
    (row,) = generate_planned(model, [PROMPT], SETTINGS, plan)
    assert list(drawn) == row.codes
    assert drawn[1] == 7
    assert all(code >> 2 & 1 for code in drawn[:1] + drawn[2:])
    assert sample_under(model, PROMPT, SETTINGS, [drawn]) == (row,)


def test_given_codes_are_those_of_the_shared_plans_and_held_bits_those_of_all():
    plan = PlanSettings(codes=((1, 2, 3, 4, 5),), held_bits=((0, 1),))
    found = compare_plans(make_free(), PROMPT, SETTINGS, plan, n_samples=2, n_plans=3)
    assert {codes[:5] for codes in found.plans} == {(1, 2, 3, 4, 5)}
    assert len({codes[5:] for codes in found.plans}) == 3
    drawn = [codes[5:] for codes in found.plans]
    own = [row.codes for samples in found.independent for row in samples]
    assert all(code & 1 for codes in drawn + own for code in codes)


def test_what_pairs_share_is_counted_over_all_pairs():
    """Against loops over pairs, for rows of different lengths, one of them empty."""
    groups = [group([1, 2, 3, 4], [9, 1, 2], []), group([5, 5], [5, 5], [5, 6, 5])]
    same, runs = [], []
    for samples in groups:
        pairs = list(itertools.combinations([row.tokens for row in samples], 2))
        same.append(
            statistics.fmean(
                sum(x == y for x, y in zip(a, b, strict=False)) / max(len(a), len(b)) for a, b in pairs
            )
        )
        runs.append(statistics.fmean(longest_common_run(a, b) / max(len(a), len(b)) for a, b in pairs))
    found = sharing(groups)
    assert found.agreement.mean == pytest.approx(statistics.fmean(same))
    assert found.agreement.standard_error == pytest.approx(abs(same[0] - same[1]) / 2)
    assert found.agreement.n == 2
    assert found.common_run.mean == pytest.approx(statistics.fmean(runs))
    assert found.curve == pytest.approx((3 / 6, 1 / 6, 0, 0))
    assert agreement(group([], [])) == 1


def longest_common_run(a, b):
    runs = [a[i:j] for i in range(len(a)) for j in range(i + 1, len(a) + 1)]
    inside = [b[i:j] for i in range(len(b)) for j in range(i + 1, len(b) + 1)]
    return max((len(run) for run in runs if run in inside), default=0)


def test_what_changes_is_counted_row_by_row():
    found = changed(group([1, 2, 3], [1, 1]), group([1, 2, 4], [2]))
    assert found.mean == pytest.approx((1 / 3 + 1) / 2)
    assert found.standard_error == pytest.approx((1 - 1 / 3) / 2)


def test_the_bit_that_acts_is_found():
    """All table rows with the same bit 3 are equal: no other bit can change a token."""
    model = ruled_by_its_plan()
    with torch.no_grad():
        on = code_to_bits(torch.arange(2**N_BITS), N_BITS)[:, 3]
        model.post_sampler.weight.copy_(model.post_sampler.weight[torch.where(on, 8, 0)])
    effects = [effect.mean for effect in bit_effects(model, PROMPT, SETTINGS, n_samples=3)]
    assert effects[3] == 1
    assert effects[:3] + effects[4:] == [0] * (N_BITS - 1)


def test_a_read_plan_is_drawn_from_the_posterior_and_says_how_sure_it_was():
    model = make_free()
    read = read_plan(model, PROMPT, seed=3)
    assert read.codes == read_plan(model, PROMPT, seed=3).codes
    logits = model.posterior(model.lower(torch.tensor([PROMPT])))[0]
    torch.testing.assert_close(read.probability, logits.sigmoid().detach())
    p = read.probability.double()
    kl = math.log(2) + p.xlogy(p) + (1 - p).xlogy(1 - p)
    torch.testing.assert_close(read.kl.double(), kl.sum(1), rtol=1e-4, atol=1e-6)
    draws = [read_plan(model, PROMPT, seed=seed).codes for seed in range(200)]
    frequency = code_to_bits(torch.tensor(draws), N_BITS).double().mean(0)
    assert ((frequency - p).abs() < 4.5 * (p * (1 - p) / 200).sqrt()).all()


def test_edits_change_what_they_name_in_order():
    codes = (0, 31, 5)
    assert edit_codes(codes, [], N_BITS) == codes
    assert edit_codes(codes, [Edit(0, 2, 1), Edit(1, 0, 0), Edit(2, None, 9)], N_BITS) == (4, 30, 9)
    assert edit_codes(codes, [Edit(2, None, 8), Edit(2, 0, 1)], N_BITS) == (0, 31, 9)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit(3, 0, 1), r"position must be in \[0, 3\), the plan, got 3"),
        (Edit(0, 5, 1), r"bit must be in \[0, 5\), got 5"),
        (Edit(0, 1, 2), "value of bit 1 must be 0 or 1, got 2"),
        (Edit(0, None, 32), r"code must be in \[0, 32\), got 32"),
    ],
)
def test_an_edit_of_what_is_not_there_is_refused(edit, message):
    with pytest.raises(ValueError, match=message):
        edit_codes((1, 2, 3), [edit], N_BITS)


@pytest.mark.parametrize("place", [4, 6])
def test_an_edit_changes_no_token_before_its_position(place):
    """Early in the text: later a single code is too small a part of the mean that rules the model."""
    model = ruled_by_its_plan()
    (codes,) = draw_plans(model, PROMPT, SETTINGS, n_plans=1)
    edited = edit_codes(codes, [Edit(place, None, codes[place] ^ 31)], N_BITS)
    before, after = (sample_under(model, PROMPT, SETTINGS, [plan] * 3) for plan in (codes, edited))
    first_affected = place + 1 - len(PROMPT)
    for a, b in zip(before, after, strict=True):
        assert a.tokens[:first_affected] == b.tokens[:first_affected]
        assert a.tokens != b.tokens


def test_a_plan_survives_the_disk_and_knows_its_model(tmp_path):
    model = make_free()
    plan = replace(PLAN, fingerprint=model_fingerprint(model))
    plan.save(tmp_path / "folder" / "plan.json")
    assert load_plan(tmp_path / "folder" / "plan.json", model) == plan
    (tmp_path / "marked.json").write_bytes(BOM_UTF8 + (tmp_path / "folder" / "plan.json").read_bytes())
    assert load_plan(tmp_path / "marked.json", model) == plan  # as editors on Windows save it
    assert model_fingerprint(make_free()) == model_fingerprint(model) != model_fingerprint(make_free(seed=2))
    with pytest.raises(ValueError, match="fingerprint must be .*, that of the model .*, got"):
        load_plan(tmp_path / "folder" / "plan.json", make_free(seed=2))
    PLAN.save(tmp_path / "any.json")
    assert load_plan(tmp_path / "any.json", make_free(seed=2)) == PLAN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_latent_bits": 6}, "n_latent_bits must be 5 as the model's, got 6"),
        ({"n_latent_bits": 17}, "n_latent_bits must be in 1..16, got 17"),
        ({"codes": [0, 32, 1]}, r"codes must be in \[0, 32\), got 32"),
        ({"codes": [0, -1, 1]}, r"codes must be in \[0, 32\), got -1"),
        ({"codes": [0, 1.5, 1]}, r"codes must be a list of integers, got \[0, 1.5, 1\]"),
        ({"codes": [0, True, 1]}, "codes must be a list of integers"),
        ({"codes": 3}, "codes must be a list of integers, got 3"),
        ({"codes": [], "tokens": [], "texts": []}, "codes must be at least one code"),
        ({"tokens": [1]}, "tokens must be as many as codes, 3, got '1 of them'"),
        ({"tokens": [1, -2, 3]}, "tokens must be an integer of at least 0, got -2"),
        ({"texts": ["a", "b", 3]}, "texts must be a list of strings"),
        ({"n_latent_bits": "5"}, "n_latent_bits must be an integer of at least 0, got '5'"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"fingerprint": 3}, "fingerprint must be a string or null, got 3"),
        ({"code": [1]}, "a plan has no key 'code'; did you mean 'codes'\\?"),
    ],
)
def test_a_file_that_is_no_plan_of_the_model_is_refused_by_name(tmp_path, change, message):
    file = tmp_path / "plan.json"
    PLAN.save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"plan.json: {message}"):
        load_plan(file, make_free())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[1, 2]", "wanted a plan, a mapping of names to values, got list"),
        ('{"codes": [1]}', "a plan needs the key 'n_latent_bits'"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=f"plan.json: {message}"):
        load_plan(tmp_path / "plan.json", make_free())
    with pytest.raises(ValueError, match="nowhere.json: No such file or directory"):
        load_plan(tmp_path / "nowhere.json", make_free())


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", "old")

    def broken(descriptor):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="full"):
        write_atomically(tmp_path / "file", "new")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_samples": 1}, "n_samples must be an integer of at least 2, got 1"),
        ({"n_plans": 1}, "n_plans must be an integer of at least 2, got 1"),
        (
            {"plan": PlanSettings(codes=((1,), (2,)))},
            "codes must be one row: that of all plans, got '2 rows'",
        ),
        ({"plan": PlanSettings(codes=((40,),))}, r"codes\[0\] must be an integer in \[0, 32\)"),
        ({"plan": PlanSettings(held_bits=((5, 1),))}, "held_bits must be below the model's 5 bits, got 5"),
        ({"prompt": []}, r"prompts\[0\] is empty"),
        ({"prompt": [99]}, "id 99 is not in the vocabulary"),
        ({"prompt": [1] * 60}, "exceed max_seq_len=64"),
    ],
)
def test_a_comparison_refuses_what_it_cannot_do(arguments, message):
    wanted = {"prompt": PROMPT, "plan": None, "n_samples": 2, "n_plans": 2} | arguments
    prompt, plan = wanted.pop("prompt"), wanted.pop("plan")
    with pytest.raises(ValueError, match=message):
        compare_plans(make_free(), prompt, SETTINGS, plan, **wanted)
    if "n_plans" not in arguments:
        with pytest.raises(ValueError, match=message):
            bit_effects(make_free(), prompt, SETTINGS, plan, n_samples=wanted["n_samples"])


def test_a_token_is_as_dark_as_it_has_company():
    shade = companions(group([1, 2, 3], [1, 5], [1, 2, 4]))
    wanted = torch.tensor([[1, 0.5, 0], [1, 0, torch.nan], [1, 0.5, 0]])
    torch.testing.assert_close(shade, wanted, equal_nan=True)


@pytest.mark.parametrize("n_tokens", [1, 12, 130])
def test_the_picture_is_drawn_whatever_the_tokens_spell(tmp_path, n_tokens):
    model = make_free(max_seq_len=140)
    settings = SamplingSettings(max_new_tokens=n_tokens, stop_tokens=(5,))
    found = compare_plans(model, PROMPT, settings, n_samples=2, n_plans=2)
    groups = [
        NamedGroup("independent plans", found.independent[0], False),
        NamedGroup("plan A", found.shared[0], True),
        NamedGroup("nothing", group([], []), True),
    ]
    file = tmp_path / "pictures" / "plans.png"
    spellings = ["a", "$", "\n", "\0", "字", "word"]
    plot_plans(groups, found, file, title="$1\n a", n_prompt=4, spell=lambda token: spellings[token % 6])
    assert file.read_bytes().startswith(b"\x89PNG")
