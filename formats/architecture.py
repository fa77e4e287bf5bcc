"""Which AutoencoderKL some tensors belong to: read off their names and shapes."""

import json
import math
import re
from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL

from formats.layers import to_ldm
from models.tokenizers import architecture_names, named_config
from models.tokenizers.diffusers_network import list_or_value
from models.tokenizers.kl import KLTokenizer
from models.weight_files import NotWeightsError

# What names and shapes tell; with how many groups GroupNorm works they do not.
INFERRED = (
    *("block_out_channels", "latent_channels", "down_block_types", "up_block_types", "layers_per_block"),
    *("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv", "in_channels", "out_channels"),
)
DEFAULTS = {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}
USUAL_GROUPS = 32
LISTED = 3  # names that a message mentions


def infer_config(state: Mapping[str, torch.Tensor]) -> dict:
    """The diffusers configuration of tensors by diffusers names; a known architecture's own file where it fits.

    Raises:
        NotWeightsError: half of it is missing, or it is not a KL autoencoder that ``AutoencoderKL`` can be.
    """
    config = infer_shape(state)
    if names := fitting_names(config):
        return named_config(names[0])
    widths = config["block_out_channels"]
    if any(width % USUAL_GROUPS for width in widths):
        raise NotWeightsError(
            f"its widths {_text(widths)} do not divide into {USUAL_GROUPS} groups, and tensors do not say how many "
            "GroupNorm has: name the architecture with --vae (a diffusers folder's config.json will do)"
        )
    defaults = {"act_fn": "silu", "norm_num_groups": USUAL_GROUPS, "sample_size": 256, "scaling_factor": 1.0}
    return {"_class_name": "AutoencoderKL", **config, **defaults, "force_upcast": False}


def infer_shape(state: Mapping[str, torch.Tensor]) -> dict:
    """The part of a diffusers configuration that names and shapes tell: :data:`INFERRED`.

    Raises:
        NotWeightsError: as :func:`infer_config`.
    """
    _check_complete(state)
    levels = range(_count(state, r"(?:encoder\.down|decoder\.up)_blocks\.(\d+)\."))
    widths = [_width(state, f"encoder.down_blocks.{level}.") for level in levels]
    latent_channels = _side(state, "decoder.conv_in.weight", 1)
    config = {
        "in_channels": _side(state, "encoder.conv_in.weight", 1),
        "out_channels": _side(state, "decoder.conv_out.weight", 0),
        "down_block_types": [_kind(state, "Down", "Encoder", f"encoder.down_blocks.{i}") for i in levels],
        "up_block_types": [_kind(state, "Up", "Decoder", f"decoder.up_blocks.{i}") for i in levels],
        "block_out_channels": widths,
        "layers_per_block": _count(state, r"encoder\.down_blocks\.\d+\.resnets\.(\d+)\."),
        "latent_channels": latent_channels,
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "mid_block_add_attention": any(name.startswith("encoder.mid_block.attentions.") for name in state),
    }
    _check_kl(state, latent_channels)
    return config


def fitting_names(config: Mapping) -> list[str]:
    """The names that ``--vae`` knows of this architecture."""
    return [name for name in architecture_names() if differing_key(config, named_config(name)) is None]


def known_names(tokenizer: KLTokenizer) -> list[str]:
    """The names that ``--vae`` knows of a VAE's architecture."""
    return fitting_names(tokenizer.network.config)


def differing_key(config: Mapping, other: Mapping) -> str | None:
    """The first key in which two configurations are different architectures, as far as tensors tell."""
    for key in INFERRED:
        default = DEFAULTS.get(key)
        if list_or_value(config.get(key, default)) != list_or_value(other.get(key, default)):
            return key
    return None


def describe_difference(config: Mapping, wanted: Mapping) -> str | None:
    """``latent_channels 16 instead of 32``; None for the same architecture."""
    key = differing_key(config, wanted)
    if key is None:
        return None
    default = DEFAULTS.get(key)
    return f"{key} {_text(config.get(key, default))} instead of {_text(wanted.get(key, default))}"


def first_misfit(state: Mapping[str, torch.Tensor], network: AutoencoderKL, as_ldm: bool = False) -> str | None:
    """What does not fit a network (tensors on the meta device suffice), in words; None where all does.

    Args:
        state: tensors by diffusers names.
        network: what they are for.
        as_ldm: name them as the LDM layout does, as in the user's file.
    """
    wanted = dict(network.state_dict())
    if as_ldm:
        state, wanted = to_ldm(state), to_ldm(wanted)
    for word, names in (("missing", wanted.keys() - state.keys()), ("unknown", state.keys() - wanted.keys())):
        if names:
            more = " …" if len(names) > LISTED else ""
            return f"of its tensors, {len(names)} {word}: {', '.join(sorted(names)[:LISTED])}{more}"
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            return f"{name} is {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
    return None


def nearly_fits(state: Mapping[str, torch.Tensor], network: AutoencoderKL) -> bool:
    """Whether only a few tensors are missing, and nothing else speaks against this architecture."""
    wanted = network.state_dict()
    return (
        len(wanted.keys() - state.keys()) <= LISTED
        and state.keys() <= wanted.keys()
        and all(tensor.shape == wanted[name].shape for name, tensor in state.items())
    )


def check_config(config: Mapping) -> None:
    """Refuse a diffusers configuration whose values are not of the kind that they must be.

    Raises:
        NotWeightsError: a width that is none, or statistics that are no numbers.
    """
    widths, channels = config.get("block_out_channels", [1]), config.get("latent_channels", 1)
    if not isinstance(widths, list) or not widths or not all(_is_count(width) for width in widths):
        raise NotWeightsError(f"block_out_channels is {json.dumps(widths)}, not a list of widths")
    if not _is_count(channels):
        raise NotWeightsError(f"latent_channels is {json.dumps(channels)}, not a number of channels")
    for name in ("latents_mean", "latents_std"):
        values = config.get(name)
        if values is not None and not (isinstance(values, list) and values and all(map(_is_number, values))):
            raise NotWeightsError(f"{name} is {json.dumps(values)[:80]}, not a list of numbers")
    factor = config.get("scaling_factor", 1.0)
    if not _is_number(factor) or factor <= 0:
        raise NotWeightsError(f"scaling_factor is {json.dumps(factor)}, not a positive number")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_complete(state: Mapping[str, torch.Tensor]) -> None:
    """Both halves are there; what else there is says the rest."""
    needed = [f"{half}.{name}.weight" for half in ("encoder", "decoder") for name in ("conv_in", "conv_out")]
    missing = [name for name in needed if name not in state]
    if not missing:
        return
    for half, other in (("encoder", "decoder"), ("decoder", "encoder")):
        if not any(name.startswith(f"{half}.") for name in state):
            raise NotWeightsError(
                f"it is half a VAE: it has the {other}, but {missing[0]} and the rest of the {half} are missing"
            )
    raise NotWeightsError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")


def _check_kl(state: Mapping[str, torch.Tensor], latent_channels: int) -> None:
    codebook = next((name for name in state if name.startswith("quantize.") or ".quantize." in name), None)
    if codebook is not None:
        raise NotWeightsError(f"it is a VQ autoencoder ({codebook} is a codebook), not a KL one")
    moments = _side(state, "quant_conv.weight" if "quant_conv.weight" in state else "encoder.conv_out.weight", 0)
    if "post_quant_conv.weight" in state:
        embedded = _side(state, "post_quant_conv.weight", 1)
        if embedded != latent_channels:
            raise NotWeightsError(
                f"its latents have {embedded} channels and its decoder {latent_channels}; AutoencoderKL has one number"
            )
    if moments != 2 * latent_channels:
        raise NotWeightsError(
            f"its encoder gives {moments} channels where mean and variance of {latent_channels} are "
            f"{2 * latent_channels}: not a KL autoencoder"
        )


def _kind(state: Mapping[str, torch.Tensor], direction: str, half: str, prefix: str) -> str:
    attention = any(name.startswith(f"{prefix}.attentions.") for name in state)
    return f"{'Attn' if attention else ''}{direction}{half}Block2D"


def _count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    """How many there are of what a pattern numbers from 0."""
    return 1 + max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=-1)


def _width(state: Mapping[str, torch.Tensor], level: str) -> int:
    """Channels of a level of the encoder, by any tensor of its residual blocks that has as many."""
    tell = re.compile(re.escape(level) + r"resnets\.\d+\.(conv[12]|norm2|conv_shortcut)\.(weight|bias)")
    name = next((name for name in sorted(state) if tell.fullmatch(name) and state[name].ndim), None)
    if name is None:
        raise NotWeightsError(f"{level}resnets.0.conv1.weight is missing, and the rest of its level")
    return state[name].shape[0]


def _side(state: Mapping[str, torch.Tensor], name: str, dimension: int) -> int:
    """A side of a convolution's weight."""
    if state[name].ndim != 4:
        raise NotWeightsError(f"{name} of shape {tuple(state[name].shape)} is not a convolution's weight")
    return state[name].shape[dimension]


def _text(value: object) -> str:
    value = list_or_value(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
