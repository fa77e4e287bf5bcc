"""The loop that every training script runs: resume, step, log, validate, sample, checkpoint, stop."""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from formats.runs import arguments_of
from runtime.checkpoint import Checkpoint, CheckpointFolder
from runtime.log import logger, progress_bar
from runtime.processes import agree_on
from training.metrics import MeanMetrics
from training.optimizer import learning_rate
from training.run import Run
from training.stop import StopFlag

MAX_CONSECUTIVE_SKIPS = 100  # fp16's scaler needs a handful of skipped steps to find its scale
VANISHED_GRADIENT = 1e-7


class TrainingFailed(Exception):
    """The training itself went wrong; the last good checkpoint is intact."""


class Task(Protocol):
    """What a script hands to the loop.

    Attributes:
        milestone: names of the modules in :meth:`modules` that milestones keep.
    """

    milestone: tuple[str, ...]

    def step(self, step: int, micro_batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Train on one global batch; scalars on the device."""

    def rates(self, step: int) -> dict[str, float]:
        """Learning rates of a step, for the log."""

    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint keeps as safetensors."""

    def states(self) -> dict[str, object]:
        """What a checkpoint keeps beside: objects with ``state_dict`` and ``load_state_dict``."""

    def facts(self) -> dict[str, object]:
        """What a checkpoint's manifest says of it beside the run's arguments; only the main process asks."""

    def validate(self, step: int) -> dict[str, float]:
        """Held-out metrics; empty where there is no held-out data."""

    def sample(self, path: Path) -> None:
        """Write a picture."""

    def finish(self, folder: Path) -> None:
        """Write the finished networks into the run's folder."""


@dataclass(frozen=True)
class Schedule:
    """How learning rates move over a run (``training.optimizer.learning_rate``)."""

    kind: str
    warmup_steps: int
    max_steps: int

    def rate(self, base: float, step: int) -> float:
        return learning_rate(base, step, self.max_steps, self.kind, self.warmup_steps)


def find_checkpoint(run: Run, resume_step: int) -> Checkpoint | None:
    """The checkpoint to resume from, verified by the main process and the same on all of them; None to start."""
    folder = CheckpointFolder(run.folder)
    step = -1
    if run.is_main:
        # The same --resume-step again, e.g. of a requeued job, goes on with what was trained from that step.
        resumed_already = resume_step and (arguments_of(run.folder) or {}).get("resume_step") == resume_step
        if resume_step and not resumed_already:
            found = folder.at_step(resume_step)
        else:
            found = folder.newest_good(logger.warning)
        step = -1 if found is None else found.step
    step = agree_on(step, run.accelerator.device)
    return None if step < 0 else Checkpoint(folder.whole / f"{step:07d}")


def restore(checkpoint: Checkpoint, task: Task, metrics: MeanMetrics, run: Run) -> None:
    """Load everything that a checkpoint holds."""
    for name, module in task.modules().items():
        checkpoint.load_module(name, module)
    for name, stateful in task.states().items():
        stateful.load_state_dict(checkpoint.load_state(name))
    accelerator = run.accelerator
    state = checkpoint.load_state("metrics")
    metrics.load_state_dict(state, accelerator.process_index, accelerator.num_processes, accelerator.device)


class Loop:
    """Runs a task from ``start_step`` to ``max_steps``.

    Args:
        task: what is trained.
        run: its folder.
        batches: yields a list of micro-batches for each step.
        args: the intervals (``training.arguments.add_interval_arguments``) and the batch size.
        max_steps: total number of steps.
        images: size of the dataset, for the epoch in the log.
        wait_seconds: how long the batches have been waited for, so far.
    """

    def __init__(
        self,
        task: Task,
        run: Run,
        batches: Iterator[list[torch.Tensor]],
        args: argparse.Namespace,
        *,
        max_steps: int,
        images: int,
        wait_seconds: Callable[[], float] = lambda: 0.0,
    ):
        self.task, self.run, self.batches, self.args = task, run, batches, args
        self.max_steps, self.images, self.wait_seconds = max_steps, images, wait_seconds
        self.metrics = MeanMetrics()
        self.checkpoints = CheckpointFolder(run.folder)
        self.saved_step = -1
        self.skipped_in_a_row = torch.zeros((), device=run.accelerator.device)

    def fit(self, start_step: int) -> int:
        """Train; returns 0 when finished, or the number of the signal that stopped it."""
        stop = StopFlag()
        self.run.set_status("running", start_step, self.max_steps)
        self.saved_step = start_step if start_step else -1
        bar = progress_bar(self.max_steps, start_step, self.run.folder.name, "step", self.run.is_main)
        step = start_step
        try:
            self._start_clock(step)
            while step < self.max_steps:
                self._step(step)
                step += 1
                bar.update()
                self._after_step(step, bar)
                if stop.poll() and step < self.max_steps:
                    self._save(step)
                    self.run.set_status("stopped", step, self.max_steps, f"signal {stop.received}")
                    logger.info("stopped by signal %d after step %d; the same command resumes", stop.received, step)
                    self.run.accelerator.wait_for_everyone()  # a launcher kills the rest as soon as one has left
                    return stop.received
            self._finish(step)
            return 0
        except Exception as error:
            with suppress(OSError):  # the disk may be what failed
                self.run.set_status("failed", step, self.max_steps, f"{type(error).__name__}: {error}")
            raise
        finally:
            bar.close()
            stop.restore()

    def _step(self, step: int) -> None:
        values = self.task.step(step, next(self.batches))
        self.skipped_in_a_row = (self.skipped_in_a_row + values["skipped"]) * values["skipped"]
        self.metrics.update(values)

    def _after_step(self, step: int, bar) -> None:
        """What is due after ``step`` steps; the checkpoint last, so that nothing of this step is done twice."""
        last = step == self.max_steps
        pause = time.perf_counter()
        if step % self.args.log_steps == 0 or last:
            self._log(step, bar)
            pause = time.perf_counter()
        if step % self.args.val_steps == 0 or last:
            self._validate(step)
        if self.run.is_main and (step % self.args.sampling_steps == 0 or last):
            self.task.sample(self.run.samples / f"{step:07d}.png")
        if step % self.args.checkpointing_steps == 0 or last:
            self._save(step)
        self._paused += time.perf_counter() - pause

    def _log(self, step: int, bar) -> None:
        means, non_finite = self.metrics.pop()
        in_a_row = int(self.skipped_in_a_row.item())
        rates = self.task.rates(step - 1)
        self.run.log_metrics(step, {"epoch": step * self.args.batch_size / self.images, **rates, **means})
        self._log_timing(step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        logger.info("step %d/%d  %s", step, self.max_steps, text)
        bar.set_postfix(loss=f"{means.get('loss', float('nan')):.4g}", refresh=False)
        if non_finite:
            names = ", ".join(f"{name} ({count}×)" for name, count in non_finite.items())
            logger.warning("non-finite values up to step %d: %s; those steps changed nothing", step, names)
        if in_a_row >= MAX_CONSECUTIVE_SKIPS:
            names = ", ".join(non_finite) or "the gradient"
            raise TrainingFailed(
                f"the last {in_a_row} steps were skipped: {names} is not finite; the weights are those of the last "
                "finite step (try a lower learning rate, or bf16 in place of fp16)"
            )
        for name in ("grad_norm", "vae_grad_norm"):
            if means.get(name, 1.0) < VANISHED_GRADIENT:
                raise TrainingFailed(f"training has collapsed: {name} fell to {means[name]:.1e}")
        if means.get("disc_grad_norm", 1.0) < VANISHED_GRADIENT:  # may be won back, and the other losses go on
            logger.warning("step %d: the discriminator learns nothing any more, its gradient has vanished", step)

    def _validate(self, step: int) -> None:
        measured = self.task.validate(step)
        values = {name: value for name, value in measured.items() if math.isfinite(value)}
        if lost := [name for name in measured if name not in values]:
            logger.warning("non-finite held-out values at step %d, left out of the log: %s", step, ", ".join(lost))
        if values:
            self.run.log_metrics(step, values)
            logger.info("step %d  %s", step, "  ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def _save(self, step: int) -> None:
        if step == self.saved_step:
            return
        states = {name: stateful.state_dict() for name, stateful in self.task.states().items()}
        states["metrics"] = self.metrics.state_dict()
        if self.run.is_main:
            arguments = self.run.arguments | self.task.facts()
            checkpoint = self.checkpoints.save(step, self.task.modules(), states, arguments)
            milestone = self.args.milestone_steps
            if milestone and step % milestone == 0:
                self.checkpoints.keep_milestone(checkpoint, self.task.milestone, arguments)
            self.checkpoints.prune(self.args.keep_checkpoints)
        self.saved_step = step
        self.run.set_status("running", step, self.max_steps)
        self.run.accelerator.wait_for_everyone()

    def _finish(self, step: int) -> None:
        if self.run.is_main:
            self.task.finish(self.run.folder)
        self.run.accelerator.wait_for_everyone()
        self.run.set_status("finished", step, self.max_steps)

    def _start_clock(self, step: int) -> None:
        self._clock, self._clock_step = time.perf_counter(), step
        self._paused, self._waited = 0.0, self.wait_seconds()

    def _log_timing(self, step: int) -> None:
        """Speed since the last log step, without validation and checkpoints."""
        seconds = time.perf_counter() - self._clock - self._paused
        steps = max(1, step - self._clock_step)
        values = {
            "seconds_per_step": seconds / steps,
            "images_per_second": steps * self.args.batch_size / max(seconds, 1e-9),
            "waiting_for_data": (self.wait_seconds() - self._waited) / max(seconds, 1e-9),
        }
        if torch.cuda.is_available():
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.run.log_timing(step, values)
        self._start_clock(step)
