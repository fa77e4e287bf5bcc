"""``--micro-batch-size auto``: the most images that a process can take at once, found by a few steps on its GPU."""

import argparse
import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from errors import UserError
from runtime.checkpoint import Checkpoint
from runtime.log import logger
from runtime.processes import least_of
from training.arguments import divisors
from training.method import Method, train_step
from training.run import Run

PROBES = (2, 4)  # images of the trial steps that the rest is predicted from
KEPT_FREE = 0.08  # of the memory: fragments, work space of other sizes, a sample grid


@dataclass(frozen=True)
class Trial:
    """Steps of networks that are thrown away.

    They are not compiled: that would take minutes, and what fits uncompiled fits compiled.

    Attributes:
        build: makes what is trained, and changes nothing that the next call uses.
        batch_of: a micro-batch of so many images for it.
        step: number of a step in which every network takes part.
    """

    build: Callable[[], Method]
    batch_of: Callable[[Any, int], Any]
    step: int = 0

    def find_for_run(self, args: argparse.Namespace, this_run: Run, checkpoint: Checkpoint | None) -> None:
        """:meth:`find` for a run, which records what was found; resumed on as many processes it keeps that."""
        recorded = {} if checkpoint is None else checkpoint.manifest()["args"]
        if args.micro_batch_size == "auto" and recorded.get("num_processes") == this_run.accelerator.num_processes:
            args.gradient_accumulation_steps = recorded["gradient_accumulation_steps"]  # which the noise depends on
        else:
            self.find(args, this_run.accelerator)
        this_run.arguments["gradient_accumulation_steps"] = args.gradient_accumulation_steps

    def find(self, args: argparse.Namespace, accelerator: Accelerator) -> None:
        """Set ``gradient_accumulation_steps`` where ``--micro-batch-size`` is auto and there is a GPU.

        The process with the least room decides. What is drawn after it is the same as without it.

        Raises:
            UserError: not even one image fits.
        """
        if args.micro_batch_size != "auto" or accelerator.device.type != "cuda":
            return
        share = args.batch_size // accelerator.num_processes
        given, args.max_train_steps = args.max_train_steps, args.max_train_steps or self.step + 2
        drawn, scaler = torch.get_rng_state(), accelerator.scaler and accelerator.scaler.state_dict()
        with torch.compiler.set_stance("force_eager"):
            images = self._most(share, accelerator)
        accelerator.free_memory()  # it remembers what it wrapped
        _empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if scaler:
            accelerator.scaler.load_state_dict(scaler)
        torch.set_rng_state(drawn)
        args.max_train_steps, args.gradient_accumulation_steps = given, share // images
        logger.info("--micro-batch-size auto: %d images at once fit", images)

    def _most(self, share: int, accelerator: Accelerator) -> int:
        method = self.build()

        def peak(images: int) -> int:
            batch = self.batch_of(method, images)
            for _ in range(2):  # the first makes the optimizers' moments, so that the second has less room
                torch.cuda.reset_peak_memory_stats()
                train_step(method, self.step, [batch])
            return torch.cuda.max_memory_allocated()

        free, _ = torch.cuda.mem_get_info()
        images = largest_fitting(share, peak, round((1 - KEPT_FREE) * (free + torch.cuda.memory_reserved())))
        images = least_of(images, accelerator.device)
        if accelerator.num_processes == 1:  # one of several that ran out of memory would leave the others waiting
            while images > 1 and not _fits(peak, images):
                images = max(number for number in divisors(share) if number < images)
        return images


def largest_fitting(share: int, peak: Callable[[int], int], room: int) -> int:
    """The largest divisor of ``share`` whose predicted peak fits; memory grows linearly with the images.

    Args:
        share: images of a step on a process.
        peak: images → bytes at the most; called with two small numbers.
        room: bytes.

    Raises:
        UserError: not even one image fits.
    """
    few, more = PROBES
    low, high = peak(few), peak(more)
    each = max(1, (high - low) // (more - few))
    fitting = few + (room - low) // each
    candidates = [number for number in divisors(share) if number <= fitting]
    if not candidates:
        raise UserError(
            f"--micro-batch-size auto: one image needs {(low - (few - 1) * each) / 2**30:.1f} GiB and there are "
            f"{room / 2**30:.1f}; add --gradient-checkpointing, or take a smaller network"
        )
    return candidates[-1]


def _fits(peak: Callable[[int], int], images: int) -> bool:
    with suppress(torch.OutOfMemoryError):
        peak(images)
        return True
    _empty_cache()
    return False


def _empty_cache() -> None:
    gc.collect()
    torch.cuda.empty_cache()
