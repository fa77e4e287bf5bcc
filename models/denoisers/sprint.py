"""SPRINT (arXiv 2510.21986): most blocks of a transformer see a part of the tokens, the first and the last ones all.

Dense tokens leave the first blocks; the middle ones go on with those that a :class:`Route` keeps. Their output takes
its places again, with a mask token in the others, and both are fused for the last blocks. Training costs less by what
the middle blocks leave out; sampling sees all tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.denoisers.config import TOKEN_GROUPS


class Route(NamedTuple):
    """Which tokens go through the middle blocks.

    Attributes:
        kept: their places in the grid, row-major, int64 ``[B, n]``; None: all.
        skipped: images whose middle blocks' output is thrown away, bool ``[B]``; None: of none. True: of all, and the
            middle blocks are not run.
    """

    kept: torch.Tensor | None = None
    skipped: torch.Tensor | bool | None = None


DENSE = Route()
SHORTCUT = Route(skipped=True)  # the first and the last blocks alone


def draw_route(count: int, grid: int, token_drop: float, path_drop: float, generator: torch.Generator) -> Route:
    """A route for a batch of ``count`` images, on the generator's device.

    Tokens are dropped at random within small squares of the grid, as many in each, so that no region is lost.

    Args:
        count: images.
        grid: tokens along a side.
        token_drop: share that is dropped, of :data:`TOKEN_GROUPS`, whose squares divide the grid; 0: none.
        path_drop: probability that an image's middle blocks' output is thrown away, so that the others learn to do
            without (for guidance).
        generator: of the random numbers.
    """
    options = {"generator": generator, "device": generator.device}
    kept = None
    if token_drop:
        side, number = TOKEN_GROUPS[token_drop]
        across = grid // side
        order = torch.rand(count, across * across, side * side, **options).argsort(-1)[..., :number]
        group = torch.arange(across * across, device=generator.device)[:, None]
        row, column = group // across * side + order // side, group % across * side + order % side
        kept = (row * grid + column).flatten(1)
    skipped = torch.rand(count, **options) < path_drop if path_drop else None
    return Route(kept, skipped)


def select(tokens: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """Tokens ``[B, N, D]`` at ``places`` ``[B, n]`` → ``[B, n, D]``; all where there are none."""
    if places is None:
        return tokens
    return tokens.flatten(0, 1).index_select(0, rows_of(places, tokens.shape[1])).unflatten(0, places.shape)


def rows_of(places: torch.Tensor, count: int) -> torch.Tensor:
    """Places ``[B, n]`` among ``count`` tokens an image → those among all of a batch, ``[B·n]``.

    By rows, because deterministic kernels sort what they add: a key a token, where ``gather`` would have one a number.
    """
    return (places + count * torch.arange(len(places), device=places.device)[:, None]).flatten()


class Shortcut(nn.Module):
    """A transformer's first and last blocks alone, for no class: what guides it in path-drop guidance.

    Args:
        denoiser: with a :class:`Fusion`, trained with images whose middle blocks were thrown away.
    """

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """As :meth:`Denoiser.forward`; the class is not used."""
        return self.denoiser(x, t, torch.full_like(y, self.denoiser.null_class), (), SHORTCUT)

    def undamped(self, velocity: torch.Tensor, t: float) -> torch.Tensor:
        """As :meth:`Denoiser.undamped`."""
        return self.denoiser.undamped(velocity, t)

    def compile(self, *args, **options) -> None:
        """Its blocks are the denoiser's, which compiles them."""


class Fusion(nn.Module):
    """Dense tokens, and what the middle blocks made of some → tokens for the last blocks.

    The mask token is drawn once and not trained, as in the method's code: the linear layer makes of it what it needs.

    Args:
        width: of the tokens.
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(2 * width, width)  # of (deep, dense)
        self.register_buffer("mask_token", 0.02 * torch.randn(width))

    def forward(
        self, dense: torch.Tensor, deep: torch.Tensor, places: torch.Tensor | None, skipped: torch.Tensor | bool | None
    ) -> torch.Tensor:
        """``W·(deep or mask, dense) + b``; deep tokens are multiplied before they are spread, as there are fewer.

        Args:
            dense: of the first blocks, ``[B, N, width]``.
            deep: of the middle blocks, ``[B, n, width]``; without use where ``skipped`` is True.
            places: of these in the first, ``[B, n]``; None: n = N, in order.
            skipped: as in :class:`Route`.
        """
        of_deep, of_dense = self.linear.weight.chunk(2, dim=1)
        fused = F.linear(dense, of_dense, self.linear.bias)
        masked = F.linear(self.mask_token.to(dense.dtype), of_deep)
        if skipped is True:
            return (fused + masked).to(dense.dtype)
        spread = F.linear(deep, of_deep)
        if places is not None:
            empty = masked.to(spread.dtype).expand(dense.shape[0] * dense.shape[1], -1)
            rows = rows_of(places, dense.shape[1])
            spread = empty.index_copy(0, rows, spread.flatten(0, 1)).unflatten(0, dense.shape[:2])
        if skipped is not None:
            spread = torch.where(skipped[:, None, None], masked.to(spread.dtype), spread)
        return (fused + spread).to(dense.dtype)  # under autocast too, as a block's output
