"""``helmholtz plan``."""

import functools
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from helmholtz._checks import check, check_integer
from helmholtz.cli.arguments import Parser, make_parser, output_file, output_picture, parse
from helmholtz.cli.checkpoints import add_checkpoint
from helmholtz.data.tokenizer import AbstractTokenizer
from helmholtz.evals.checkpoints import Checkpoint, open_checkpoint
from helmholtz.evals.plan_figure import NamedGroup, plot_plans
from helmholtz.evals.plan_file import (
    Edit,
    PlanFile,
    ReadPlan,
    edit_codes,
    load_plan,
    model_fingerprint,
    read_plan,
)
from helmholtz.evals.plans import bit_effects, changed, compare_plans, sample_under
from helmholtz.models.decoder import Decoder, require_plan
from helmholtz.models.planning import PlanSettings
from helmholtz.models.sampling import SamplingSettings
from helmholtz.ops.binary_latent import code_to_bits

DESCRIPTION = "Read the plan of a text, or sample under shared, given, edited and independent plans."
EDIT = re.compile(r"(?P<position>\d+)(:(?P<bit>\d+))?=(?P<value>\d+)")
HOLD = re.compile(r"(\d+)=([01])")
END = "<end>"


def make_plan_parser() -> Parser:
    parser = make_parser("plan", DESCRIPTION)
    option = parser.add_argument
    add_checkpoint(parser)
    option("--encode", type=str, default=None, help="show the encoder's plan of this text")
    option("--save", type=str, default=None, help="file for the plan that --encode reads, edits included")
    option("--prompt", type=str, default=None, help="sample continuations of this text")
    option("--plan", type=str, default=None, help="a saved plan, used from the prompt's first token on")
    repeated: dict[str, Any] = {"type": str, "action": "append", "default": []}
    edit = "change the plan, or with POSITION=CODE a whole code of it; may be repeated"
    option("--edit", metavar="POSITION:BIT=VALUE", help=edit, **repeated)
    hold = "force a bit in every code that is drawn; may be repeated"
    option("--hold", metavar="BIT=VALUE", help=hold, **repeated)
    drawn = "who draws the prompt's codes; default: posterior"
    option("--prompt_plan", type=Literal["posterior", "prior"] | None, help=drawn)
    option("--plan_seed", type=int | None, default=None, help="seed of the codes; default: sampling.seed")
    option("--n_samples", type=int, default=5, help="samples per group")
    option(
        "--n_plans",
        type=int,
        default=8,
        help="groups that share a plan, and as many that do not",
    )
    option("--bit_effects", action="store_true", help="measure what each bit changes")
    option("--picture", type=str, default=None, help="file for a figure of what the samples share")
    option("--json", action="store_true", help="print JSON")
    parser.add_class_arguments(SamplingSettings, "sampling", skip={"stop_tokens"})
    return parser


def run(arguments: list[str], console: Console) -> int:
    parser = make_plan_parser()
    values = parse(parser, arguments)
    _check_combination(values, parser)
    if values["save"] is not None:
        output_file("save", values["save"])
    if values["picture"] is not None:
        output_picture("picture", values["picture"])
    checkpoint = open_checkpoint(values["checkpoint"], "plan")
    action = _encode if values["prompt"] is None else _sample
    result = action(checkpoint, values, Console(quiet=True) if values["json"] else console)
    if values["json"]:
        console.print(json.dumps(result))
    return 0


def _check_combination(values: dict[str, Any], parser: Parser) -> None:
    """Refuse options that would do nothing beside others."""
    encode, prompt = values["encode"] is not None, values["prompt"] is not None
    if encode == prompt:
        raise ValueError("encode and prompt: wanted one of them, to read the plan of a text or to sample")
    sampling = {f"sampling.{name}" for name in values["sampling"]}
    others = {"plan", "prompt_plan", "n_samples", "n_plans", "bit_effects", "picture"} | sampling
    for name in sorted(others) if encode else ["save"]:
        value = values["sampling"][name[9:]] if name in sampling else values[name]
        if value != parser.get_default(name):
            raise ValueError(f"{name} and {'encode' if encode else 'prompt'}: {name} has no meaning here")
    if values["plan_seed"] is not None:
        check_integer("plan_seed", values["plan_seed"], minimum=0)


def _encode(checkpoint: Checkpoint, values: dict[str, Any], console: Console) -> dict[str, Any]:
    """Read the plan of a text, change it as asked, show it and save it."""
    check(bool(values["encode"]), "encode", values["encode"], "a text that is not empty")
    model, tokens, seed = checkpoint.model, checkpoint.document(values["encode"]), values["plan_seed"] or 0
    n_bits = require_plan(model).n_bits
    read = read_plan(model, tokens, seed=seed)
    held = [Edit(place, bit, value) for bit, value in _held(values, model) for place in range(len(tokens))]
    codes = edit_codes(read.codes, held + _edits(values), n_bits)
    plan = PlanFile(
        n_latent_bits=n_bits,
        codes=codes,
        tokens=tuple(tokens),
        texts=tuple(_spell(checkpoint.tokenizer, token) for token in tokens),
        seed=seed,
        fingerprint=model_fingerprint(model),
    )
    console.print(_plan_table(plan, read))
    console.print(
        f"{read.kl.sum() / math.log(2):.2f} bits from the prior (KL) in {len(codes)} codes of {n_bits} bits"
    )
    if values["save"] is not None:
        plan.save(values["save"])
        console.print(f"wrote {values['save']}")
    return asdict(plan) | {"probability": read.probability.tolist(), "kl": read.kl.tolist()}


def _plan_table(plan: PlanFile, read: ReadPlan) -> Table:
    title = "Plan: a code per token; bits from bit 0 on, and how likely the encoder holds each bit to be 1"
    table = Table("position", "token", "code", "bits", "P(bit = 1), %", "KL, bits", title=title)
    bits = code_to_bits(torch.tensor(plan.codes), plan.n_latent_bits).int().tolist()
    rows = zip(plan.texts, plan.codes, bits, read.probability, read.kl, strict=True)
    for place, (text, code, row, probability, kl) in enumerate(rows):
        percent = " ".join(f"{100 * p:3.0f}" for p in probability.tolist())
        spelled = "".join(map(str, row))
        table.add_row(str(place), _one_line(text), str(code), spelled, percent, f"{kl / math.log(2):.3f}")
    return table


def _sample(checkpoint: Checkpoint, values: dict[str, Any], console: Console) -> dict[str, Any]:
    """Sample in groups, show the first group of each kind and one to set beside them, and measure all groups."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    edits, prompt = _edits(values), checkpoint.document(values["prompt"])
    settings = SamplingSettings(**values["sampling"], stop_tokens=(tokenizer.eos_id,))
    plan = _plan_settings(model, values, len(prompt) + settings.max_new_tokens, console)
    n_samples, n_plans = values["n_samples"], values["n_plans"]
    found = compare_plans(model, prompt, settings, plan, n_samples=n_samples, n_plans=n_plans)
    last = NamedGroup("plan B", found.shared[1], True)
    if edits:
        edited = edit_codes(found.plans[0], edits, require_plan(model).n_bits)
        samples = sample_under(model, prompt, settings, [edited] * n_samples)
        last = NamedGroup("plan A, edited", samples, True)
    first = NamedGroup("independent plans", found.independent[0], False)
    groups = [first, NamedGroup("plan A", found.shared[0], True), last]
    result = {
        "prompt": values["prompt"],
        "n_samples": n_samples,
        "n_plans": n_plans,
        "one_plan": asdict(found.sharing),
        "a_plan_each": asdict(found.independent_sharing),
        "gap": asdict(found.gap),
        "groups": [_described(group, tokenizer) for group in groups],
    }
    if edits:
        result["changed_by_edit"] = asdict(changed(found.shared[0], last.samples))
    if values["bit_effects"]:
        effects = bit_effects(model, prompt, settings, plan, n_samples=n_plans)
        result["changed_by_bit"] = [asdict(effect) for effect in effects]
    _print(result, console)
    if values["picture"] is not None:
        file, title = Path(values["picture"]), values["prompt"]
        spell = functools.partial(_spell, tokenizer)
        plot_plans(groups, found, file, title=title, n_prompt=len(prompt), spell=spell)
        console.print(f"wrote {file}")
    return result


def _plan_settings(model: Decoder, values: dict[str, Any], n_codes: int, console: Console) -> PlanSettings:
    codes: tuple[int, ...] = ()
    held = _held(values, model)
    if values["plan"] is not None:
        codes = load_plan(values["plan"], model).codes
        if held and len(codes) >= n_codes:
            raise ValueError(
                f"hold and plan: {values['plan']} gives all {n_codes} codes and none is drawn; change them with --edit"
            )
        console.print(
            f"plan: {min(len(codes), n_codes)} of {n_codes} codes from {values['plan']}, which has {len(codes)}"
        )
    return PlanSettings(
        prompt=values["prompt_plan"] or "posterior", codes=(codes,), held_bits=held, seed=values["plan_seed"]
    )


def _described(group: NamedGroup, tokenizer: AbstractTokenizer) -> dict[str, Any]:
    samples = [
        {"text": tokenizer.decode(row.tokens), "tokens": row.tokens, "codes": row.codes}
        for row in group.samples
    ]
    return {"name": group.name, "one_plan": group.is_shared, "samples": samples}


def _print(result: dict[str, Any], console: Console) -> None:
    for group in result["groups"]:
        console.print(group["name"], style="bold")
        for number, sample in enumerate(group["samples"], 1):
            console.print(f"{number:>3}  {_one_line(result['prompt'] + sample['text'])}")
    table = Table("", "same token, %", "longest common run, %", title="What two samples of a group share")
    for name, kind in (("one plan", "one_plan"), ("a plan each", "a_plan_each")):
        table.add_row(name, _percent(result[kind]["agreement"]), _percent(result[kind]["common_run"]))
    table.add_row("difference", _percent(result["gap"]), "")
    console.print(table)
    kinds = f"{result['n_plans']} groups of {result['n_samples']} samples of each kind"
    console.print(f"{kinds}; ± is the standard error over the groups")
    if change := result.get("changed_by_edit"):
        console.print(
            f"the edit changes {_percent(change)} % of the tokens ({change['n']} samples of plan A)"
        )
    if "changed_by_bit" in result:
        title = f"A bit 1 in all codes against 0, {result['changed_by_bit'][0]['n']} pairs of samples"
        bits = Table("bit", "tokens changed, %", title=title)
        for bit, change in enumerate(result["changed_by_bit"]):
            bits.add_row(str(bit), _percent(change))
        console.print(bits)


def _percent(value: dict[str, Any]) -> str:
    return f"{100 * value['mean']:.1f} ± {100 * value['standard_error']:.1f}"


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n")


def _spell(tokenizer: AbstractTokenizer, token: int) -> str:
    return END if token == tokenizer.eos_id else tokenizer.decode([token])


def _edits(values: dict[str, Any]) -> list[Edit]:
    edits = []
    for text in values["edit"]:
        match = _match(EDIT, "edit", text, "POSITION:BIT=VALUE or POSITION=CODE, whole numbers")
        bit = None if match["bit"] is None else int(match["bit"])
        edits.append(Edit(int(match["position"]), bit, int(match["value"])))
    return edits


def _held(values: dict[str, Any], model: Decoder) -> tuple[tuple[int, int], ...]:
    n_bits = require_plan(model).n_bits
    held: dict[int, int] = {}
    for text in values["hold"]:
        bit, value = map(int, _match(HOLD, "hold", text, "BIT=0 or BIT=1").groups())
        check(bit < n_bits, "hold", text, f"of a bit below the model's {n_bits}")
        check(held.setdefault(bit, value) == value, "hold", values["hold"], f"one value for bit {bit}")
    return tuple(held.items())


def _match(pattern: re.Pattern[str], name: str, text: str, wanted: str) -> re.Match[str]:
    match = pattern.fullmatch(text)
    if match is None:
        raise ValueError(f"{name} must be {wanted}, got {text!r}")
    return match
