"""LPIPS through the ``lpips`` package, with the trunk taken from a local file, torch's cache or its download."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from errors import UserError
from models.weight_files import NotWeightsError, read_state_dict

GO_WITHOUT = "perceptual_weight: 0 in the loss configuration, or --loss-override perceptual_weight=0"


@dataclass(frozen=True)
class Trunk:
    """A network whose features LPIPS compares.

    Attributes:
        name: for messages.
        url: of torchvision's weights.
        min_resolution: side of the smallest images that leave something of its pooling, pixels.
        layers: builds its feature layers.
    """

    name: str
    url: str
    min_resolution: int
    layers: Callable[[], nn.Module]

    @property
    def file(self) -> str:
        return self.url.rsplit("/", 1)[1]


def _vgg_layers() -> nn.Module:
    from torchvision.models.vgg import cfgs, make_layers  # seconds, which a loss without LPIPS need not wait

    return make_layers(cfgs["D"])


def _alexnet_layers() -> nn.Module:
    from torchvision.models import alexnet

    return alexnet().features


_WEIGHTS = "https://download.pytorch.org/models"
TRUNKS = {
    "vgg": Trunk("VGG16", f"{_WEIGHTS}/vgg16-397923af.pth", 16, _vgg_layers),
    "alex": Trunk("AlexNet", f"{_WEIGHTS}/alexnet-owt-7be5be79.pth", 31, _alexnet_layers),
}


def build_lpips(
    checkpoint: str | None = None,
    random_weights: bool = False,
    net: str = "vgg",
    flag: str = "--lpips-ckpt",
    go_without: str = GO_WITHOUT,
) -> nn.Module:
    """LPIPS (linear heads v0.1), frozen: two images ``[B, 3, H, W]`` in [-1, 1] → ``[B, 1, 1, 1]``.

    The inputs get LPIPS's own shift and scale and nothing else; REPA-E's first release scaled x → 2x − 1 once more.

    Args:
        checkpoint: torchvision's weights of the trunk; by default torch's hub cache or download.
        random_weights: a random trunk, to measure sizes and speed.
        net: of :data:`TRUNKS`; losses use ``vgg``.
        flag: that the checkpoint comes from, for messages.
        go_without: what to do without weights, for messages.

    Raises:
        UserError: the weights cannot be had, or are another network's.
    """
    import lpips

    state = None if random_weights else _trunk_state(TRUNKS[net], checkpoint, flag, go_without)
    with warnings.catch_warnings():  # lpips 0.1.4 asks torchvision in an outdated way
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=net, version="0.1", pnet_rand=True, verbose=False)
    if torch.are_deterministic_algorithms_enabled():
        _pool_deterministically(network)
    if state is not None:
        _load_trunk(network, state)
    return network.requires_grad_(False).eval()


class DisjointMaxPool(nn.Module):
    """``MaxPool2d(2)`` of finite values and its gradient, bit for bit, of operations that torch calls deterministic.

    torch's own backward pass counts as non-deterministic on CUDA, which it is where windows overlap.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., H, W]`` → ``[..., H // 2, W // 2]``."""
        height, width = (side // 2 * 2 for side in x.shape[-2:])
        corners = [x[..., row:height:2, column:width:2] for row in (0, 1) for column in (0, 1)]
        return functools.reduce(lambda most, corner: torch.where(corner > most, corner, most), corners)


def _pool_deterministically(network: nn.Module) -> None:
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d) and child.kernel_size == child.stride == 2:
                setattr(module, name, DisjointMaxPool())


def _trunk_state(trunk: Trunk, checkpoint: str | None, flag: str, go_without: str) -> dict[str, torch.Tensor]:
    """A state dict that holds the trunk's tensors, in torchvision's names."""
    path = Path(checkpoint) if checkpoint else Path(torch.hub.get_dir()) / "checkpoints" / trunk.file
    if path.is_file():
        source = f"{flag} {checkpoint}" if checkpoint else str(path)
        try:
            state = read_state_dict(path)
        except NotWeightsError as error:
            raise UserError(f"{source} is not a file of {trunk.name} weights ({error})") from error
        wrong = _first_wrong(trunk, state)
        if wrong:
            raise UserError(f"{source} is not torchvision's {trunk.name}: {wrong} is missing or has another shape")
        return state
    if checkpoint:
        raise UserError(f"{flag} {checkpoint}: no such file")
    try:
        return torch.hub.load_state_dict_from_url(
            trunk.url, map_location="cpu", weights_only=True, check_hash=True, progress=False
        )
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"LPIPS needs torchvision's {trunk.name} weights and {trunk.url} cannot be reached: give the file with "
            f"{flag}, put it at {path}, or go without ({go_without})"
        ) from error


def _first_wrong(trunk: Trunk, state: dict[str, torch.Tensor]) -> str | None:
    """The first tensor of the trunk that a loaded file lacks, or has in another shape."""
    with torch.device("meta"):
        layers = trunk.layers()
    for name, parameter in layers.state_dict(prefix="features.").items():
        if name not in state or state[name].shape != parameter.shape:
            return name
    return None


def _load_trunk(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy torchvision's ``features.N`` into the slices of lpips, which keep the layers' numbers."""
    with torch.no_grad():
        for name, parameter in network.net.named_parameters():
            parameter.copy_(state["features." + name.split(".", 1)[1]])
