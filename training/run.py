"""A run: its processes, its folder, its log, its trackers, and where it continues.

Rank checks live here. The folder ``OUTPUT_DIR/EXP_NAME`` holds ``args.json``, ``log.txt``, ``metrics.jsonl`` (only what
is reproducible), ``timing.jsonl`` (what is not), ``samples/``, ``checkpoints/`` and ``status.json``.
"""

import argparse
import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from errors import UserError
from files import missing_folders, remove_empty, remove_leftovers, write_atomically, write_json
from formats.run_folders import Line, arguments_of, status_of
from loss.alignment import defaults_of_methods
from loss.vae_objective import VAELossConfig
from models.denoisers import denoiser_config
from runtime.checkpoint import Checkpoint, CheckpointFolder
from runtime.cli import flag_of, out_of_memory_means
from runtime.log import logger, setup_logging
from runtime.processes import cpu_group
from schema import MalformedError, parse_json
from training.arguments import CHANGEABLE, MENTIONED, UNSAID, divisors, settle_micro_batch
from training.method import micro_batch_size
from training.optimizer import scheduled_rate

# What follows from flags and data, in words for the user.
DERIVED = {
    "data_fingerprint": "other data",
    "vae_checksum": "latents of another VAE",
    "statistics_checksum": "a latent cache with other --statistics",
    "class_names": "data of other classes",
    "vae_config": "a VAE of another architecture",
    "denoiser": "a denoiser of another shape (--model, --flow-map-blocks, or latents of another size)",
    "feature_widths": "VFMs of other widths (--enc-type)",
}
PACKAGES = ("torch", "torchvision", "accelerate", "timm", "diffusers", "lpips", "numpy", "pillow", "safetensors")


# What accelerate takes from the environment without a word, and is harmless: devices, affinity, its own messages.
HARMLESS = (
    "USE_CPU",
    "TORCH_DEVICE",
    "CPU_AFFINITY",
    "NUM_PROCESSES",
    "LOG_LEVEL",
    "ENABLE_RICH",
    "DEBUG_MODE",
    "DEBUG_RDV_FILE",
    "MIXED_PRECISION",
)  # fmt: skip  (the last is given explicitly)
NOTHING_ASKED = ("", "0", "1", "no", "false", "none", "default")  # by a launcher's own settings
IN_FORCE = ("ACCELERATE_", "NCCL_", "PYTORCH_", "TORCH_", "TORCHDYNAMO_", "CUBLAS_", "OMP_NUM_", "MKL_NUM_")  # logged


def settle_environment() -> list[str]:
    """Remove from the environment what would change a training behind its flags; names and values of what asked for it.

    ``ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4`` in a shell divides every gradient by four, whatever the script says.
    """
    prefix, ignored = "ACCELERATE_", []
    for name in sorted(os.environ):
        if name.startswith(prefix) and name.removeprefix(prefix) not in HARMLESS:
            value = os.environ.pop(name)
            if value.lower() not in NOTHING_ASKED:
                ignored.append(f"{name}={value}")
    return ignored


def build_accelerator(mixed_precision: str, report_to: str = "none", logging_dir: Path | None = None) -> Accelerator:
    """Processes, device and precision. CUDA where there is one, else the CPU (any number of processes on either).

    Args:
        mixed_precision: ``auto`` (bf16 on CUDA devices that have it, else no), ``no``, ``bf16`` or ``fp16``.
        report_to: ``wandb``, ``tensorboard`` or ``none``.
        logging_dir: where tensorboard writes.
    """
    has_cuda = torch.cuda.is_available()
    if mixed_precision == "auto":
        mixed_precision = "bf16" if has_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if mixed_precision == "fp16" and not has_cuda:
        raise UserError("--mixed-precision fp16 needs a CUDA device; use bf16 or no on a CPU")
    ignored = settle_environment()
    accelerator = Accelerator(
        cpu=not has_cuda,
        mixed_precision=mixed_precision,
        log_with=None if report_to == "none" else report_to,
        project_dir=None if logging_dir is None else str(logging_dir),
        # PatchGAN's BatchNorm buffers stay local, and the latent statistics are reduced by the trainer itself
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(minutes=60)),  # one may compile long after the others
        ],
    )
    accelerator.ignored_environment = ignored
    return accelerator


def begin(args: argparse.Namespace, folder: Path | None) -> Accelerator:
    """Processes, precision and numerics of a training script; ``args`` then say which they are.

    Args:
        args: the flags of ``training.arguments``.
        folder: of the run; None in a dry run.
    """
    accelerator = build_accelerator(args.mixed_precision, args.report_to, folder)
    args.mixed_precision = accelerator.mixed_precision
    if args.compile is None:
        args.compile = accelerator.device.type == "cuda"
    if args.channels_last is None:  # uncompiled, CUDA's GroupNorm copies what comes in that order
        args.channels_last = args.compile or accelerator.device.type == "cpu"
    settle_micro_batch(args, accelerator.num_processes)
    cpu_group()  # before anything can fail on one process alone: the others then notice
    set_numerics(args.seed, args.allow_tf32, args.deterministic)
    return accelerator


def set_numerics(seed: int, allow_tf32: bool, deterministic: bool) -> None:
    """Seed what is drawn while networks are built, choose TF32 and deterministic kernels. Same on every process."""
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # neither's backward pass is deterministic
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Strictly: with warn_only flash attention keeps its faster backward pass, whose sums come in any order.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing is read before it is written


class Run:
    """A run folder as one process sees it; only the main process writes.

    Args:
        folder: ``OUTPUT_DIR/EXP_NAME``.
        accelerator: who the processes are.
        arguments: all resolved flags, JSON-serialisable.
        defaults: of flags: what a run was trained with that is older than the flag.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        arguments: dict[str, Any],
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.folder, self.accelerator, self.arguments = Path(folder), accelerator, arguments
        self.defaults = defaults
        self.is_main = accelerator.is_main_process
        self._lock = None
        # of what was not there before, nothing stays if the command is refused before it begins
        self._has_begun = False
        self._made = missing_folders(self.folder)
        self._found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder / ".lock")
        setup_logging(self.folder / "log.txt" if self.is_main else None)
        if ignored := getattr(accelerator, "ignored_environment", []):
            logger.warning("%s in the environment: ignored, the flags decide", ", ".join(ignored))

    @property
    def samples(self) -> Path:
        return self.folder / "samples"

    def checkpoint(self, resume_step: int) -> Checkpoint | None:
        """The checkpoint to resume from, verified by the main process and the same on all of them; None to start.

        Args:
            resume_step: of ``--resume-step``; 0: the newest intact one.

        Raises:
            UserError: the folder holds another run, no such checkpoint, or none that is intact.
        """
        # The same --resume-step again, e.g. of a requeued job, continues with what was trained from that step.
        resumed_already = resume_step and (arguments_of(self.folder) or {}).get("resume_step") == resume_step
        folder = CheckpointFolder(self.folder)
        checkpoint = folder.intact(0 if resumed_already else resume_step, logger.warning)
        if checkpoint is not None:
            self._check_same(checkpoint.step)
        accelerator = self.accelerator
        logger.info("device %s, precision %s", accelerator.device, accelerator.mixed_precision)
        if settings := [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(IN_FORCE)]:
            logger.info("environment: %s", ", ".join(settings))
        return checkpoint

    def is_finished(self, step: int) -> bool:
        """Whether nothing is left to do: it was trained so far, and its VAE is there."""
        try:
            status = status_of(self.folder)
        except ValueError as error:
            raise UserError(f"{self.folder / 'status.json'} is damaged ({error}); delete it") from error
        done = status is not None and status["state"] == "finished" and step >= self.arguments["max_train_steps"]
        if done and self.has_vae:
            logger.info("%s is finished: %d steps", self.folder, step)
            return True
        return False

    @property
    def has_vae(self) -> bool:
        """Whether ``vae/`` is there, which every finished run has."""
        return (self.folder / "vae").exists()

    def start(self, step: int) -> None:
        """Record the arguments; set aside, or drop, what an earlier process left of later steps, which are done again.

        Args:
            step: that the run continues from; 0: it begins.
        """
        self._has_begun = True
        if not self.is_main:
            return
        if step and (aside := CheckpointFolder(self.folder).set_aside_newer(step)):
            logger.warning("later checkpoints than that of step %d were moved to %s", step, aside)
        record = {"args": self.arguments, "command": sys.argv, **_provenance()}
        write_json(self.folder / "args.json", record)
        for name in ("metrics.jsonl", "timing.jsonl"):
            _truncate(self.folder / name, step)
        self.samples.mkdir(exist_ok=True)
        CheckpointFolder(self.folder).remove_leftovers()
        remove_leftovers(self.folder, "vae", "*.json*")
        remove_leftovers(self.samples, "*.png")

    def start_trackers(self, project: str) -> None:
        """Start wandb or tensorboard; a resumed run continues the same wandb run."""
        kind = self.arguments.get("report_to", "none")
        if kind == "none":
            return
        options = {}
        if kind == "wandb":
            options["wandb"] = {
                "name": self.folder.name,
                "dir": str(self.folder),
                "id": self._wandb_id(),
                "resume": "allow",
            }
            if not _has_wandb_key():
                os.environ.setdefault("WANDB_MODE", "offline")  # never a prompt
        plain = {k: v for k, v in self.arguments.items() if isinstance(v, int | float | str | bool)}
        self.accelerator.init_trackers(project, config=plain, init_kwargs=options)

    def describe(self, args: argparse.Namespace, lines: Sequence[str], start_step: int) -> None:
        """Say once, in the log, what is trained and how."""
        accelerator = self.accelerator
        for line in lines:
            logger.info("%s", line)
        parts = accelerator.num_processes, args.gradient_accumulation_steps, micro_batch_size(args, accelerator)
        logger.info("batch %d = %d processes × %d micro-steps × %d images", args.batch_size, *parts)
        verb = f"resuming after step {start_step}" if start_step else "starting"
        logger.info("%s; %d steps in all", verb, args.max_train_steps)

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Append to ``metrics.jsonl`` what a repetition would reproduce, and send it to the trackers."""
        self._append("metrics.jsonl", {"step": step, **values})
        self.accelerator.log(values, step=step)

    def log_timing(self, step: int, values: dict[str, float]) -> None:
        """Append to ``timing.jsonl`` and send to the trackers."""
        self._append("timing.jsonl", {"step": step, **values})
        self.accelerator.log({f"timing/{k}": v for k, v in values.items()}, step=step)

    def set_status(self, state: str, step: int, max_steps: int, reason: str | None = None) -> None:
        """Write ``status.json``: running, finished, stopped (by a signal) or failed. Later stages look at it."""
        if self.is_main:
            status = {"state": state, "step": step, "max_train_steps": max_steps, "reason": reason}
            write_json(self.folder / "status.json", status)

    def _check_same(self, step: int) -> None:
        """A folder that was begun holds the same run, or its first differing flag is named; says what else differs.

        Args:
            step: that it continues from.
        """
        old = arguments_of(self.folder)
        if old is None:
            return
        refuse_changed_arguments(old, self.arguments, CHANGEABLE, self.folder, self.defaults)
        for name, effect in MENTIONED.items():
            before, now = old.get(name), self.arguments.get(name)
            is_found_later = name == "gradient_accumulation_steps" and self.arguments.get("micro_batch_size") == "auto"
            if before not in (None, now) and not is_found_later:
                what = "number of processes" if name == "num_processes" else flag_of(name)
                logger.warning("%s %s before, %s now: from here on %s", what, before, now, effect)
        before, now = (schedule_factor(arguments, step) for arguments in (old, self.arguments))
        if before is not None and not math.isclose(before, now):
            logger.warning(
                "%d steps in all before, %d now: the %s schedule goes on at %.3g times the peak rate, not %.3g",
                *(arguments["max_train_steps"] for arguments in (old, self.arguments)),
                self.arguments["lr_schedule"], now, before,
            )  # fmt: skip

    def finish(self, is_good: bool = True) -> None:
        """Give everything back. After an error processes are not disbanded: others may be waiting for this one."""
        if is_good:
            self.accelerator.end_training()
        else:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        if self._lock is not None:
            self._lock.close()

    def leave_nothing(self) -> None:
        """Remove the lock and the log of a command that was refused before it began, and its folder if that was new."""
        if self._has_begun or not self.is_main:
            return
        setup_logging(None)
        for name in {".lock", "log.txt"} - self._found:
            (self.folder / name).unlink(missing_ok=True)
        remove_empty(self._made)

    def _append(self, name: str, record: dict) -> None:
        if self.is_main:
            with open(self.folder / name, "a") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")

    def _wandb_id(self) -> str:
        path = self.folder / "wandb_id.txt"
        if self.is_main and not path.exists():
            path.write_text(f"{int(time.time()):x}{os.getpid():x}")
        return path.read_text() if self.is_main else ""


@contextmanager
def open_run(folder: Path, accelerator: Accelerator, args: argparse.Namespace, **more: Any) -> Iterator[Run]:
    """A run of these flags, given back at the end whatever happens; ``more`` is recorded with them."""
    arguments = vars(args) | {"num_processes": accelerator.num_processes} | more
    run = Run(folder, accelerator, arguments, args.defaults)
    is_good = False
    try:
        with out_of_memory_means(lambda: _less_memory(run.arguments)):
            yield run
        is_good = True
    except UserError:
        run.leave_nothing()
        raise
    finally:
        run.finish(is_good)


def _less_memory(arguments: dict[str, Any]) -> str:
    """What to do where a micro-batch does not fit."""
    images = arguments["batch_size"] // arguments["num_processes"] // arguments["gradient_accumulation_steps"]
    if images <= 1:
        return "add --gradient-checkpointing"
    return f"add --micro-batch-size {divisors(images)[-2]}, which keeps the global batch, or --gradient-checkpointing"


def schedule_factor(arguments: Mapping[str, Any], step: int) -> float | None:
    """What the learning rate of the step after ``step`` is multiplied by; None where the arguments do not say."""
    if not {"lr_schedule", "warmup_steps", "max_train_steps"} <= arguments.keys():
        return None
    return scheduled_rate(argparse.Namespace(**UNSAID | dict(arguments)), 1.0, step)


def refuse_changed_arguments(
    old: dict, new: dict, changeable: frozenset[str], folder: Path, defaults: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """A resumed run must be the same run: raise :class:`UserError` naming the first flag that differs.

    Args:
        old, new: flags as recorded and as given.
        changeable: flags that may differ.
        folder: of the run.
        defaults: of flags; an older run was trained with that of a flag which it does not know. What was made from
            other people's checkpoints says of few flags what they were, and may be trained on with any other.
    """
    of_methods = defaults_of_methods()
    known = {name: default for name, default in of_methods.items() if default is not None}
    unsaid = {**defaults, **known, **UNSAID} if "output_dir" in old else UNSAID
    for name, value in new.items():
        if value is None and name in of_methods:  # of another alignment; older runs recorded some of them all the same
            continue
        # a flag that says nothing in this run (None) said nothing either before it was there
        before = old.get(name, value if value is None else unsaid.get(name, value))
        if name == "denoiser":
            before = with_later_fields(before)
        if name == "loss" and isinstance(before, Mapping):  # of a run that is older than some of its keys
            before = asdict(VAELossConfig()) | dict(before)
        if name not in changeable and before != value:
            if name in DERIVED:
                raise UserError(
                    f"{folder} was started with {DERIVED[name]}: give that to resume, or another --exp-name to start "
                    "anew"
                )
            flag = flag_of(name)
            raise UserError(
                f"{folder} was started with {flag} {before}, not {value}: "
                "give the old value to resume, or another --exp-name to start anew"
            )


def with_later_fields(denoiser: Mapping) -> Mapping:
    """A recorded configuration with the fields that its kind was given since, at their defaults."""
    try:
        return denoiser_config(denoiser).to_dict()
    except (KeyError, TypeError, UserError):
        return denoiser


def _lock(path: Path):
    """Hold the folder: two processes that write one run would destroy it."""
    file = open(path, "w")  # noqa: SIM115  held as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"another process is training in {path.parent}: wait, or choose another --exp-name") from None
    except OSError:
        logger.info("the file system of %s has no locks: nothing keeps a second process out", path.parent)
    return file


def _truncate(path: Path, step: int) -> None:
    """Keep the lines up to ``step``; a line that a kill cut short goes too."""
    if not path.exists():
        return
    text, kept, lost = path.read_text(errors="replace"), [], 0
    *lines, unfinished = text.split("\n")
    for line in (*lines, unfinished):
        try:
            if parse_json(line, Line)["step"] <= step:
                kept.append(line + "\n")
        except MalformedError:
            lost += line is not unfinished
    if lost or not text:
        logger.warning("%s was damaged: %s of what it said is lost", path, f"{lost} lines" if lost else "all")
    write_atomically(path, "".join(kept).encode())


def _has_wandb_key() -> bool:
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text())


def _provenance() -> dict[str, Any]:
    root = Path(__file__).resolve().parent.parent
    commit = None
    if git := shutil.which("git"):
        answer = subprocess.run([git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = answer.stdout.strip() or None
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"versions": versions, "git_commit": commit}
