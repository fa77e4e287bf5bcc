"""What sampling reads of a REPA or REPA-E checkpoint: its SiT, its VAE, and how they were trained.

Flags say only what the checkpoint does not say itself; one that contradicts it is refused.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from errors import UserError
from formats.sit import SiTCheckpoint, SiTWeights, Statistics, assumed_statistics, read_sit
from formats.statistics import REPA_CHANNELS, REPA_SCALE
from formats.vae import load_vae
from models.denoisers.sit import PROJECTORS, SiT, SiTConfig
from models.tokenizers import Tokenizer
from models.tokenizers.kl import architecture_names
from models.weight_files import weights_checksum

VAE_FLAGS = ("vae", "vae_ckpt", "vae_latents_stats")
FLAGS = (*VAE_FLAGS, "path_type", "resolution")  # for checkpoints that do not say it themselves
DEFAULT_PATH_TYPE = "linear"  # of every public checkpoint
TOLERANCE = 0.01  # of two latent statistics that count as the same, in standard deviations


@dataclass(frozen=True)
class ForeignLDM:
    """A SiT of REPA or REPA-E with its VAE; what ``generate.py`` asks of ``inference.trained_ldm.TrainedLDM`` too.

    Attributes:
        folder: the experiment's, or the one that the file lies in.
        label: for the names of what is made from it.
        step: it was trained for, or None.
        weights: ``"ema"`` or ``"model"``.
        config: of the SiT without projectors.
        path_type: of the interpolant it was trained on.
        class_names: the labels, as numbers.
        resolution: side of the images in pixels.
        vae_checksum: which VAE decodes.
        checksum: of the SiT's weights.
    """

    folder: Path
    label: str
    step: int | None
    weights: str
    config: SiTConfig
    path_type: str
    class_names: list[str]
    resolution: int
    vae_checksum: str
    checksum: str
    _state: dict = field(repr=False)
    _autoencoder: Tokenizer = field(repr=False)

    def load_model(self) -> SiT:
        """The SiT in eval mode, on the CPU, without REPA's projectors."""
        model = SiT(self.config)
        model.load_state_dict(self._state)
        return model.eval().requires_grad_(False)

    def load_autoencoder(self) -> Tokenizer:
        """Its VAE with the latent statistics of its training."""
        return self._autoencoder.requires_grad_(False)


def is_foreign(folder: Path) -> bool:
    """Whether a folder is an experiment of REPA or REPA-E: ``checkpoints/`` holds .pt files, not folders."""
    return any((Path(folder) / "checkpoints").glob("*.pt"))


def checkpoint_file(folder: Path, train_steps: int | None, flag: str = "--exp-path") -> tuple[Path, dict]:
    """A checkpoint in an experiment of REPA or REPA-E, and the content of its ``args.json``.

    Args:
        folder: of the experiment.
        train_steps: of the checkpoint; None: the newest.
        flag: that names the folder, for messages.
    """
    folder = Path(folder)
    found = {int(path.stem): path for path in (folder / "checkpoints").glob("*.pt") if path.stem.isdigit()}
    if not found or train_steps not in (None, *found):
        there = ", ".join(map(str, sorted(found))) or "none"
        wanted = "a step's .pt" if train_steps is None else f"step {train_steps}"
        raise UserError(f"{flag} {folder}: no checkpoint of {wanted} in checkpoints/; there are: {there}")
    path = found[max(found) if train_steps is None else train_steps]
    try:
        facts = json.loads((folder / "args.json").read_text())
        if not isinstance(facts, dict):
            raise ValueError("no mapping")
    except FileNotFoundError:
        raise UserError(
            f"{flag} {folder} has checkpoints/{path.name} but no args.json, which says how it was trained; copy it "
            "beside, or give the file itself"
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / 'args.json'} is not readable as JSON ({error}); copy it again") from error
    return path, facts


def open_foreign_ldm(args: argparse.Namespace, report: Callable[[str], object], flag: str = "--exp-path") -> ForeignLDM:
    """Read a SiT checkpoint of REPA or REPA-E with its VAE.

    Args:
        args: ``exp_path`` or ``ckpt``, ``train_steps``, ``weights`` and ``FLAGS``, None where they are not given.
        report: is told what was assumed.
        flag: what the user calls ``exp_path``, for messages.

    Raises:
        UserError: no such checkpoint, not readable, contradicted by a flag, or a flag is needed that is not given.
    """
    if args.ckpt is not None:
        path, facts, folder, given = Path(args.ckpt), None, Path(args.ckpt).parent, f"--ckpt {args.ckpt}"
        _refuse_own(path)
    else:
        path, facts = checkpoint_file(args.exp_path, args.train_steps, flag)
        folder, given = Path(args.exp_path), f"{flag} {args.exp_path} ({path.name})"
    checkpoint = read_sit(path, given, facts)
    weights = _chosen(checkpoint, args.weights, given)
    notes: list[str] = []
    path_type = _path_type(checkpoint.facts, args.path_type, given, notes.append)
    tokenizer = _load_autoencoder(checkpoint, weights, args, given, notes.append)
    config = checkpoint.config.without_projectors()
    resolution = config.latent_size * tokenizer.downsampling
    for name, value in (("its args say", checkpoint.facts.get("resolution")), ("--resolution is", args.resolution)):
        if value not in (None, resolution):
            remedy = "give its own VAE" + (" and no --resolution" if args.resolution else "")
            raise UserError(
                f"{given}: {name} {value} px, but {config.latent_size}×{config.latent_size} latents of this VAE are "
                f"{resolution} px: {remedy}"
            )
    state = {key: tensor for key, tensor in weights.state.items() if not key.startswith(PROJECTORS)}
    for note in notes:
        report(note)
    return ForeignLDM(
        folder=folder,
        label=path.stem,
        step=checkpoint.step,
        weights=args.weights,
        config=config,
        path_type=path_type,
        class_names=[str(number) for number in range(config.num_classes)],
        resolution=resolution,
        vae_checksum=tokenizer.checksum(),
        checksum=weights_checksum(state),
        _state=state,
        _autoencoder=tokenizer,
    )


def statistics_difference(a: Statistics, b: Statistics) -> float:
    """The largest difference of a channel's mean or standard deviation, in standard deviations of ``b``."""
    return max(((a.mean - b.mean).abs() / b.std).max().item(), (a.std / b.std - 1).abs().max().item())


def statistics_of(tokenizer: Tokenizer) -> Statistics:
    """The latent statistics that a VAE has."""
    tensors = tokenizer.statistics.tensors()
    return Statistics(tensors["mean"], tensors["std"])


def _refuse_own(path: Path) -> None:
    """Our own checkpoints are opened by their run, which says what a bare file does not."""
    if path.is_dir():
        raise UserError(f"--ckpt {path} is a folder; give a file, or a folder with --exp-path")
    if (path.parent / "manifest.json").is_file():
        run = path.resolve().parent.parent.parent
        raise UserError(f"--ckpt {path} belongs to a run of train_ldm.py: give --exp-path {os.path.relpath(run)}")


def _chosen(checkpoint: SiTCheckpoint, weights: str, given: str) -> SiTWeights:
    if weights not in checkpoint.weights:
        raise UserError(
            f"--weights {weights}: {given} does not hold them; take --weights {', '.join(checkpoint.weights)}"
        )
    return checkpoint.weights[weights]


def _path_type(facts: Mapping, flag: str | None, given: str, report: Callable[[str], object]) -> str:
    said = facts.get("path_type")
    if said is not None and flag not in (None, said):
        raise UserError(f"--path-type {flag}: {given} was trained on the {said} path; leave the flag away")
    if said is None and flag is None:
        report(f"{given} does not say its path; taking --path-type {DEFAULT_PATH_TYPE}, as all public checkpoints have")
    return said or flag or DEFAULT_PATH_TYPE


def _load_autoencoder(
    checkpoint: SiTCheckpoint,
    weights: SiTWeights,
    args: argparse.Namespace,
    given: str,
    report: Callable[[str], object],
) -> Tokenizer:
    """The VAE in the checkpoint or of the flags, with the statistics that its SiT was trained with."""
    named = checkpoint.facts.get("vae")
    if named is not None and args.vae not in (None, named):
        raise UserError(f"--vae {args.vae}: {given} was trained on the latents of {named}; leave the flag away")
    if checkpoint.holds_vae:
        for name in ("vae_ckpt", "vae_latents_stats"):
            if getattr(args, name) is not None:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}: {given} holds the VAE that it was trained with; leave the flag away")
        source = str(checkpoint.path)
    else:
        source = args.vae_ckpt or _vae_of_training(checkpoint, given)
    architecture = args.vae or (named if named in architecture_names() else None)  # else as its tensors tell
    loaded = load_vae(architecture, source, args.vae_latents_stats)
    tokenizer = loaded.tokenizer
    if tokenizer.latent_channels != checkpoint.config.latent_channels:
        raise UserError(
            f"{given} makes latents of {checkpoint.config.latent_channels} channels, the VAE decodes "
            f"{tokenizer.latent_channels}: give the VAE that it was trained with (--vae-ckpt)"
        )
    assumed = assumed_statistics(checkpoint.config) if args.vae_latents_stats is None else None
    if weights.statistics is not None:
        # a VAE in the checkpoint is the right one, and its statistics are those of ema
        if loaded.statistics_source is not None and not checkpoint.holds_vae:
            _check_vae_of(weights.statistics, statistics_of(tokenizer), args, given)
        statistics = weights.statistics
    elif assumed is not None:
        others = loaded.statistics_source
        instead = f", and not those of {others} (--vae-latents-stats takes those)" if others else ""
        report(f"{given} holds no latent statistics; taking REPA's, mean 0 and scale {REPA_SCALE}{instead}")
        statistics = assumed
    elif loaded.statistics_source is None:
        raise UserError(f"--vae-latents-stats is needed: neither {given} nor its VAE says how latents were normalised")
    else:
        return tokenizer
    tokenizer.statistics.load(statistics.mean, statistics.std)
    return tokenizer


def _vae_of_training(checkpoint: SiTCheckpoint, given: str) -> str:
    """The VAE file that the training named, where it is there."""
    path = checkpoint.facts.get("vae_ckpt")
    if path is not None and Path(path).exists():
        return path
    if path is not None:
        raise UserError(f"--vae-ckpt is needed: {given} was trained with the VAE {path}, which is not here")
    hint = "; REPA's is stabilityai/sd-vae-ft-ema or -mse" if checkpoint.config.latent_channels == REPA_CHANNELS else ""
    raise UserError(f"--vae-ckpt is needed: {given} does not hold the VAE of its latents{hint}")


def _check_vae_of(statistics: Statistics, own: Statistics, args: argparse.Namespace, given: str) -> None:
    """A VAE with other statistics than those in the checkpoint is not the one of its training."""
    if (difference := statistics_difference(own, statistics)) > TOLERANCE:
        raise UserError(
            f"{args.vae_latents_stats or args.vae_ckpt or given}: its latent statistics differ by {difference:.2f} "
            f"standard deviations from those in {given}: not the VAE of this SiT"
        )
