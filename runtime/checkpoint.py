"""Checkpoints: complete or absent, verified before use, nothing unpickled.

``checkpoints/0050000/`` holds one safetensors file a module, one ``.pt`` a state (optimizers, counters; read with
``weights_only=True``) and ``manifest.json`` with sizes and SHA-256 of them all. It is written under another name and
renamed when it is complete.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import SafetensorError
from torch import nn

from errors import UserError, one_line
from files import (
    FileEntry,
    checksum,
    is_out_of_reach,
    read_safetensors,
    remove_leftovers,
    whole_folder,
    write_safetensors,
    write_torch,
)
from runtime.processes import agree_on
from schema import MalformedError, read_json

FORMAT_VERSION = 2  # 1: projectors and mappers lay in the networks they belong to
MANIFEST = "manifest.json"


class Manifest(TypedDict):
    """``manifest.json``."""

    format_version: int
    step: int
    files: dict[str, FileEntry]
    args: dict  # all resolved flags


class Checkpoint:
    """One checkpoint on disk.

    Args:
        folder: e.g. ``exps/NAME/checkpoints/0050000``.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    @property
    def step(self) -> int:
        return int(self.folder.name)

    def manifest(self) -> Manifest:
        """The content of ``manifest.json``."""
        try:
            return read_json(self.folder / MANIFEST, Manifest)
        except (OSError, MalformedError) as error:
            if is_out_of_reach(error):
                raise
            raise UserError(f"{self.folder / MANIFEST} is not readable ({error})") from error

    def states(self) -> set[str]:
        """Names of the states that it holds."""
        return {name.removesuffix(".pt") for name in self.manifest()["files"] if name.endswith(".pt")}

    def fault(self, module: str | None = None) -> str | None:
        """What is wrong with it (a missing file, a wrong size or checksum), or None. Reads every byte.

        Args:
            module: look at this module's weights alone.

        Raises:
            OSError: it may not be read, or the file system is at fault: nothing is known of it.
        """
        try:
            manifest = read_json(self.folder / MANIFEST, Manifest)
            if manifest["format_version"] != FORMAT_VERSION:
                found = manifest["format_version"]
                return f"written by other code, in format {found} where this code reads {FORMAT_VERSION}"
            names = manifest["files"] if module is None else [f"{module}.safetensors"]
            for name in names:
                path, entry = self.folder / name, manifest["files"].get(name)
                if entry is None:
                    return f"{MANIFEST} does not list {name}"
                if not path.is_file():
                    return f"{name} is missing"
                if path.stat().st_size != entry["bytes"]:
                    return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
                if checksum(path) != entry:
                    return f"{name} has another checksum than when it was written"
        except (OSError, MalformedError) as error:
            if is_out_of_reach(error):
                raise
            return f"{MANIFEST} is not readable ({error})"
        return None

    def checksum(self, module: str) -> str:
        """SHA-256 of a module's weights, as the manifest says it."""
        return self.manifest()["files"][f"{module}.safetensors"]["sha256"]

    def read_module(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of ``name.safetensors``."""
        return read_safetensors(self.folder / f"{name}.safetensors")

    def load_module(self, name: str, module: nn.Module, without: str | tuple[str, ...] = ()) -> None:
        """Load ``name.safetensors``; keys must be exactly the module's, those that begin with ``without`` left out."""
        path = self.folder / f"{name}.safetensors"
        try:
            weights = self.read_module(name)
            module.load_state_dict({k: v for k, v in weights.items() if not k.startswith(without)})
        except (OSError, SafetensorError, RuntimeError) as error:
            if is_out_of_reach(error):
                raise
            raise UserError(f"{path} does not fit the network ({one_line(error)})") from error

    def load_state(self, name: str) -> dict:
        """Load ``name.pt``: tensors, numbers, strings and containers of them, nothing else."""
        path = self.folder / f"{name}.pt"
        try:
            # mapped: processes of one machine share what is read of it
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            if is_out_of_reach(error):
                raise
            raise UserError(f"{path} does not load ({one_line(error)})") from error


class CheckpointFolder:
    """All checkpoints of a run.

    Args:
        run_folder: ``exps/NAME``.
    """

    def __init__(self, run_folder: Path):
        self.whole = Path(run_folder) / "checkpoints"
        self.milestones = Path(run_folder) / "milestones"
        self.snapshots = Path(run_folder) / "snapshots"
        self._places = (self.whole, self.milestones, self.snapshots)

    def list(self) -> list[Checkpoint]:
        """Whole checkpoints, newest first."""
        return _checkpoints_in(self.whole)

    def of_step(self, step: int) -> Checkpoint:
        """Where that of a step lies, or will lie."""
        return Checkpoint(self.whole / f"{step:07d}")

    def newest_good(self, report: Callable[[str], object] = lambda message: None) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None where there is none; ``report`` is told of damaged newer ones.

        Raises:
            UserError: there are checkpoints, and none is intact.
        """
        damaged = []
        for checkpoint in self.list():
            fault = checkpoint.fault()
            if fault is None:
                for message in damaged:
                    report(f"{message}; taking {checkpoint.folder.name}")
                return checkpoint
            damaged.append(f"checkpoint {checkpoint.folder} is damaged ({fault})")
        if damaged:
            raise UserError(f"{damaged[0]}, and no other is intact; start under another --exp-name")
        return None

    def at_step(self, step: int) -> Checkpoint:
        """The checkpoint of ``--resume-step``."""
        checkpoint = self.of_step(step)
        if not checkpoint.folder.is_dir():
            there = ", ".join(str(c.step) for c in self.list()) or "none"
            raise UserError(f"--resume-step {step}: no such checkpoint in {self.whole}; there are: {there}")
        if fault := checkpoint.fault():
            raise UserError(f"--resume-step {step}: {checkpoint.folder} is damaged ({fault})")
        return checkpoint

    def intact(self, step: int, report: Callable[[str], object]) -> Checkpoint | None:
        """That of a step, or for 0 the newest good one. The main process alone verifies; all processes get its answer.

        Raises:
            UserError: as :meth:`at_step` and :meth:`newest_good`, in the main process.
        """

        def find() -> int:
            found = self.at_step(step) if step else self.newest_good(report)
            return -1 if found is None else found.step

        found = agree_on(find)
        return None if found < 0 else self.of_step(found)

    def set_aside_newer(self, step: int) -> Path | None:
        """Move what was kept of later steps out of the way of a run that continues from ``step``.

        Left in place they would count as the newest, and what is saved from now on as old.

        Returns:
            the folder inside ``checkpoints/`` (of milestones or snapshots alone: inside theirs) that they lie in, or
            None.
        """
        moved = [self._set_aside_newer(place, step) for place in self._places]
        return next(filter(None, moved), None)

    @staticmethod
    def _set_aside_newer(place: Path, step: int) -> Path | None:
        newer = [checkpoint for checkpoint in _checkpoints_in(place) if checkpoint.step > step]
        aside = place / f"abandoned-at-{step:07d}"
        for checkpoint in newer:
            target = aside / checkpoint.folder.name
            shutil.rmtree(target, ignore_errors=True)
            aside.mkdir(exist_ok=True)
            checkpoint.folder.rename(target)
        return aside if newer else None

    def save(
        self, step: int, modules: Mapping[str, nn.Module], states: Mapping[str, dict], arguments: Mapping
    ) -> Checkpoint:
        """Write the checkpoint of ``step``, replacing a damaged one of the same step."""
        checkpoint = self.of_step(step)
        with whole_folder(checkpoint.folder) as temporary:
            for name, module in modules.items():
                write_safetensors(module.state_dict(), temporary / f"{name}.safetensors")
            for name, state in states.items():
                write_torch(state, temporary / f"{name}.pt")
            _write_manifest(temporary, step, arguments)
        return checkpoint

    def keep_milestone(self, checkpoint: Checkpoint, modules: Sequence[str], arguments: Mapping) -> None:
        """Keep some modules of a checkpoint for good, under ``milestones/``: hard links, so that it costs no time."""
        with whole_folder(self.milestone(checkpoint)) as temporary:
            _link(checkpoint, modules, temporary)
            _write_manifest(temporary, checkpoint.step, arguments)

    def keep_snapshot(
        self, checkpoint: Checkpoint, averages: Sequence[str], others: Sequence[str], arguments: Mapping
    ) -> None:
        """Keep averages in float16, which is half the size, and other modules as they are, under ``snapshots/``."""
        with whole_folder(self.snapshot(checkpoint)) as temporary:
            for name in averages:
                tensors = checkpoint.read_module(name)
                halves = {key: each.half() if each.is_floating_point() else each for key, each in tensors.items()}
                write_safetensors(halves, temporary / f"{name}.safetensors")
            _link(checkpoint, others, temporary)
            _write_manifest(temporary, checkpoint.step, arguments)

    def milestone(self, checkpoint: Checkpoint) -> Path:
        """Where that of a checkpoint is kept."""
        return self.milestones / checkpoint.folder.name

    def snapshot(self, checkpoint: Checkpoint) -> Path:
        """Where that of a checkpoint is kept."""
        return self.snapshots / checkpoint.folder.name

    def remove_leftovers(self) -> None:
        """Delete what an interrupted save left; of a run that nobody else is writing."""
        for place in self._places:
            remove_leftovers(place, "[0-9]*")

    def prune(self, keep: int) -> None:
        """Delete all whole checkpoints but the newest ``keep``, and what an interrupted save left."""
        for checkpoint in self.list()[keep:]:
            # renamed first: half a deleted folder must not look like a damaged checkpoint
            doomed = checkpoint.folder.with_name(f".{checkpoint.folder.name}.tmp")
            shutil.rmtree(doomed, ignore_errors=True)
            checkpoint.folder.rename(doomed)
        self.remove_leftovers()


def _link(checkpoint: Checkpoint, modules: Sequence[str], folder: Path) -> None:
    """Put a checkpoint's modules into another folder as well."""
    for module in modules:
        source = checkpoint.folder / f"{module}.safetensors"
        try:
            os.link(source, folder / source.name)
        except OSError:  # file systems without hard links
            shutil.copyfile(source, folder / source.name)


def _checkpoints_in(place: Path) -> list[Checkpoint]:
    """Newest first."""
    if not place.is_dir():
        return []
    steps = sorted((p for p in place.iterdir() if p.is_dir() and p.name.isdigit()), reverse=True)
    return [Checkpoint(path) for path in steps]


def _write_manifest(folder: Path, step: int, arguments: Mapping) -> None:
    files = {path.name: checksum(path) for path in sorted(folder.iterdir())}
    manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files, "args": dict(arguments)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
