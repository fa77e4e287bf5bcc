"""What training scripts share once their flags are known: start or resume a run, turn its end into an exit code."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dataset.loader import BatchLoader
from dataset.order import SampleOrder
from errors import UserError
from formats.runs import arguments_of, status_of
from runtime.checkpoint import Checkpoint, CheckpointFolder
from runtime.cli import EXIT_FAILED, EXIT_OK
from runtime.log import logger
from training.arguments import CHANGEABLE
from training.loop import Loop, Task, TrainingFailed, find_checkpoint, restore
from training.run import Run, refuse_changed_arguments


@dataclass(frozen=True)
class Job:
    """What is particular to a script.

    Attributes:
        project: its trackers' project.
        dataset: what ``dataset.loader.BatchLoader`` reads.
        build: builds the networks; called once it is clear that there is something left to train.
        begin: called with the task of a run that has no checkpoint of its own.
        first_step: that ``begin`` takes the run to, with what it had from elsewhere; None: nothing, so 0.
        describe: lines for the log that say what is trained.
        products: names in the run's folder that a finished run has.
        prepare: called on the main process with the folder of a run that starts, or that lacks a product.
    """

    project: str
    dataset: Any
    build: Callable[[], Task]
    begin: Callable[[Task], None] = lambda task: None
    first_step: int | None = None
    describe: Callable[[Task], Sequence[str]] = lambda task: ()
    products: tuple[str, ...] = ()
    prepare: Callable[[Path], None] = lambda folder: None


def train(args: argparse.Namespace, arguments: dict[str, Any], folder: Path, job: Job, accelerator: Accelerator) -> int:
    """Start the run in ``folder``, or resume it; returns the exit code.

    Args:
        args: the flags of ``training.arguments``, resolved.
        arguments: everything that ``args.json`` and checkpoints say of the run.
        folder: the run's.
        job: what is trained.
        accelerator: precision and processes.
    """
    run = Run(folder, accelerator, arguments | {"num_processes": accelerator.num_processes})
    try:
        # of a run that begins elsewhere, --resume-step chose a checkpoint there
        checkpoint = find_checkpoint(run, args.resume_step if job.first_step is None else 0)
        if checkpoint is not None:
            _check_same_run(run)
        start_step = (job.first_step or 0) if checkpoint is None else checkpoint.step
        if _is_finished(run, start_step, args.max_train_steps, job.products):
            logger.info("%s is finished: %d steps", folder, start_step)
            return EXIT_OK
        with build_loader(args, job.dataset, accelerator, start_step) as loader:
            task = job.build()
            if run.is_main:
                _make_way(run, checkpoint, job)
            loop = Loop(
                task,
                run,
                loader,
                args,
                max_steps=args.max_train_steps,
                images=len(job.dataset),
                wait_seconds=lambda: loader.wait_seconds,
            )
            run.start(start_step)
            if checkpoint is not None:
                restore(checkpoint, task, loop.metrics, run)
            else:
                job.begin(task)
            run.start_trackers(job.project)
            _describe(args, job.describe(task), start_step, accelerator)
            signal_number = loop.fit(start_step)
        return 128 + signal_number if signal_number else EXIT_OK
    except TrainingFailed as error:
        print(f"{Path(sys.argv[0]).name}: training failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory ({str(error).splitlines()[0]}): raise --gradient-accumulation-steps, which keeps the "
            "global batch, or add --gradient-checkpointing"
        ) from error
    finally:
        run.finish()


def build_loader(args: argparse.Namespace, dataset: Any, accelerator: Accelerator, start_step: int) -> BatchLoader:
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
    )


def micro_batch_size(args: argparse.Namespace, accelerator: Accelerator) -> int:
    """Images at once on a process."""
    return args.batch_size // accelerator.num_processes // args.gradient_accumulation_steps


def dry_run_batch_size(args: argparse.Namespace, accelerator: Accelerator) -> int:
    """Images at once on a process in a dry run: 2, or 1 where a training has no more."""
    return max(1, min(2, micro_batch_size(args, accelerator)))


def _check_same_run(run: Run) -> None:
    """A folder that was begun holds the same run, or its first differing flag is named."""
    old = arguments_of(run.folder)
    if old is None:
        return
    refuse_changed_arguments(old, run.arguments, CHANGEABLE, run.folder)
    before, now = old.get("num_processes"), run.arguments["num_processes"]
    if before != now:
        logger.warning("%s processes before, %d now: from here on the noise is drawn otherwise", before, now)


def _make_way(run: Run, checkpoint: Checkpoint | None, job: Job) -> None:
    """Prepare the folder of a new run; of a resumed one, set aside what it does not go on from."""
    if checkpoint is None or not all((run.folder / name).exists() for name in job.products):
        job.prepare(run.folder)
    if checkpoint is not None and (aside := CheckpointFolder(run.folder).set_aside_newer(checkpoint.step)):
        logger.warning("later checkpoints than that of step %d were moved to %s", checkpoint.step, aside)


def _is_finished(run: Run, step: int, max_steps: int, products: Sequence[str]) -> bool:
    status = status_of(run.folder)
    done = status is not None and status["state"] == "finished" and step >= max_steps
    return done and all((run.folder / name).exists() for name in products)


def _describe(args: argparse.Namespace, lines: Sequence[str], start_step: int, accelerator: Accelerator) -> None:
    """The resolved sizes, once, in the log."""
    for line in lines:
        logger.info("%s", line)
    processes, accumulation = accelerator.num_processes, args.gradient_accumulation_steps
    micro = micro_batch_size(args, accelerator)
    logger.info("batch %d = %d processes × %d micro-steps × %d images", args.batch_size, processes, accumulation, micro)
    logger.info("device %s, precision %s", accelerator.device, accelerator.mixed_precision)
    verb = f"resuming after step {start_step}" if start_step else "starting"
    logger.info("%s; %d steps in all", verb, args.max_train_steps)
