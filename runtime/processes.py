"""The processes of a job: who this one is, and the few numbers that they exchange."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist

from errors import UserError

GROUP_TIMEOUT = timedelta(hours=6)  # the slowest of the processes may be that late


@dataclass(frozen=True)
class Process:
    """One of several processes that share a job without talking to each other.

    Attributes:
        rank: from 0.
        world_size: number of processes, over all machines.
        device: CUDA's ``LOCAL_RANK``-th where there is one, else the CPU.
        local_size: number of processes on this machine.
    """

    rank: int
    world_size: int
    device: torch.device
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of ``count`` equal pieces are this process's: rank, rank + world_size, …"""
        return range(self.rank, count, self.world_size)


def this_process() -> Process:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, which torchrun and accelerate launch set; else alone.

    Also selects the CUDA device.
    """
    rank, world_size = _variable("RANK", 0), _variable("WORLD_SIZE", 1)
    local_rank, local_size = _variable("LOCAL_RANK", 0), _variable("LOCAL_WORLD_SIZE", 1)
    if not 0 <= rank < world_size:
        raise UserError(f"RANK={rank} is not one of WORLD_SIZE={world_size} processes; start them with launch.sh")
    if not torch.cuda.is_available():
        return Process(rank, world_size, torch.device("cpu"), local_size)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK={local_rank}, but this machine has {torch.cuda.device_count()} GPUs; start fewer processes"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return Process(rank, world_size, device, local_size)


@contextmanager
def process_group(process: Process) -> Iterator[None]:
    """Let the processes exchange CPU tensors (gloo, whatever the device); one alone needs no group."""
    if process.world_size == 1:
        yield
        return
    dist.init_process_group("gloo", rank=process.rank, world_size=process.world_size, timeout=GROUP_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def set_inference_numerics(process: Process, mixed_precision: str, allow_tf32: bool) -> None:
    """TF32, and kernels that are chosen by shape alone: the same in every process and every time."""
    has_cuda = process.device.type == "cuda"
    if mixed_precision == "bf16" and has_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("--mixed-precision bf16: this GPU has no bf16; use no")
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise UserError(f"{name}={text} is not a number; torchrun and accelerate launch set it") from None


def sum_over_processes(moments: torch.Tensor) -> torch.Tensor:
    """All-reduce additive moments in place, on whatever backend there is (``SyncBatchNorm`` refuses CPUs)."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(moments)
    return moments


def mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The average of a tensor over all processes; the tensor itself where there is one."""
    if _several():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def agree_on(find: Callable[[], int]) -> int:
    """What the main process finds, on every process; the others do not look."""
    group = cpu_group()
    if group is None:
        return find()
    answer = torch.tensor([int(find()) if dist.get_rank() == 0 else 0])
    dist.broadcast(answer, src=0, group=group)
    return int(answer.item())


def on_all_or_none(action: Callable[[], None]) -> None:
    """Do something on every process; where it is refused on one, the others are refused too and do not wait for it.

    Raises:
        UserError: on all of them; the process that met the fault names it.
    """
    fault = None
    try:
        action()
    except UserError as error:
        fault = error
    group = cpu_group()
    if group is not None:
        faults = torch.tensor([fault is not None], dtype=torch.int32)
        dist.all_reduce(faults, group=group)
        if faults and fault is None:
            raise UserError("another process was refused and says why; nothing was done")
    if fault is not None:
        raise fault


def wait_for_all() -> None:
    """Wait until every process is here: for what one of them alone takes long for, to hash, write, sample or copy.

    On the CPU, for up to ``GROUP_TIMEOUT``. A barrier of NCCL would keep the GPUs of those that wait busy, and end the
    training after NCCL's limit.
    """
    group = cpu_group()
    if group is not None:
        dist.barrier(group=group)


@contextmanager
def goes_first(is_first: bool) -> Iterator[None]:
    """Context: the process that goes first, one on each machine, is done before the others begin."""
    if not is_first:
        wait_for_all()
    yield
    if is_first:
        wait_for_all()


def cpu_group() -> dist.ProcessGroup | None:
    """All processes, over gloo, whatever they train on; None for one alone. The first call is every process's."""
    return _gloo_beside(dist.group.WORLD) if _several() else None


@lru_cache(maxsize=1)
def _gloo_beside(world: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
