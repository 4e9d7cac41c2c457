"""Stopping on request: a signal is noted, the step is finished, the state is saved."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from helmholtz.training.distributed import LostRankError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """While open, SIGINT, SIGTERM and SIGHUP are noted in the list instead of ending the process; a second one ends it.

    A SIGHUP that is ignored stays so: ``nohup`` asked for that.

    Where another process is lost they go on being noted afterwards: this one is about to end, and torchrun's SIGTERM
    must not keep it from saying why.
    """
    received: list[int] = []
    try:
        previous: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
        if previous[signal.SIGHUP] == signal.SIG_IGN:
            del previous[signal.SIGHUP]

        def note(number: int, frame: FrameType | None) -> None:
            received.append(number)
            signal.signal(number, previous[number])

        for number in previous:
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
