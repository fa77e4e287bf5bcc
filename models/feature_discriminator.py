"""A discriminator on the features of a frozen VFM (StyleGAN-T, arXiv 2301.09515; the heads of VAR and RAE)."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from models.encoders import Encoder

KERNEL = 9  # tokens that a head looks at, in the order of rows


class FeatureDiscriminator(nn.Module):
    """Small heads on the patch tokens of a frozen network; a logit for each token of each head.

    A ViT is read after each quarter of its blocks and, by a head more, after the last one again; a ``cnn`` at its one
    stage. Images are resized to what the network was built for (bilinear, no antialiasing). Only the heads are trained,
    saved and counted. Their weights are divided by their largest singular value, of which every forward that trains
    them makes a step of power iteration, in float32.

    What is saved knows the frozen network by the checksum of its weights, and is loaded beside no other.

    Args:
        encoder: the frozen network; on whose device it is, what it is cast to and compiled with follows this module.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        self._frozen = [encoder]  # in a list: no part of what is trained and saved
        self.register_buffer("vfm", torch.tensor(list(bytes.fromhex(encoder.checksum())), dtype=torch.uint8))
        self.register_load_state_dict_pre_hook(_check_vfm)
        depth = encoder.depth
        self.blocks = [] if depth is None else sorted({math.ceil(depth * quarter / 4) for quarter in (1, 2, 3, 4)})
        count = len(self.blocks) + 1
        self.heads = nn.ModuleList(Head(encoder.embed_dim) for _ in range(count))

    @property
    def encoder(self) -> Encoder:
        return self._frozen[0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images ``[B, 3, H, W]`` in [-1, 1] → logits ``[B, heads · tokens]``."""
        self.heads.train(next(self.heads.parameters()).requires_grad)  # else the singular values stay what they are
        states = self.encoder.states(self.preprocess(images), self.blocks)
        if self.blocks:
            states = [states[-1], *states]
        with parametrize.cached():  # weights are divided once a forward, and not in autocast's precision
            with torch.autocast(images.device.type, enabled=False):
                for module in self.heads.modules():
                    if isinstance(module, nn.Conv1d):
                        module.weight  # noqa: B018
            logits = [head(x.transpose(1, 2)).flatten(1) for head, x in zip(self.heads, states, strict=True)]
        return torch.cat(logits, dim=1)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] → what the network takes, float32."""
        x = ((images.float() + 1) * 127.5 - self.encoder.mean) / self.encoder.std
        side = self.encoder.input_size
        return x if x.shape[-1] == side else F.interpolate(x, (side, side), mode="bilinear", align_corners=False)

    def compile(self, *args, **options) -> None:
        """The frozen network; the heads are matrix products, which a compiler leaves alone."""
        self.encoder.compile(*args, **options)

    def _apply(self, function, recurse: bool = True) -> "FeatureDiscriminator":
        self.encoder._apply(function, recurse)
        return super()._apply(function, recurse)


def _check_vfm(module: FeatureDiscriminator, state: dict, prefix: str, *others: object) -> None:
    saved, errors = state.get(f"{prefix}vfm"), others[-1]
    if saved is not None and not torch.equal(saved.cpu(), module.vfm.cpu()):
        errors.append(f"its heads were trained on the features of another {module.encoder.name} than the one given")


class Head(nn.Module):
    """Tokens ``[B, D, N]`` → logits ``[B, 1, N]``: a layer on each token, one on its neighbours, a sum of channels."""

    def __init__(self, width: int):
        super().__init__()
        self.token = _layer(width, 1)
        self.neighbours = _layer(width, KERNEL)
        self.logit = spectral_norm(nn.Conv1d(width, 1, 1), eps=1e-12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.token(x)
        return self.logit((self.neighbours(x) + x) / math.sqrt(2))


def _layer(width: int, kernel: int) -> nn.Sequential:
    """Normalised over the tokens of an image, channel by channel, so that logits do not depend on the batch."""
    convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular")
    norm = nn.InstanceNorm1d(width, eps=1e-6, affine=True)
    return nn.Sequential(spectral_norm(convolution, eps=1e-12), norm, nn.LeakyReLU(0.2))
