"""The tab *Plan*: the bits of a text's codes as check boxes, and the texts that they make."""

from typing import Any

from helmholtz.evals.plans import Codes
from helmholtz.explore import planning
from helmholtz.explore.html import note
from helmholtz.explore.planning import Request
from helmholtz.explore.runs import Offer
from helmholtz.explore.tabs.events import on
from helmholtz.models.decoder import require_plan

PROMPT = "KING HENRY."
TEXT = "To be, or not to be"
ABOUT = (
    "A Free Transformer decides on a code of a few bits per token before it writes the token. Here is one plan, a row "
    "of check boxes per token. Flip some and compare the texts; hold a bit in all codes and draw another plan."
)


def fill(gr: Any, offer: Offer) -> None:
    names = offer.names("plan")
    if not names:
        gr.HTML(note(offer.missing("plan")))
        return
    n_bits = {name: require_plan(offer.runs[name].checkpoint.model).n_bits for name in names}
    bits = list(range(n_bits[names[0]]))
    gr.HTML(note(ABOUT))
    with gr.Row():
        run = gr.Dropdown(names, value=names[0], label="run", scale=1, min_width=200)
        prompt = gr.Textbox(PROMPT, label="prompt (Enter draws a plan)", max_lines=1, scale=2, min_width=240)
        seed = gr.Number(0, label="seed of the tokens", precision=0, minimum=0, scale=1)
    with gr.Row():
        n_new = gr.Slider(8, planning.MOST_NEW, 32, step=8, label="new tokens", min_width=120)
        temperature = gr.Slider(0, 1.5, 0.8, step=0.1, label="sampling temperature", min_width=120)
        n_samples = gr.Slider(1, planning.MOST_SAMPLES, 2, step=1, label="samples", min_width=120)
    with gr.Row():
        at_0 = gr.CheckboxGroup(bits, label="hold these bits at 0")
        at_1 = gr.CheckboxGroup(bits, label="hold these bits at 1")
        draw = gr.Button("Draw another plan", variant="primary", min_width=140)
    gr.HTML("<h4>The plan: a row per token, its bits from bit 0 on; the top row sets a bit in all</h4>")
    flips = gr.HTML()
    with gr.Group(elem_classes="hz-wide"):
        boxes = _boxes(gr, n_bits[names[0]])
    texts = gr.HTML()
    gr.HTML("<h4>What the encoder says of a text</h4>")
    own = gr.Textbox(TEXT, label="a text of your own (Enter reads it)", max_lines=3)
    said = gr.HTML()
    number, drawn = gr.State(0), gr.State()

    def plan(run: str, number: int, at_0: list[int], at_1: list[int], *wanted: Any) -> tuple[Any, ...]:
        checkpoint, request = offer.runs[run].checkpoint, Request(*wanted)
        codes = planning.draw_codes(checkpoint, request, seed=number, held=held_bits(at_0, at_1))
        written = planning.write(checkpoint, request, codes)
        rows = planning.bit_rows(checkpoint, request, codes, written)
        kept = (run, request, codes, written)
        return (
            _filled(gr, rows),
            planning.texts_html(checkpoint, request, written, None),
            _note(codes, codes),
            kept,
        )

    def another(run: str, number: int, *rest: Any) -> tuple[Any, ...]:
        return *plan(run, number + 1, *rest), number + 1

    def flip(rows: list[list[Any]], kept: Any) -> tuple[str, str]:
        run, request, before, written = kept
        checkpoint, codes = offer.runs[run].checkpoint, planning.codes_of(rows)
        after = None if codes == before else planning.write(checkpoint, request, codes)
        return planning.texts_html(checkpoint, request, written, after), _note(before, codes)

    def other_run(run: str) -> tuple[Any, Any]:
        choices = list(range(n_bits[run]))
        return gr.CheckboxGroup(choices, value=[]), gr.CheckboxGroup(choices, value=[])

    def encode(run: str, text: str) -> str:
        return planning.encoder_html(offer.runs[run].checkpoint, text)

    app = gr.context.Context.root_block
    inputs = [run, number, at_0, at_1, prompt, n_new, temperature, seed, n_samples]
    shown = [boxes, texts, flips, drawn]
    settled = [n_new.release, temperature.release, n_samples.release, seed.change, at_0.input, at_1.input]
    on(gr, [app.load, prompt.submit, *settled], plan, inputs, shown, api_name="plan")
    on(gr, [draw.click], another, inputs, [*shown, number], api_name="another_plan")
    on(gr, [boxes.input], flip, [boxes, drawn], [texts, flips], api_name="flip")
    changed = on(gr, [run.change], other_run, run, [at_0, at_1], api_visibility="private")
    changed.then(plan, inputs, shown, api_visibility="private")
    on(gr, [app.load, own.submit, run.change], encode, [run, own], said, api_name="encode")


def held_bits(at_0: list[int], at_1: list[int]) -> list[tuple[int, int]]:
    """Raises: ValueError for a bit that is to be both."""
    both = sorted(set(at_0) & set(at_1))
    if both:
        raise ValueError(f"bit {both[0]} cannot be held at 0 and at 1")
    return [(bit, 0) for bit in at_0] + [(bit, 1) for bit in at_1]


def _note(before: Codes, after: Codes) -> str:
    return planning.changes_note(before, after)


def _columns(n_bits: int) -> dict[str, Any]:
    headers = ["token", *map(str, range(n_bits))]
    widths = ["130px", *["44px"] * n_bits]
    return {"headers": headers, "datatype": ["str", *["bool"] * n_bits], "column_widths": widths}


def _boxes(gr: Any, n_bits: int) -> Any:
    return gr.Dataframe(
        **_columns(n_bits), type="array", interactive=True, static_columns=[0], max_height=330,
        label="check boxes of bits", show_label=False, buttons=[], elem_id="plan-bits",
    )  # fmt: skip


def _filled(gr: Any, rows: list[list[str | bool]]) -> Any:
    return gr.Dataframe(rows, **_columns(len(rows[0]) - 1))
