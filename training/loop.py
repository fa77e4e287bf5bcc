"""The loop that every training script runs: step, log, validate, sample, checkpoint, stop."""

import argparse
import math
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from dataset.loader import BatchLoader
from dataset.order import SampleOrder
from errors import TrainingFailed
from runtime.checkpoint import Checkpoint, CheckpointFolder
from runtime.log import logger, progress_bar
from runtime.processes import wait_for_all
from training.method import Method, train_step
from training.metrics import MeanMetrics
from training.run import Run
from training.stop import StopFlag

MAX_CONSECUTIVE_SKIPS = 100  # fp16's scaler needs a handful of skipped steps to find its scale
FEW_SKIPS = 4
VANISHED_GRADIENT = 1e-7


class Loop:
    """Trains a method to ``--max-train-steps``.

    Args:
        method: what is trained.
        run: its folder.
        dataset: what ``dataset.loader.BatchLoader`` reads.
        args: the flags of ``training.arguments``, resolved.
        start_step: steps that are done.

    Raises:
        UserError: the batch cannot be split evenly, or the dataset has no mirrored copy that is asked for.
    """

    def __init__(
        self,
        method: Method,
        run: Run,
        dataset: Any,
        args: argparse.Namespace,
        start_step: int,
    ):
        self.method, self.run, self.dataset, self.args = method, run, dataset, args
        self.max_steps, self.start_step = args.max_train_steps, start_step
        self.batches = build_loader(args, dataset, run.accelerator, start_step, method.unread)
        self.metrics = MeanMetrics()
        self.checkpoints = CheckpointFolder(run.folder)
        self.saved_step = -1
        self.save_seconds = 0.0  # that the last save took
        self.skipped_in_a_row = torch.zeros((), device=run.accelerator.device)

    def __enter__(self) -> "Loop":
        self.batches.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.batches.__exit__(*exception)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load everything that a checkpoint holds; a scaler only where the run was fp16 and is."""
        for name, module in self._modules().items():
            checkpoint.load_module(name, module)
        states, there = self._states(), checkpoint.states()
        if "scaler" in states and "scaler" not in there:
            logger.warning("%s is not of an fp16 training: the loss scale begins anew", checkpoint.folder)
            del states["scaler"]
        elif "scaler" in there and "scaler" not in states:
            logger.warning("%s is of an fp16 training, whose loss scale is left out", checkpoint.folder)
        for name, stateful in states.items():
            stateful.load_state_dict(checkpoint.load_state(name))
        accelerator = self.run.accelerator
        state = checkpoint.load_state("metrics")
        self.metrics.load_state_dict(state, accelerator.process_index, accelerator.num_processes, accelerator.device)

    def fit(self) -> int:
        """Train; returns the exit code: 0 when finished, 128 + the number of the signal that stopped it."""
        stop, step = StopFlag(), self.start_step
        self.run.set_status("running", step, self.max_steps)
        self.saved_step = step if step else -1
        bar = progress_bar(self.max_steps, step, self.run.folder.name, "step", self.run.is_main)
        try:
            wait_for_all()  # the main process began the run's folder, its trackers, its copy of a VAE
            self._make_up(step)
            self._start_clock(step)
            while step < self.max_steps:
                self._step(step)
                step += 1
                bar.update()
                self._after_step(step, bar)
                stopping = stop.poll()
                if self.saved_step == step:  # a signal during the save counts now, not after a step that is saved again
                    stopping = stop.poll() or stopping
                if stopping and step < self.max_steps:
                    if self.saved_step != step:
                        self._announce_stop(stop.received)
                    self._save(step)
                    self.run.set_status("stopped", step, self.max_steps, f"signal {stop.received}")
                    logger.info("stopped by signal %d after step %d; the same command resumes", stop.received, step)
                    wait_for_all()  # a launcher kills the rest as soon as one has left
                    return 128 + stop.received
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
        values = train_step(self.method, step, next(self.batches))
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
        if step % self.args.sampling_steps == 0 or last:
            if self.run.is_main:
                self.method.sample(self.run.samples / f"{step:07d}.png")
            wait_for_all()
        if step % self.args.checkpointing_steps == 0 or last:
            self._save(step)
        self._paused += time.perf_counter() - pause

    def _log(self, step: int, bar) -> None:
        means, non_finite = self.metrics.pop()
        in_a_row = int(self.skipped_in_a_row.item())
        rates = self.method.rates(step - 1)
        self.run.log_metrics(step, {"epoch": step * self.args.batch_size / len(self.dataset), **rates, **means})
        self._log_timing(step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        logger.info("step %d/%d  %s", step, self.max_steps, text)
        bar.set_postfix(loss=f"{means.get('loss', float('nan')):.4g}", refresh=False)
        if non_finite:
            names = ", ".join(f"{name} ({count}×)" for name, count in non_finite.items())
            logger.warning("non-finite values up to step %d: %s; those steps changed nothing", step, names)
        allowed = MAX_CONSECUTIVE_SKIPS
        if step == self.max_steps:  # what ends in skipped steps is not finished, however short it was
            allowed = min(allowed, max(FEW_SKIPS, (self.max_steps - self.start_step) // 2))
        if in_a_row >= allowed:
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
        measured = self.method.validate()
        values = {name: value for name, value in measured.items() if math.isfinite(value)}
        if lost := [name for name in measured if name not in values]:
            logger.warning("non-finite held-out values at step %d, left out of the log: %s", step, ", ".join(lost))
        if values:
            self.run.log_metrics(step, values)
            logger.info("step %d  %s", step, "  ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def _announce_stop(self, number: int | None) -> None:
        """A launcher or a scheduler may not wait as long as it takes: the log then says what happened."""
        took = f", which took {self.save_seconds:.0f} s the last time" if self.save_seconds else ""
        logger.info("signal %s: saving%s", number, took)

    def _make_up(self, step: int) -> None:
        """What was due at the step that the run continues from, and not done when it died after the save."""
        if not step or not self.run.is_main:
            return
        checkpoint = self.checkpoints.of_step(step)
        if checkpoint.folder.is_dir():
            self._keep(checkpoint, only_missing=True)
        self.checkpoints.prune(self.args.keep_checkpoints)

    def _keep(self, checkpoint: Checkpoint, only_missing: bool = False) -> None:
        """What is due at its step and outlives a checkpoint: a milestone, and a snapshot for averages of any length."""
        checkpoints, method, step = self.checkpoints, self.method, checkpoint.step
        arguments, milestone = checkpoint.manifest()["args"], self.args.milestone_steps
        if milestone and step % milestone == 0 and not (only_missing and checkpoints.milestone(checkpoint).is_dir()):
            checkpoints.keep_milestone(checkpoint, method.milestone, arguments)
        is_due = method.snapshot and (step % self.args.posthoc_steps == 0 or step == self.max_steps)
        if is_due and not (only_missing and checkpoints.snapshot(checkpoint).is_dir()):
            checkpoints.keep_snapshot(checkpoint, method.snapshot, method.beside_snapshot, arguments)

    def _save(self, step: int) -> None:
        if step == self.saved_step:
            return
        began = time.perf_counter()
        states = {name: stateful.state_dict() for name, stateful in self._states().items()}
        states["metrics"] = self.metrics.state_dict()
        if self.run.is_main:
            arguments = self.run.arguments | self.method.facts()
            checkpoint = self.checkpoints.save(step, self._modules(), states, arguments)
            self._keep(checkpoint)
            self.checkpoints.prune(self.args.keep_checkpoints)
        self.saved_step = step
        self.run.set_status("running", step, self.max_steps)
        wait_for_all()
        self.save_seconds = time.perf_counter() - began

    def _finish(self, step: int) -> None:
        if self.run.is_main:
            self.method.finish(self.run.folder)
        wait_for_all()
        self.run.set_status("finished", step, self.max_steps)

    def _start_clock(self, step: int) -> None:
        self._clock, self._clock_step = time.perf_counter(), step
        self._paused, self._waited = 0.0, self.batches.wait_seconds

    def _log_timing(self, step: int) -> None:
        """Speed since the last log step, without validation and checkpoints."""
        seconds = time.perf_counter() - self._clock - self._paused
        steps = max(1, step - self._clock_step)
        values = {
            "seconds_per_step": seconds / steps,
            "images_per_second": steps * self.args.batch_size / max(seconds, 1e-9),
            "waiting_for_data": (self.batches.wait_seconds - self._waited) / max(seconds, 1e-9),
        }
        if torch.cuda.is_available():
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.run.log_timing(step, values)
        self._start_clock(step)

    def _modules(self) -> dict[str, nn.Module]:
        return {name: m for name, m in self.method.modules().items() if m is not None and m.state_dict()}

    def _states(self) -> dict[str, Any]:
        return {name: stateful for name, stateful in self.method.states().items() if stateful is not None}


def build_loader(
    args: argparse.Namespace,
    dataset: Any,
    accelerator,
    start_step: int,
    unread: Callable[[int], Collection[str]] = lambda step: (),
) -> BatchLoader:
    """This process's batches from ``start_step`` on, as the flags of ``training.arguments`` say."""
    return BatchLoader(
        dataset,
        SampleOrder(len(dataset), args.seed, args.shuffle),
        batch_size=args.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        accumulation=args.gradient_accumulation_steps,
        start_step=start_step,
        num_workers=args.num_workers,
        prefetch=args.prefetch,
        pin_memory=accelerator.device.type == "cuda",
        hflip=args.hflip,
        unread=unread,
    )
