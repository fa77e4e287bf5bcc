"""What sampling and evaluation read of a train_ldm.py or train_repae.py run: networks, and how they were trained.

Nothing of it can be given by a flag that might contradict the training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from errors import UserError, one_line
from formats.averages import FURTHER, MAIN, MODEL, POSTHOC, posthoc_length, statistics_of
from formats.flow_map import learned_guidance
from formats.run_folders import OWN_VAE, arguments_of, status_of
from formats.vae import load_tokenizer
from inference import INTERNAL, PATH_DROP
from inference.posthoc import PosthocCheckpoint
from models.denoisers import Denoiser, DenoiserConfig, denoiser_config
from models.denoisers.sprint import Shortcut
from models.tokenizers import STATISTICS_FILE, Tokenizer, build_tokenizer
from runtime.checkpoint import Checkpoint, CheckpointFolder
from schema import check


class _Arguments(TypedDict):
    """What is read of a training's flags."""

    denoiser: dict
    path_type: str
    class_names: list[str]
    resolution: int
    vae_checksum: str
    statistics_checksum: str | None
    vae_config: dict | None
    cfg_prob: float | None
    time_shift: float | None
    path_drop: float | None
    flow_map_cfg_scale: float | None
    flow_map_guidance_low: float | None
    flow_map_guidance_high: float | None


@dataclass(frozen=True)
class TrainedLDM:
    """A checkpoint of a latent diffusion model.

    Attributes:
        folder: of the run.
        checkpoint: a whole one, a milestone or a snapshot; its weights are verified.
        weights: their name, see ``formats.averages``.
        config: of the denoiser.
        path_type: of the interpolant it was trained on.
        class_names: label ``c`` means ``class_names[c]``.
        resolution: side of the images in pixels.
        vae_checksum: which VAE its latents came from.
        statistics_checksum: which statistics they were normalised with; None where the run does not say.
        checksum: SHA-256 of the weights' file.
        vae_config: architecture of the VAE where it lies in the checkpoint, because it was trained along; or None.
        cfg_prob: share of labels that were dropped; with 0 the null class was never trained, and nothing can guide.
        time_shift: of its training times.
        path_drop: with which probability images went without SPRINT's middle blocks; 0: never.
        learned_guidance: what a flow map's jumps have of it (``formats.flow_map.learned_guidance``), or None.
        guide: what guides it in the place of the null class (:func:`open_guide`), or None.
    """

    folder: Path
    checkpoint: Checkpoint
    weights: str
    config: DenoiserConfig
    path_type: str
    class_names: list[str]
    resolution: int
    vae_checksum: str
    statistics_checksum: str | None
    checksum: str
    vae_config: dict | None = None
    cfg_prob: float = 0.1
    time_shift: float = 1.0
    path_drop: float = 0.0
    learned_guidance: str | None = None
    guide: "TrainedLDM | PathDrop | InternalGuide | None" = None

    @property
    def step(self) -> int:
        return self.checkpoint.step

    @property
    def label(self) -> str:
        """For the names of what is made from it."""
        return f"{self.step:07d}"

    def load_model(self) -> Denoiser:
        """The denoiser in eval mode, on the CPU."""
        model = self.config.build()
        self.checkpoint.load_module(self.weights, model)
        return model.eval().requires_grad_(False)

    @property
    def as_guide(self) -> str:
        """What it is called where it guides."""
        return f"{self.config.model} of step {self.step}"

    def load_guide(self, guided: Denoiser) -> Denoiser:
        """As :meth:`load_model`, where it guides."""
        return self.load_model()

    def load_autoencoder(self) -> Tokenizer:
        """The run's VAE with its latent statistics; refused if it is not the one of the training."""
        if self.vae_config is not None:
            return self._own_autoencoder()
        folder = self.folder / "vae"
        if not folder.is_dir():
            raise UserError(f"{folder} is missing: the VAE that the run was trained with; copy it back")
        try:
            tokenizer, has_statistics = load_tokenizer(str(folder))
        except UserError as error:
            raise UserError(str(error).removeprefix("--vae ")) from error
        if not has_statistics:
            raise UserError(
                f"{folder} has no latent statistics ({STATISTICS_FILE}): without those of the training, latents "
                "cannot be decoded; copy the file back"
            )
        shape, side = tokenizer.latent_shape(self.resolution), self.config.latent_size
        if shape != (self.config.latent_channels, side, side):
            expected = (self.config.latent_channels, side, side)
            raise UserError(f"{folder} decodes latents {shape}, the denoiser makes {expected}: not the VAE of this run")
        if tokenizer.checksum() != self.vae_checksum:
            raise UserError(
                f"{folder} holds other weights than the VAE that the run was trained with; copy the right one back"
            )
        if self.statistics_checksum not in (None, tokenizer.statistics.checksum()):
            raise UserError(
                f"{folder} holds other latent statistics ({STATISTICS_FILE}) than the run was trained with; copy the "
                "right file back"
            )
        return tokenizer.requires_grad_(False)

    def _own_autoencoder(self) -> Tokenizer:
        """The VAE in the checkpoint, with the statistics that belong to the weights."""
        statistics = statistics_of(self.weights)
        for name in filter(None, (OWN_VAE, statistics)):
            if fault := self.checkpoint.fault(name):
                raise UserError(f"{self.checkpoint.folder} is damaged ({fault}); choose another with --train-steps")
        try:
            tokenizer = build_tokenizer(self.vae_config)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.checkpoint.folder}: vae_config of manifest.json: {one_line(error)}") from error
        self.checkpoint.load_module(OWN_VAE, tokenizer)
        if statistics is not None:
            self.checkpoint.load_module(statistics, tokenizer.statistics)
        return tokenizer.requires_grad_(False)


def open_trained_ldm(
    folder: Path, train_steps: int | None, weights: str, report: Callable[[str], object] = lambda message: None
) -> TrainedLDM:
    """Find a checkpoint, verify its weights and read how they were trained.

    Args:
        folder: of the run (``--exp-path``).
        train_steps: of the checkpoint or milestone; None: the newest intact one of a finished run.
        weights: their name, see ``formats.averages``.
        report: is told of damaged checkpoints that were passed over, and of a length that snapshots do not give well.

    Raises:
        UserError: no such run, not finished, no such checkpoint, damaged, or not made by train_ldm.py.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--exp-path {folder}: no such folder; give that of a train_ldm.py run, e.g. exps/NAME")
    if arguments_of(folder) is None:
        raise UserError(
            f"--exp-path {folder} is not a run (it has no args.json); give the folder of a train_ldm.py run"
        )
    checkpoints = _checkpoints(folder, weights)
    if train_steps is None:
        last_step = _finished_at(folder, checkpoints)
        checkpoint = _newest_good(folder, checkpoints, weights, report)
        if checkpoint.step != last_step:
            report(f"{folder} was trained for {last_step} steps; its newest intact checkpoint is of {checkpoint.step}")
    else:
        checkpoint = _at_step(folder, train_steps, checkpoints, weights)
    if isinstance(checkpoint, PosthocCheckpoint) and (doubts := checkpoint.doubts()):
        report(doubts)
    return _describe(folder, checkpoint, weights)


class PathDrop:
    """What guides a network with SPRINT: its own first and last blocks, for no class (arXiv 2510.21986)."""

    as_guide, checksum = PATH_DROP, None

    def load_guide(self, guided: Denoiser) -> Shortcut:
        return Shortcut(guided)


def open_path_drop(trained: TrainedLDM) -> PathDrop:
    """Of a run that was trained for it.

    Raises:
        UserError: it was not.
    """
    why = "the null class (--cfg-prob 0)" if trained.cfg_prob == 0 else None
    if not trained.path_drop:
        why = "--path-drop" if trained.config.sparse_blocks else "--sprint"
    if why is not None:
        raise UserError(
            f"--guide {PATH_DROP}: {trained.folder} was trained without {why}; leave the flag out, or give a run"
        )
    return PathDrop()


class InternalGuide:
    """What guides a network that was trained with ``--guide-depth``: its own output after that block."""

    as_guide, checksum = INTERNAL, None

    def load_guide(self, guided: Denoiser) -> Denoiser:
        return guided


def open_internal_guide(trained: TrainedLDM) -> InternalGuide:
    """Of a run that was trained for it.

    Raises:
        UserError: it was not.
    """
    if not trained.config.guide_depth:
        raise UserError(
            f"--guide {INTERNAL}: {trained.folder} was trained without --guide-depth; leave the flag out, or give a run"
        )
    return InternalGuide()


def open_guide(
    trained: TrainedLDM, folder: Path | None, step: int | None, report: Callable[[str], object] = lambda message: None
) -> TrainedLDM:
    """The checkpoint whose velocity guides another's, of the same kind of weights; any size and architecture.

    Args:
        trained: what it guides.
        folder: of its run (``--guide``); None: of the same run.
        step: of the checkpoint or milestone; None: the newest intact one of a finished run.
        report: is told of damaged checkpoints that were passed over.

    Raises:
        UserError: no such checkpoint, or velocities that cannot be compared.
    """
    folder = folder or trained.folder
    try:
        guide = open_trained_ldm(folder, step, trained.weights, report)
    except UserError as error:
        reason = str(error).removeprefix("--exp-path ").replace(f"--train-steps {step}: ", f"{folder}@{step}: ")
        raise UserError(f"--guide {reason.replace('--train-steps', f'--guide {folder}@STEP')}") from error
    if guide.checksum == trained.checksum:
        raise UserError(f"--guide {folder}@{guide.step} is what it would guide; give an earlier step or another run")
    if difference := _difference(trained, guide):
        raise UserError(
            f"--guide {folder}@{guide.step} {difference}: its velocity means something else than that of "
            f"{trained.folder} at step {trained.step}; give a run on the same latents and classes"
        )
    return guide


def _difference(trained: TrainedLDM, guide: TrainedLDM) -> str | None:
    """Why two velocities, or their labels, do not mean the same."""
    ours, theirs = trained.config.latent_shape, guide.config.latent_shape
    if ours != theirs:
        return f"makes latents {theirs}, not {ours}"
    ours, theirs = trained.config.class_token_width, guide.config.class_token_width
    if ours != theirs:
        return f"generates {_token(theirs)} beside the latent, not {_token(ours)} (--reg-coeff)"
    if guide.vae_checksum != trained.vae_checksum:
        return "was trained on latents of another VAE"
    if guide.path_type != trained.path_type:
        return f"was trained on the {guide.path_type} path, not {trained.path_type}"
    if guide.class_names != trained.class_names:
        return "has other classes"
    if None not in (checksums := (guide.statistics_checksum, trained.statistics_checksum)):
        is_same = checksums[0] == checksums[1]
    else:  # older runs do not say
        is_same = len({run.load_autoencoder().statistics.checksum() for run in (guide, trained)}) == 1
    return None if is_same else "was trained on latents that other statistics normalise"


def _token(width: int) -> str:
    return f"a class token of {width}" if width else "nothing"


def _checkpoints(folder: Path, weights: str) -> dict[int, Checkpoint]:
    """Those that hold the weights, whole ones and milestones or else snapshots, by step, newest first."""
    places, is_posthoc = CheckpointFolder(folder), posthoc_length(weights) is not None
    pattern = f"{POSTHOC}*.safetensors" if is_posthoc else f"{weights}.safetensors"
    found = {}
    for place in (places.snapshots,) if is_posthoc else (places.milestones, places.whole):
        for path in place.glob("[0-9]*") if place.is_dir() else ():
            if path.name.isdigit() and any(path.glob(pattern)):
                found[int(path.name)] = PosthocCheckpoint(path, weights) if is_posthoc else Checkpoint(path)
    return dict(sorted(found.items(), reverse=True))


def _finished_at(folder: Path, checkpoints: Mapping[int, Checkpoint]) -> int:
    """The last step of a finished run."""
    try:
        status = status_of(folder) or {}
        state, step, steps = status.get("state", "not started"), status.get("step"), status.get("max_train_steps")
    except ValueError as error:
        raise UserError(f"{folder / 'status.json'} is damaged ({error}); choose with --train-steps") from error
    if state != "finished":
        at = "" if step is None else f", at step {step} of {steps}"
        raise UserError(
            f"{folder} is not finished ({state}{at}): run the same training command again, or choose a checkpoint "
            f"with --train-steps; there are: {_listed(checkpoints)}"
        )
    return step


def _newest_good(folder: Path, checkpoints: Mapping[int, Checkpoint], weights: str, report: Callable) -> Checkpoint:
    damaged = []
    for checkpoint in checkpoints.values():
        fault = checkpoint.fault(weights)
        if fault is None:
            for message in damaged:
                report(message)
            return checkpoint
        damaged.append(f"{checkpoint.folder} is damaged ({fault})")
    if damaged:
        raise UserError(f"{damaged[0]}, and no other checkpoint is intact; copy the run again")
    raise _without_weights(folder, weights)


def _at_step(folder: Path, step: int, checkpoints: Mapping[int, Checkpoint], weights: str) -> Checkpoint:
    if not checkpoints:
        raise _without_weights(folder, weights)
    if step not in checkpoints:
        raise UserError(
            f"--train-steps {step}: {folder} has no checkpoint of that step with --weights {weights}; there are: "
            f"{_listed(checkpoints)}"
        )
    if fault := checkpoints[step].fault(weights):
        raise UserError(f"--train-steps {step}: {checkpoints[step].folder} is damaged ({fault}); choose another")
    return checkpoints[step]


def _without_weights(folder: Path, weights: str) -> UserError:
    places = CheckpointFolder(folder)
    files = (path for place in (places.whole, places.milestones) for path in place.glob("[0-9]*/*.safetensors"))
    others = sorted({path.stem for path in files if path.stem in (MAIN, MODEL) or path.stem.startswith(FURTHER)})
    if any(places.snapshots.glob(f"[0-9]*/{POSTHOC}*.safetensors")):
        others.append(f"{POSTHOC}X with any X")
    if others:
        there = " or ".join(others)
        return UserError(f"--weights {weights}: no checkpoint of {folder} holds them; take --weights {there}")
    return UserError(f"{folder} has no checkpoints with a diffusion model; give the folder of a train_ldm.py run")


def _listed(checkpoints: Mapping[int, Checkpoint]) -> str:
    return ", ".join(map(str, sorted(checkpoints))) or "none"


def _describe(folder: Path, checkpoint: Checkpoint, weights: str) -> TrainedLDM:
    manifest = checkpoint.manifest()
    arguments = manifest["args"]
    try:
        check(arguments, _Arguments)
        config = denoiser_config(arguments["denoiser"])
        trained = TrainedLDM(
            folder=folder,
            checkpoint=checkpoint,
            weights=weights,
            config=config,
            path_type=arguments["path_type"],
            class_names=arguments["class_names"],
            resolution=arguments["resolution"],
            vae_checksum=arguments["vae_checksum"],
            statistics_checksum=arguments.get("statistics_checksum"),
            checksum=checkpoint.checksum(weights),
            vae_config=arguments.get("vae_config"),
            cfg_prob=arguments.get("cfg_prob", 0.1),
            time_shift=arguments.get("time_shift", 1.0),
            path_drop=arguments.get("path_drop") or 0.0,
            learned_guidance=learned_guidance(arguments),
        )
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(
            f"{checkpoint.folder} does not say how its diffusion model was trained ({error} in manifest.json); "
            "give the folder of a train_ldm.py run"
        ) from error
    if len(trained.class_names) != config.num_classes:
        raise UserError(
            f"{checkpoint.folder}: manifest.json names {len(trained.class_names)} classes for a denoiser with "
            f"{config.num_classes}; it is damaged"
        )
    return trained
