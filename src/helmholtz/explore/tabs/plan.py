"""The tab *Plan*: the bits of a text's codes as check boxes, and the texts that they make."""

from typing import Any

from helmholtz._notebook.html import note
from helmholtz._notebook.plan import codes_table
from helmholtz.explore import planning
from helmholtz.explore.planning import Request
from helmholtz.explore.runs import Offer
from helmholtz.explore.tabs.events import on
from helmholtz.models.decoder import require_plan

PROMPT = "KING HENRY."
TEXT = "To be, or not to be"
ABOUT = (
    "A Free Transformer decides on a code of a few bits per token before it writes the token. Here is one plan. "
    "Flip some bits and compare the texts; hold a bit in all codes and draw another plan."
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
    gr.HTML("<h4>The plan: a code per token</h4>")
    table, flips = gr.HTML(), gr.HTML()
    with gr.Row(elem_id="plan-bits"):
        place = gr.Slider(0, 999, 5, step=1, label="token whose code is changed", min_width=200)
        boxes = gr.CheckboxGroup(bits, label="bits of its code", min_width=200)
        everywhere = gr.Checkbox(False, label="flip in the codes of all tokens", min_width=160)
    texts = gr.HTML()
    gr.HTML("<h4>What the encoder says of a text</h4>")
    own = gr.Textbox(TEXT, label="a text of your own (Enter reads it)", max_lines=3)
    said = gr.HTML()
    number, kept = gr.State(0), gr.State()

    def plan(
        place: int, run: str, number: int, at_0: list[int], at_1: list[int], *wanted: Any
    ) -> tuple[Any, ...]:
        checkpoint, request = offer.runs[run].checkpoint, Request(*wanted)
        codes = planning.draw_codes(checkpoint, request, seed=number, held=held_bits(at_0, at_1))
        written = planning.write(checkpoint, request, codes)
        place = min(int(place), len(codes) - 1)
        return *shown((run, request, codes, written, codes), place), gr.Slider(0, len(codes) - 1, place)

    def another(place: int, run: str, number: int, *rest: Any) -> tuple[Any, ...]:
        return *plan(place, run, number + 1, *rest), number + 1

    def shown(kept: Any, place: int) -> tuple[Any, ...]:
        run, request, before, written, after = kept
        checkpoint = offer.runs[run].checkpoint
        other = None if after == before else planning.write(checkpoint, request, after)
        words = planning.words_of(checkpoint, request, len(before), written)
        codes = codes_table(words, before, after, n_bits[run])
        bits = planning.bits_of(after[min(int(place), len(after) - 1)])
        texts = planning.texts_html(checkpoint, request, written, other)
        return codes, bits, texts, planning.changes_note(before, after), kept

    def flip(bits: list[int], place: int, everywhere: bool, kept: Any) -> tuple[Any, ...]:
        *rest, after = kept
        return shown((*rest, planning.with_bits(after, int(place), bits, everywhere=everywhere)), place)

    def look(place: int, kept: Any) -> list[int]:
        return planning.bits_of(kept[-1][int(place)])

    def other_run(run: str) -> tuple[Any, Any, Any]:
        none = {"choices": list(range(n_bits[run])), "value": []}
        return gr.CheckboxGroup(**none), gr.CheckboxGroup(**none), gr.CheckboxGroup(**none)

    def encode(run: str, text: str) -> str:
        return planning.encoder_html(offer.runs[run].checkpoint, text)

    app = gr.context.Context.root_block
    inputs = [place, run, number, at_0, at_1, prompt, n_new, temperature, seed, n_samples]
    drawn = [table, boxes, texts, flips, kept]
    settled = [n_new.release, temperature.release, n_samples.release, seed.change, at_0.input, at_1.input]
    on(gr, [app.load, prompt.submit, *settled], plan, inputs, [*drawn, place], api_name="plan")
    on(gr, [draw.click], another, inputs, [*drawn, place, number], api_name="another_plan")
    on(gr, [boxes.input], flip, [boxes, place, everywhere, kept], drawn, api_name="flip")
    on(gr, [place.input], look, [place, kept], boxes, api_name="code")
    changed = on(gr, [run.change], other_run, run, [at_0, at_1, boxes], api_visibility="private")
    changed.then(plan, inputs, [*drawn, place], api_visibility="private")
    on(gr, [app.load, own.submit, run.change], encode, [run, own], said, api_name="encode")


def held_bits(at_0: list[int], at_1: list[int]) -> list[tuple[int, int]]:
    """Raises: ValueError for a bit that is to be both."""
    both = sorted(set(at_0) & set(at_1))
    if both:
        raise ValueError(f"bit {both[0]} cannot be held at 0 and at 1")
    return [(bit, 0) for bit in at_0] + [(bit, 1) for bit in at_1]
