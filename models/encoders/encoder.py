"""A frozen vision foundation model: uint8 images → patch features ``[B, N, D]``."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from files import weights_checksum
from models.compilation import allow_graphs, compile_options
from models.encoders.folding import fold_batch_norm
from models.encoders.registry import EncoderSpec


class Encoder(nn.Module):
    """A frozen VFM that gives the token grid it was asked for.

    Images are normalised in float32 and resized (bicubic, ``align_corners=False``, no antialiasing: the REPA protocol)
    to ``grid · stride`` pixels. Always in eval mode, parameters frozen, forward without gradient.

    Args:
        spec: which network.
        grid: tokens along a side.
        network: the timm network, built for that input size and with its weights; a ``cnn`` is folded in place
            (``models.encoders.folding``).
        name: what ``--enc-type`` calls it.
    """

    def __init__(self, spec: EncoderSpec, grid: int, network: nn.Module, name: str = ""):
        super().__init__()
        self.spec, self.grid, self.network, self.name = spec, grid, network, name or spec.timm_name
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1) * 255.0, persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1) * 255.0, persistent=False)
        self._checksum: str | None = None
        if spec.kind == "cnn":
            if not next(network.parameters()).is_meta:
                self._checksum = weights_checksum(network.state_dict())
            fold_batch_norm(network)
            network.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.eval()

    @property
    def embed_dim(self) -> int:
        return self.spec.embed_dim

    @property
    def input_size(self) -> int:
        """Side of the image that the network sees, in pixels."""
        return self.grid * self.spec.stride

    @property
    def depth(self) -> int | None:
        """Blocks of a ViT; None: it has none."""
        return None if self.spec.kind == "cnn" else len(self.network.blocks)

    def checksum(self) -> str:
        """SHA-256 of the weights as loaded, without position embeddings: they were resampled to the grid."""
        if self._checksum is not None:
            return self._checksum
        state = self.network.state_dict()
        return weights_checksum({name: state[name] for name in state if not name.endswith("pos_embed")})

    def train(self, mode: bool = True) -> "Encoder":
        """Stays in eval mode: a frozen network whose statistics must not move."""
        return super().train(False)

    def compile(self, *args, **options) -> None:
        """``torch.compile`` in place; of a vision transformer each block, as they share their code."""
        allow_graphs()
        options = compile_options(options)
        if self.spec.kind == "cnn":
            super().compile(*args, **options)
        else:
            for block in self.network.blocks:
                block.compile(*args, **options)

    @torch.no_grad()
    def forward(self, images: torch.Tensor, class_token: bool = False) -> torch.Tensor:
        """Frozen features.

        Args:
            images: uint8 ``[B, 3, H, W]``.
            class_token: put the class token in front, from where the patch tokens are taken; of a network without one
                the mean of its patch tokens.

        Returns:
            float32 patch features ``[B, grid², D]``, row-major, or ``[B, 1 + grid², D]``.
        """
        patches, prefix = self._tokens(self.preprocess(images))
        if not class_token:
            return patches
        has_class_token = getattr(self.network, "cls_token", None) is not None
        first = prefix[:, :1] if has_class_token else patches.mean(1, keepdim=True)
        return torch.cat([first, patches], dim=1)

    @torch.no_grad()
    def block_features(self, images: torch.Tensor, blocks: Sequence[int]) -> list[torch.Tensor]:
        """Patch tokens after some blocks of a ViT, each through the network's final norm.

        Args:
            images: uint8 ``[B, 3, H, W]``.
            blocks: counted from 1, ascending.

        Returns:
            float32 ``[B, grid², D]`` for each.
        """
        options = {"norm": True, "output_fmt": "NLC", "intermediates_only": True}
        indices = [block - 1 for block in blocks]
        states = self.network.forward_intermediates(self.preprocess(images), indices=indices, **options)
        return [state.float() for state in states]

    def states(self, x: torch.Tensor, blocks: Sequence[int]) -> list[torch.Tensor]:
        """Patch tokens after some blocks, as they are, with gradients of the images.

        Args:
            x: images as the network takes them, ``[B, 3, input_size, input_size]``.
            blocks: of a ViT, counted from 1, ascending; a ``cnn`` gives its one stage.

        Returns:
            ``[B, grid², D]`` for each.
        """
        if self.spec.kind == "cnn":
            return [self.network(x)[0].flatten(2).transpose(1, 2)]
        options = {"norm": False, "output_fmt": "NLC", "intermediates_only": True}
        return self.network.forward_intermediates(x, indices=[block - 1 for block in blocks], **options)

    def _tokens(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Patch tokens and, of a ViT, those before them: class token, registers."""
        if self.spec.kind == "cnn":
            return self.network(x)[0].flatten(2).transpose(1, 2).float(), None
        if self.spec.final_norm:
            tokens = self.network.forward_features(x).float()
            return tokens[:, self.network.num_prefix_tokens :], tokens[:, : self.network.num_prefix_tokens]
        options = {"norm": False, "output_fmt": "NLC", "intermediates_only": True, "return_prefix_tokens": True}
        patches, prefix = self.network.forward_intermediates(x, indices=1, **options)[-1]
        return patches.float(), prefix.float()

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images ``[B, 3, H, W]`` → normalised float32 ``[B, 3, input_size, input_size]``."""
        x = (images.float() - self.mean) / self.std
        if x.shape[-2:] != (self.input_size, self.input_size):
            x = F.interpolate(x, (self.input_size, self.input_size), mode="bicubic", align_corners=False)
        return x
