"""Where a new train_ldm.py run continues from: a checkpoint of another run.

The source gives weights, their average, projectors, AdamW's moments and the step. Afterwards the new run is one like
any other: it resumes from its own checkpoints, and the source may go.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from errors import UserError, one_line
from files import is_out_of_reach, read_safetensors
from formats.averages import MAIN, MODEL
from formats.run_folders import OWN_STATISTICS, arguments_of, refuse_foreign
from loss.alignment import DENOISER_ALIGNMENTS, parse_sum
from models.denoisers import DenoiserConfig, denoiser_config
from models.latent_statistics import LatentStatistics, difference
from models.tokenizers import STATISTICS_FILE, Tokenizer
from runtime.checkpoint import Checkpoint, CheckpointFolder
from runtime.cli import flag_of
from runtime.log import logger
from training import arguments
from training.ldm import LDM
from training.networks import aligned

FLAG = "--continue-train-exp-dir"
MENTIONED_DIFFERENCE = 0.01  # of latent statistics, in standard deviations, that counts as the same below
REFUSED_DIFFERENCE = 0.1  # from which on a denoiser sees other latents
# What must be the same, and which flag (or data) decides it here.
SAME = {
    "model": "--model",
    "latent_channels": "the cache's VAE: latent channels",
    "latent_size": "the cache: latent side",
    "num_classes": "the cache: classes",
    "class_token_width": "--reg-coeff, and the first VFM of --enc-type",
}
BEGINS_HERE = "flow_map_blocks"  # any network may learn to jump, and one that jumps with other blocks
OF_THE_CACHE = ("num_classes", "latent_channels", "latent_size")


@dataclass(frozen=True)
class StartingRun:
    """What a run continues from.

    Attributes:
        given: by the user, for messages.
        checkpoint: a whole one of another run.
        config: of its denoiser.
        facts: its arguments.
        statistics: by which its latents were normalised, or None.
    """

    given: str
    checkpoint: Checkpoint
    config: DenoiserConfig
    facts: Mapping
    statistics: LatentStatistics | None

    @property
    def step(self) -> int:
        return self.checkpoint.step

    @property
    def alignments(self) -> list[str]:
        """Whose projectors it has."""
        return parse_sum(self.facts.get("align", "none"))

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a module; empty where the checkpoint has none of that name."""
        return self.checkpoint.read_module(name) if self._holds(name) else {}

    def _holds(self, name: str) -> bool:
        return (self.checkpoint.folder / f"{name}.safetensors").is_file()

    def take_over(self, method: LDM) -> None:
        """Load weights, average, projectors and moments into a method whose configuration :meth:`check` accepted."""
        self.checkpoint.load_module("model", method.denoiser)
        for name, average in method.averages.items():  # one that it lacks begins as its main one, or as its weights
            begins_as = next(each for each in (name, MAIN, MODEL) if each == MODEL or self._holds(each))
            self.checkpoint.load_module(begins_as, average.module)
        if len(method.alignment):
            there = method.alignment.state_dict()  # what is not aligned any more is left
            state = {key: tensor for key, tensor in self.state("alignment").items() if key in there}
            try:
                method.alignment.load_state_dict(state)
            except RuntimeError as error:
                raise UserError(f"{self.given} has projectors that do not fit ({one_line(error)})") from error
        if method.feature_norm is not None and method.feature_norm.is_measured:
            self.checkpoint.load_module("feature_norm", method.feature_norm)
        self._take_over_moments(method)
        logger.info("continuing from %s, step %d", self.checkpoint.folder, self.step)
        if self.config.flow_map_blocks and not method.denoiser.config.flow_map_blocks:
            logger.warning("it makes jumps, and without --flow-map-blocks this run forgets them")
        before, now = (getattr(each, "guide_coeff", 1.0) for each in (argparse.Namespace(**self.facts), method.args))
        if method.denoiser.config.guide_depth and before != now:
            logger.warning("its second output was trained with --guide-coeff %g, here it is %g", before, now)
        if self.statistics is not None:
            differs = difference(method.tokenizer.statistics, self.statistics)
            if differs > MENTIONED_DIFFERENCE:
                logger.warning("the cache's latent statistics differ from its by %.3f standard deviations", differs)

    def check(self, config: DenoiserConfig, args: argparse.Namespace, tokenizer: Tokenizer | None) -> None:
        """Refuse to go on with another network, another objective, or latents that mean something else.

        Args:
            config: of the denoiser to train.
            args: resolved flags.
            tokenizer: of the latent cache; None in a dry run without one.
        """
        given = self.given
        if config.flow_map_blocks and self.config.guide_depth:
            raise UserError(
                f"{given} was trained with --guide-depth, and a flow map continues none of those: give another"
            )
        names = config.to_dict() | self.config.to_dict()
        own = {name: flag_of(name) for name in names if name not in SAME and name != BEGINS_HERE}
        for name, what in (SAME | own).items():
            before, now = getattr(self.config, name, None), getattr(config, name)
            if before != now and not (tokenizer is None and name in OF_THE_CACHE):
                raise UserError(f"{given} was trained with {name} {before}, not {now} ({what}): give what fits it")
        path_type = self.facts.get("path_type", args.path_type)
        if path_type != args.path_type:
            raise UserError(f"{given} was trained with --path-type {path_type}, not {args.path_type}: give the former")
        for name in parse_sum(args.align):
            self._check_alignment(name, args, config)
        if args.max_train_steps is not None and args.max_train_steps <= self.step:
            raise UserError(
                f"{given} was trained for {self.step} steps already, and {args.max_train_steps} are the last: raise "
                "--max-train-steps or --epochs, which count from its beginning"
            )
        if tokenizer is not None and self.statistics is not None:
            differs = difference(tokenizer.statistics, self.statistics)
            if differs > REFUSED_DIFFERENCE:
                raise UserError(
                    f"the cache's latent statistics differ from those of {given} by {differs:.2f} standard deviations: "
                    "its denoiser would see other latents; make the cache with the VAE and statistics of its training, "
                    "--vae and --vae-latents-stats of cache_latents.py (a run keeps both in its vae/)"
                )

    def _check_alignment(self, name: str, args: argparse.Namespace, config: DenoiserConfig) -> None:
        """Its projectors must be there, and of the same kind."""
        kind = DENOISER_ALIGNMENTS[name]
        if name not in self.alignments:
            with torch.device("meta"):
                has_tensors = len(aligned(args, [name], config.build()).state_dict())
            if not has_tensors:
                return
            raise UserError(
                f"{self.given} was trained without {kind.called()} and has no projectors of it: --align without {name}"
            )
        for fixed in kind.FIXED:
            before, now = self.facts.get(fixed), getattr(args, fixed)
            if before not in (None, now):
                flag = flag_of(fixed)
                raise UserError(f"{self.given} was trained with {flag} {before}, not {now}: give the former")
        before, now = self.facts.get("feature_norm", arguments.UNSAID["feature_norm"]), args.feature_norm
        if kind.needs_features and before != now:
            raise UserError(f"{self.given} was trained with --feature-norm {before}, not {now}: give the former")
        before, now = self.facts.get("feature_widths"), args.feature_widths
        if kind.needs_features and before not in (None, now):
            raise UserError(
                f"{self.given} has projectors of widths {_listed(before)}, --enc-type needs {_listed(now)}: give the "
                "encoders that it was trained with, or --proj-coeff 0"
            )

    def _take_over_moments(self, method: LDM) -> None:
        """Moments by the names of parameters, numbered as the method's optimizer has them."""
        if not (self.checkpoint.folder / "optimizer.pt").is_file():
            logger.warning("%s holds no optimizer state: the optimizer begins anew", self.checkpoint.folder)
            return
        before = self.facts.get("optimizer", arguments.UNSAID["optimizer"])
        if before != method.args.optimizer:
            logger.warning("%s was trained with --optimizer %s: this one begins anew", self.checkpoint.folder, before)
            return
        theirs, ours = self.checkpoint.load_state("optimizer"), method.optimizer.state_dict()
        if not theirs["state"]:  # of bare weights
            logger.warning("%s holds no moments: the optimizer begins anew", self.checkpoint.folder)
        moments = {name: theirs["state"][number] for name, number in _numbers(theirs) if number in theirs["state"]}
        state = {number: moments[name] for name, number in _numbers(ours) if name in moments}
        method.optimizer.load_state_dict({"state": state, "param_groups": ours["param_groups"]})


def _numbers(state: dict) -> Iterator[tuple[str, int]]:
    """The names of an optimizer's parameters and their numbers in its state dict."""
    for group in state["param_groups"]:
        yield from zip(group["param_names"], group["params"], strict=True)


def resolve_folder(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The run's folder, and what it continues from where it is a new one.

    ``--continue-train-exp-dir`` alone is a run of this project that continues in its own folder; with ``--exp-name``
    it is what the run of that name begins with.
    """
    given = args.continue_train_exp_dir
    if given is not None:
        refuse_foreign(Path(given), FLAG, FLAG, *chosen_step(args.resume_step))
    if given is None or not args.exp_name:
        return arguments.run_folder(args), None
    folder = arguments.named_folder(args)
    return folder, None if folder.resolve() == Path(given).resolve() else Path(given)


def chosen_step(step: int) -> tuple[str, ...]:
    """``--resume-step`` as export_ldm.py calls it."""
    return ("--train-steps", str(step)) if step else ()


def open_source(
    args: argparse.Namespace,
    config: DenoiserConfig,
    origin: str | Path | None,
    folder: Path | None,
    tokenizer: Tokenizer | None,
) -> StartingRun | None:
    """What a run continues from that has no checkpoint of its own yet; noted in ``args``.

    Args:
        args: resolved flags; ``resume_step`` chooses the checkpoint, 0 the newest.
        config: of the denoiser to train.
        origin: the other run; None: the run begins anew.
        folder: of this run; None in a dry run.
        tokenizer: of the latent cache; None in a dry run without one.

    Raises:
        UserError: no such run or step, damaged, or one that the new run cannot continue from.
    """
    if folder is not None and CheckpointFolder(folder).list():
        before = arguments_of(folder) or {}
        if "continued_from" in before:
            args.continued_from = before["continued_from"]
        return None
    if origin is None:
        return None
    source = _read(Path(origin), args.resume_step)
    source.check(config, args, tokenizer)
    args.continued_from = {"checkpoint": str(source.checkpoint.folder), "step": source.step}
    return source


def _read(folder: Path, step: int) -> StartingRun:
    """A checkpoint of another run of train_ldm.py."""
    if not folder.exists():
        raise UserError(f"{FLAG} {folder}: no such folder; give a run")
    refuse_foreign(folder, FLAG, FLAG, *chosen_step(step))
    if arguments_of(folder) is None:
        raise UserError(f"{FLAG} {folder} is not a run: it has no args.json")
    checkpoint = CheckpointFolder(folder).intact(step, logger.warning)
    if checkpoint is None:
        raise UserError(f"{FLAG} {folder} has no checkpoints yet: let it train, or choose another run")
    facts = checkpoint.manifest()["args"]
    try:
        config = denoiser_config(facts["denoiser"])
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"{FLAG} {folder} holds no diffusion model ({error}): give a run of train_ldm.py") from error
    return StartingRun(f"{FLAG} {folder}", checkpoint, config, facts, _statistics(checkpoint, config.latent_channels))


def _statistics(checkpoint: Checkpoint, channels: int) -> LatentStatistics | None:
    """Those in the checkpoint, where the VAE was trained along, or those of the run's VAE."""
    statistics = LatentStatistics(channels)
    of_run = checkpoint.folder.parents[1] / "vae" / STATISTICS_FILE
    if (checkpoint.folder / f"{OWN_STATISTICS}.safetensors").is_file():
        checkpoint.load_module(OWN_STATISTICS, statistics)
    elif of_run.is_file():
        try:
            statistics.load(**read_safetensors(of_run))
        except (OSError, SafetensorError, TypeError, RuntimeError) as error:
            if is_out_of_reach(error):
                raise
            raise UserError(f"{of_run} cannot be read ({one_line(error)}); copy the run again") from error
    else:
        return None
    return statistics


def _listed(widths: list[int]) -> str:
    return ", ".join(map(str, widths)) or "none"
