"""What a measurement was taken on."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch


def peak_memory_bytes() -> int:
    """Largest resident size that this process has had, interpreter and libraries included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def usable_device(name: str, wanted: str | torch.device) -> torch.device:
    """The device that the argument ``name`` asks for. Raises: ValueError if this machine, or this torch, has none."""
    try:
        device = torch.device(wanted)
        if (
            str(device) not in _devices()
        ):  # of a GPU that is there nothing is asked: it would take some memory of it
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
    return [
        "cpu",
        found.type,
        *(f"{found.type}:{index}" for index in range(torch.accelerator.device_count())),
    ]


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
