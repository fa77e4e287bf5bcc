"""SiT, the scalable interpolant transformer: noisy latent, time and class → velocity (arXiv 2401.08740, DiT's blocks).

Parameter names are those of the public SiT, REPA and REPA-E code, so that their checkpoints load.
"""

import json
import math
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import Mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

from errors import UserError
from models.layers import projector, sincos_positions, xavier_linears
from models.weight_files import NotWeightsError, one_line, read_state_dict

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"  # as diffusers calls them


@dataclass(frozen=True)
class SiTSize:
    """Depth in blocks, width, attention heads."""

    depth: int
    width: int
    heads: int


SIT_SIZES = {
    "Ti": SiTSize(6, 192, 3),
    "S": SiTSize(12, 384, 6),
    "B": SiTSize(12, 768, 12),
    "L": SiTSize(24, 1024, 16),
    "XL": SiTSize(28, 1152, 16),
}
PATCH_SIZES = (1, 2, 4, 8)
LATENT_PROJECTOR_LAYERS = 5  # of VAE-REPA's projector
PROJECTORS = ("projectors.", "latent_projector.")  # parameters that only training has a use for


@dataclass(frozen=True)
class SiTConfig:
    """Everything that determines a SiT's parameters; saved whole in checkpoints.

    Attributes:
        model: ``SiT-SIZE/PATCH``, e.g. ``SiT-XL/1``.
        latent_channels: C.
        latent_size: h = w of the latent.
        num_classes: real classes; the null class of guidance comes on top.
        qk_norm: LayerNorm on queries and keys.
        encoder_depth: block after which hidden states are projected to VFM features (REPA), counted from 1.
        feature_dims: D of each VFM, one projector each; empty without REPA.
        projector_width: hidden width of the projectors.
        latent_depth: block after which hidden states predict the clean latent (VAE-REPA), counted from 1; 0: none.
        latent_width: hidden width of that projector.
    """

    model: str
    latent_channels: int
    latent_size: int
    num_classes: int
    qk_norm: bool = False
    encoder_depth: int = 8
    feature_dims: tuple[int, ...] = ()
    projector_width: int = 2048
    latent_depth: int = 0
    latent_width: int = 0

    @property
    def size_name(self) -> str:
        """A key of ``SIT_SIZES``."""
        return self._name[0]

    @property
    def size(self) -> SiTSize:
        return SIT_SIZES[self.size_name]

    @property
    def patch_size(self) -> int:
        return int(self._name[1])

    @property
    def grid(self) -> int:
        """Tokens along a side."""
        return self.latent_size // self.patch_size

    @property
    def _name(self) -> tuple[str, str]:
        return re.fullmatch(r"SiT-(\w+)/(\d+)", self.model).groups()

    def to_dict(self) -> dict:
        """Plain JSON values; ``SiTConfig.from_dict`` is the inverse.

        What says that there is no VAE-REPA is left out, so that runs from before it was known are the same runs.
        """
        values = asdict(self) | {"feature_dims": list(self.feature_dims)}
        if not self.latent_depth:
            del values["latent_depth"], values["latent_width"]
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "SiTConfig":
        return cls(**(values | {"feature_dims": tuple(values["feature_dims"])}))

    def without_projectors(self) -> "SiTConfig":
        """The network that samples: its parameters are those whose names do not begin with one of ``PROJECTORS``."""
        return replace(self, feature_dims=(), latent_depth=0, latent_width=0)

    def check(self) -> None:
        """Raise :class:`UserError` for a name or a combination that cannot be built."""
        if self.model not in model_names():
            sizes, patches = ", ".join(SIT_SIZES), ", ".join(map(str, PATCH_SIZES))
            raise UserError(f"--model {self.model} is not known; give SiT-SIZE/PATCH with {sizes} and {patches}")
        if self.latent_size % self.patch_size:
            raise UserError(
                f"--model {self.model}: patch {self.patch_size} does not divide the "
                f"{self.latent_size}×{self.latent_size} latent"
            )
        if self.feature_dims and not 1 <= self.encoder_depth <= self.size.depth:
            raise UserError(
                f"--encoder-depth {self.encoder_depth}: {self.model} has blocks 1 to {self.size.depth}; choose one"
            )
        if not 0 <= self.latent_depth <= self.size.depth:
            raise UserError(
                f"--vae-repa-depth {self.latent_depth}: {self.model} has blocks 1 to {self.size.depth}; choose one"
            )


def model_names() -> list[str]:
    """The names that ``--model`` knows."""
    return [f"SiT-{size}/{patch}" for size in SIT_SIZES for patch in PATCH_SIZES]


class SiT(nn.Module):
    """The diffusion model on latents, with the projectors of REPA and VAE-REPA (arXiv 2601.17830) beside it.

    Args:
        config: its sizes.

    Raises:
        UserError: sizes that do not fit together.
    """

    def __init__(self, config: SiTConfig):
        super().__init__()
        config.check()
        self.config = config
        width, patch = config.size.width, config.patch_size
        self.gradient_checkpointing = False
        self.x_embedder = PatchEmbedding(config.latent_channels, width, patch)
        self.register_buffer("pos_embed", sincos_positions(width, config.grid)[None])
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.blocks = nn.ModuleList(Block(width, config.size.heads, config.qk_norm) for _ in range(config.size.depth))
        self.projectors = nn.ModuleList()
        self.final_layer = FinalLayer(width, patch * patch * config.latent_channels)
        self._initialise()
        # Last, so that one seed gives the same network whatever it is aligned with.
        self.projectors.extend(projector(width, dim, config.projector_width) for dim in config.feature_dims)
        self.projectors.apply(xavier_linears)
        self.latent_projector = None
        if config.latent_depth:
            values = patch * patch * config.latent_channels
            self.latent_projector = projector(width, values, config.latent_width, LATENT_PROJECTOR_LAYERS)
            self.latent_projector.apply(xavier_linears)

    @property
    def null_class(self) -> int:
        """The label that means "no class", for classifier-free guidance."""
        return self.config.num_classes

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of what it is given."""
        return self.config.latent_channels, self.config.latent_size, self.config.latent_size

    def save_pretrained(self, folder: str | Path, projectors: bool = False) -> None:
        """Write ``config.json`` and the weights as safetensors, complete or not at all.

        Args:
            folder: is replaced where it exists.
            projectors: also write those of REPA and VAE-REPA, which only training needs.
        """
        folder = Path(folder)
        beside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        config = self.config if projectors else self.config.without_projectors()
        content = {"_class_name": type(self).__name__} | config.to_dict()
        (beside / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
        weights = {key: tensor.contiguous() for key, tensor in self.state_dict().items()}
        kept = {key: tensor for key, tensor in weights.items() if projectors or not key.startswith(PROJECTORS)}
        save_file(kept, beside / WEIGHTS_FILE)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SiT":
        """The network that :meth:`save_pretrained` wrote, in eval mode on the CPU.

        Raises:
            UserError: no such folder, not of a SiT, or weights of another one.
        """
        folder = Path(folder)
        try:
            content = json.loads((folder / CONFIG_FILE).read_text())
            if content["_class_name"] != cls.__name__:
                raise UserError(f"{folder / CONFIG_FILE} describes a {content['_class_name']}, not a {cls.__name__}")
            config = SiTConfig.from_dict({key: value for key, value in content.items() if not key.startswith("_")})
            model = cls(config)
            model.load_state_dict(read_state_dict(folder / WEIGHTS_FILE))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, NotWeightsError, RuntimeError) as error:
            raise UserError(f"{folder} is no complete folder of a SiT ({one_line(error)})") from error
        return model.eval()

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        with_tokens: bool = False,
        only_tokens: bool = False,
        with_latent: bool = False,
    ) -> torch.Tensor | tuple | list[torch.Tensor]:
        """Predict the velocity.

        Args:
            x: noisy normalised latent ``[B, C, h, w]``.
            t: time in [0, 1], data at 0, noise at 1, ``[B]``.
            y: class in 0…num_classes, the last one the null class, int64 ``[B]``.
            with_tokens: also return the projected hidden states of block ``encoder_depth``.
            only_tokens: return nothing else, and leave out the blocks after that one.
            with_latent: also return them and the clean latent that block ``latent_depth`` predicts.

        Returns:
            velocity ``[B, C, h, w]``; with ``with_tokens`` also a list of ``[B, N, D]``, one for each VFM; with
            ``only_tokens`` that list; with ``with_latent`` velocity, that list and the predicted normalised latent
            ``[B, C, h, w]``, None without VAE-REPA.
        """
        x = self.x_embedder(x) + self.pos_embed  # [B, N, width]
        condition = F.silu(self.t_embedder(t) + self.y_embedder(y))  # [B, width]
        tokens, latent = [], None
        for number, block in enumerate(self.blocks, start=1):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, condition, use_reentrant=False)
            else:
                x = block(x, condition)
            if (with_tokens or only_tokens or with_latent) and number == self.config.encoder_depth:
                tokens = [project(x) for project in self.projectors]
                if only_tokens:
                    return tokens
            if with_latent and number == self.config.latent_depth:
                latent = self._unpatchify(self.latent_projector(x))
        velocity = self._unpatchify(self.final_layer(x, condition))
        if with_latent:
            return velocity, tokens, latent
        return (velocity, tokens) if with_tokens else velocity

    def _unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, N, p·p·C]`` → ``[B, C, h, w]``."""
        grid, patch = self.config.grid, self.config.patch_size
        x = x.unflatten(1, (grid, grid)).unflatten(-1, (patch, patch, self.config.latent_channels))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # b r c p q C → b C (r p) (c q)

    def _initialise(self) -> None:
        self.apply(xavier_linears)
        embedding = self.x_embedder.proj
        nn.init.xavier_uniform_(embedding.weight.view(embedding.out_channels, -1))
        nn.init.zeros_(embedding.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        zero = [block.adaLN_modulation[1] for block in self.blocks]
        for layer in (*zero, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


class PatchEmbedding(nn.Module):
    """Non-overlapping patches → tokens: ``[B, C, h, w]`` → ``[B, (h/p)·(w/p), width]``."""

    def __init__(self, channels: int, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Time ``[B]`` in [0, 1] → ``[B, width]``: 128 cosines and 128 sines (longest period 10000·2π), then an MLP."""

    def __init__(self, width: int, frequencies: int = 256, max_period: float = 10000.0):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        half = frequencies // 2
        frequency = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        phase = t.float()[:, None] * self.frequency
        embedding = torch.cat([phase.cos(), phase.sin()], dim=-1)
        return self.mlp(embedding.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A vector for each class and one for the null class: int64 ``[B]`` → ``[B, width]``."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention: ``[B, N, width]`` → the same."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, w]
        x = F.scaled_dot_product_attention(self.q_norm(q).to(v), self.k_norm(k).to(v), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """An adaLN-Zero transformer block (DiT): shift, scale and gate of both branches come from the condition."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Tokens ``[B, N, width]`` and the condition after its SiLU ``[B, width]`` → tokens."""
        modulation = self.adaLN_modulation(condition)[:, None]  # [B, 1, 6·width]
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        x = x + gate_attn * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens ``[B, N, width]`` → ``[B, N, out]``, modulated by the condition."""

    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x·(1 + scale) + shift``."""
    return torch.addcmul(shift, x, 1 + scale)
