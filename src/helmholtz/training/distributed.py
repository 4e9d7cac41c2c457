"""The processes of a run: one, or those that ``torchrun`` has started, and what they tell each other."""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float64
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from helmholtz._checks import check
from helmholtz._hardware import usable_device

ResultT = TypeVar("ResultT")

LAUNCHED = "TORCHELASTIC_RUN_ID"
"""Set by torchrun in the processes it starts."""


class LostRankError(RuntimeError):
    """Another process of the run has gone."""


@dataclass(frozen=True, slots=True)
class World:
    """One process's place among those of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number among the processes of this machine: which GPU is its own."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.rank == 0


def world() -> World:
    """This process's place; alone without a process group."""
    if not _connected():
        return World()
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def is_launched() -> bool:
    """Whether torchrun has started this process."""
    return LAUNCHED in os.environ


def is_main_process() -> bool:
    """Whether this process prints, also where no process group is: torchrun's first, or the only one."""
    return not is_launched() or os.environ["RANK"] == "0"


def training_device(wanted: str) -> torch.device:
    """The device that ``train.device`` asks for. Raises: ValueError if there is none."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = usable_device("train.device", wanted)
    if is_launched() and device.index is not None:
        check(False, "train.device", wanted, f"{device.type} under torchrun, whose processes take one each")
    return device


@contextlib.contextmanager
def process_group(device: str, timeout_seconds: int) -> Iterator[World]:
    """Join the processes that torchrun started, if it did; they part when the block ends.

    An exception in one process leaves at once, so that torchrun ends the others.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl, and gloo for what lies on the CPU).
    """
    if not is_launched() or _connected():
        yield world()
        return
    connect(device, timeout_seconds)
    try:
        with lost_rank_named("between two steps"):
            yield world()
            dist.barrier()
    finally:
        dist.destroy_process_group()


def connect(device: str, timeout_seconds: int) -> None:
    """Join the processes that torchrun started."""
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    # torch 2.13 gives restarted processes the store of those before them, where gloo finds addresses of the dead
    attempt = PrefixStore(fresh_name(store, rank, size, timeout), store)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=timeout)


def fresh_name(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that these processes agree on and no earlier ones had, whose words the store may still hold.

    The number of the restart is none: every machine counts its own. So each process asks with a number that nobody had
    before, the first one answers what it finds asked, and is done when all have confirmed its answer.

    Raises: TimeoutError, or dist.DistStoreError, if others do not come.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"asked_{rank}", mine)
        store.wait([f"answer_{mine}"], timeout)
        name = store.get(f"answer_{mine}").decode()
        store.set(f"confirmed_{name}_{rank}", "")
        return name
    waiting, end = list(range(1, size)), time.monotonic() + timeout.total_seconds()
    while waiting:
        for other in waiting:
            if store.check([f"asked_{other}"]):
                store.set(f"answer_{store.get(f'asked_{other}').decode()}", mine)
        waiting = [other for other in waiting if not store.check([f"confirmed_{mine}_{other}"])]
        if time.monotonic() > end:
            raise TimeoutError(f"ranks {waiting} of {size} did not come within {timeout.total_seconds():g} s")
        time.sleep(0.01)
    return mine


@contextlib.contextmanager
def lost_rank_named(where: str) -> Iterator[None]:
    """Says in words what gloo and NCCL say of sockets when another process is gone. Raises: LostRankError."""
    try:
        yield
    except RuntimeError as error:  # gloo raises nothing more special
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        words = ("connection closed", "connection reset", "broken pipe", "gloo")
        from_gloo = type(error) is RuntimeError and any(word in str(error).lower() for word in words)
        if world().size == 1 or not (from_gloo or isinstance(error, dist.DistError)):
            raise
        raise LostRankError(
            f"rank {world().rank} of {world().size} lost another rank {where} ({reason}); look for its error "
            "above or in the system's log (killed, out of memory), and go on with --train.resume=auto"
        ) from error


def mean_over_ranks(values: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Means over all processes: the same to the bit on each."""
    if world().size == 1:
        return values
    dist.all_reduce(values)
    return values / world().size


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of ranks; each must bring equally many."""
    if world().size == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world().size)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def gather_text(text: str) -> list[str]:
    """What every process has to say, in the order of ranks."""
    if world().size == 1:
        return [text]
    parts: list[Any] = [None] * world().size
    dist.all_gather_object(parts, text)
    return parts


def on_main(function: Callable[[], ResultT]) -> ResultT:
    """Run ``function`` in the main process; all get its result, or the error that it raised.

    What touches the disk goes through here: otherwise one process fails and the others wait for it.
    """
    if world().size == 1:
        return function()
    outcome: list[Any] = [None, None]
    if world().is_main:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: ResultT = outcome[0]
    return result


def local_share(rows: int, name: str) -> int:
    """Rows of each process. Raises: ValueError if they cannot be shared out evenly."""
    size = world().size
    check(rows % size == 0, name, rows, f"a multiple of the {size} processes")
    return rows // size


def _connected() -> bool:
    return dist.is_available() and dist.is_initialized()
