"""``--micro-batch-size auto``: the most images that a process can take at once, found by a few steps on its GPU."""

import argparse
import gc
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from errors import UserError
from runtime.checkpoint import Checkpoint
from runtime.cli import is_out_of_memory
from runtime.log import logger
from runtime.processes import agree_on
from training.arguments import divisors
from training.method import Method, train_step
from training.run import Run

FEW, MORE = 2, 8  # images of the steps from which the rest is predicted, at most
KEPT_FREE = 0.08  # of the memory: fragments, work space of other sizes, a sample grid
FOUND = "--micro-batch-size auto: {} images at once"
# what torchrun and accelerate launch tell a process of its group
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


@dataclass(frozen=True)
class Trial:
    """Steps of networks that are thrown away.

    They are not compiled: that would take minutes, and what fits uncompiled fits compiled.

    Attributes:
        build: makes what is trained, and changes nothing that the next call uses.
        batch_of: a micro-batch of so many images for it.
        step: number of a step in which every network takes part.
        build_largest: makes what needs most memory, where that changes from step to step; else it is :attr:`build`.
        later: another step that a dry run shows, because what is trained changes there; or None.
    """

    build: Callable[[], Method]
    batch_of: Callable[[Any, int], Any]
    step: int = 0
    build_largest: Callable[[], Method] | None = None
    later: int | None = None

    def find_for_run(self, args: argparse.Namespace, this_run: Run, checkpoint: Checkpoint | None) -> None:
        """:meth:`find` for a run, which records what was found; resumed on as many processes it keeps that."""
        recorded = {} if checkpoint is None else checkpoint.manifest()["args"]
        if args.micro_batch_size == "auto" and recorded.get("num_processes") == this_run.accelerator.num_processes:
            # the noise depends on it
            args.gradient_accumulation_steps = recorded.get("gradient_accumulation_steps", 1)
        else:
            self.find(args, this_run.accelerator)
        this_run.arguments["gradient_accumulation_steps"] = args.gradient_accumulation_steps

    def find(self, args: argparse.Namespace, accelerator: Accelerator) -> None:
        """Set ``gradient_accumulation_steps`` where ``--micro-batch-size`` is auto and there is a GPU.

        What is drawn afterwards is the same as without it.

        Raises:
            UserError: not even one image fits.
        """
        if args.micro_batch_size != "auto" or accelerator.device.type != "cuda":
            return
        share = args.batch_size // accelerator.num_processes
        if accelerator.num_processes == 1:
            images = self._find_here(args, accelerator, share)
        else:
            images = agree_on(lambda: find_elsewhere(share))
        args.gradient_accumulation_steps = share // images
        logger.info(FOUND.format(images))

    def _find_here(self, args: argparse.Namespace, accelerator: Accelerator, share: int) -> int:
        given, args.max_train_steps = args.max_train_steps, args.max_train_steps or self.step + 2
        drawn, scaler = torch.get_rng_state(), accelerator.scaler and accelerator.scaler.state_dict()
        free, _ = torch.cuda.mem_get_info()
        room = round((1 - KEPT_FREE) * (free + torch.cuda.memory_reserved()))
        method: Method | None = None

        def forget() -> None:
            nonlocal method
            method = None
            accelerator.free_memory()  # it remembers what it wrapped
            if accelerator.scaler is not None:
                accelerator.scaler._per_optimizer_states.clear()  # of a step that was broken off
            gc.collect()
            torch.cuda.empty_cache()

        def peak(images: int) -> float:
            nonlocal method
            try:
                method = method or (self.build_largest or self.build)()
                # two: the second one's activations lie next to the first one's gradients, as with accumulation, and as
                # under DDP, whose buckets stay
                batches = [self.batch_of(method, images)] * 2
                for _ in range(2):  # the first makes the optimizers' moments, so that the second has less room
                    torch.cuda.reset_peak_memory_stats()
                    train_step(method, self.step, batches)
                return torch.cuda.max_memory_allocated()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # as long as it is handled, its traceback holds what was computed
            forget()
            return math.inf

        with torch.compiler.set_stance("force_eager"):
            images = most_that_fit(share, peak, room)
        forget()
        torch.cuda.reset_peak_memory_stats()
        if scaler:
            accelerator.scaler.load_state_dict(scaler)
        torch.set_rng_state(drawn)
        args.max_train_steps = given
        return images


def find_elsewhere(share: int) -> int:
    """The same by a dry run in a process of its own, on this process's GPU.

    One of several processes that runs out of memory would leave the others waiting in a reduction.

    Args:
        share: images of a step on a process.
    """
    device = torch.cuda.current_device()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    environment["CUDA_VISIBLE_DEVICES"] = visible[device] if len(visible) > device and visible[0] else str(device)
    flags = ["--dry-run", "--no-compile", "--batch-size", str(share)]
    answer = subprocess.run(
        [sys.executable, *sys.argv, *flags], env=environment, capture_output=True, text=True, check=False
    )
    found = re.search(FOUND.format(r"(\d+)"), answer.stdout)
    if found is None:
        last = next(iter(reversed(answer.stderr.strip().splitlines())), f"exit code {answer.returncode}")
        raise UserError(f"--micro-batch-size auto found nothing ({last}); give a number")
    return int(found[1])


def most_that_fit(share: int, peak: Callable[[int], float], room: float) -> int:
    """The largest divisor of ``share`` that fits: predicted from two small ones, then tried, and smaller ones after it.

    Args:
        share: images of a step on a process.
        peak: images → bytes at the most, infinite where they do not fit; memory grows about linearly.
        room: bytes.

    Raises:
        UserError: not even one image fits.
    """
    numbers = divisors(share)
    few, more = (max(number for number in numbers if number <= most) for most in (FEW, MORE))
    measured = {number: peak(number) for number in sorted({few, more})}
    predicted = more
    if few < more and math.isfinite(measured[more]):
        predicted = few + (room - measured[few]) // max(1.0, (measured[more] - measured[few]) / (more - few))
    for number in reversed([number for number in numbers if number <= max(predicted, more)]):
        if number not in measured:
            measured[number] = peak(number)
        if measured[number] <= room:
            return number
    raise UserError(
        f"--micro-batch-size auto: not even one image fits into {room / 2**30:.1f} GiB; add --gradient-checkpointing, "
        "or take a smaller network"
    )
