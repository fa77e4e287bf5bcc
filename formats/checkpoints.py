"""Whose checkpoint a file is, and which of its tensors are a VAE, a discriminator or latent statistics.

=====================================  ===============================================================================
LDM file (``.pt``, ``.safetensors``)   ``encoder.down.…``, perhaps with a projection: REPA-E's sdvae, invae, e2e-…
Lightning checkpoint (VA-VAE, LDM)     the same under ``state_dict``, with ``loss.``, ``foundation_model.`` …
Stable Diffusion checkpoint            the same with the prefix ``first_stage_model.``, with a U-Net
diffusers file                         ``encoder.down_blocks.…``, attention in today's or in older names
REPA-E training checkpoint             ``vae``, ``discriminator``, statistics in ``ema``
our own checkpoint                     ``tokenizer.network.…`` or ``network.…``, with ``statistics.…``
=====================================  ===============================================================================

A VAE is found by its first convolution, whatever prefix a training code gave it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from formats.layers import State, is_ldm, to_diffusers
from formats.statistics import FoundStatistics, batch_norm_statistics, own_statistics
from models.weight_files import NotWeightsError, tensors_by_name

WRAPPERS = ("module.", "_orig_mod.")  # of DDP and torch.compile
# What training codes keep with a VAE under the same prefix.
IGNORED = ("loss.", "linear_proj.", "foundation_model.", "model_ema.", "quant_norm.", "proj.", "logvar")
STABLE_DIFFUSION = "first_stage_model."
OPTIMIZER_ENTRIES = {
    *("opt", "opt_vae", "opt_disc", "optimizer", "optimizer_states", "lr_schedulers"),
    *("args", "steps", "step", "epoch", "global_step"),
}
_ANCHORS = ("encoder.conv_in.weight", "decoder.conv_in.weight")
_DISCRIMINATOR_ANCHOR = "main.0.weight"


@dataclass(frozen=True)
class FoundVAE:
    """The VAE in a checkpoint.

    Attributes:
        state: its tensors by diffusers names, as they are stored.
        layout: of the file, in words.
        is_ldm: whether the file has LDM names.
        statistics: of its latents where the checkpoint holds them.
    """

    state: State
    layout: str
    is_ldm: bool
    statistics: FoundStatistics | None = None


def find_vae(contents: object, source: str) -> FoundVAE:
    """The VAE among what a file holds.

    Args:
        contents: what ``read_contents`` gave.
        source: the file, for messages about its statistics.

    Raises:
        NotWeightsError: there is none; the reason says what there is instead.
    """
    if isinstance(contents, Mapping) and isinstance(contents.get("vae"), Mapping):
        statistics = None
        if isinstance(contents.get("ema"), Mapping):
            statistics = batch_norm_statistics(contents["ema"], f"bn of ema in {source}")
        found = _vae_among(tensors_by_name(contents["vae"]))
        return FoundVAE(found.state, "REPA-E training checkpoint", found.is_ldm, statistics)
    nested, layout = _unnested(contents)
    tensors = _tensors(nested)
    try:
        found = _vae_among(tensors)
    except NotWeightsError as error:
        instead = None if vae_prefixes(tensors) else what_instead(contents)
        raise NotWeightsError(f"it holds no VAE, but {instead}" if instead else str(error)) from error
    return FoundVAE(found.state, f"{layout}{found.layout}", found.is_ldm, own_statistics(nested, source))


def find_discriminator(contents: object) -> State | None:
    """The PatchGAN among what a file holds, by names ``main.N.…``; None where there is none."""
    if isinstance(contents, Mapping) and isinstance(contents.get("discriminator"), Mapping):
        contents = contents["discriminator"]
    contents, _ = _unnested(contents)
    tensors = _tensors(contents) if isinstance(contents, Mapping) else {}
    prefixes = sorted((_prefixes(tensors, _DISCRIMINATOR_ANCHOR)), key=len)
    prefixes = [prefix for prefix in prefixes if prefix in ("", *WRAPPERS) or "discriminator." in prefix]
    if not prefixes:
        return None
    return tensors_by_name(_below(tensors, prefixes[0]))


def vae_prefixes(names: Iterable[str]) -> set[str]:
    """What stands before the names of each VAE among these."""
    names = list(names)
    prefixes = {prefix for anchor in _ANCHORS for prefix in _prefixes(names, anchor)}
    return {prefix for prefix in prefixes if not prefix.startswith(IGNORED)}


def what_instead(contents: object) -> str | None:
    """What somebody took for a VAE or a discriminator, "a …"; None where that cannot be told."""
    outer = set(map(str, contents)) if isinstance(contents, Mapping) else set()
    inner, _ = _unnested(contents)
    inner = set(map(str, inner)) if isinstance(inner, Mapping) else set()
    names = {name.removeprefix("module.") for name in outer | inner}
    if outer >= {"state", "param_groups"} or (outer and outer <= OPTIMIZER_ENTRIES):
        return f"an optimizer's state alone ({', '.join(sorted(outer)[:4])})"
    if {"latents_scale", "latents_bias"} & outer or outer in ({"mean", "std"}, {"mean", "std", "var"}):
        return "latent statistics, which --vae-latents-stats takes"
    if any(name.startswith("main.") for name in names):
        return "a PatchGAN discriminator, which --disc-pretrained-ckpt takes"
    if any(name.startswith("heads.") and ".parametrizations." in name for name in names):
        return "a discriminator's heads on a VFM's features"
    if "ema" in outer or any("x_embedder." in name or "adaLN_modulation." in name for name in names):
        return "a diffusion transformer, without the VAE that made its latents"
    if any(name.startswith(("time_embedding.", "model.diffusion_model.")) for name in names):
        return "a U-Net"
    if vae_prefixes(inner):
        return "a VAE, which --vae-ckpt takes"
    return None


def _unnested(contents: object) -> tuple[object, str]:
    """What lies under ``state_dict``, or under ``model`` where that is nothing but tensors; and the layout's name."""
    if isinstance(contents, Mapping):
        if isinstance(contents.get("state_dict"), Mapping):
            return contents["state_dict"], "Lightning checkpoint, "
        for key in ("model", "ema", "params"):
            inner = contents.get(key)
            if isinstance(inner, Mapping) and any(str(name).endswith(_ANCHORS) for name in inner):
                return inner, f"{key} of a checkpoint, "
    return contents, ""


def _tensors(contents: object) -> State:
    """Those entries that are tensors: training codes leave numbers among them."""
    if not isinstance(contents, Mapping):
        raise NotWeightsError(f"it holds a {type(contents).__name__}, not tensors by name")
    return {name: t for name, t in contents.items() if isinstance(name, str) and isinstance(t, torch.Tensor)}


def _vae_among(tensors: State) -> FoundVAE:
    prefixes = vae_prefixes(tensors)
    if not prefixes:
        some = ", ".join(sorted(tensors)[:3]) or "no tensors by name"
        raise NotWeightsError(f"it holds no VAE ({_ANCHORS[0]} is missing), but {some}")
    if len(prefixes) > 1:
        raise NotWeightsError(f"it holds several VAEs, under {', '.join(sorted(prefixes))}: save one of them alone")
    prefix = prefixes.pop()
    state = {name: tensor for name, tensor in _below(tensors, prefix).items() if not name.startswith(IGNORED)}
    ldm = is_ldm(tensors_by_name(state))
    layout = f"{'LDM' if ldm else 'diffusers'} layout"
    if prefix == STABLE_DIFFUSION:
        layout = "Stable Diffusion checkpoint"
    return FoundVAE(to_diffusers(state), layout, ldm)


def _prefixes(names: Iterable[str], anchor: str) -> set[str]:
    """Whatever stands before this name."""
    return {name.removesuffix(anchor) for name in names if name == anchor or name.endswith(f".{anchor}")}


def _below(tensors: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
