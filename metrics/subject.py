"""The VAE that is measured: its flags, how it is built, and where what is measured of it goes."""

import argparse
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from errors import UserError
from formats.run_folders import refuse_unfinished, status_of
from formats.vae import load_tokenizer
from metrics.record import metrics_folder
from models.tokenizers import Tokenizer
from runtime.processes import Process


@dataclass(frozen=True)
class Subject:
    """A VAE under examination.

    Attributes:
        tokenizer: on the device, frozen.
        has_statistics: whether it came with latent statistics.
        description: for a measurement: ``path``, ``vae_checksum``, and the ``step`` of a run.
    """

    tokenizer: Tokenizer
    has_statistics: bool
    description: dict


def open_vae(args: argparse.Namespace, process: Process) -> Subject:
    """Build the VAE of ``--vae`` and ``--vae-ckpt`` on the device."""
    if not args.vae and not args.vae_ckpt:
        raise UserError("--vae is needed: a run, a VAE's file or folder, or an architecture with --vae-ckpt")
    if not args.allow_unfinished:
        refuse_unfinished(args.vae, args.vae_ckpt)
    torch.manual_seed(args.seed)  # of random weights
    tokenizer, statistics = load_tokenizer(args.vae, args.vae_ckpt, args.vae_latents_stats)
    tokenizer.requires_grad_(False).to(process.device)
    if process.device.type == "cpu":
        tokenizer.to(memory_format=torch.channels_last)
    path = _path(args)
    description = {"path": "random weights" if path is None else str(path), "vae_checksum": tokenizer.checksum()}
    with suppress(ValueError):  # a damaged status.json, with --allow-unfinished
        status = None if path is None else status_of(path.parent)
        if status is not None and status.get("state") == "finished":  # else the step is not that of the VAE
            description["step"] = status.get("step")
    return Subject(tokenizer, statistics is not None, description)


def output_subject(args: argparse.Namespace) -> Path:
    """Where the measurements belong (``metrics.record.metrics_folder``); an error where that is nowhere.

    Raises:
        UserError: no ``--output-dir`` for a VAE without a place of its own, or one that is a file.
    """
    if args.output_dir is not None:
        folder = Path(args.output_dir)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output-dir {folder} is a file; give a folder")
        return folder
    path = _path(args)
    if path is None or not path.exists():
        raise UserError("--output-dir is needed: what is measured has no folder of its own to write into")
    return path


def file_suffix(args: argparse.Namespace) -> str:
    """What tells measurements of several VAE files in one folder apart, e.g. ``-v0`` for ``v0.pt``; else empty."""
    path = _path(args)
    return f"-{path.stem}" if args.output_dir is None and path is not None and path.is_file() else ""


def output_folder(args: argparse.Namespace) -> Path:
    """The folder of the measurements, made."""
    folder = metrics_folder(output_subject(args))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _path(args: argparse.Namespace) -> Path | None:
    """Where the VAE's weights lie; None for random ones or without a VAE."""
    source = args.vae_ckpt or args.vae
    return None if source is None or source == "none" else Path(source)
