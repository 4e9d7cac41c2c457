"""Pieces of HTML that notebooks and the explorer show.

Colours are mixed with those of the page around them, so that they hold in light and dark: the explorer's (Gradio's
variables), a notebook's (Jupyter's or VS Code's), else the browser's own.
"""

import html
import math
from collections.abc import Iterable, Sequence

CSS = """
.hz-scroll {overflow-x: auto; width: 100%; contain: inline-size;}
.hz-table {border-collapse: collapse; font-size: 13px; width: auto; border: none !important; margin: 0 !important;}
.hz-table tr {border: none !important;}
.hz-table th, .hz-table td {padding: 2px 6px; text-align: right; white-space: nowrap; border: none !important;
  font-variant-numeric: tabular-nums;}
.hz-table th {font-weight: 600; vertical-align: bottom;}
.hz-table th:first-child, .hz-table td:first-child {text-align: left; position: sticky; left: 0;
  background: var(--background-fill-primary, var(--jp-layout-color0, var(--vscode-editor-background, Canvas)));}
.hz-table td.hz-heat {min-width: 22px; padding: 2px 3px; text-align: center; font-size: 11px;
  background: color-mix(in srgb, #0072B2 calc(var(--w) * 100%), transparent);}
.hz-table td.hz-flipped {outline: 2px solid #E69F00; outline-offset: -2px; font-weight: 700;}
.hz-table td.hz-strong {color: #fff;}
.hz-table tr.hz-first td {border-bottom: 2px solid color-mix(in srgb, currentColor 30%, transparent) !important;}
.hz-table th.hz-token {writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: 4px 1px;
  font-family: ui-monospace, monospace; font-weight: 400;}
.hz-table th.hz-here {font-weight: 700; text-decoration: underline;}
.hz-note {font-size: 13px; opacity: 0.85; margin: 4px 0;}
.hz-texts {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 12px;}
.hz-card {border: 1px solid color-mix(in srgb, currentColor 30%, transparent);
  border-radius: 6px; padding: 10px; min-width: 0;}
.hz-card h4 {margin: 0 0 6px; font-size: 13px; font-weight: 600;}
.hz-text {white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: 13px;
  line-height: 1.5;}
.hz-prompt {opacity: 0.6;}
.hz-text mark {background: color-mix(in srgb, #E69F00 45%, transparent); color: inherit; border-radius: 2px;}
.hz-controls:not([hidden]) {display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 4px 16px;
  margin: 4px 0; max-width: 900px; font-size: 13px;}
.hz-controls label > span {display: block;}
.hz-controls input[type=range] {width: 100%; margin: 2px 0;}
.hz-controls .hz-choices {grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: 2px 14px;}
"""
BETA, LAMBDA = "\N{GREEK SMALL LETTER BETA}", "\N{GREEK SMALL LETTER LAMDA}"
NOTHING = "\N{EN DASH}"
STRONG = 0.6
"""Weight from which on a cell is dark."""


def note(text: str) -> str:
    """A line that explains; ``text`` may hold back-ticks for code."""
    parts = html.escape(text).split("`")
    joined = "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))
    return f'<p class="hz-note">{joined}</p>'


def heat(weight: float) -> str:
    """A cell whose colour is a weight in [0, 1], with its percents."""
    strong = " hz-strong" if weight > STRONG else ""
    shown = f"{100 * weight:.0f}" if weight >= 0.005 else ""
    return f'<td class="hz-heat{strong}" style="--w:{weight:.3f}" title="{weight:.4f}">{shown}</td>'


def number(value: float, digits: int = 2) -> str:
    """A cell; what is not a number is left open."""
    return f"<td>{NOTHING if math.isnan(value) else f'{value:.{digits}f}'}</td>"


def table(head: Iterable[str], rows: Iterable[str]) -> str:
    """A table that scrolls in its own frame where it is wider than the window."""
    inner = f"<thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="hz-scroll" tabindex="0"><table class="hz-table">{inner}</table></div>'


def cells(*texts: object) -> str:
    return "".join(f"<td>{html.escape(str(text))}</td>" for text in texts)


def head_cells(*texts: str) -> str:
    return "".join(f"<th>{html.escape(text)}</th>" for text in texts)


def token_heads(words: Sequence[str], here: int | None = None) -> list[str]:
    """Columns headed by tokens, that of the reading one underlined."""
    return [
        f'<th class="hz-token{" hz-here" if place == here else ""}">{html.escape(word)}</th>'
        for place, word in enumerate(words)
    ]


def card(title: str, body: str) -> str:
    return f'<div class="hz-card"><h4>{html.escape(title)}</h4>{body}</div>'


def grid(cards: Iterable[str]) -> str:
    """Cards side by side where there is room."""
    return f'<div class="hz-texts">{"".join(cards)}</div>'


def text_block(prompt: str, continuation: str) -> str:
    """``continuation`` is HTML."""
    return f'<div class="hz-text"><span class="hz-prompt">{html.escape(prompt)}</span>{continuation}</div>'
