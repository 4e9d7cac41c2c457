"""A line that says what runs, how far all is, and about how long it will take."""

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from helmholtz.experiments.demo.settings import Note


def remaining_seconds(shares: Mapping[str, float], done: Mapping[str, float], elapsed: float) -> float | None:
    """How long is left if all parts keep the pace so far; None as long as nothing is done.

    Args:
        shares: of the parts that are computed in this call, in seconds of any machine.
        done: fraction of each that is done.
    """
    total = sum(shares.values())
    finished = sum(share * done.get(name, 0.0) for name, share in shares.items())
    return elapsed * (total - finished) / finished if finished else None


class DemoProgress:
    """One line on a terminal, which changes; elsewhere a line whenever something else begins.

    Args:
        shares: as of ``remaining_seconds``.
    """

    def __init__(self, console: Console, shares: Mapping[str, float]) -> None:
        self.console, self.shares = console, shares
        self.done = dict.fromkeys(shares, 0.0)
        self._begin, self._said = time.perf_counter(), ""
        columns = (
            BarColumn(bar_width=20), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
            TextColumn("{task.description}"),
        )  # fmt: skip
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=sum(shares.values()) or 1.0, left="")

    def __enter__(self) -> "DemoProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def note(self, part: str) -> Note:
        """What a part is given to tell how far it is."""

        def say(words: str, fraction: float) -> None:
            self.done[part] = fraction
            left = remaining_seconds(self.shares, self.done, time.perf_counter() - self._begin)
            about = "" if left is None else f"about {left // 60:.0f}:{left % 60:02.0f} left"
            completed = sum(self.shares[name] * value for name, value in self.done.items())
            self._bar.update(self._task, completed=completed, description=words, left=about)
            subject = words.partition(", step")[0]
            if not self.console.is_terminal and subject != self._said:
                self.console.print(f"{subject}{'  (' + about + ')' if about else ''}", markup=False)
            self._said = subject

        return say
