"""The page: four tabs over the functions of this package. Gradio (extra ``explore``) is imported where it is used."""

from typing import TYPE_CHECKING, Any

from helmholtz._notebook import html
from helmholtz.explore.runs import Offer

if TYPE_CHECKING:
    import gradio

INSTALL = "the explorer needs Gradio and matplotlib: pip install 'helmholtz-nn[explore]'"
HOST = "127.0.0.1"
"""The page is for this machine alone."""
CSS = (
    html.CSS
    + """
.gradio-container {max-width: min(1240px, 100vw) !important; margin: 0 auto !important; box-sizing: border-box;}
.gradio-container .main, .gradio-container .contain {min-width: 0 !important; max-width: 100% !important;}
@media (max-width: 640px) {.gradio-container {padding: 6px !important;}
  .tab-container button {padding: 0 7px !important; font-size: 14px !important;}
  .gradio-container .column {min-width: 0 !important;}}
.hz-wide {contain: inline-size; width: 100%;}
.hz-wide .table-wrap, .hz-wide {background: transparent;}
"""
)
FOOTER: list[Any] = []
"""Links to Gradio's own site, of which there are none."""


def require_gradio() -> Any:
    """The module. Raises: ImportError naming the extra."""
    try:
        import gradio
        import matplotlib  # noqa: F401 - figures are drawn long after the page is there
    except ImportError as error:
        raise ImportError(INSTALL) from error
    return gradio


def build(offer: Offer) -> "gradio.Blocks":
    """The app over the runs, not yet served."""
    gr = require_gradio()
    from helmholtz.explore.tabs import TABS

    with gr.Blocks(title="helmholtz explore", analytics_enabled=False) as app:
        gr.HTML(_header(offer))
        for name, fill in TABS.items():
            with gr.Tab(name):
                fill(gr, offer)
    # one call at a time: a model is switched to evaluation and hooked while it is read
    app.queue(default_concurrency_limit=1)
    return app


def _header(offer: Offer) -> str:
    runs = "; ".join(run.summary for run in offer.runs.values())
    lines = [html.note(f"Runs: {runs}." if runs else offer.missing("reader"))]
    lines += [html.note(f"Left out: {reason}.") for reason in offer.left_out]
    return "<h2>helmholtz explore</h2>" + "".join(lines)


def launch(offer: Offer, *, port: int | None = None, share: bool = False) -> Any:
    """Serve the app on this machine and return it, served.

    Args:
        port: None takes the first free one from 7860 on.
        share: also through a public address of Gradio's servers, which then see what is asked and answered.
    """
    gr = require_gradio()
    app = build(offer)
    app.launch(
        server_name=HOST,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        footer_links=FOOTER,
        ssr_mode=False,
        run_history=False,
        theme=_theme(gr),
        css=CSS,
    )
    return app


def _theme(gr: Any) -> Any:
    """Gradio's own with the fonts of the system: nothing is loaded from elsewhere."""
    sans, mono = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
    fonts = {"font": sans, "font_mono": mono}
    return gr.themes.Default(
        **{key: [gr.themes.Font(name) for name in names] for key, names in fonts.items()},
    )
