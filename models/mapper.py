"""The mapper h_φ: (noisy) latent → predicted VFM patch features (Send-VAE, arXiv 2601.05823, section 3)."""

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import nn

from models.layers import TokenConvolution, projector, sincos_positions, xavier_linears


class Mapper(nn.Module):
    """Patch embedding, ``depth`` pre-norm ViT blocks, MLP. Trained together with the VAE and thrown away after.

    The hidden width is the VFM's, with heads of 64 channels where that divides it. Depth 0 is the paper's MLP baseline:
    each token is mapped on its own, so it gets no position embedding either. The initialisation is not published; this
    is SiT's (Xavier uniform, zero biases).

    Args:
        latent_channels: C of the latent.
        latent_size: h = w of the latent.
        grid: side of the VFM's token grid; must divide ``latent_size``, the patch size is their ratio.
        embed_dim: D of the VFM.
        depth: number of ViT blocks.
        projector_width: hidden width of the MLP.
        head: ``mlp``, or ``conv`` for one 3×3 convolution over the tokens in its place.
    """

    def __init__(
        self,
        latent_channels: int,
        latent_size: int,
        grid: int,
        embed_dim: int,
        depth: int = 1,
        projector_width: int = 2048,
        head: str = "mlp",
    ):
        super().__init__()
        if latent_size % grid:
            raise ValueError(f"a {grid}×{grid} token grid does not divide the {latent_size}×{latent_size} latent")
        self.patch_size = latent_size // grid
        self.patch_embed = nn.Conv2d(latent_channels, embed_dim, self.patch_size, stride=self.patch_size)
        if depth:
            self.register_buffer("pos_embed", sincos_positions(embed_dim, grid)[None], persistent=False)
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads(embed_dim), mlp_ratio=4.0, qkv_bias=True, norm_layer=norm_layer)
            for _ in range(depth)
        )
        if head == "conv":
            self.projector = TokenConvolution(embed_dim, embed_dim)
        else:
            self.projector = projector(embed_dim, embed_dim, projector_width)
        self.apply(xavier_linears)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(embed_dim, -1))
        nn.init.zeros_(self.patch_embed.bias)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Map a normalised latent ``[B, C, h, w]``, with or without noise, to ``[B, grid², D]``."""
        x = self.patch_embed(z).flatten(2).transpose(1, 2)  # [B, N, D]
        if len(self.blocks):
            x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.projector(x)


class LinearMapper(nn.Module):
    """VA-VAE's projection of the latent to the VFM's width: a 1×1 convolution without bias (arXiv 2501.01423).

    Args:
        latent_channels: C of the latent.
        embed_dim: D of the VFM.
    """

    def __init__(self, latent_channels: int, embed_dim: int):
        super().__init__()
        self.projection = nn.Conv2d(latent_channels, embed_dim, kernel_size=1, bias=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Map an un-normalised latent ``[B, C, h, w]`` to ``[B, h·w, D]``."""
        return self.projection(z).flatten(2).transpose(1, 2)


def num_heads(width: int) -> int:
    """Attention heads for a hidden width: 64 channels each, or else the widest heads below 64 that divide it."""
    head_width = next(w for w in range(min(64, width), 0, -1) if width % w == 0)
    return width // head_width
