"""Progress that may be lost: nobody reads it any more, its terminal is gone, its disk is full."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console


class StandardOutput:
    """Standard output, whose errors say that they are its own; but for a closed pipe's, which ends a command."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self._attempt(lambda: self._write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _write(self, text: str) -> None:
        self.stream.write(text)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(f"standard output: {error.strerror}") from error


class LosableStream(StandardOutput):
    """A text stream that goes silent, after one line on standard error, where ``stream`` cannot be written."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.lost = False

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except UnicodeEncodeError as error:  # a name or a bar that the terminal has no letters for
            self.stream.write(text.encode(error.encoding, errors="replace").decode(error.encoding))

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.lost:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream has been closed
            self.lost = True
            self._silence()
            reason = getattr(error, "strerror", None) or error
            with contextlib.suppress(OSError, ValueError, AttributeError):
                text = f"warning: progress cannot be shown any more ({reason}); the work goes on\n"
                _itself(sys.stderr).write(text)

    def _silence(self) -> None:
        """What standard output still holds goes nowhere, or Python would fail on it when it ends."""
        if self.stream is _itself(sys.stdout):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


def _itself(stream: Any) -> Any:
    """A standard stream, also while a progress bar has put itself before it."""
    return getattr(stream, "rich_proxied_file", stream)


def make_losable(console: Console) -> None:
    """From now on the console's output never ends the work that it tells of."""
    stream: Any = console.file
    if not isinstance(stream, LosableStream):
        console.file = LosableStream(getattr(stream, "stream", stream))  # type: ignore[assignment]


@contextlib.contextmanager
def losable(console: Console | None) -> Iterator[None]:
    """``make_losable`` for as long as the block lasts."""
    if console is None:
        yield
        return
    before = console.file
    make_losable(console)
    try:
        yield
    finally:
        console.file = before
