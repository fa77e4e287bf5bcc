"""LightningDiT: SiT with RMSNorm, rotary positions and SwiGLU (VA-VAE, arXiv 2501.01423).

Parameter names and values are those of the public LightningDiT code, so that its checkpoints load as they are. That
code counts time from noise at 0 to data at 1, the other way round than here: with x_t on the same path, its network is
asked at 1 − t and its velocity points from noise to data. The network below keeps that inside, so that weights and
optimizer moments of theirs mean the same here, to the bit.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from models.denoisers.config import TransformerSize
from models.denoisers.transformer import Attention, Block, Norm, PlainBlock, Transformer


class RMSNorm(nn.RMSNorm):
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension (arXiv 1910.07467), in the weight's precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype))


class LightningDiT(Transformer):
    """The transformer; time is 0 at the data, as for every denoiser here."""

    counts_to_data = True

    def norm(self, width: int) -> nn.Module:
        return RMSNorm(width, eps=1e-6)

    def make_blocks(self) -> Iterator[Block]:
        size, qk_norm = self.config.size, self.norm if self.config.qk_norm else nn.Identity
        return lightning_blocks(Block, size, self.norm, qk_norm, self.grid, self.prefix)


def lightning_blocks(
    kind: type[PlainBlock],
    size: TransformerSize,
    norm: Norm,
    qk_norm: Norm,
    grid: int,
    unplaced: int,
    depth: int | None = None,
) -> Iterator[PlainBlock]:
    """Blocks with rotary positions and SwiGLU, of as many numbers as with a GELU MLP of four times the width.

    Args:
        kind: of the blocks.
        size: how many, of which width, with how many heads.
        norm, qk_norm: as in :class:`Block` and :class:`Attention`.
        grid, unplaced: as in :class:`RotaryPositions`.
        depth: how many, where they are not all.
    """
    rotary = RotaryPositions(size.width // size.heads, grid, unplaced=unplaced)  # one for all
    for _ in range(size.depth if depth is None else depth):
        attention = Attention(size.width, size.heads, qk_norm, rotary)
        yield kind(size.width, norm, attention, SwiGLU(size.width, 8 * size.width // 3))


class RotaryPositions(nn.Module):
    """Rotary position embedding of a square token grid (RoPE, arXiv 2104.09864; by axis as in EVA-02, 2303.11331).

    Neighbouring channels (2i, 2i + 1) are a point in the plane, which is turned by the token's place times a frequency:
    in the first half of a head by its row, in the second by its column. A product of query and key then depends on how
    far apart their tokens are, and not on where.

    Args:
        width: of a head; a multiple of 4.
        grid: tokens along a side, row-major.
        base: frequencies fall from 1 to 1/base.
        unplaced: tokens before those of the grid, which are not turned.
    """

    def __init__(self, width: int, grid: int, base: float = 10000.0, unplaced: int = 0):
        super().__init__()
        if width % 4:
            raise ValueError(f"rotary positions in two dimensions need heads of a multiple of 4 channels, got {width}")
        frequency = base ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
        phase = torch.arange(grid, dtype=torch.float64)[:, None] * frequency  # [grid, width/4]
        row, column = phase[:, None].expand(-1, grid, -1), phase[None].expand(grid, -1, -1)
        angle = torch.cat([row, column], dim=-1).flatten(0, 1)  # [grid², width/2]
        angle = F.pad(angle, (0, 0, unplaced, 0))
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """Queries or keys ``[B, N, heads, width]`` → the same, turned.

        ``places`` ``[B, N]`` are theirs among the unplaced and the grid; None: N is all of these.
        """
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = (self.cos, self.sin) if places is None else (self.cos[places], self.sin[places])
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for all heads
        turned = first * cos - second * sin, first * sin + second * cos
        return torch.stack(turned, dim=-1).flatten(-2)


class SwiGLU(nn.Module):
    """``w3(silu(a)·b)`` with (a, b) = ``w12(x)`` (arXiv 2002.05202): ``[..., width]`` → the same.

    A hidden width of 8/3 has as many parameters as an MLP of four times the width.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)
