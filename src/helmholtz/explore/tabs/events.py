"""What the events of all tabs have in common."""

import functools
from collections.abc import Callable
from typing import Any

ONE_AT_A_TIME = "models"
"""Group of events that wait for each other: they run the same models."""


def answers(gr: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose complaints about its input are shown to the reader in one line."""

    @functools.wraps(function)
    def answer(*inputs: Any) -> Any:
        try:
            return function(*inputs)
        except (ValueError, RuntimeError, OSError) as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from error

    return answer


def on(
    gr: Any, triggers: Any, function: Callable[..., Any], inputs: Any, outputs: Any, **options: Any
) -> Any:
    """Call ``function`` on any of ``triggers``; of those that come while it runs the last is kept."""
    options = {"trigger_mode": "always_last", "show_progress": "minimal"} | options
    return gr.on(
        triggers,
        answers(gr, function),
        inputs,
        outputs,
        concurrency_id=ONE_AT_A_TIME,
        concurrency_limit=1,
        **options,
    )
