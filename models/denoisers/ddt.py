"""DDT as diffusion-bench has it (arXiv 2606.24888): DiT^DH's head behind blocks whose condition is tokens.

Four tokens of the time and eight of the class, each a learned vector and the embedding, stand before those of the
latent. The blocks have no modulation; the head's has each token's own, as in ``models.denoisers.ditdh``.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from models.denoisers.config import DDTConfig
from models.denoisers.ditdh import DiTDH
from models.denoisers.lightningdit import lightning_blocks
from models.denoisers.transformer import PlainBlock

TIME_TOKENS, LABEL_TOKENS = 4, 8


class DDT(DiTDH):
    """The transformer with its condition as tokens, then the head.

    Args:
        config: its sizes.
    """

    def __init__(self, config: DDTConfig):
        super().__init__(config)
        self.pos_embed = None  # rotary positions alone
        scale = self.width**-0.5
        self.time_tokens = nn.Parameter(scale * torch.randn(TIME_TOKENS, self.width))
        self.label_tokens = nn.Parameter(scale * torch.randn(LABEL_TOKENS, self.width))

    @property
    def prefix(self) -> int:
        return TIME_TOKENS + LABEL_TOKENS + super().prefix

    def make_blocks(self) -> Iterator[PlainBlock]:
        return lightning_blocks(PlainBlock, self.config.size, self.norm, self.qk_norm, self.grid, self.prefix)

    def condition(self, time: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        of_time = self.time_tokens + time[:, None]
        of_label = self.label_tokens + self.y_embedder(y)[:, None]
        return torch.cat([of_time, of_label], dim=1)  # [B, 12, width]

    def embed(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return torch.cat([condition, super().embed(x, condition)], dim=1)

    def guide_tokens(
        self, time: torch.Tensor, condition: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen = F.silu(time[:, None] + state)  # as the head is told
        return seen, F.silu(seen)  # twice, as there

    def last_tokens(
        self, x: torch.Tensor, time: torch.Tensor, condition: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().last_tokens(x, time, condition, tokens[:, condition.shape[1] :])
