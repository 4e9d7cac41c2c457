"""Write the tables and numbers of README.md and docs/ anew from the committed results.

    python tools/tables.py

What stands between ``<!-- from NAME -->`` and ``<!-- end -->`` is made by the function NAME of ``FROM``. A table whose
results are not there, or are of an older form, stays as it is.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "benchmarks.md"]
MARKED = re.compile(r"<!-- from (\w+) -->(\n*).*?<!-- end -->", re.DOTALL)
Row = dict[str, Any]
MIXERS = {"rnn_softmax": "AFT (`rnn_softmax`)"}
ARCHITECTURES = {
    "baseline": "baseline (Llama-style)",
    "fem_softmax": "FEM, softmax prior",
    "fem_gla": "FEM, GLA prior",
    "control": "control of the Free Transformer: one more block",
    "free_transformer": "Free Transformer, 8 bits, half a bit free",
    "mamba": "Mamba (Mamba-2 blocks, no feed-forward)",
    "mamba_hopfield": "Mamba-Hopfield: an equilibrium per token",
}


def rows(name: str) -> list[Row]:
    found: list[Row] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]
    return found


def table(header: str, lines: Iterable[Iterable[object]]) -> str:
    columns = header.split(" | ")
    body = [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join([f"| {header} |", "|" + "---|" * len(columns), *body])


def environment(name: str) -> Row:
    found: Row = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["environment"]
    return found


def conditions(name: str) -> str:
    """Hardware, versions and commit, in a sentence's words."""
    e = environment(name)
    beside = f", in turn with `{e['against']}`" if "against" in e else ""
    allocator = "memory kept" if e["keep_memory"] else "default allocator"
    built = {"built": "native kernels"}.get(e["kernels"], e["kernels"])
    return (
        f"{e['hardware']}, {e['threads']} threads, torch {e['torch']}, {built}, {allocator}, commit `{e['commit']}`"
        f"{beside}, {e['rounds']} rounds"
    )


def layers_speed() -> str:
    header = (
        "mixer | dtype | B, T | time | attention | ratio | wanted | of attention at `252ba62` | mixer there"
    )
    plain = {_place(row): row for row in _with_the_default_allocator()}
    lines = [
        (
            MIXERS.get(row["mixer"], row["mixer"]), row["dtype"], f"{row['B']}, {row['T']:,}",
            f"{row['milliseconds']:.0f} ms", f"{row['attention_milliseconds']:.0f} ms", f"{row['ratio']:.2f}",
            "" if row["goal"] is None else f"{row['goal']:.2f}",
            f"{row['milliseconds'] / row['attention_milliseconds_other']:.2f}", f"{row['ratio_other']:.2f}",
            *([f"{plain[_place(row)]['ratio']:.2f}"] if plain else []),
        )
        for row in rows("layers_speed")
    ]  # fmt: skip
    return table(header + (" | default allocator" if plain else ""), lines)


def _with_the_default_allocator() -> list[Row]:
    """The same measurements, if they are of the same commit."""
    name = "layers_speed_default_allocator"
    same = environment(name)["commit"] == environment("layers_speed")["commit"]
    return rows(name) if same and len(rows(name)) == len(rows("layers_speed")) else []


def _place(row: Row) -> tuple[Any, ...]:
    return row["mixer"], row["dtype"], row["T"]


def kernels() -> str:
    header = (
        "operation | dtype | kernels | forward | of its floor | both | of its floor | bound by | plain form"
    )
    lines = (
        (
            f"`{row['op']}`", row["dtype"], row["kernels"], f"{row['forward_ms']:.2f} ms",
            f"{row['forward_to_floor']:.1f}", f"{row['ms']:.2f} ms", f"{row['to_floor']:.1f}", row["bound"],
            f"{row['plain_ms']:.1f} ms, {row['plain_to_kernel']:.1f}",
        )
        for row in rows("kernels")
    )  # fmt: skip
    return table(header, lines)


def layers_decode() -> str:
    contexts = [
        int(key.split("_")[-1]) for key in rows("layers_decode")[0] if re.fullmatch(r"micro.*_\d+", key)
    ]
    header = "mixer | " + " | ".join(f"{n:,} | of attention | `252ba62`" for n in contexts)
    lines = (
        (
            MIXERS.get(row["mixer"], row["mixer"]),
            *(cell for n in contexts for cell in (
                f"{row[f'microseconds_at_{n}']:,.0f} µs", f"{row[f'to_attention_at_{n}']:.2f}",
                f"{row[f'microseconds_at_{n}_other']:,.0f} µs",
            )),
        )
        for row in rows("layers_decode")
    )  # fmt: skip
    return table(header, lines)


def architectures() -> str:
    header = "model | training step | tokens/s | × `252ba62` | a decoded token | × `252ba62` | by `step` | × `252ba62`"
    lines = (
        (
            row["model"], f"{row['training_ms']:.0f} ms", f"{row['train_tokens_per_s']:,.0f}",
            f"{row['train_tokens_per_s_ratio']:.2f}", f"{row['decode_ms_per_token']:.2f} ms",
            f"{row['decode_tokens_per_s_ratio']:.2f}", f"{row['step_ms_per_token']:.2f} ms",
            f"{row['step_tokens_per_s_ratio']:.2f}",
        )
        for row in rows("architectures")
    )  # fmt: skip
    return table(header, lines)


def mad() -> str:
    header = "task | model | a training step | of attention | `252ba62` | of attention"
    lines = (
        (
            row["task"], row["model"], f"{row['training_ms']:.0f} ms", f"{row['to_attention']:.2f}",
            f"{row['training_ms_other']:.0f} ms", f"{row.get('to_attention_other', 1.0):.2f}",
        )
        for row in rows("mad")
    )  # fmt: skip
    return table(header, lines)


def layers_growth() -> str:
    header = "mixer | T | µs per token | peak bytes per token | streaming state, bytes"
    lines = (
        (
            row["mixer"], f"{row['T']:,}", f"{row['microseconds_per_token']:.0f}",
            f"{row['peak_bytes_per_token']:,.0f}", f"{row['state_bytes']:,}",
        )
        for row in rows("layers_growth")
    )  # fmt: skip
    return table(header, lines)


def layers_operations() -> str:
    header = "mixer | form | B, T | operations | that compute | peak | × `252ba62`"
    lines = (
        (
            MIXERS.get(row["mixer"], row["mixer"]), row["form"], f"{row['B']}, {row['T']:,}",
            f"{row['operations']:,}", f"{row['computing']:,}", f"{row['peak_megabytes']:,.0f} MB",
            f"{row['peak_megabytes_ratio']:.2f}",
        )
        for row in rows("layers_operations")
    )  # fmt: skip
    return table(header, lines)


def mamba_hopfield() -> str:
    header = "model | forward | forward and backward | of the floor | steps, mean / largest"
    lines = (
        (
            f"`{row['model']}`" if row["steps"] else "Mamba, without equilibria", f"{row['forward_s']:.2f} s",
            f"{row['forward_backward_s']:.2f} s", f"{row['to_floor']:.1f}" if row["steps"] else "",
            f"{row['steps']:.2f} / {row['max_steps']:.0f}" if row["steps"] else "",
        )
        for row in rows("mamba_hopfield")[:-1]
    )  # fmt: skip
    return table(header, lines)


def mamba_hopfield_floor() -> str:
    return f"{rows('mamba_hopfield')[-1]['floor_seconds']:.2f} s"


def free_transformer() -> str:
    header = (
        "model | training step | tokens/s | to the decoder | a new token, prompt included | a decoded token"
    )
    lines = (
        (
            row["model"], f"{row['train_ms']:,.0f} ms", f"{row['train_tokens_per_s']:,.0f}",
            f"{row['train_to_decoder']:.2f}", _or_nothing(row["ms_per_new_token"]), _or_nothing(row["decode_ms"]),
        )
        for row in rows("free_transformer") if row["model"] != "floor_of_the_table"
    )  # fmt: skip
    return table(header, lines)


def _or_nothing(milliseconds: float) -> str:
    return "" if milliseconds != milliseconds else f"{milliseconds:.2f} ms"


def against_the_package(bits: int) -> tuple[float, float]:
    """How many times the package's speed training and generation have."""
    of = {row["model"]: row for row in rows("free_transformer")}
    ours, peer = of[f"ours, H={bits}"], of[f"peer, H={bits}"]
    return peer["train_ms"] / ours["train_ms"], peer["ms_per_new_token"] / ours["ms_per_new_token"]


def free_transformer_ratios() -> str:
    of_8, of_16 = (against_the_package(bits) for bits in (8, 16))
    return (
        f"Against the package: training {of_8[0]:.2f} times its speed at 8 bits and {of_16[0]:.1f} times at 16, "
        f"generation {of_8[1]:.1f} and {of_16[1]:.1f} times."
    )


def demo() -> str:
    header = "model | parameters | validation bits/byte | train tokens/s | decode tokens/s"
    study = json.loads((ROOT / "docs" / "experiments" / "shakespeare" / "seven_models.json").read_text())
    trained = {row["name"]: row for row in study["rows"]}
    speed = {row["model"]: row for row in rows("architectures")}
    lines = (
        (
            words, f"{trained[name]['parameters']:,}",
            ("≤ " if trained[name]["kind"] != "exact" else "") + f"{trained[name]['validation_bits_per_byte']:.3f}",
            *(f"{round(speed[name][f'{what}_tokens_per_s'], -1):,.0f}" for what in ("train", "decode")),
        )
        for name, words in ARCHITECTURES.items()
    )  # fmt: skip
    return table(header, lines)


def demo_cost() -> str:
    """What the demo's mixers take of attention's training speed."""
    speed = {row["model"]: row["train_tokens_per_s"] for row in rows("architectures")}
    cost = sorted(1 - speed[name] / speed["baseline"] for name in ("fem_gla", "fem_softmax"))
    return f"{100 * cost[0]:.0f} to {100 * cost[1]:.0f} %"


def demo_commit() -> str:
    return f"`{environment('architectures')['commit']}`"


FROM: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        layers_speed, kernels, layers_decode, architectures, mad, layers_growth, free_transformer,
        free_transformer_ratios, layers_operations, mamba_hopfield, mamba_hopfield_floor, demo, demo_cost, demo_commit,
    )
} | {
    f"on_{name}": lambda name=name: conditions(name)
    for name in (
        "layers_speed", "kernels", "layers_decode", "architectures", "mad", "layers_growth", "free_transformer",
        "layers_operations", "mamba_hopfield",
    )
}  # fmt: skip


def filled(text: str) -> str:
    """A page with everything marked in it made anew."""
    return MARKED.sub(_made, text)


def _made(found: re.Match[str]) -> str:
    name, space = found[1], found[2] and "\n\n"
    try:
        return f"<!-- from {name} -->{space}{FROM[name]()}{space}<!-- end -->"
    except (FileNotFoundError, KeyError) as missing:
        if name not in FROM:
            raise
        print(f"{name} stays as it is: {missing}")
        return found[0]


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text()))
        print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
