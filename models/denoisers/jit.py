"""JiT: a transformer on large patches of pixels that predicts the image itself (arXiv 2511.13720).

A patch of 16×16 pixels has 768 numbers, of which noise fills every direction and images few. A network as wide as this
can say which image it is, and hardly which noise it was; so it predicts the image, and the velocity follows.

LightningDiT's blocks, with norms of queries and keys, and two things more: patches pass through a bottleneck, and from
a third of the depth on 32 tokens of the class stand before those of the image. Parameter names and values are those of
the public code, whose time runs as LightningDiT's.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from models.denoisers.config import JiTConfig
from models.denoisers.lightningdit import LightningDiT, lightning_blocks
from models.denoisers.sprint import Route
from models.denoisers.transformer import Block

CLASS_TOKENS = 32


class JiT(LightningDiT):
    """The transformer.

    Args:
        config: its sizes.
    """

    config: JiTConfig

    def __init__(self, config: JiTConfig):
        super().__init__(config)
        self.in_context_posemb = nn.Parameter(0.02 * torch.randn(1, CLASS_TOKENS, self.width))

    def make_patch_embedding(self, channels: int, width: int, patch_size: int) -> nn.Module:
        return BottleneckPatchEmbedding(channels, self.config.bottleneck, width, patch_size)

    def make_blocks(self) -> Iterator[Block]:
        before = self.config.blocks_before_class
        parts = (before, self.prefix), (self.depth - before, self.prefix + CLASS_TOKENS)
        for depth, unplaced in parts:
            yield from lightning_blocks(Block, self.config.size, self.norm, self.norm, self.grid, unplaced, depth)

    def condition(self, time: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``[B, 1 + 32, width]``: what modulates, and the tokens of the class."""
        tokens = self.y_embedder(y)[:, None] + self.in_context_posemb
        return torch.cat([super().condition(time, y), tokens], dim=1)

    def _through_blocks(
        self,
        x: torch.Tensor,
        condition: torch.Tensor,
        taps: Sequence[int],
        last: int,
        route: Route,
        last_condition: torch.Tensor,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        condition, of_class = condition[:, :1], condition[:, 1:]
        x, states = self.embed(x, condition), {}
        for number, block in enumerate(self.blocks[:last], start=1):
            if number == self.config.blocks_before_class + 1:
                x = torch.cat([of_class.to(x.dtype), x], dim=1)
            x = self.run_block(block, x, condition)
            if number in taps:
                states[number] = x[:, -(self.grid**2) :]
        return x[:, -(self.prefix + self.grid**2) :], tuple(states[tap] for tap in taps)

    def last_tokens(
        self, x: torch.Tensor, time: torch.Tensor, condition: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens, condition[:, :1]

    def guide_tokens(
        self, time: torch.Tensor, condition: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return state, condition[:, :1]


class BottleneckPatchEmbedding(nn.Module):
    """Patches → fewer channels → tokens, both linear: ``[B, C, h, w]`` → ``[B, (h/p)·(w/p), width]``."""

    def __init__(self, channels: int, bottleneck: int, width: int, patch_size: int):
        super().__init__()
        self.proj1 = nn.Conv2d(channels, bottleneck, patch_size, stride=patch_size, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, width, 1)

    def initialise(self) -> None:
        """As the linear layers that they are."""
        for layer in (self.proj1, self.proj2):
            nn.init.xavier_uniform_(layer.weight.view(layer.out_channels, -1))
        nn.init.zeros_(self.proj2.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2)
