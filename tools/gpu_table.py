"""What ``tools/gpu.py`` prints at its end."""

from typing import Any

from gpu_budget import CARDS, Card, Floor

Row = dict[str, Any]
LAYER_COLUMNS = {
    "case": "layer", "ms": "ms", "floor_ms": "floor, ms", "bound": "bound by", "roofline": "of the roofline",
    "parameters": "parameters / D²",
}  # fmt: skip
MODEL_COLUMNS = {
    "case": "model", "parameters": "parameters", "tokens_per_s": "tokens/s", "ms": "ms", "peak_bytes": "peak, GB",
    "waits": "waits", "first_step_s": "first step, s",
}  # fmt: skip


def card_of(machine: list[Row]) -> tuple[str, Card | None]:
    """The data sheet of the card that was measured; of an unknown one what copies and products reached, and a fifteenth
    of the products for vectors."""
    if not machine or "device" not in machine[0]:
        return "unknown", None
    found = machine[0]
    for known, card in CARDS.items():
        if known in found["device"]:
            return f"{known}, data sheet", card
    matmul, copy = found["matmul_flop_per_s"], found["copy_bytes_per_s"]
    return f"{found['device']}, measured", Card(matmul, matmul / 15, copy)


def roofline(row: Row, machine: list[Row]) -> Row:
    """A layer's row with its floor on this card and the fraction of it that was reached."""
    card = card_of(machine)[1]
    if card is None or "matmul" not in row or "ms" not in row:
        return row
    floor = Floor(0, row["matmul"], row["vector"], row["bytes"])
    floor_ms = 1e3 * floor.seconds(card)
    return row | {"floor_ms": floor_ms, "bound": floor.bound(card), "roofline": floor_ms / row["ms"]}


def table(parts: dict[str, list[Row]]) -> str:
    """All parts, one after the other."""
    blocks = [f"card: {card_of(parts['machine'])[0]}"]
    for row in parts["machine"]:
        if "copy_bytes_per_s" in row:
            blocks.append(
                f"torch {row['torch']}, triton {row['triton'] or 'absent'}; "
                f"copies {row['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
                f"products {row['matmul_flop_per_s'] / 1e12:.1f} TFLOP/s; "
                f"GPU kernels: {', '.join(row['gpu_kernels']) or 'none'}"
            )
        else:
            blocks.append(f"  {_failure(row)}")
    for part in ("kernels", "steps"):
        rows = parts[part]
        good = [row for row in rows if row.get("ok")]
        blocks.append(f"{part}: {len(good)} of {len(rows)} cases within their bounds")
        blocks += [f"  {_failure(row)}" for row in rows if not row.get("ok")]
        if good and part == "kernels":
            worst = max(good, key=lambda row: row["error"] / row["limit"])
            blocks.append(
                f"  nearest to its bound: {worst['case']}, {worst['error']:.1e} of {worst['limit']:.0e}"
            )
        if part == "steps":
            counted = [row for row in good if row["waits"] is not None]
            blocks += [f"  {row['case']}: {row['waits']:.0f} waits a step" for row in counted]
    blocks.append(_grid("layers", parts["layers"], LAYER_COLUMNS))
    blocks.append(_grid("models", parts["models"] + parts["compiled"], MODEL_COLUMNS))
    return "\n".join(blocks)


def _failure(row: Row) -> str:
    if row["state"] == "begun":
        return f"{row['case']}: ended its process, or met its limit"
    if isinstance(row.get("error"), float):
        return f"{row['case']}: wrong by {row['error']:.2e}, allowed {row['limit']:.0e} ({row.get('of', 'losses')})"
    return f"{row['case']}: {row.get('error')}"


def _grid(title: str, rows: list[Row], columns: dict[str, str]) -> str:
    good = [row for row in rows if "ms" in row]
    lines = [[*columns.values()]] + [[_cell(name, row.get(name)) for name in columns] for row in good]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = [f"{title}:"] + [
        "  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines
    ]
    return "\n".join(text + [f"  {_failure(row)}" for row in rows if "ms" not in row])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "roofline":
        return f"{value:.1%}"
    if name == "peak_bytes":
        return f"{value / 1e9:.1f}"
    if name in ("tokens_per_s",) or (name == "parameters" and value > 1000):
        return f"{value:,.0f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
