"""Stopping on request: a signal is noted, the step is finished, the state is saved."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from helmholtz.training.distributed import LostRankError


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """While open, SIGINT and SIGTERM are noted in the list instead of ending the process; a second one ends it.

    Where another process is lost they go on being noted afterwards: this one is about to end, and torchrun's SIGTERM
    must not keep it from saying why.
    """
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        previous: dict[int, Any] = {number: signal.getsignal(number) for number in signals}

        def note(number: int, frame: FrameType | None) -> None:
            received.append(number)
            signal.signal(number, previous[number])

        for number in signals:
            signal.signal(number, note)
    except ValueError:  # only the main thread may set handlers; elsewhere its owner handles signals
        yield received
        return
    try:
        yield received
    except LostRankError:
        raise
    except BaseException:
        _restore(previous)
        raise
    else:
        _restore(previous)


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
