"""SiT checkpoints of REPA and REPA-E: which network they hold, by its tensors, and what they say of its training.

::

    last.pt (REPA)          the averaged weights alone
    0400000.pt (REPA)       model, ema, opt, args (an argparse.Namespace), steps
    0400000.pt (REPA-E)     the same, and vae, discriminator, opt_vae, opt_disc where the VAE was trained along

REPA-E's SiT holds the latent statistics too, as ``bn.running_mean`` and ``bn.running_var``. REPA's first checkpoints
call the blocks after ``encoder_depth`` ``decoder_blocks``, counted from 0.
"""

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from diffusion.flow import PATH_TYPES
from errors import UserError
from formats.statistics import REPA_CHANNELS, batch_norm_statistics, repa_statistics
from models.denoisers.sit import PATCH_SIZES, SIT_SIZES, SiT, SiTConfig
from models.weight_files import NotWeightsError, check_values, read_contents, tensors_by_name

State = dict[str, torch.Tensor]

DEFAULT_ENCODER_DEPTH = 8  # of REPA and REPA-E; no tensor tells it
REPAE_VAES, REPAE_PROJECTOR_WIDTH = ("f8d4", "f16d32"), 2048
BATCH_NORM_PREFIX = "bn."
WRAPPERS = ("module.", "_orig_mod.")  # of DDP and torch.compile
# What REPA's and REPA-E's flags say of a network or of how it is sampled; the rest of args is nobody's concern here.
FACTS = (
    *("model", "num_classes", "encoder_depth", "qk_norm", "resolution", "path_type", "prediction", "cfg_prob"),
    *("enc_type", "vae", "vae_ckpt"),
)
NUMBERS = ("num_classes", "encoder_depth", "resolution")  # of these; whole ones
_COMPARED = tuple(name for name in FACTS if name != "vae_ckpt")  # a path may be written in several ways
AVERAGES = ("exp_avg", "exp_avg_sq")  # of AdamW, for each parameter
READ_SHAPES = {"x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2}  # dimensions


class Statistics(NamedTuple):
    """Mean and standard deviation by which latents were normalised, each float32 ``[C]``."""

    mean: torch.Tensor
    std: torch.Tensor


@dataclass(frozen=True)
class SiTWeights:
    """One set of weights of a checkpoint.

    Attributes:
        state: of ``models.denoisers.sit.SiT``, with projectors.
        statistics: of the latents it was trained on, or None where the checkpoint does not hold them.
    """

    state: State
    statistics: Statistics | None


@dataclass(frozen=True)
class SiTCheckpoint:
    """What a checkpoint of REPA or REPA-E holds.

    Attributes:
        path: of the file.
        config: of the SiT, by its tensors; ``encoder_depth`` by the flags of its training.
        weights: by name, ``"ema"`` and ``"model"``, or ``"ema"`` alone.
        facts: what the flags of its training say (of ``FACTS``), as far as they are known.
        step: it was trained for, or None.
        holds_vae: whether the VAE is in the file.
        optimizer: AdamW's state dict as torch saved it, or None.
        optimizer_names: of the parameters that AdamW's numbers stand for, in their order.
    """

    path: Path
    config: SiTConfig
    weights: dict[str, SiTWeights]
    facts: dict[str, object]
    step: int | None
    holds_vae: bool
    optimizer: dict | None
    optimizer_names: tuple[str, ...]

    @cached_property
    def moments(self) -> dict[str, dict[str, torch.Tensor]] | None:
        """AdamW's state (``step``, ``exp_avg``, ``exp_avg_sq``) by the parameter's name; None where there is none.

        torch numbers parameters as ``model.parameters()`` yields them, which is the order of the state dict without its
        buffers. Theirs begins with ``pos_embed``, a frozen parameter: it has a number and no state.
        """
        if self.optimizer is None:
            return None
        try:
            numbers = [number for group in self.optimizer["param_groups"] for number in group["params"]]
            state = {number: self.optimizer["state"].get(number) for number in numbers}
        except (KeyError, TypeError, AttributeError) as error:
            raise self._damaged(f"its optimizer is no state dict of AdamW ({error!r})") from error
        if len(numbers) != len(self.optimizer_names):
            raise self._damaged(f"its optimizer has {len(numbers)} parameters, its model {len(self.optimizer_names)}")
        weights = self.weights["model"].state
        found = {name: state[number] for name, number in zip(self.optimizer_names, numbers, strict=True)
                 if state[number] is not None and name in weights and name != "pos_embed"}  # fmt: skip
        for name, moments in found.items():
            self._check_moments(name, moments, weights[name])
        return found

    def _check_moments(self, name: str, moments: object, weight: torch.Tensor) -> None:
        """A parameter's state is AdamW's: a number of steps and two averages of the weight's shape."""
        for key in AVERAGES:
            average = moments.get(key) if isinstance(moments, dict) else None
            if not isinstance(average, torch.Tensor):
                raise self._damaged(f"its optimizer's state of {name} has no {key}")
            if average.shape != weight.shape:
                raise self._damaged(
                    f"its optimizer's state of {name} has shape {tuple(average.shape)}, the weight "
                    f"{tuple(weight.shape)}"
                )
        step = moments.get("step")
        if not isinstance(step, int | float | torch.Tensor) or (isinstance(step, torch.Tensor) and step.numel() != 1):
            raise self._damaged(f"its optimizer's state of {name} has no step")

    def _damaged(self, fault: str) -> UserError:
        return UserError(f"{self.path}: {fault}; it is damaged or of another code")


def read_sit(path: str | Path, given: str, json_facts: Mapping | None = None) -> SiTCheckpoint:
    """Read a checkpoint of SiT weights in the public layout.

    Args:
        path: a .pt or .safetensors file.
        given: what the user gave it with, for messages, e.g. ``--ckpt last.pt``.
        json_facts: content of the ``args.json`` beside it.

    Raises:
        UserError: not readable, no SiT, none that this project builds, or flags that contradict its tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{given}: no such file; give a SiT checkpoint, .pt or .safetensors")
    try:
        contents = read_contents(path)
    except NotWeightsError as error:
        raise UserError(f"{given} is not readable as a checkpoint ({error})") from error
    sets = _weight_sets(contents, given)
    facts = _facts(contents, json_facts, given)
    found, configs = {}, {}
    for name, state in sets.items():
        plain, legacy_depth = rename_legacy_blocks(_unwrapped(state))
        sit = {key: tensor for key, tensor in plain.items() if not key.startswith(BATCH_NORM_PREFIX)}
        config = infer_config(sit, given, facts, legacy_depth)
        sit = _without_empty_projectors(sit)
        _check_fits(sit, config, given)
        found[name], configs[name] = SiTWeights(sit, _batch_norm(plain, config.latent_channels, given)), config
    if len(set(configs.values())) > 1:
        raise UserError(f"{given}: ema and model are networks of different shapes; the file is damaged")
    config = next(iter(configs.values()))
    _check_facts(facts, config, given)
    is_whole = isinstance(contents.get("opt"), dict) and "model" in found
    return SiTCheckpoint(
        path=path,
        config=config,
        weights=found,
        facts=facts,
        step=contents["steps"] if isinstance(contents.get("steps"), int) else None,
        holds_vae=isinstance(contents.get("vae"), dict),
        optimizer=contents["opt"] if is_whole else None,
        optimizer_names=_parameter_names(sets["model"]) if is_whole else (),
    )


def infer_config(
    state: Mapping[str, torch.Tensor], given: str, facts: Mapping | None = None, legacy_depth: int | None = None
) -> SiTConfig:
    """Which SiT a state dict in the public layout belongs to, by names and shapes; meta tensors suffice.

    Args:
        state: without ``bn.…``, blocks under their present names.
        given: for messages.
        facts: the flags of its training; only ``encoder_depth`` is taken from them.
        legacy_depth: ``encoder_depth`` where the names told it.
    """
    for name, ndim in READ_SHAPES.items():
        if name not in state:
            raise UserError(f"{given} holds no SiT in the public layout ({name!r}, first names {_some(state)})")
        if state[name].ndim != ndim:
            raise UserError(f"{given}: {name} has {state[name].ndim} dimensions instead of {ndim}; the file is damaged")
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    tokens, rows = state["pos_embed"].shape[1], len(state["y_embedder.embedding_table.weight"])
    depth = 1 + max((int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", key) for key in state) if m), default=-1)
    names = [name for name, size in SIT_SIZES.items() if (size.depth, size.width) == (depth, width)]
    if not names or patch not in PATCH_SIZES:
        known = ", ".join(f"{name} {size.depth} × {size.width}" for name, size in SIT_SIZES.items())
        raise UserError(
            f"{given}: a SiT of {depth} blocks of width {width} with patch {patch} is none that is known ({known}, "
            f"patch {', '.join(map(str, PATCH_SIZES))})"
        )
    grid = round(tokens**0.5)
    if grid * grid != tokens:
        raise UserError(f"{given}: pos_embed has {tokens} tokens, which is no square")
    projectors = sorted({int(m[1]) for m in (re.match(r"projectors\.(\d+)\.", key) for key in state) if m})
    dims = tuple(len(state[f"projectors.{n}.4.bias"]) for n in projectors if f"projectors.{n}.4.bias" in state)
    depth_said = (facts or {}).get("encoder_depth")
    config = SiTConfig(
        model=f"SiT-{names[0]}/{patch}",
        latent_channels=channels,
        latent_size=grid * patch,
        num_classes=rows - 1,
        qk_norm="blocks.0.attn.q_norm.weight" in state,
        encoder_depth=legacy_depth or depth_said or min(DEFAULT_ENCODER_DEPTH, depth),
        feature_dims=tuple(dim for dim in dims if dim),
    )
    if config.feature_dims and "projectors.0.0.bias" in state:
        config = replace(config, projector_width=len(state["projectors.0.0.bias"]))
    return config


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


def assumed_statistics(config: SiTConfig) -> Statistics | None:
    """REPA's, for a SiT on Stable Diffusion's latents that holds none; None for other channels."""
    if config.latent_channels != REPA_CHANNELS:
        return None
    assumed = repa_statistics()
    return Statistics(assumed.mean, assumed.std)


def repae_checkpoint(
    sets: Mapping[str, State], mean: torch.Tensor, var: torch.Tensor, vae: State, facts: Mapping, step: int
) -> dict:
    """What REPA-E's ``generate.py`` reads, to be written with ``torch.save``.

    Args:
        sets: state dicts of a SiT with the projectors of REPA, ``"model"`` and ``"ema"``.
        mean, var: of the latents, ``[C]``; become the BatchNorms', which add the same 1e-4 to var as we do.
        vae: in the LDM layout.
        facts: the content of ``args.json`` (:func:`repae_facts`).
        step: trained for.
    """

    def with_batch_norm(state: State) -> State:
        statistics = {"bn.running_mean": mean.clone(), "bn.running_var": var.clone()}
        return dict(state) | statistics | {"bn.num_batches_tracked": torch.zeros((), dtype=torch.int64)}

    networks = {name: with_batch_norm(state) for name, state in sets.items()}
    return networks | {"vae": vae, "args": Namespace(**facts), "steps": step}


def repae_facts(config: SiTConfig, resolution: int, path_type: str, trained_with: Mapping) -> dict[str, object]:
    """The flags that REPA-E's ``generate.py`` looks at, under its names.

    Args:
        config: of the SiT with projectors.
        resolution: of the images, pixels.
        path_type: of the interpolant.
        trained_with: the run's own flags, from which ``cfg_prob`` and ``enc_type`` come.
    """
    return {
        "model": config.model,
        "num_classes": config.num_classes,
        "encoder_depth": config.encoder_depth,
        "qk_norm": config.qk_norm,
        "fused_attn": True,
        "bn_momentum": 0.1,
        "resolution": resolution,
        "vae": f"f{resolution // config.latent_size}d{config.latent_channels}",
        "path_type": path_type,
        "prediction": "v",
        "cfg_prob": trained_with.get("cfg_prob", 0.1),
        "enc_type": trained_with.get("enc_type") if config.feature_dims else "None",
    }


def what_repae_lacks(config: SiTConfig, facts: Mapping) -> list[str]:
    """Why REPA-E's own code could not build this network; empty where it can."""
    reasons = []
    if config.model.startswith("SiT-Ti") or config.model.startswith("SiT-S"):
        reasons.append(f"it builds no {config.model}")
    if facts["vae"] not in REPAE_VAES:
        reasons.append(f"it knows the VAEs {' and '.join(REPAE_VAES)}, not {facts['vae']}")
    if not config.feature_dims:
        reasons.append("it expects a projector for each encoder, and this run was not aligned")
    elif config.projector_width != REPAE_PROJECTOR_WIDTH:
        reasons.append(f"its projectors have width {REPAE_PROJECTOR_WIDTH}, not {config.projector_width}")
    return reasons


def _weight_sets(contents: object, given: str) -> dict[str, State]:
    """The state dicts in a file, under ``ema`` and ``model``; a bare one counts as ``ema``."""
    if not isinstance(contents, dict):
        raise UserError(f"{given} holds a {type(contents).__name__}, not SiT weights")
    nested = {name: contents[name] for name in ("ema", "model") if isinstance(contents.get(name), dict)}
    sets = nested or {"ema": {key: value for key, value in contents.items() if isinstance(value, torch.Tensor)}}
    for state in sets.values():
        if not any(str(key).endswith("x_embedder.proj.weight") for key in state):
            raise UserError(f"{given} {_what_instead(contents, state)}; give a SiT checkpoint of REPA or REPA-E")
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
    facts = {name: kept[name] for name in FACTS if kept.get(name) is not None}
    for name in FACTS:
        value = (json_facts or {}).get(name)
        if value is None:
            continue
        if name in _COMPARED and facts.get(name, value) != value:
            raise UserError(
                f"{given}: args.json says {name} {value}, the checkpoint {facts[name]}: they do not belong together; "
                "copy its own args.json beside it"
            )
        facts[name] = value
    for name in NUMBERS:
        if not isinstance(facts.get(name, 0), int):
            raise UserError(f"{given}: its args say {name} {facts[name]!r}, which is no whole number")
    return facts


def _check_facts(facts: Mapping, config: SiTConfig, given: str) -> None:
    """What the flags of the training say must be what the tensors say."""
    by_tensors = {"model": config.model, "qk_norm": config.qk_norm}
    if facts.get("cfg_prob") == 0:
        raise UserError(
            f"{given} was trained without dropping labels (cfg_prob 0): it has no null class, which this project's SiT "
            "needs"
        )
    by_tensors |= {"num_classes": config.num_classes, "encoder_depth": config.encoder_depth}  # the old layout tells it
    encoders = [name for name in str(facts.get("enc_type", "None")).split(",") if name != "None"]
    if encoders and len(encoders) != len(config.feature_dims):
        raise UserError(
            f"{given}: enc_type {facts['enc_type']} names {len(encoders)} encoders, the checkpoint has "
            f"{len(config.feature_dims)} projectors: args and weights do not belong together"
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
    if facts.get("prediction", "v") != "v":
        raise UserError(f"{given}: it predicts {facts['prediction']}; only velocities (v) are known here")
    try:
        config.check()
    except UserError as error:
        raise UserError(f"{given}: {str(error).removeprefix('--')}") from error


def _unwrapped(state: Mapping[str, torch.Tensor]) -> State:
    """Names without what DDP and torch.compile put before them."""
    return {_unwrap(key): tensor for key, tensor in state.items()}


def _unwrap(key: str) -> str:
    for prefix in WRAPPERS * 2:
        key = key.removeprefix(prefix)
    return key


def _parameter_names(state: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Present names of the parameters, in the order of the state dict."""
    renamed, _ = rename_legacy_blocks(_unwrapped(state))
    return tuple(key for key in renamed if not key.startswith(BATCH_NORM_PREFIX))


def _without_empty_projectors(state: State) -> State:
    """Trained without an encoder, REPA-E builds a projector to width 0; it is of no use."""
    empty = [key.removesuffix("4.bias") for key, tensor in state.items() if key.endswith(".4.bias") and not len(tensor)]
    return {key: tensor for key, tensor in state.items() if not any(key.startswith(prefix) for prefix in empty)}


def _batch_norm(state: Mapping[str, torch.Tensor], channels: int, given: str) -> Statistics | None:
    """The statistics that REPA-E keeps in the SiT; it decodes with ``z·sqrt(var) + mean``, without the epsilon."""
    try:
        found = batch_norm_statistics(state, given)
        if found is None:
            return None
        found.check(channels)
    except NotWeightsError as error:
        raise UserError(f"{given}: its BatchNorm of latents (bn): {error}") from error
    return Statistics(found.mean, found.var.sqrt())


def _check_fits(state: State, config: SiTConfig, given: str) -> None:
    """Names and shapes must be exactly those of the network."""
    with torch.device("meta"):
        expected = SiT(config).state_dict()
    final = state.get("final_layer.linear.bias")
    if final is not None and len(final) == 2 * len(expected["final_layer.linear.bias"]):
        raise UserError(
            f"{given}: its last layer predicts a variance too, as the original SiT and DiT do; only networks that "
            "predict the velocity alone are known here"
        )
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    misshapen = [key for key, tensor in state.items() if key in expected and tensor.shape != expected[key].shape]
    for what, keys in (("lacks", missing), ("has beside it", unexpected), ("has in another shape", misshapen)):
        if keys:
            raise UserError(f"{given} is no complete {config.model}: it {what} {', '.join(keys[:3])}")
    try:
        check_values(state, expected)
    except NotWeightsError as error:
        raise UserError(f"{given}: {error}") from error


def _some(state: Mapping) -> str:
    return ", ".join(map(str, list(state)[:3])) or "none"
