"""An tokenizer with the names, shapes and arithmetic of latent-diffusion's public files, in plain torch.

Written from the layout alone (``encoder.down.i.block.j``, ``mid.attn_1``, ``quant_conv``), without diffusers and
without ``formats``: what loads its files must give the same numbers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

TINY = {"width": 16, "multipliers": (1, 2, 4), "blocks": 1, "latent_channels": 4, "groups": 8}  # f4d4-tiny
# f16d32's shape, narrower: 5 levels, attention in the last one, 32 channels
NARROW = {"width": 32, "multipliers": (1, 1, 2, 2, 4), "blocks": 2, "latent_channels": 32, "attention": (4,)}


class ResidualBlock(nn.Module):
    def __init__(self, before: int, after: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, eps=1e-6)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, after, eps=1e-6)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """One head over all positions; projections are 1×1 convolutions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bci,bcj->bij", q, k).mul(q.shape[1] ** -0.5).softmax(-1)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))


class Resample(nn.Module):
    """Half the side, padded on the right and below; or twice the side, nearest neighbours first."""

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)
        self.up = up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.up:
            return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.attn_1 = Attention(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    def __init__(self, before: int, after: int, blocks: int, attention: bool, groups: int, resample: str | None):
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(before if i == 0 else after, after, groups) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(after, groups) for _ in range(blocks if attention else 0))
        self.resample = resample
        if resample:
            setattr(self, resample, Resample(after, resample == "upsample"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        return getattr(self, self.resample)(x) if self.resample else x


class Half(nn.Module):
    """The encoder (``up`` false) or the decoder, whose levels are counted from the pixels too."""

    def __init__(
        self, up: bool, ends: tuple[int, int], widths: Sequence[int], blocks: int, attention: Sequence[int], groups: int
    ):
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(ends[0], widths[last if up else 0], 3, padding=1)
        levels = []
        for number, width in enumerate(widths):
            before = widths[min(number + 1, last)] if up else widths[max(number - 1, 0)]
            resample = None if number == (0 if up else last) else "upsample" if up else "downsample"
            levels.append(Level(before, width, blocks + up, number in attention, groups, resample))
        setattr(self, "up" if up else "down", nn.ModuleList(levels))
        self.mid = Middle(widths[last], groups)
        end = widths[0 if up else last]
        self.norm_out = nn.GroupNorm(groups, end, eps=1e-6)
        self.conv_out = nn.Conv2d(end, ends[1], 3, padding=1)
        self.is_decoder = up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        if self.is_decoder:
            x = self.mid(x)
            for level in reversed(self.up):
                x = level(x)
        else:
            for level in self.down:
                x = level(x)
            x = self.mid(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class PublicVAE(nn.Module):
    """Args are those of LDM's configuration: base width, multipliers and residual blocks of the levels, and so on."""

    def __init__(
        self,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        blocks: int = 2,
        latent_channels: int = 4,
        attention: Sequence[int] = (),
        groups: int = 32,
    ):
        super().__init__()
        widths, c = [width * m for m in multipliers], latent_channels
        self.encoder = Half(False, (3, 2 * c), widths, blocks, attention, groups)
        self.decoder = Half(True, (c, 3), widths, blocks, attention, groups)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images in [-1, 1] → mean, logvar."""
        return self.quant_conv(self.encoder(images)).chunk(2, 1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(z))


class PublicPatchGAN(nn.Module):
    """taming-transformers' discriminator with 3 layers of 64 filters."""

    def __init__(self, width: int = 64):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after, stride in ((1, 2, 2), (2, 4, 2), (4, 8, 1)):
            layers += [nn.Conv2d(before * width, after * width, 4, stride, 1, bias=False)]
            layers += [nn.BatchNorm2d(after * width), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.main(images)


def random_vae(seed: int = 0, **architecture) -> PublicVAE:
    """With random weights everywhere: biases and norms too, which would hide a mistaken name at 0 and 1."""
    return randomised(PublicVAE(**architecture), seed)


def randomised(network: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                scale = 0.8 * tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2
                tensor.copy_(noise * scale + (1.0 if tensor.ndim == 1 else 0.0) * (tensor.mean() > 0.5))
        for name, buffer in network.named_buffers():
            if name.endswith("running_var"):
                buffer.abs_().add_(0.5)
    return network.eval()
