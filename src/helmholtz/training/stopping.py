"""Stopping on request: a signal is noted, the step is finished, the state is saved."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """While open, SIGINT and SIGTERM are noted in the list instead of ending the process; a second one ends it."""
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
    finally:
        for number in signals:
            signal.signal(number, previous[number])
