"""The tab *Compare*: one prompt, all runs, one seed."""

from typing import Any

from helmholtz._notebook.html import note
from helmholtz.explore import compare
from helmholtz.explore.runs import HOW, Offer
from helmholtz.explore.tabs.events import on

PROMPT = "KING HENRY.\n"
ABOUT = "Every run continues the same prompt with the same seed. Below are the losses and speeds of their training."


def fill(gr: Any, offer: Offer) -> None:
    names = offer.names()
    if not names:
        gr.HTML(note(f"There is no run yet: {HOW}."))
        return
    gr.HTML(note(ABOUT))
    with gr.Row():
        chosen = gr.CheckboxGroup(names, value=names, label="runs", min_width=240)
        prompt = gr.Textbox(PROMPT, label="prompt", lines=2, max_lines=4, min_width=240)
    with gr.Row():
        n_new = gr.Slider(8, 256, 64, step=8, label="new tokens", min_width=120)
        temperature = gr.Slider(0, 1.5, 0.8, step=0.1, label="sampling temperature", min_width=120)
        seed = gr.Number(0, label="seed", precision=0, minimum=0, min_width=120)
        go = gr.Button("Continue", variant="primary", min_width=120)
    texts = gr.HTML()
    runs = list(offer.runs.values())
    gr.HTML("<h4>Training</h4>" + compare.losses_html(runs))
    curves = compare.loss_picture(runs)
    if curves is not None:
        gr.Image(curves, interactive=False, show_label=False, buttons=[], format="png", elem_id="losses")

    def continue_all(chosen: list[str], prompt: str, n_new: int, temperature: float, seed: int) -> str:
        runs = [offer.runs[name] for name in chosen]
        if not runs:
            raise ValueError("runs: choose at least one")
        count, seed = int(n_new), int(seed)
        found = [
            compare.continued(run, prompt, n_new=count, temperature=temperature, seed=seed) for run in runs
        ]
        return compare.texts_html(runs, prompt, found)

    inputs = [chosen, prompt, n_new, temperature, seed]
    app = gr.context.Context.root_block
    on(gr, [app.load, go.click, prompt.submit], continue_all, inputs, texts, api_name="compare")
