"""DiT^DH: a transformer and a wide, shallow head behind it (RAE, arXiv 2510.11690; the head is DDT's, 2504.05741).

A denoiser has to be as wide as the tokens that it makes, or it cannot even overfit one image (RAE, section 4.1): those
of a representation autoencoder have 768 channels and more. The head is, at little cost: it sees the noisy latent once
more, and what the transformer made of each token is that token's condition.

Numbers are those of the public RAE code, whose time runs from the data at 0, as here.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from models.denoisers.config import DiTDHConfig
from models.denoisers.lightningdit import RMSNorm, lightning_blocks
from models.denoisers.transformer import Block, ClassTokenEmbedder, Norm, PatchEmbedding, Transformer


class DiTDH(Transformer):
    """LightningDiT's blocks, then the head; hidden states are those of the blocks.

    Args:
        config: its sizes.
    """

    config: DiTDHConfig

    def __init__(self, config: DiTDHConfig):
        super().__init__(config)
        embedder = self.make_class_token_embedder(config.head_width) if config.class_token_width else None
        self.head = Head(config, self.norm, self.qk_norm, embedder)

    def norm(self, width: int) -> nn.Module:
        return RMSNorm(width, eps=1e-6)

    @property
    def qk_norm(self) -> Norm:
        return self.norm if self.config.qk_norm else nn.Identity

    def make_blocks(self) -> Iterator[Block]:
        return lightning_blocks(Block, self.config.size, self.norm, self.qk_norm, self.grid, self.prefix)

    def make_time_embedder(self) -> nn.Module:
        return FourierTimeEmbedder(self.width)

    def make_class_token_embedder(self, width: int) -> nn.Module:
        return ClassTokenEmbedder(self.class_token_width, width, self.norm)

    def make_final_layer(self, width: int) -> nn.Module:
        return super().make_final_layer(self.config.head_width)

    def condition(self, time: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.silu(super().condition(time, y))  # twice, as there: once for all, and in each block's modulation

    def last_tokens(
        self, x: torch.Tensor, time: torch.Tensor, condition: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        condition = self.head.condition(time, tokens)
        x = self.head.embed(*self.unpack(x))
        for block in self.head.blocks:
            x = self.run_block(block, x, condition)
        return x, condition

    def compiled_parts(self) -> Iterator[nn.Module]:
        yield from super().compiled_parts()
        yield from self.head.blocks

    def describe(self) -> str:
        head = self.config.head
        return f"{super().describe()}, and a head of {head.depth} × {head.width}"

    def initialise_linears(self) -> None:
        """As torch makes them, as there."""


class Head(nn.Module):
    """The parts of the head but its last layer.

    Args:
        config: its sizes.
        norm, qk_norm: as in the blocks before it.
        class_token_embedder: of a class token, or None.
    """

    def __init__(self, config: DiTDHConfig, norm: Norm, qk_norm: Norm, class_token_embedder: nn.Module | None):
        super().__init__()
        size = config.head
        self.x_embedder = PatchEmbedding(config.latent_channels, size.width, config.patch_size)
        self.class_token_embedder = class_token_embedder
        self.projector = nn.Linear(config.size.width, size.width)
        unplaced = min(1, config.class_token_width)
        self.blocks = nn.ModuleList(lightning_blocks(Block, size, norm, qk_norm, config.grid, unplaced))
        self.x_embedder.initialise()
        for block in self.blocks:
            block.initialise()

    def condition(self, time: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The embedding of the time ``[B, width]`` and the tokens before the head → each token's ``[B, N, width]``."""
        return F.silu(self.projector(F.silu(time[:, None] + tokens)))

    def embed(self, latent: torch.Tensor, class_token: torch.Tensor | None) -> torch.Tensor:
        """A noisy latent and class token → tokens ``[B, N, width]``, the class token first."""
        x = self.x_embedder(latent)  # where they are, the rotary positions say
        return x if class_token is None else torch.cat([self.class_token_embedder(class_token)[:, None], x], dim=1)


class FourierTimeEmbedder(nn.Module):
    """Time ``[B]`` in [0, 1] → ``[B, width]``: sines and cosines of random frequencies, then an MLP.

    The frequencies are drawn once, from a normal distribution, and belong to the weights.

    Args:
        width: of the answer.
        frequencies: sines, and as many cosines.
    """

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.register_buffer("W", torch.randn(frequencies))
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        phase = 2 * torch.pi * t[:, None] * self.W
        embedding = torch.cat([phase.sin(), phase.cos()], dim=-1)
        return self.mlp(embedding.to(self.mlp[0].weight.dtype))
