"""What a measurement was taken on."""

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


def git_commit() -> str:
    """Commit of the working directory, marked ``-dirty`` if tracked files differ from it; ``unknown`` outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
