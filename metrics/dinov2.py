"""FD-DINOv2's features (Stein et al. 2023, arXiv 2306.04675): the class token of DINOv2 ViT-L/14 at 224 px.

As edm2 computes them: images are resized to 224 px in float32, bicubic with antialiasing and neither clamped nor
rounded (dgm-eval does it in 8 bits, which its authors found to give almost the same), and position embeddings are
resampled as DINOv2's own code does it.
"""

import timm
import torch
import torch.nn.functional as F
from torch import nn

from errors import UserError, one_line
from files import weights_checksum
from metrics.arguments import DINOV2, FEATURES_FLAG
from models.encoders.layouts import NESTED_KEYS, to_timm
from models.encoders.registry import ENCODERS, IMAGENET_MEAN, IMAGENET_STD, EncoderSpec
from models.encoders.weights import find_weights
from models.weight_files import NotWeightsError, check_values, read_state_dict

NETWORK = "dinov2-vit-l"
SIDE = 224


class ClassToken(nn.Module):
    """uint8 images ``[B, 3, H, W]`` → the class token after the last norm, ``[B, D]``."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.weights_sha256 = weights_checksum(network.state_dict())
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        x = images.float()
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True)
        return (self.network.forward_features((x / 255 - self.mean) / self.std)[:, 0].float(),)


def build_dinov2(checkpoint: str | None = None, random_weights: bool = False, network: str = NETWORK) -> ClassToken:
    """Build it.

    Args:
        checkpoint: file with the weights; by default they are looked for as those of ``--enc-type dinov2-vit-l``.
        random_weights: to measure sizes and speed.
        network: of the DINOv2 networks without registers.

    Raises:
        UserError: no weights, or those of another network.
    """
    spec = ENCODERS[network]
    try:
        path = None if random_weights else find_weights(network, spec, checkpoint)
    except UserError as error:  # the same network, asked for by another flag and name
        raise type(error)(str(error).replace(f"--enc-type {network}", f"{FEATURES_FLAG} {DINOV2}")) from error
    built = timm.create_model(spec.timm_name, img_size=SIDE, num_classes=0)
    if path is not None:
        try:
            _load(built, spec, read_state_dict(path, NESTED_KEYS))
        except (NotWeightsError, RuntimeError, ValueError, KeyError) as error:
            said = f"{path} holds no weights for {network} ({one_line(error)})"
            raise UserError(f"{FEATURES_FLAG} {DINOV2}: {said}") from error
    return ClassToken(built)


def _load(network: nn.Module, spec: EncoderSpec, state: dict[str, torch.Tensor]) -> None:
    state = {name: tensor for name, tensor in to_timm(state).items() if name != "mask_token"}
    state["pos_embed"] = resampled_positions(state["pos_embed"], SIDE // spec.stride)
    check_values(state, network.state_dict())
    network.load_state_dict(state)


def resampled_positions(embedding: torch.Tensor, grid: int) -> torch.Tensor:
    """Position embeddings on another grid as in DINOv2's code: bicubic, sampled as if it were 0.1 tokens longer.

    That offset was meant against rounding of the output's size and moves the values; the published networks have it.

    Args:
        embedding: ``[1, 1 + n², D]``, the class token's first.
        grid: tokens along a side.
    """
    token, grid_before = embedding[:, :1], embedding[:, 1:]
    side = round(grid_before.shape[1] ** 0.5)
    if side == grid:
        return embedding
    image = grid_before.mT.unflatten(2, (side, side))
    factor = (grid + 0.1) / side
    image = F.interpolate(image, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([token, image.flatten(2).mT], dim=1)
