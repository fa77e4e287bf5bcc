"""Where a new train_ldm.py run goes on from: another run of this project, or a checkpoint of REPA or REPA-E.

The source gives weights, their average, AdamW's moments and the step. Afterwards the new run is one like any other: it
resumes from its own checkpoints, and the source may go.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from errors import UserError
from formats.runs import arguments_of
from formats.sit import SiTCheckpoint, State, Statistics, assumed_statistics, read_sit
from formats.statistics import REPA, REPA_SCALE
from inference.foreign_ldm import TOLERANCE, checkpoint_file, is_foreign, statistics_difference
from inference.trained_ldm import OWN_STATISTICS
from models.denoisers.sit import PROJECTORS, SiT, SiTConfig
from models.latent_statistics import EPSILON
from models.tokenizers.kl import STATISTICS_FILE
from runtime.checkpoint import Checkpoint, CheckpointFolder
from runtime.log import logger
from training import arguments
from training.ldm import LDMTrainer

FLAG = "--continue-train-exp-dir"
REFUSED_DIFFERENCE = 0.1  # of latent statistics, in standard deviations, from which on a SiT sees other latents
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
# What must be the same, and which flag (or data) decides it here.
SAME = {
    "model": "--model",
    "latent_channels": "the cache's VAE: latent channels",
    "latent_size": "the cache: latent side",
    "num_classes": "the cache: classes",
    "qk_norm": "--qk-norm",
}


@dataclass(frozen=True)
class Source:
    """What a run goes on from.

    Attributes:
        given: by the user, for messages.
        path: of the checkpoint, a folder or a file.
        config: of its SiT.
        model, ema: state dicts with projectors; ema is None where it has no average.
        moments: AdamW's by the parameter's name; None where it has none.
        step: it was trained for.
        facts: what it says of its training: ``path_type``, ``encoder_depth``; may be empty.
        statistics: by which its latents were normalised, or None.
        assumes_repa: whether these are REPA's, because it holds none.
    """

    given: str
    path: Path
    config: SiTConfig
    model: State
    ema: State | None
    moments: dict[str, dict[str, torch.Tensor]] | None
    step: int
    facts: Mapping
    statistics: Statistics | None
    assumes_repa: bool = False

    def record(self) -> dict:
        """For ``args.json``."""
        return {"checkpoint": str(self.path), "step": self.step}

    def take_over(self, trainer: LDMTrainer) -> None:
        """Load weights, average and moments into a trainer whose configuration :func:`check_source` accepted."""
        trainer.model.load_state_dict(_for_network(self.model, trainer.model))
        if trainer.ema is not None:
            average = self.model if self.ema is None else self.ema
            trainer.ema.module.load_state_dict(_for_network(average, trainer.model))
        if self.moments is None:
            logger.warning("%s holds no optimizer state: AdamW begins anew", self.path)
        else:
            trainer.optimizer.load_state_dict(_optimizer_state(self.moments, trainer))
        logger.info("going on from %s, step %d", self.path, self.step)
        if self.statistics is not None:
            tensors = trainer.statistics.tensors()
            difference = statistics_difference(Statistics(tensors["mean"], tensors["std"]), self.statistics)
            if difference > TOLERANCE:
                logger.warning("the cache's latent statistics differ from its by %.3f standard deviations", difference)


def resolve_folder(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The run's folder, and what it goes on from where it is a new one.

    ``--continue-train-exp-dir`` alone is a run of this project that goes on in its own folder; beside ``--exp-name``
    it is what the run of that name begins with.
    """
    given = args.continue_train_exp_dir
    if given is None:
        return arguments.run_folder(args), None
    if not args.exp_name:
        if Path(given).is_file() or is_foreign(given):
            raise UserError(
                f"--exp-name is needed: {FLAG} {given} is not a run of this project, a new one goes on from it"
            )
        return arguments.run_folder(args), None
    folder = arguments.named_folder(args)
    return folder, None if folder.resolve() == Path(given).resolve() else Path(given)


def open_source(path: Path, step: int) -> Source:
    """Read what a run is to go on from.

    Args:
        path: a run of this project, an experiment of REPA or REPA-E, or a checkpoint file of theirs.
        step: of the checkpoint (``--resume-step``); 0: the newest.

    Raises:
        UserError: nothing of that kind, no such step, or damaged.
    """
    if not path.exists():
        raise UserError(f"{FLAG} {path}: no such folder or file; give a run, or a checkpoint of REPA or REPA-E")
    if path.is_dir() and not is_foreign(path):
        return _own(path, step)
    if path.is_dir():
        file, facts = checkpoint_file(path, step or None, FLAG)
    else:
        file, facts = path, None
    given = f"{FLAG} {path}" + (f" ({file.name})" if path.is_dir() else "")
    checkpoint = read_sit(file, given, facts)
    if step and checkpoint.step not in (None, step):
        raise UserError(f"--resume-step {step}: {given} is of step {checkpoint.step}; leave the flag away")
    return _foreign(checkpoint, given)


def check_source(source: Source, config: SiTConfig, args: argparse.Namespace, statistics: Statistics | None) -> None:
    """Refuse to go on with another network, another objective, or latents that mean something else.

    Args:
        source: what is gone on from.
        config: of the SiT to train.
        args: resolved flags.
        statistics: by which the latent cache is normalised; None in a dry run without one.
    """
    given, theirs = source.given, source.config
    for name, what in SAME.items():
        before, now = getattr(theirs, name), getattr(config, name)
        if before != now and not (statistics is None and name in ("num_classes", "latent_channels", "latent_size")):
            raise UserError(f"{given} was trained with {name} {before}, not {now} ({what}): give what fits it")
    path_type = source.facts.get("path_type", args.path_type)
    if path_type != args.path_type:
        raise UserError(f"{given} was trained with --path-type {path_type}, not {args.path_type}: give the former")
    if config.feature_dims:
        _check_projectors(source, config)
    if config.latent_depth:
        _check_latent_projector(source, config)
    if args.max_train_steps is not None and args.max_train_steps <= source.step:
        raise UserError(
            f"{given} was trained for {source.step} steps already, and {args.max_train_steps} are the last: raise "
            "--max-train-steps or --epochs, which count from its beginning"
        )
    if statistics is not None and source.statistics is not None:
        _check_statistics(source, statistics)


def _check_projectors(source: Source, config: SiTConfig) -> None:
    given, theirs = source.given, source.config
    if theirs.feature_dims != config.feature_dims:
        raise UserError(
            f"{given} has projectors of widths {_widths(theirs)}, --enc-type needs {_widths(config)}: give the "
            "encoders that it was trained with, or --proj-coeff 0"
        )
    if theirs.projector_width != config.projector_width:
        raise UserError(
            f"{given} has projectors with --projector-width {theirs.projector_width}, not {config.projector_width}: "
            "give the former"
        )
    depth = source.facts.get("encoder_depth", config.encoder_depth)
    if depth != config.encoder_depth:
        raise UserError(f"{given} was aligned at --encoder-depth {depth}, not {config.encoder_depth}: give the former")


def _check_latent_projector(source: Source, config: SiTConfig) -> None:
    before, now = ((c.latent_depth, c.latent_width) for c in (source.config, config))
    if before[0] == 0:
        raise UserError(f"{source.given} was trained without VAE-REPA and has no projector of it: --align without vae")
    if before != now:
        raise UserError(
            f"{source.given} was trained with --vae-repa-depth {before[0]} and --vae-repa-width {before[1]}, not "
            f"{now[0]} and {now[1]}: give the former"
        )


def _check_statistics(source: Source, statistics: Statistics) -> None:
    difference = statistics_difference(statistics, source.statistics)
    if difference > REFUSED_DIFFERENCE:
        remedy = "make the cache with the VAE and statistics of its training"
        if source.assumes_repa:
            remedy = (
                f"it holds no statistics, so that REPA's are taken (mean 0, scale {REPA_SCALE}): make the cache with "
                f"cache_latents.py --vae-latents-stats {REPA}"
            )
        raise UserError(
            f"the cache's latent statistics differ from those of {source.given} by {difference:.2f} standard "
            f"deviations: its SiT would see other latents; {remedy}"
        )


def _own(folder: Path, step: int) -> Source:
    """A checkpoint of another run of train_ldm.py."""
    if arguments_of(folder) is None:
        raise UserError(f"{FLAG} {folder} is not a run: it has no args.json")
    checkpoints = CheckpointFolder(folder)
    checkpoint = checkpoints.at_step(step) if step else checkpoints.newest_good(logger.warning)
    if checkpoint is None:
        raise UserError(f"{FLAG} {folder} has no checkpoints yet: let it train, or choose another run")
    facts = checkpoint.manifest()["args"]
    try:
        config = SiTConfig.from_dict(facts["sit"])
        model = load_file(checkpoint.folder / "model.safetensors")
    except (KeyError, TypeError, OSError) as error:
        raise UserError(f"{FLAG} {folder} holds no diffusion model ({error}): give a run of train_ldm.py") from error
    ema = checkpoint.folder / "ema.safetensors"
    return Source(
        given=f"{FLAG} {folder}",
        path=checkpoint.folder,
        config=config,
        model=model,
        ema=load_file(ema) if ema.is_file() else None,
        moments=_own_moments(checkpoint, config),
        step=checkpoint.step,
        facts=facts,
        statistics=_own_statistics(checkpoint),
    )


def _own_moments(checkpoint: Checkpoint, config: SiTConfig) -> dict[str, dict[str, torch.Tensor]] | None:
    if not (checkpoint.folder / "optimizer.pt").is_file():
        return None
    with torch.device("meta"):
        names = [name for name, _ in SiT(config).named_parameters()]
    state = checkpoint.load_state("optimizer").get("state", {})
    return {names[number]: moments for number, moments in state.items()}


def _own_statistics(checkpoint: Checkpoint) -> Statistics | None:
    """Those in the checkpoint, where the VAE was trained along, or those of the run's VAE."""
    own, of_run = checkpoint.folder / f"{OWN_STATISTICS}.safetensors", checkpoint.folder.parents[1] / "vae"
    if own.is_file():
        tensors = load_file(own)
        return Statistics(tensors["mean"], (tensors["var"] + EPSILON).sqrt())
    if (of_run / STATISTICS_FILE).is_file():
        tensors = load_file(of_run / STATISTICS_FILE)
        return Statistics(tensors["mean"], tensors["std"])
    return None


def _foreign(checkpoint: SiTCheckpoint, given: str) -> Source:
    """Theirs; bare weights count as model and average, and begin at step 0."""
    ema = checkpoint.weights.get("ema")
    model = checkpoint.weights.get("model", ema)
    assumed = assumed_statistics(checkpoint.config) if model.statistics is None else None
    return Source(
        given=given,
        path=checkpoint.path,
        config=checkpoint.config,
        model=model.state,
        ema=None if ema is None else ema.state,
        moments=checkpoint.moments,
        step=checkpoint.step or 0,
        facts=checkpoint.facts,
        statistics=model.statistics if assumed is None else assumed,
        assumes_repa=assumed is not None,
    )


def _for_network(state: State, network: SiT) -> State:
    """Without the projectors that the network has not: what they aligned is not aligned any more."""
    there = network.state_dict()
    return {key: tensor for key, tensor in state.items() if key in there or not key.startswith(PROJECTORS)}


def _optimizer_state(moments: Mapping[str, Mapping[str, torch.Tensor]], trainer: LDMTrainer) -> dict:
    """Moments by name → what ``load_state_dict`` takes: numbered as the optimizer's parameters, our own settings."""
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    state = {
        number: {key: torch.as_tensor(moments[name][key]) for key in MOMENTS}
        for number, name in enumerate(names)
        if name in moments
    }
    return {"state": state, "param_groups": trainer.optimizer.state_dict()["param_groups"]}


def _widths(config: SiTConfig) -> str:
    return ", ".join(map(str, config.feature_dims)) or "none"
