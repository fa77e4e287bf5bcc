"""Checkpoints of diffusion transformers: which network they hold, by its tensors, and what they say of it.

::

    last.pt (REPA)          the averaged weights alone
    0400000.pt (REPA)       model, ema, opt, args (an argparse.Namespace), steps
    0400000.pt (REPA-E)     the same, and vae, discriminator, opt_vae, opt_disc where the VAE was trained along

Their networks hold REPA's projectors, ``projectors.N.…``, here kept apart from the denoiser (``loss.alignment``).
REPA-E's hold the latent statistics too, as ``bn.running_mean`` and ``bn.running_var``. REPA's first checkpoints call
the blocks after ``encoder_depth`` ``decoder_blocks``, counted from 0. Internal guidance's SiT and LightningDiT (arXiv
2512.24176) have a second output, ``final_layer_xr``, after ``encoder_depth``. What is LightningDiT's alone is in
``formats.lightningdit``, what is RAE's and diffusion-bench's in ``formats.ddt``, JiT's in ``formats.jit``, Decoupled
MeanFlow's in ``formats.flow_map``; wherever SiT is said below, theirs are meant too.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from diffusion import PATH_TYPES
from errors import UserError
from formats import ddt, jit
from formats.flow_map import LOG_VARIANCE, THEIR_DEPTH, THEIR_GUIDANCE, flow_map_config, own_model
from formats.lightningdit import ROTARY, check_rotary, facts_of, is_lightningdit, step_of
from formats.statistics import batch_norm_statistics
from loss.alignment import DenoiserAlignments, TokenGrid
from loss.alignment.repa import REPA
from models.denoisers import Denoiser
from models.denoisers.config import PREDICTIONS, JiTConfig, LightningDiTConfig, SiTConfig, TransformerConfig
from models.latent_statistics import LatentStatistics
from models.weight_files import NotWeightsError, check_plain, check_values, read_contents, tensors_by_name

State = dict[str, torch.Tensor]

PROJECTORS, BATCH_NORM = "projectors.", "bn."  # what of their networks is none of ours
BESIDE = (BATCH_NORM, ROTARY, LOG_VARIANCE)
REPA_PREFIX = "repa."  # of REPA's projectors among ``loss.alignment.DenoiserAlignments``
SOURCES = "REPA, REPA-E, LightningDiT, RAE, diffusion-bench, JiT or Decoupled MeanFlow"
GUIDE, THEIR_GUIDE = "guide_layer.", "final_layer_xr."  # the second output, of ours and of internal guidance's
GUIDE_DEPTH, GUIDE_COEFF = 8, 0.5  # of all its configurations; its SiT's are built so whatever their args say
WRAPPERS = ("module.", "_orig_mod.", jit.PREFIX)  # of DDP, torch.compile and JiT
# What REPA's and REPA-E's flags say of a network or of how it is sampled; the rest of args is nobody's concern here.
FACTS = (
    *("model", "num_classes", "encoder_depth", "qk_norm", "resolution", "path_type", "prediction", "cfg_prob"),
    *("enc_type", "vae", "vae_ckpt", THEIR_DEPTH, *THEIR_GUIDANCE),
)
FINITE = ("cfg_prob", "time_mean", "time_std")
NUMBERS = ("num_classes", "encoder_depth", "resolution", THEIR_DEPTH)  # of these; whole ones
_COMPARED = tuple(name for name in FACTS if name != "vae_ckpt")  # a path may be written in several ways
FROZEN = "pos_embed"  # of their parameters
AVERAGES = ("exp_avg", "exp_avg_sq")  # of AdamW, for each parameter
READ_SHAPES = {"x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2}  # dimensions


@dataclass(frozen=True)
class Projectors:
    """Sizes of REPA's projectors, in the words of a run's arguments.

    Attributes:
        feature_widths: of the VFMs, one projector each.
        projector_width: of the hidden layers; None where there are no projectors.
        encoder_depth: the block that they follow, from 1; None where it is not known.
    """

    feature_widths: tuple[int, ...] = ()
    projector_width: int | None = None
    encoder_depth: int | None = None


@dataclass(frozen=True)
class SiTWeights:
    """One set of weights of a checkpoint.

    Attributes:
        denoiser: of the network that :attr:`SiTCheckpoint.config` builds.
        alignment: of ``loss.alignment.DenoiserAlignments``: REPA's projectors.
        statistics: of the latents it was trained on, or None where the checkpoint does not hold them.
    """

    denoiser: State
    alignment: State
    statistics: LatentStatistics | None


@dataclass(frozen=True)
class SiTCheckpoint:
    """What a checkpoint of one of :data:`SOURCES` holds.

    Attributes:
        path: of the file.
        config: of the network, by its tensors.
        projectors: apart from it, by their tensors; ``encoder_depth`` by the flags of its training.
        weights: by name, ``"ema"`` and ``"model"``, or one of them alone.
        facts: what the flags of its training say (of ``FACTS``), as far as they are known.
        step: it was trained for, or None.
        says_all: whether its training's flags are in it, so that no ``args.json`` need lie next to it.
        holds_vae: whether the VAE is in the file.
        optimizer: AdamW's state dict as torch saved it, or None.
        optimizer_names: of the parameters that AdamW's numbers stand for, in their order.
    """

    path: Path
    config: TransformerConfig
    projectors: Projectors
    weights: dict[str, SiTWeights]
    facts: dict[str, object]
    step: int | None
    says_all: bool
    holds_vae: bool
    optimizer: dict | None
    optimizer_names: tuple[str, ...]

    @property
    def is_of_pixels(self) -> bool:
        """Whether it was trained without a VAE."""
        return isinstance(self.config, JiTConfig) or ddt.is_of_pixels(self.config)

    @cached_property
    def moments(self) -> dict[str, dict[str, torch.Tensor]] | None:
        """AdamW's state (``step``, ``exp_avg``, ``exp_avg_sq``) by the parameter's name; None where there is none.

        Names are those of :attr:`SiTWeights.denoiser` and :attr:`SiTWeights.alignment`.

        torch numbers parameters as ``model.parameters()`` yields them, which is the order of the state dict without its
        buffers. Theirs begins with ``pos_embed``, a frozen parameter: it has a number and no state.
        """
        if self.optimizer is None:
            return None
        try:
            numbers = [number for group in self.optimizer["param_groups"] for number in group["params"]]
            state = {number: self.optimizer["state"].get(number) for number in numbers}
        except (KeyError, TypeError, AttributeError) as error:
            raise self._damaged(f"its optimizer is not a state dict of AdamW ({error!r})") from error
        names = self.optimizer_names
        if self.config.flow_map_blocks and len(numbers) < len(names):  # theirs has none of what is frozen
            names = [name for name in names if name != FROZEN]
        if len(numbers) != len(names):
            raise self._damaged(f"its optimizer has {len(numbers)} parameters, its model {len(names)}")
        weights = self.weights["model"].denoiser | self.weights["model"].alignment
        found = {name: state[number] for name, number in zip(names, numbers, strict=True)
                 if state[number] is not None and name in weights and name != FROZEN}  # fmt: skip
        for name, moments in found.items():
            self._check_moments(name, moments, weights[name])
        return found

    @property
    def adamw(self) -> dict[str, object]:
        """AdamW's ``betas``, ``eps`` and ``weight_decay``; the usual ones where the checkpoint holds no optimizer."""
        try:
            group = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
            group = group if self.optimizer is None else self.optimizer["param_groups"][0]
            beta1, beta2 = map(float, group["betas"])
            return {"betas": (beta1, beta2), "eps": float(group["eps"]), "weight_decay": float(group["weight_decay"])}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self._damaged(f"its optimizer is not a state dict of AdamW ({error!r})") from error

    def _check_moments(self, name: str, moments: object, weight: torch.Tensor) -> None:
        """A parameter's state is AdamW's: a number of steps and two averages of the weight's shape."""
        for key in AVERAGES:
            average = moments.get(key) if isinstance(moments, dict) else None
            if not isinstance(average, torch.Tensor):
                raise self._damaged(f"its optimizer's state of {name} has no {key}")
            if average.shape != weight.shape:
                shapes = f"has shape {tuple(average.shape)}, the weight {tuple(weight.shape)}"
                raise self._damaged(f"its optimizer's state of {name} {shapes}")
            try:
                check_plain(key, average)
            except NotWeightsError as error:
                raise self._damaged(f"its optimizer's state of {name}: {error}") from error
        step = moments.get("step")
        if not isinstance(step, int | float | torch.Tensor) or (isinstance(step, torch.Tensor) and step.numel() != 1):
            raise self._damaged(f"its optimizer's state of {name} has no step")

    def _damaged(self, fault: str) -> UserError:
        return UserError(f"{self.path}: {fault}; it is damaged or of another code")


def read_sit(
    path: str | Path,
    given: str,
    json_facts: Mapping | None = None,
    flow_map_blocks: int | None = None,
    prediction: str | None = None,
) -> SiTCheckpoint:
    """Read a checkpoint of SiT weights in the public layout.

    Args:
        path: a .pt or .safetensors file.
        given: what the user gave it with, for messages, e.g. ``SOURCE last.pt``.
        json_facts: content of the ``args.json`` next to it.
        flow_map_blocks, prediction: as the user says, where neither says it.

    Raises:
        UserError: not readable, no SiT, none that this project builds, or flags that contradict its tensors.
    """
    path = Path(path)
    try:
        contents = read_contents(path)
    except NotWeightsError as error:
        raise UserError(f"{given} is not readable as a checkpoint ({error})") from error
    sets = _weight_sets(contents, given)
    facts = _facts(contents, json_facts, given)
    found, sizes = {}, {}
    for name, state in sets.items():
        plain, legacy_depth = rename_legacy_blocks(_unwrapped(state, given))
        if ddt.has_wide_head(plain):
            config, projectors = ddt.wide_head_config(plain, given, prediction), Projectors()
            ddt.check_tables(plain, config, given)
            networks = ddt.own_names(plain, config, given)
            facts |= ddt.facts_of(config)
        elif jit.is_jit(plain):
            config, projectors = jit.jit_config(plain, given), Projectors()
            facts = jit.OF_ALL | facts
            scale = jit.noise_scale(facts, config, given)
            networks, statistics = jit.own_tensors(plain, scale), jit.statistics_of(config.latent_channels, scale)
        else:
            networks = _without_empty_projectors(plain)
            config, projectors = infer_sizes(networks, given, legacy_depth or facts.get("encoder_depth"))
            facts |= {"guide_coeff": GUIDE_COEFF} if config.guide_depth else {}
        config = flow_map_config(config, plain, facts, flow_map_blocks, given)
        sizes[name] = config, projectors
        if isinstance(config, LightningDiTConfig):
            check_rotary(plain, config, given)
        _check_fits(networks, config, projectors, given)
        denoiser = {key: tensor for key, tensor in networks.items() if not key.startswith(PROJECTORS)}
        alignment = {f"{REPA_PREFIX}{key}": tensor for key, tensor in networks.items() if key.startswith(PROJECTORS)}
        if not isinstance(config, JiTConfig):
            statistics = _batch_norm(plain, config.latent_channels, given)
        found[name] = SiTWeights(denoiser, alignment, statistics)
    if len(set(sizes.values())) > 1:
        raise UserError(f"{given}: ema and model are networks of different shapes; the file is damaged")
    config, projectors = next(iter(sizes.values()))
    _check_facts(facts, config, projectors, given)
    is_whole = isinstance(contents.get("opt"), dict) and "model" in found
    step = contents.get("steps", contents.get("step", step_of(path) if "config" in contents else None))
    return SiTCheckpoint(
        path=path,
        config=config,
        projectors=projectors,
        weights=found,
        facts=facts,
        step=step if isinstance(step, int) and step >= 0 else None,
        says_all="config" in contents,
        holds_vae=isinstance(contents.get("vae"), dict),
        optimizer=contents["opt"] if is_whole else None,
        optimizer_names=_parameter_names(sets["model"], given) if is_whole else (),
    )


def infer_sizes(
    state: Mapping[str, torch.Tensor], given: str, encoder_depth: int | None = None
) -> tuple[TransformerConfig, Projectors]:
    """Which network a state dict in the public layout belongs to, by names and shapes; meta tensors suffice.

    Args:
        state: without ``bn.…`` and ``feat_rope.…``, blocks under their present names.
        given: for messages.
        encoder_depth: where it is known; no tensor tells it.

    Raises:
        UserError: it is none that is known here.
    """
    for name, ndim in READ_SHAPES.items():
        if name not in state:
            raise UserError(f"{given} holds no SiT in the public layout ({name!r}, first names {_some(state)})")
        if state[name].ndim != ndim:
            raise UserError(f"{given}: {name} has {state[name].ndim} dimensions instead of {ndim}; the file is damaged")
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    tokens, rows = state["pos_embed"].shape[1], len(state["y_embedder.embedding_table.weight"])
    depth = 1 + max((int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", key) for key in state) if m), default=-1)
    kind = LightningDiTConfig if is_lightningdit(state) else SiTConfig
    model = kind.name_of(depth, width, patch)
    if model is None:
        raise UserError(
            f"{given}: a {kind.kind} of {depth} blocks of width {width} with patch {patch} is none that is known "
            f"({kind.sizes_in_words()})"
        )
    grid = round(tokens**0.5)
    if grid * grid != tokens:
        raise UserError(f"{given}: pos_embed has {tokens} tokens, which is not a square")
    config = kind(
        model=model,
        latent_channels=channels,
        latent_size=grid * patch,
        num_classes=rows - 1,
        qk_norm="blocks.0.attn.q_norm.weight" in state,
        guide_depth=_guide_depth(kind, state, encoder_depth, depth, given),
    )
    numbers = sorted({int(m[1]) for m in (re.match(r"projectors\.(\d+)\.", key) for key in state) if m})
    widths = tuple(len(state[f"projectors.{n}.4.bias"]) for n in numbers if f"projectors.{n}.4.bias" in state)
    hidden = len(state["projectors.0.0.bias"]) if "projectors.0.0.bias" in state else None
    return config, Projectors(widths, hidden if widths else None, encoder_depth)


def _guide_depth(kind: type[TransformerConfig], state: Mapping, said: int | None, blocks: int, given: str) -> int:
    """Of a network with a second output: what LightningDiT's configuration says, or the same for all SiTs."""
    if f"{GUIDE}linear.weight" not in state:
        return 0
    depth = said if kind is LightningDiTConfig and said else GUIDE_DEPTH
    if not 0 < depth < blocks:
        raise UserError(
            f"{given} has internal guidance after block {depth} and {blocks} blocks: it is none that is known"
        )
    return depth


def build_networks(config: TransformerConfig, projectors: Projectors) -> tuple[Denoiser, DenoiserAlignments]:
    """Denoiser and alignment on the meta device, for weights to be assigned.

    Raises:
        UserError: they do not fit together.
    """
    vfms = [TokenGrid(f"VFM {n}", config.grid, width) for n, width in enumerate(projectors.feature_widths)]
    with torch.device("meta"):
        denoiser, parts = config.build(), {}
        if vfms:  # depth and weight have nothing to do with tensors
            parts["repa"] = REPA(denoiser, vfms, projectors.encoder_depth or 1, projectors.projector_width or 1, 0.0)
        return denoiser, DenoiserAlignments(parts)


def rename_legacy_blocks(state: Mapping[str, torch.Tensor]) -> tuple[State, int | None]:
    """REPA's first layout → the present one: ``decoder_blocks.i`` follow the ``blocks``.

    Returns:
        the state dict in the same order, and ``encoder_depth`` where the layout was the old one.
    """
    if not any(key.startswith("decoder_blocks.") for key in state):
        return dict(state), None
    first = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=-1)

    def name(key: str) -> str:
        match = re.match(r"decoder_blocks\.(\d+)\.(.*)", key)
        return f"blocks.{int(match[1]) + first}.{match[2]}" if match else key

    return {name(key): tensor for key, tensor in state.items()}, first


def _weight_sets(contents: object, given: str) -> dict[str, State]:
    """The state dicts in a file, under ``ema`` and ``model``; a bare one counts as ``ema``."""
    if not isinstance(contents, dict):
        raise UserError(f"{given} holds a {type(contents).__name__}, not SiT weights")
    nested = jit.weight_sets(contents)
    if nested is None:
        nested = {name: contents[name] for name in ("ema", "model") if isinstance(contents.get(name), dict)}
    sets = nested or {"ema": {key: value for key, value in contents.items() if isinstance(value, torch.Tensor)}}
    for name, state in sets.items():
        if not isinstance(state, dict):
            raise UserError(f"{given} holds no weights ({name}), but a {type(state).__name__}; the file is damaged")
        if not any(str(key).endswith(("x_embedder.proj.weight", jit.PATCHES)) for key in state):
            raise UserError(f"{given} {_what_instead(contents, state)}; give a checkpoint of {SOURCES}")
        try:
            tensors_by_name(state)
        except NotWeightsError as error:
            raise UserError(f"{given}: {error}") from error
        scalar = next((key for key, tensor in state.items() if key.endswith(".bias") and tensor.ndim != 1), None)
        if scalar is not None:
            raise UserError(f"{given}: {scalar} has {state[scalar].ndim} dimensions instead of 1; the file is damaged")
    return sets


def _what_instead(contents: Mapping, state: Mapping) -> str:
    """What a file holds that holds no SiT."""
    if not state:
        parts = ", ".join(map(str, list(contents)[:4])) or "nothing"
        return f"holds no weights, but {parts}"
    if any(str(key).startswith(("encoder.", "decoder.", "first_stage_model.")) for key in state):
        return "holds a VAE, not a SiT"
    return f"holds no SiT (first names {_some(state)})"


def _facts(contents: dict, json_facts: Mapping | None, given: str) -> dict[str, object]:
    """The flags of the training, of the file and of ``args.json``, which must agree."""
    kept = contents.get("args")
    kept = kept if isinstance(kept, dict) else vars(kept) if hasattr(kept, "__dict__") else {}
    facts = {name: kept[name] for name in FACTS if kept.get(name) is not None} | jit.facts_of(kept)
    if isinstance(contents.get("config"), dict):
        facts |= facts_of(contents["config"], given)
    for name in FACTS:
        value = (json_facts or {}).get(name)
        if value is None:
            continue
        if name in _COMPARED and facts.get(name, value) != value:
            raise UserError(
                f"{given}: args.json says {name} {value}, the checkpoint {facts[name]}: they do not belong together; "
                "copy its own args.json next to it"
            )
        facts[name] = value
    if "model" in facts:
        facts["model"] = own_model(facts["model"])
    for name, value in facts.items():
        if name in NUMBERS and not isinstance(value, int):
            raise UserError(f"{given}: its args say {name} {value!r}, which is not a whole number")
        if not isinstance(value, str | int | float):
            raise UserError(f"{given}: its args say {name} {type(value).__name__}, which is neither number nor text")
        if name in FINITE and not (isinstance(value, int | float) and math.isfinite(value)):
            raise UserError(f"{given}: its args say {name} {value!r}, which is not a number")
        if name == "time_std" and value <= 0:
            raise UserError(f"{given}: its args say {name} {value!r}, which is not above 0")
    return facts


def _check_facts(facts: Mapping, config: TransformerConfig, projectors: Projectors, given: str) -> None:
    """What the flags of the training say must be what the tensors say."""
    if facts.get("cfg_prob") == 0:
        raise UserError(
            f"{given} was trained without dropping labels (cfg_prob 0): it has no null class, which this project's SiT "
            "needs"
        )
    by_tensors = {name: getattr(config, name) for name in ("model", "qk_norm", "num_classes")}
    by_tensors["encoder_depth"] = projectors.encoder_depth  # the old layout tells it
    encoders = [name for name in str(facts.get("enc_type", "None")).split(",") if name != "None"]
    if encoders and len(encoders) != len(projectors.feature_widths):
        raise UserError(
            f"{given}: enc_type {facts['enc_type']} names {len(encoders)} encoders, the checkpoint has "
            f"{len(projectors.feature_widths)} projectors: args and weights do not belong together"
        )
    if match := re.fullmatch(r"f(\d+)d(\d+)\S*", str(facts.get("vae"))):
        if int(match[2]) != config.latent_channels:
            by_tensors["vae"] = f"{config.latent_channels} latent channels"
        by_tensors["resolution"] = config.latent_size * int(match[1])
    for name, value in by_tensors.items():
        if name in facts and facts[name] != value:
            raise UserError(
                f"{given}: its args say {name} {facts[name]}, its weights {value}: they do not belong together"
            )
    if facts.get("path_type", PATH_TYPES[0]) not in PATH_TYPES:
        raise UserError(f"{given}: path_type {facts['path_type']} is none of {', '.join(PATH_TYPES)}")
    if (said := facts.get("prediction", config.prediction)) != config.prediction:
        raise UserError(
            f"{given}: it predicts {said}; of {config.model} on {config.latent_channels} channels only "
            f"{PREDICTIONS[config.prediction]} ({config.prediction}) is known here"
        )


def _unwrapped(state: Mapping[str, torch.Tensor], given: str) -> State:
    """Names without what DDP and torch.compile put before them."""
    plain = {_unwrap(key): tensor for key, tensor in state.items()}
    if len(plain) < len(state):
        twice = next(key for key in plain if sum(_unwrap(name) == key for name in state) > 1)
        raise UserError(f"{given}: {twice} is there under two names; the file is of another code")
    return plain


def _unwrap(key: str) -> str:
    for prefix in WRAPPERS * 2:
        key = key.removeprefix(prefix)
    return GUIDE + key.removeprefix(THEIR_GUIDE) if key.startswith(THEIR_GUIDE) else key


def _parameter_names(state: Mapping[str, torch.Tensor], given: str) -> tuple[str, ...]:
    """Present names of the parameters, in the order of the state dict."""
    renamed, _ = rename_legacy_blocks(_unwrapped(state, given))
    renamed = {key: tensor for key, tensor in renamed.items() if not key.startswith((BATCH_NORM, ROTARY))}
    return tuple(f"{REPA_PREFIX}{key}" if key.startswith(PROJECTORS) else key for key in renamed)


def _without_empty_projectors(state: State) -> State:
    """The networks' tensors. Trained without an encoder, REPA-E builds a projector to width 0; it is of no use."""
    empty = [key.removesuffix("4.bias") for key, tensor in state.items() if key.endswith(".4.bias") and not len(tensor)]
    return {key: tensor for key, tensor in state.items() if not key.startswith((*BESIDE, *empty))}


def _batch_norm(state: Mapping[str, torch.Tensor], channels: int, given: str) -> LatentStatistics | None:
    """The statistics that REPA-E keeps in the SiT, its var as it is: latents are normalised to the same numbers."""
    try:
        found = batch_norm_statistics(state, given)
        if found is None:
            return None
        statistics = LatentStatistics(channels)
        found.load_into(statistics)
    except NotWeightsError as error:
        raise UserError(f"{given}: its BatchNorm of latents (bn): {error}") from error
    return statistics


def _check_fits(state: State, config: TransformerConfig, projectors: Projectors, given: str) -> None:
    """Names and shapes must be exactly those of the networks."""
    try:
        denoiser, alignment = build_networks(config, projectors)
    except UserError as error:
        raise UserError(f"{given}: {str(error).removeprefix('--')}") from error
    expected = denoiser.state_dict()
    expected |= {key.removeprefix(REPA_PREFIX): tensor for key, tensor in alignment.state_dict().items()}
    final = state.get("final_layer.linear.bias")
    if final is not None and len(final) == 2 * len(expected["final_layer.linear.bias"]):
        raise UserError(
            f"{given}: its last layer predicts a variance too, as the original SiT and DiT do; only networks that "
            "predict the velocity alone are known here"
        )
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    misshapen = [key for key, tensor in state.items() if key in expected and tensor.shape != expected[key].shape]
    for what, keys in (("lacks", missing), ("has in addition", unexpected), ("has in another shape", misshapen)):
        if keys:
            raise UserError(f"{given} is not a complete {config.model}: it {what} {', '.join(keys[:3])}")
    try:
        check_values(state, expected)
    except NotWeightsError as error:
        raise UserError(f"{given}: {error}") from error


def _some(state: Mapping) -> str:
    return ", ".join(map(str, list(state)[:3])) or "none"
