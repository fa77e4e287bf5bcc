"""Small layers and constants that several networks share."""

from itertools import pairwise

import torch
from torch import nn


def projector(in_features: int, out_features: int, width: int = 2048, layers: int = 3) -> nn.Sequential:
    """Linear layers with a SiLU between each two, on the last dimension: ``[..., in]`` → ``[..., out]``.

    Args:
        width: of all hidden layers.
        layers: linear ones; three are REPA's projector.
    """
    widths = [in_features, *[width] * (layers - 1), out_features]
    modules = []
    for before, after in pairwise(widths):
        modules += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*modules[:-1])


class TokenConvolution(nn.Conv2d):
    """A 3×3 convolution over a square grid of tokens, zeros around it: ``[B, N, in]`` → ``[B, N, out]``.

    iREPA's projector (arXiv 2512.10794): it sees neighbours, where one that works token by token has to learn them all
    from the denoiser's attention.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, kernel_size=3, padding=1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        grid = round(tokens.shape[1] ** 0.5)
        image = tokens.transpose(1, 2).unflatten(2, (grid, grid))
        return super().forward(image).flatten(2).transpose(1, 2)


def sincos_positions(width: int, grid: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine position embedding of a square token grid (MAE; DiT's order of the axes).

    The first half of the channels encodes the column, the second half the row; in each half come the sines, then the
    cosines, at frequencies ``10000^(-4i/width)``.

    Returns:
        float32 ``[grid², width]``, row-major over (row, column).
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, got {width}")
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    phase = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([phase.sin(), phase.cos()], dim=1)  # [grid, width/2]
    column = axis[None, :, :].expand(grid, grid, -1)
    row = axis[:, None, :].expand(grid, grid, -1)
    return torch.cat([column, row], dim=-1).reshape(grid * grid, width).float()


def unpatchify(tokens: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Tokens of square patches, row-major: ``[B, N, p·p·C]`` → an image of ``shape`` (C, h, w), ``[B, C, h, w]``."""
    channels, height, _ = shape
    grid = round(tokens.shape[1] ** 0.5)
    patch = height // grid
    x = tokens.unflatten(1, (grid, grid)).unflatten(-1, (patch, patch, channels))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # b r c p q C → b C (r p) (c q)


def xavier_linears(module: nn.Module) -> None:
    """Initialise every linear layer as SiT does: Xavier uniform weight, zero bias. For ``module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
