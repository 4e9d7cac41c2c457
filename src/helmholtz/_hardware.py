"""What a measurement was taken on."""

import os
import platform
import subprocess
import threading
from pathlib import Path
from types import TracebackType

import torch

STATM = Path("/proc/self/statm")
INTERVAL = 0.02
"""Seconds between two looks at this process's memory."""


class PeakMemory:
    """The most memory that was in use while this was open; a context manager.

    On a CUDA device what torch had allocated there, exactly. Elsewhere the anonymous memory of this process
    (``RssAnon`` of ``/proc/self/status``: tensors, the interpreter's and libraries' data), looked at every
    ``INTERVAL`` seconds: what lives shorter may be missed. Pages of memory-mapped files, which the system takes back
    when it needs them, and what the parent process had are not in it, as they are in ``ru_maxrss``.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
        elif STATM.exists():
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.read()
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def read(self) -> int | None:
        """Bytes so far; None on a system without ``/proc``, where this is not measured."""
        if self._device is not None:
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device))
        elif STATM.exists():
            if not self._stop.is_set():
                self._look()
        else:
            return None
        return self._peak

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        _, resident, of_files, *_ = map(int, STATM.read_text().split())  # pages
        self._peak = max(self._peak, (resident - of_files) * os.sysconf("SC_PAGE_SIZE"))


def usable_device(name: str, wanted: str | torch.device) -> torch.device:
    """The device that the argument ``name`` asks for. Raises: ValueError if this machine, or this torch, has none."""
    try:
        device = torch.device(wanted)
        if str(device) not in _devices():  # of a GPU that is there nothing is asked: it would take memory
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} must be a device of this machine ({', '.join(_devices())}), got {str(wanted)!r}: {reason}"
        ) from error
    return device


def _devices() -> list[str]:
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return ["cpu"]
    indices = range(torch.accelerator.device_count())
    return ["cpu", found.type, *(f"{found.type}:{index}" for index in indices)]


def memory_bytes() -> int | None:
    """Main memory of this machine; None on a system that does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def describe_hardware() -> dict[str, str | int]:
    """Processor, threads and versions, for the head of a result file."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor without a name: the machine type has to do
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


SOURCES = Path(__file__).resolve().parents[2]
"""Root of the checkout that this code is run from, if it is run from one."""


def git_commit() -> str:
    """Commit of this library's sources, marked ``-dirty`` if tracked files differ; ``unknown`` outside a checkout.

    The current folder is not asked: its git configuration may name programs to run, and it is not the code that ran.
    """
    if not (SOURCES / ".git").exists():
        return "unknown"
    command = ["git", "--no-optional-locks", f"--git-dir={SOURCES / '.git'}", f"--work-tree={SOURCES}"]
    command += ["-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}"]
    command += ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
