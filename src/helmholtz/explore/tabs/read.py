"""The tab *Read*: what each channel of a head reads, and how a temperature changes it."""

import functools
from typing import Any

from helmholtz._notebook.html import BETA, LAMBDA, note
from helmholtz._notebook.reading import KNOBS, LARGEST_BETA, MOST_TOKENS, Knob
from helmholtz.explore.reading import layer_names, read_layer, reading_html
from helmholtz.explore.runs import Offer
from helmholtz.explore.tabs.events import on

TEXT = "To be, or not to be, that is the question"
ABOUT = (
    "Attention reads one average of the tokens for all channels of a head. The Free Energy Mixer lets each channel "
    f"weight the tokens by their values in that channel; {BETA}, the inverse temperature, says how strongly. Move a "
    "slider: at 0 every row is attention's, at the right end each channel picks its largest value. Of a layer of plain "
    "attention the first row is what it reads, and the sliders show what a free-energy read of its values would weight."
)


def fill(gr: Any, offer: Offer) -> None:
    names = offer.names("reader")
    if not names:
        gr.HTML(note(offer.missing("reader")))
        return
    layers = {name: layer_names(offer.runs[name].checkpoint) for name in names}

    @functools.lru_cache(maxsize=8)
    def reading(run: str, text: str, layer: str) -> Any:
        return read_layer(offer.runs[run].checkpoint, text, layer)

    gr.HTML(note(ABOUT))
    with gr.Row():
        run = gr.Dropdown(names, value=names[0], label="run", scale=1, min_width=200)
        layer = gr.Dropdown(
            layers[names[0]], value=layers[names[0]][0], label="layer", scale=1, min_width=200
        )
        text = gr.Textbox(TEXT, label="text (Enter reads it)", max_lines=1, scale=3)
    with gr.Row():
        head = gr.Slider(0, 63, 0, step=1, label="head", min_width=120)
        query = gr.Slider(0, MOST_TOKENS - 1, 0, step=1, label="token that reads", min_width=120)
        shown = gr.Slider(1, 32, 8, step=1, label="channels shown", min_width=120)
    with gr.Row():
        knob = gr.Radio(list(KNOBS), value=KNOBS[0], label="temperature", min_width=220)
        gate = gr.Slider(0, 1, 0.5, step=0.01, label=f"inner gate {LAMBDA} of all channels", min_width=160)
        beta = gr.Slider(0, LARGEST_BETA, 4, step=0.1, label=f"{BETA} of all channels", min_width=160)
    weights = gr.HTML()

    def take(
        run: str, layer: str, text: str, head: int, knob: Knob, gate: float, beta: float, shown: int
    ) -> tuple[Any, ...]:
        found = reading(run, text, layer)
        last, n_heads = len(found.words) - 1, found.n_heads
        head = min(int(head), n_heads - 1)
        picture = reading_html(found, head, last, knob, set_to(knob, gate, beta), int(shown))
        heads = gr.Slider(0, max(1, n_heads - 1), head, interactive=n_heads > 1)
        return heads, gr.Slider(0, last, last), picture

    def show(
        run: str,
        layer: str,
        text: str,
        head: int,
        query: int,
        knob: Knob,
        gate: float,
        beta: float,
        shown: int,
    ) -> str:
        found = reading(run, text, layer)
        query = min(int(query), len(found.words) - 1)
        return reading_html(found, int(head), query, knob, set_to(knob, gate, beta), int(shown))

    def other_run(run: str) -> Any:
        return gr.Dropdown(layers[run], value=layers[run][0])

    where, knobs = [run, layer, text], [knob, gate, beta, shown]
    taken = [head, query, weights]
    app = gr.context.Context.root_block
    on(gr, [app.load, layer.change, text.submit], take, [*where, head, *knobs], taken, api_name="read")
    on(gr, [run.change], other_run, run, layer, api_visibility="private")
    moved = [head.input, query.input, shown.input, knob.change]
    on(gr, moved, show, [*where, head, query, *knobs], weights, show_progress="hidden", api_name="weights")
    # a slider that is moved says what is to be set; the change of the choice, if there is one, shows the same
    sliders: tuple[tuple[Any, Knob], ...] = ((gate, "inner gate"), (beta, "beta"))
    for slider, name in sliders:
        set_by = functools.partial(_set_by, show, name)
        rest = [*where, head, query, gate, beta, shown]
        on(
            gr,
            [slider.input],
            set_by,
            rest,
            [knob, weights],
            show_progress="hidden",
            api_visibility="private",
        )


def _set_by(show: Any, knob: Knob, *rest: Any) -> tuple[Knob, str]:
    *where, gate, beta, shown = rest
    return knob, show(*where, knob, gate, beta, shown)


def set_to(knob: Knob, gate: float, beta: float) -> float:
    """The slider that the choice is about."""
    return gate if knob == "inner gate" else beta
