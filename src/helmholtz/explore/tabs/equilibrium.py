"""The tab *Equilibrium*: the energy around a token's equilibrium, or of a memory that nothing has trained."""

from typing import Any

from helmholtz._notebook.html import note
from helmholtz.evals.landscape_case import BASES
from helmholtz.explore import energy
from helmholtz.explore.energy import VIEWS, Scene
from helmholtz.explore.runs import Offer
from helmholtz.explore.tabs.events import on

MEMORY = "a memory of random patterns"
TEXT = "To be, or not to be, that is"
ABOUT = (
    "An equilibrium model descends an energy for each token, and reads the minimum that it reaches. Click into "
    "the picture: every solver starts from there. Then store that point as a pattern and see a basin grow around it."
)
HINT = "Click into the picture to start a path from there."


def fill(gr: Any, offer: Offer) -> None:
    names = [*offer.names("equilibrium"), MEMORY]
    gr.HTML(note(ABOUT))
    if len(names) == 1:
        gr.HTML(note(f"{offer.missing('equilibrium')} Until then there is {MEMORY}."))
    of_run = names[0] != MEMORY
    with gr.Row():
        source = gr.Dropdown(names, value=names[0], label="energy of", scale=1, min_width=200)
        text = gr.Textbox(
            TEXT, label="text (Enter reads it)", max_lines=1, scale=2, min_width=240, visible=of_run
        )
        token = gr.Slider(0, 999, 999, step=1, label="token", min_width=120, visible=of_run)
        seed = gr.Number(0, label="seed of the patterns", precision=0, minimum=0, visible=not of_run)
    with gr.Row():
        view = gr.Radio(list(VIEWS), value=VIEWS[0], label="colours", min_width=160)
        basis = gr.Dropdown(list(BASES), value=BASES[0], label="plane", min_width=120)
        keep = gr.Button("Store the clicked point as a pattern", variant="primary", min_width=160)
        forget = gr.Button("Forget what was stored", min_width=160)
    with gr.Row():
        with gr.Column(min_width=300):
            image = gr.Image(
                type="pil",
                interactive=False,
                show_label=False,
                buttons=[],
                elem_id="energy-picture",
                format="png",
            )
            legend = gr.HTML()
        with gr.Column(min_width=300):
            summary, paths = gr.HTML(), gr.HTML()
    state = gr.State()  # the scene as it was, as it is, the clicked point, the number of stored patterns

    def case(source: str, text: str, token: int, seed: int) -> tuple[Any, Any]:
        if source == MEMORY:
            return energy.memory_case(seed=int(seed)), gr.Slider(visible=False)
        checkpoint = offer.runs[source].checkpoint
        last = len(checkpoint.encode(text)) - 1
        place = min(int(token), last)
        return energy.run_case(checkpoint, text, place)[0], gr.Slider(0, last, place, visible=True)

    def take(source: str, text: str, token: int, seed: int, basis: Any, view: Any) -> tuple[Any, ...]:
        found, slider = case(source, text, token, seed)
        scene = energy.scene_of(found, basis)
        return *shown((scene, scene, None, 0), view), slider

    def other(source: str) -> tuple[Any, Any, Any]:
        of_run = source != MEMORY
        return gr.Textbox(visible=of_run), gr.Slider(visible=of_run), gr.Number(visible=not of_run)

    def click(state: Any, view: Any, event: gr.SelectData) -> tuple[Any, ...]:
        before, scene, _, stored = state
        return shown((before, scene, energy.clicked(scene, *event.index[:2]), stored), view)

    def keep_point(state: Any, view: Any) -> tuple[Any, ...]:
        before, scene, point, stored = state
        if point is None:
            raise ValueError("there is no point yet: click into the picture first")
        return shown((before, energy.store(scene, scene.point(*point)), point, stored + 1), view)

    def forget_all(state: Any, view: Any) -> tuple[Any, ...]:
        before, _, point, _ = state
        return shown((before, before, point, 0), view)

    app = gr.context.Context.root_block
    drawn = [image, legend, summary, paths, state]
    inputs = [source, text, token, seed, basis, view]
    settled = [app.load, text.submit, token.release, seed.change, basis.input]
    on(gr, settled, take, inputs, [*drawn, token], api_name="energy")
    changed = on(gr, [source.input], other, source, [text, token, seed], api_visibility="private")
    changed.then(take, inputs, [*drawn, token], api_visibility="private")
    on(gr, [view.change], shown, [state, view], drawn, api_name="energy_view")
    on(gr, [image.select], click, [state, view], drawn, api_visibility="private")
    on(gr, [keep.click], keep_point, [state, view], drawn, api_name="store")
    on(gr, [forget.click], forget_all, [state, view], drawn, api_name="forget")


def shown(state: tuple[Scene, Scene, Any, int], view: Any) -> tuple[Any, ...]:
    """Picture, legend, summary, table of paths and the state itself."""
    before, scene, point, stored = state
    paths = None if point is None else energy.follow(scene, *point)
    told = note(HINT) if paths is None else energy.paths_html(scene, paths)
    image, legend = energy.picture(scene, view, paths), energy.legend_html(scene, view)
    return image, legend, energy.summary_html(scene, stored, before), told, state
