"""Other people's diffusion transformer as a run of train_ldm.py: networks, VAE, statistics, arguments.

Flags say only what the checkpoint does not say itself; one that contradicts it is refused.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from errors import UserError
from formats.ddt import statistics_of as diffusion_bench_statistics
from formats.flow_map import learned_by_theirs
from formats.run_folders import OWN_STATISTICS, OWN_VAE, is_foreign_experiment
from formats.sit import SOURCES, SiTCheckpoint, SiTWeights, State, build_networks, read_sit
from formats.statistics import CONFIG_STATISTICS, REPA_CHANNELS, REPA_SCALE, repa_statistics
from formats.vae import LoadedVAE, load_tokenizer, load_vae
from models.denoisers.config import PREDICTIONS, DDTConfig, LightningDiTConfig, SiTConfig
from models.latent_statistics import LatentStatistics, difference
from models.tokenizers import Tokenizer, architecture_names
from models.tokenizers.base import CONFIG_FILE
from models.tokenizers.kl import KLTokenizer
from models.tokenizers.pixels import NAME as PIXELS
from runtime.cli import flag_of
from schema import MalformedError, read_json

# of what a checkpoint may not say
FLAGS = ("vae", "vae_ckpt", "vae_latents_stats", "path_type", "resolution", "flow_map_blocks", "prediction")
DEFAULT_PATH_TYPE = "linear"  # of every public checkpoint
TOLERANCE = 0.01  # of two latent statistics that count as the same, in standard deviations


@dataclass(frozen=True)
class ForeignRun:
    """A denoiser from elsewhere, with its VAE.

    Attributes:
        checkpoint: what its file holds.
        tokenizer: its VAE, with the statistics that belong to the averaged weights.
        path_type: of the interpolant it was trained on.
        resolution: side of the images in pixels.
    """

    checkpoint: SiTCheckpoint
    tokenizer: Tokenizer
    path_type: str
    resolution: int

    @property
    def step(self) -> int:
        """It was trained for; 0 where nothing says it."""
        return self.checkpoint.step or 0

    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint of ours keeps, by its names; bare weights are those of the network and of its average."""
        sets = self.checkpoint.weights
        model = sets.get("model", sets.get("ema"))
        denoiser, alignment = self._networks(model)
        modules: dict[str, nn.Module] = {"model": denoiser}
        if model.alignment:
            modules["alignment"] = alignment
        if "ema" in sets:
            modules["ema"], _ = self._networks(sets["ema"])
        if self._has_own_statistics:
            modules[OWN_VAE] = self.tokenizer.with_statistics(model.statistics)
            modules[OWN_STATISTICS] = self.tokenizer.statistics
        return modules

    def arguments(self) -> dict[str, object]:
        """What the manifest of a checkpoint of ours says, as far as theirs says it."""
        facts, config, projectors = self.checkpoint.facts, self.checkpoint.config, self.checkpoint.projectors
        beta1, beta2 = self.checkpoint.adamw["betas"]
        arguments = {
            "denoiser": config.to_dict(),
            "path_type": self.path_type,
            "class_names": [str(number) for number in range(config.num_classes)],
            "resolution": self.resolution,
            "vae_checksum": self.tokenizer.checksum(),
            "statistics_checksum": self.tokenizer.statistics.checksum(),
            "align": "repa" if projectors.feature_widths else "none",
            "feature_widths": list(projectors.feature_widths),
            "projector_width": projectors.projector_width,
            "encoder_depth": projectors.encoder_depth if projectors.feature_widths else None,
            "enc_type": facts.get("enc_type") if projectors.feature_widths else None,
            "cfg_prob": facts.get("cfg_prob"),
            "weighting": facts.get("weighting"),
            "velocity_cosine_coeff": facts.get("velocity_cosine_coeff"),
            "guide_coeff": facts.get("guide_coeff"),
            "time_shift": facts.get("time_shift"),
            "time_mean": facts.get("time_mean"),
            "time_std": facts.get("time_std"),
            "prediction": config.prediction,
            "adam_beta1": beta1,
            "adam_beta2": facts.get("adam_beta2", beta2),
            "adam_epsilon": self.checkpoint.adamw["eps"],
            "adam_weight_decay": self.checkpoint.adamw["weight_decay"],
            "vae_config": self.tokenizer.architecture if self._has_own_statistics else None,
            **learned_by_theirs(facts),
        }
        return {name: value for name, value in arguments.items() if value is not None}

    @property
    def _has_own_statistics(self) -> bool:
        """Whether a VAE was trained along, so that weights as trained have other statistics than their average."""
        statistics = [weights.statistics for weights in self.checkpoint.weights.values()]
        return self.checkpoint.holds_vae and None not in statistics and len({s.checksum() for s in statistics}) > 1

    def _networks(self, weights: SiTWeights) -> tuple[nn.Module, nn.Module]:
        denoiser, alignment = build_networks(self.checkpoint.config, self.checkpoint.projectors)
        for network, state in ((denoiser, weights.denoiser), (alignment, weights.alignment)):
            network.load_state_dict(_float32(state), assign=True)
        return denoiser, alignment


def open_foreign_run(args: argparse.Namespace, report: Callable[[str], object]) -> ForeignRun:
    """Read a checkpoint of one of ``formats.sit.SOURCES`` with its VAE.

    Args:
        args: ``source``, ``train_steps`` and ``FLAGS``, None where they are not given.
        report: is told what was assumed.

    Raises:
        UserError: no such checkpoint, not readable, contradicted by a flag, or a flag is needed that is not given.
    """
    path, facts = checkpoint_file(args.source, args.train_steps)
    given = f"SOURCE {args.source}" + (f" ({path.name})" if path != args.source else "")
    checkpoint = read_sit(path, given, facts, args.flow_map_blocks, args.prediction)
    if args.prediction not in (None, predicts := checkpoint.config.prediction):
        raise UserError(f"--prediction {args.prediction}: {given} predicts {PREDICTIONS[predicts]}; leave the flag out")
    if facts is None and path != args.source and not checkpoint.says_all:
        raise UserError(
            f"SOURCE {args.source} has checkpoints/{path.name} but no args.json, which says how it was trained; copy "
            "it there as well, or give the file itself"
        )
    checkpoint.moments  # noqa: B018  a damaged optimizer is found before anything is written
    notes: list[str] = []
    path_type = _path_type(checkpoint.facts, args.path_type, given, notes.append)
    tokenizer = _load_vae(checkpoint, args, given, notes.append)
    resolution = checkpoint.config.latent_size * tokenizer.downsampling
    for name, value in (("its args say", checkpoint.facts.get("resolution")), ("--resolution is", args.resolution)):
        if value not in (None, resolution):
            side = checkpoint.config.latent_size
            remedy = "give its own VAE" + (" and no --resolution" if args.resolution else "")
            raise UserError(
                f"{given}: {name} {value} px, but {side}×{side} latents of this VAE are {resolution} px: {remedy}"
            )
    config = checkpoint.config
    if config.guide_depth and not (config.kind == LightningDiTConfig.kind and "encoder_depth" in checkpoint.facts):
        notes.append(f"{given} does not say after which block its guide comes; taking block {config.guide_depth}")
    if checkpoint.step is None:
        notes.append(f"{given} does not say its step; taking 0")
    if checkpoint.moments is None:
        notes.append(f"{given} holds no optimizer state that is read here: training on from it begins AdamW anew")
    for note in notes:
        report(note)
    return ForeignRun(checkpoint, tokenizer, path_type, resolution)


def checkpoint_file(source: Path, train_steps: int | None) -> tuple[Path, dict | None]:
    """A checkpoint's file, and the content of the ``args.json`` of an experiment, which LightningDiT's are without.

    Args:
        source: the file, or the folder of an experiment.
        train_steps: of the checkpoint in an experiment; None: the newest.
    """
    if not source.is_dir():
        if not source.exists():
            raise UserError(f"SOURCE {source}: no such file or folder; give a checkpoint of {SOURCES}")
        if train_steps is not None:
            raise UserError(f"--train-steps chooses a checkpoint of a folder; SOURCE {source} is one itself")
        return source, None
    if not is_foreign_experiment(source):
        raise UserError(
            f"SOURCE {source} has no checkpoints/*.pt: give an experiment of REPA, REPA-E or LightningDiT, or a file "
            "of these, RAE, diffusion-bench, JiT or Decoupled MeanFlow"
        )
    named = ((path.stem.removeprefix("step-"), path) for path in (source / "checkpoints").glob("*.pt"))  # IG's
    found = {int(step): path for step, path in named if step.isdigit()}
    others = sorted(path for path in (source / "checkpoints").glob("*.pt") if path not in found.values())
    if not found and others and train_steps is None:
        raise UserError(
            f"SOURCE {source}: its checkpoints are not named by their steps, as RAE's and diffusion-bench's; give one "
            f"of them, such as {others[-1]}"
        )
    if not found or train_steps not in (None, *found):
        there = ", ".join(map(str, sorted(found))) or "none"
        wanted = "a step's .pt" if train_steps is None else f"step {train_steps}"
        raise UserError(f"SOURCE {source}: no checkpoint of {wanted} in checkpoints/; there are: {there}")
    path = found[max(found) if train_steps is None else train_steps]
    try:
        facts = read_json(source / "args.json")
    except FileNotFoundError:
        return path, None
    except MalformedError as error:
        raise UserError(f"{source / 'args.json'} is not readable as JSON ({error}); copy it again") from error
    return path, facts


def _path_type(facts: Mapping, flag: str | None, given: str, report: Callable[[str], object]) -> str:
    said = facts.get("path_type")
    if said is not None and flag not in (None, said):
        raise UserError(f"--path-type {flag}: {given} was trained on the {said} path; leave the flag out")
    if said is None and flag is None:
        report(f"{given} does not say its path; taking --path-type {DEFAULT_PATH_TYPE}, as all public checkpoints have")
    return said or flag or DEFAULT_PATH_TYPE


def _load_vae(
    checkpoint: SiTCheckpoint, args: argparse.Namespace, given: str, report: Callable[[str], object]
) -> Tokenizer:
    """The VAE in the checkpoint or of the flags, with the statistics that its SiT was trained with."""
    if checkpoint.is_of_pixels:
        return _pixels(checkpoint, args, given)
    named = checkpoint.facts.get("vae")
    if named is not None and args.vae not in (None, named):
        raise UserError(f"--vae {args.vae}: {given} was trained on the latents of {named}; leave the flag out")
    if checkpoint.holds_vae:
        for name in ("vae_ckpt", "vae_latents_stats"):
            if getattr(args, name) is not None:
                raise UserError(f"{flag_of(name)}: {given} holds the VAE that it was trained with; leave the flag out")
        source = str(checkpoint.path)
    else:
        source = args.vae_ckpt or _vae_of_training(checkpoint, given)
    architecture = args.vae or (named if named in architecture_names() else None)  # else as its tensors tell
    loaded = load_vae(architecture, source, args.vae_latents_stats)
    tokenizer, known = loaded.tokenizer, loaded.statistics_source
    channels = checkpoint.config.latent_channels
    is_repas = channels == REPA_CHANNELS and (
        isinstance(checkpoint.config, SiTConfig) or (isinstance(checkpoint.config, DDTConfig) and known is None)
    )
    if tokenizer.latent_channels != channels:
        raise UserError(
            f"{given} makes latents of {channels} channels, the VAE decodes {tokenizer.latent_channels}: give the VAE "
            "that it was trained with (--vae-ckpt)"
        )
    own = next(iter(checkpoint.weights.values())).statistics  # of ema, where there is one
    if own is not None:
        # a VAE in the checkpoint is the right one
        if known is not None and not checkpoint.holds_vae:
            _check_vae_of(own, tokenizer.statistics, args.vae_latents_stats or args.vae_ckpt or given, given)
        tokenizer.statistics.load_state_dict(own.state_dict())
    elif isinstance(checkpoint.config, DDTConfig) and args.vae_latents_stats is None and _is_configured(loaded):
        statistics = diffusion_bench_statistics(tokenizer.network.config)
        report(f"{given} holds no latent statistics; taking what diffusion-bench takes of the VAE: {statistics.source}")
        statistics.load_into(tokenizer.statistics)
    elif is_repas and args.vae_latents_stats is None:
        instead = f", and not those of {known} (--vae-latents-stats takes those)" if known else ""
        report(f"{given} holds no latent statistics; taking REPA's, mean 0 and scale {REPA_SCALE}{instead}")
        repa_statistics().load_into(tokenizer.statistics)
    elif known is None:
        raise UserError(f"--vae-latents-stats is needed: neither {given} nor its VAE says how latents were normalised")
    return tokenizer


def _pixels(checkpoint: SiTCheckpoint, args: argparse.Namespace, given: str) -> Tokenizer:
    """What stands for the VAE of a network that was trained without one."""
    for name in ("vae", "vae_ckpt", "vae_latents_stats"):
        if getattr(args, name) not in (None, PIXELS):
            raise UserError(f"{flag_of(name)}: {given} was trained on pixels, without a VAE; leave the flag out")
    tokenizer, _ = load_tokenizer(PIXELS)
    own = next(iter(checkpoint.weights.values())).statistics
    if own is not None:
        tokenizer.statistics.load_state_dict(own.state_dict())
    return tokenizer


def _is_configured(loaded: LoadedVAE) -> bool:
    """Whether a VAE is a folder of diffusers' AutoencoderKL, with no statistics but those of its configuration."""
    is_folder = loaded.path is not None and (loaded.path / CONFIG_FILE).is_file()
    by_config = loaded.statistics_source is None or loaded.statistics_source.startswith(CONFIG_STATISTICS)
    return is_folder and isinstance(loaded.tokenizer, KLTokenizer) and by_config


def _vae_of_training(checkpoint: SiTCheckpoint, given: str) -> str:
    """The VAE file that the training named, where it is there."""
    path = checkpoint.facts.get("vae_ckpt")
    if path is not None and Path(path).exists():
        return path
    if path is not None:
        raise UserError(f"--vae-ckpt is needed: {given} was trained with the VAE {path}, which is not here")
    is_repas = checkpoint.config.latent_channels == REPA_CHANNELS and isinstance(checkpoint.config, SiTConfig)
    hint = "; REPA's is stabilityai/sd-vae-ft-ema or -mse" if is_repas else ""
    raise UserError(f"--vae-ckpt is needed: {given} does not hold the VAE of its latents{hint}")


def _check_vae_of(own: LatentStatistics, of_vae: LatentStatistics, vae: str, given: str) -> None:
    """A VAE with other statistics than those in the checkpoint is not the one of its training.

    Files that store no var give the root of theirs as std, without the 1e-4 that is added to it here.
    """
    without = LatentStatistics(len(own.mean))
    without.load(own.mean, own.var.sqrt())
    if (least := min(difference(of_vae, own), difference(of_vae, without))) > TOLERANCE:
        raise UserError(
            f"{vae}: its latent statistics differ by {least:.2f} standard deviations from those in {given}: not the "
            "VAE of this SiT"
        )


def _float32(state: State) -> State:
    """The tensors themselves where that is possible; copies of those that share memory, which safetensors refuses."""
    tensors, taken = {}, set()
    for name, tensor in state.items():
        tensor = tensor.detach().float().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return tensors
