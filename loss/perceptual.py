"""LPIPS through the ``lpips`` package, with the VGG16 trunk taken from a local file, torch's cache or its download."""

import warnings
from pathlib import Path

import lpips
import torch
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from errors import UserError
from models.weight_files import NotWeightsError, read_state_dict

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG16_FILE = VGG16_URL.rsplit("/", 1)[1]


def build_lpips(checkpoint: str | None = None, random_weights: bool = False) -> nn.Module:
    """LPIPS (VGG16, linear heads v0.1), frozen: two images ``[B, 3, H, W]`` in [-1, 1] → ``[B, 1, 1, 1]``.

    The inputs get LPIPS's own shift and scale and nothing else; REPA-E's first release scaled x → 2x − 1 once more.

    Args:
        checkpoint: torchvision's ``vgg16-397923af.pth``; by default torch's hub cache or download.
        random_weights: a random trunk, to measure sizes and speed.

    Raises:
        UserError: the weights cannot be had, or are not VGG16's.
    """
    state = None if random_weights else _vgg16_state(checkpoint)
    with warnings.catch_warnings():  # lpips 0.1.4 asks torchvision in an outdated way
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="vgg", version="0.1", pnet_rand=True, verbose=False)
    if state is not None:
        _load_trunk(network, state)
    return network.requires_grad_(False).eval()


def _vgg16_state(checkpoint: str | None) -> dict[str, torch.Tensor]:
    """A state dict that holds the trunk's tensors, in torchvision's names."""
    path = Path(checkpoint) if checkpoint else Path(torch.hub.get_dir()) / "checkpoints" / VGG16_FILE
    if path.is_file():
        source = f"--lpips-ckpt {checkpoint}" if checkpoint else str(path)
        try:
            state = read_state_dict(path)
        except NotWeightsError as error:
            raise UserError(f"{source} is not a file of VGG16 weights ({error})") from error
        wrong = _first_wrong(state)
        if wrong:
            raise UserError(f"{source} is not torchvision's VGG16: {wrong} is missing or has another shape")
        return state
    if checkpoint:
        raise UserError(f"--lpips-ckpt {checkpoint}: no such file")
    try:
        return torch.hub.load_state_dict_from_url(
            VGG16_URL, map_location="cpu", weights_only=True, check_hash=True, progress=False
        )
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"LPIPS needs torchvision's VGG16 weights and {VGG16_URL} cannot be reached: give the file with "
            f"--lpips-ckpt, put it at {path}, or go without (perceptual_weight: 0 in the loss configuration, "
            "or --loss-override perceptual_weight=0)"
        ) from error


def _first_wrong(state: dict[str, torch.Tensor]) -> str | None:
    """The first tensor of VGG16's trunk that a loaded file lacks, or has in another shape."""
    with torch.device("meta"):
        trunk = make_layers(cfgs["D"])
    for name, parameter in trunk.state_dict(prefix="features.").items():
        if name not in state or state[name].shape != parameter.shape:
            return name
    return None


def _load_trunk(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy torchvision's ``features.N`` into the slices of lpips, which keep the layers' numbers."""
    with torch.no_grad():
        for name, parameter in network.net.named_parameters():
            parameter.copy_(state["features." + name.split(".", 1)[1]])
