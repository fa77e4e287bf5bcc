"""What SiT and its relatives share: noisy latent → tokens → adaLN-Zero blocks → velocity (DiT, arXiv 2212.09748).

A kind says which norm and which block. Parameter names are those of the public SiT, REPA, REPA-E and LightningDiT code,
so that their checkpoints load.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.compilation import allow_graphs, compile_options
from models.denoisers.base import Denoiser, velocity_to
from models.denoisers.config import TransformerConfig
from models.denoisers.sprint import DENSE, Fusion, Route, select
from models.layers import sincos_positions, unpatchify, xavier_linears

Norm = Callable[[int], nn.Module]  # width → a norm of the last dimension


class Transformer(Denoiser):
    """The transformer.

    Args:
        config: its sizes.

    Raises:
        UserError: sizes that do not fit together.
    """

    config: TransformerConfig
    counts_to_data = False  # inside, in checkpoints: time runs from noise at 0, and a velocity points to the data

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.gradient_checkpointing = False
        size, patch = config.size, config.patch_size
        self.x_embedder = self.make_patch_embedding(config.latent_channels, size.width, patch)
        self.register_buffer("pos_embed", sincos_positions(size.width, config.grid)[None])
        token_width = config.class_token_width
        self.class_token_embedder = self.make_class_token_embedder(size.width) if token_width else None
        self.t_embedder = self.make_time_embedder()
        self.y_embedder = LabelEmbedder(config.num_classes, size.width)
        self.blocks = nn.ModuleList(self.make_blocks())
        self.fusion = Fusion(size.width) if config.sprint else None
        self.final_layer = self.make_final_layer(size.width)
        self._initialise()
        self.guide_layer = self._make_guide_layer() if config.guide_depth else None

    @abstractmethod
    def norm(self, width: int) -> nn.Module:
        """Of the last dimension, before attention, MLP and output."""

    @abstractmethod
    def make_blocks(self) -> Iterator["Block"]:
        """The blocks, in their order."""

    def make_patch_embedding(self, channels: int, width: int, patch_size: int) -> nn.Module:
        """What makes tokens of patches."""
        return PatchEmbedding(channels, width, patch_size)

    def make_time_embedder(self) -> nn.Module:
        """Time ``[B]`` → ``[B, width]``."""
        return TimestepEmbedder(self.width)

    def make_class_token_embedder(self, width: int) -> nn.Module:
        """A noisy class token ``[B, D]`` → ``[B, width]``."""
        return ClassTokenEmbedder(self.class_token_width, width, partial(nn.LayerNorm, eps=1e-6))

    def make_final_layer(self, width: int) -> nn.Module:
        """Tokens of ``width`` → patches of the velocity, and its class token."""
        return FinalLayer(width, self.patch_numbers, self.norm, self.class_token_width)

    @property
    def patch_numbers(self) -> int:
        """Of the latent, in a token's patch."""
        return self.config.patch_size**2 * self.config.latent_channels

    @property
    def prefix(self) -> int:
        """Tokens before those of the grid: they are nowhere in it, and see and are seen by all."""
        return min(1, self.class_token_width)

    @property
    def depth(self) -> int:
        return self.config.size.depth

    @property
    def width(self) -> int:
        return self.config.size.width

    @property
    def grid(self) -> int:
        return self.config.grid

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        taps: Sequence[int] = (),
        route: Route = DENSE,
        arrival: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        time = self.embed_time(t)
        condition = last = self.condition(time, y)
        if arrival is not None:  # Decoupled MeanFlow (arXiv 2510.24474): the last blocks decode for another time
            last = self.condition(self.embed_time(arrival), y)
        tokens, states = self._through_blocks(x, condition, taps, self.depth, route, last)
        patches, class_token = self.final_layer(*self.last_tokens(x, time, last, tokens))
        return self._velocity(patches, class_token, x, t), states

    def _velocity(
        self, patches: torch.Tensor, class_token: torch.Tensor | None, x: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """What follows from an output for states ``x`` at times ``t``."""
        output = self.pack(unpatchify(patches, self.config.latent_shape), class_token)
        if self.damps:
            return velocity_to(output, x, t)
        return -output if self.counts_to_data else output

    def guide_velocity(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        time = self.embed_time(t)
        patches, _ = self.guide_layer(*self.guide_tokens(time, self.condition(time, y), state))
        return self._velocity(patches, None, x, t)

    def guide_tokens(
        self, time: torch.Tensor, condition: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the guide's layer is given: tokens of the grid, and their condition."""
        return state, condition

    def hidden_states(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, taps: Sequence[int]
    ) -> tuple[torch.Tensor, ...]:
        condition = self.condition(self.embed_time(t), y)
        return self._through_blocks(x, condition, taps, max(taps), DENSE, condition)[1]

    def embed_time(self, t: torch.Tensor) -> torch.Tensor:
        """Time ``[B]`` → ``[B, width]``."""
        return self.t_embedder(1 - t if self.counts_to_data else t)

    def condition(self, time: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The embedding of the time ``[B, width]`` and the class ``[B]`` → what the blocks are given."""
        return F.silu(time + self.y_embedder(y))[:, None]  # [B, 1, width], for all tokens

    def embed(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """A noisy state, and what the blocks are given → tokens ``[B, prefix + N, width]``."""
        latent, class_token = self.unpack(x)
        x = self.x_embedder(latent)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        if class_token is not None:
            x = torch.cat([self.class_token_embedder(class_token)[:, None], x], dim=1)
        return x

    def last_tokens(
        self, x: torch.Tensor, time: torch.Tensor, condition: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the final layer is given: tokens after the blocks, the class token first, and its condition."""
        return tokens, condition

    def enable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = True

    def compile(self, *args, **options) -> None:
        """Each block on its own: they share their code, and checkpointing and DDP stay outside of it."""
        allow_graphs()
        for part in self.compiled_parts():
            part.compile(*args, **compile_options(options))

    def compiled_parts(self) -> Iterator[nn.Module]:
        """What is compiled, each on its own."""
        yield from (*self.blocks, self.final_layer)
        if self.guide_layer is not None:
            yield self.guide_layer

    def _through_blocks(
        self,
        x: torch.Tensor,
        condition: torch.Tensor,
        taps: Sequence[int],
        last: int,
        route: Route,
        last_condition: torch.Tensor,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Tokens ``[B, prefix + N, width]`` after block ``last``; those of the grid after each tap.

        The last ``config.flow_map_blocks`` of all blocks are given ``last_condition``.
        """
        sparse, places = self.config.sparse_blocks, None
        first_of_map = self.depth - self.config.flow_map_blocks + 1
        x = self.embed(x, condition)
        if sparse:  # as tokens lie behind select and fusion: blocks that differ in this alone would not share a graph
            x = x.contiguous()
        dense, states = x, {}
        for number, block in enumerate(self.blocks[:last], start=1):
            if number == sparse.start:  # SPRINT: on with some of the tokens
                dense, places = x, self._sequence_places(route.kept)
                x = select(x, places)
            elif number == sparse.stop:  # and with all again
                x, places = self.fusion(dense, x, places, route.skipped), None
            if number in sparse and route.skipped is True:
                continue
            of_block = condition if number < first_of_map else last_condition
            given = (x, of_block) if places is None else (x, of_block, places)
            x = self.run_block(block, *given)
            if number in taps:
                states[number] = x[:, self.prefix :] if self.prefix else x
        return x, tuple(states[tap] for tap in taps)

    def run_block(self, block: nn.Module, *given: torch.Tensor) -> torch.Tensor:
        """Its answer, with gradient checkpointing where that is on."""
        recomputes = self.gradient_checkpointing and self.training
        return checkpoint(block, *given, use_reentrant=False) if recomputes else block(*given)

    def _sequence_places(self, kept: torch.Tensor | None) -> torch.Tensor | None:
        """Of tokens of the grid, with those before them, which are always kept."""
        if kept is None or not self.prefix:
            return kept
        before = torch.arange(self.prefix, device=kept.device).expand(len(kept), -1)
        return torch.cat([before, kept + self.prefix], dim=1)

    def _initialise(self) -> None:
        self.initialise_linears()
        self.x_embedder.initialise()
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for block in self.blocks:
            block.initialise()
        zero = [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        if self.final_layer.class_token is not None:
            zero.append(self.final_layer.class_token)
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _make_guide_layer(self) -> "FinalLayer":
        """Begins with zeros, as the final layer does; one seed gives the same network with and without it."""
        with torch.random.fork_rng(devices=[]):
            layer = FinalLayer(self.width, self.patch_numbers, self.norm)
        for parameter in (*layer.adaLN_modulation.parameters(), *layer.linear.parameters()):
            nn.init.zeros_(parameter)
        return layer

    def initialise_linears(self) -> None:
        """All linear layers, before those that begin otherwise."""
        self.apply(xavier_linears)


class PatchEmbedding(nn.Module):
    """Non-overlapping patches → tokens: ``[B, C, h, w]`` → ``[B, (h/p)·(w/p), width]``."""

    def __init__(self, channels: int, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def initialise(self) -> None:
        """As the linear layer that it is."""
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.out_channels, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ClassTokenEmbedder(nn.Module):
    """A noisy class token ``[B, D]`` → a token ``[B, width]``: linear, norm (REG, arXiv 2507.01467)."""

    def __init__(self, token_width: int, width: int, norm: Norm):
        super().__init__()
        self.proj = nn.Linear(token_width, width)
        self.norm = norm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x))


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
    """Multi-head self-attention: ``[B, N, width]`` → the same.

    Args:
        width, heads: of the tokens.
        qk_norm: of the queries and keys of each head.
        positions: what is done to queries and keys ``[B, N, heads, width/heads]``, given their places, to tell them
            where they are; None: nothing.
    """

    def __init__(self, width: int, heads: int, qk_norm: Norm = nn.Identity, positions: nn.Module | None = None):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = qk_norm(width // heads), qk_norm(width // heads)
        self.positions = positions
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """``places`` ``[B, N]`` are those of the tokens in the whole sequence; None: all of it."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each [B, N, heads, w]
        q, k = self.q_norm(q), self.k_norm(k)
        if self.positions is not None:
            where = () if places is None else (places,)
            q, k = self.positions(q, *where), self.positions(k, *where)
        q, k = q.to(v), k.to(v)
        x = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)))  # heads before tokens
        return self.proj(x.transpose(1, 2).flatten(2))  # as they lie: attention answers in the order of its queries


class PlainBlock(nn.Module):
    """A transformer block without a condition of its own, for networks whose condition is tokens.

    Args:
        width: of the tokens.
        norm: before both branches.
        attention, mlp: the branches, ``[B, N, width]`` → the same.
    """

    def __init__(self, width: int, norm: Norm, attention: nn.Module, mlp: nn.Module):
        super().__init__()
        self.norm1 = norm(width)
        self.attn = attention
        self.norm2 = norm(width)
        self.mlp = mlp

    def initialise(self) -> None:
        """Nothing but what all linear layers begin with."""

    def forward(self, x: torch.Tensor, condition: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """As :meth:`Block.forward`; the condition is not used."""
        where = () if places is None else (places,)
        x = x + self.attn(self.norm1(x), *where)
        return x + self.mlp(self.norm2(x))


class Block(PlainBlock):
    """An adaLN-Zero transformer block (DiT): shift, scale and gate of both branches come from the condition.

    Args:
        width, norm, attention, mlp: as in :class:`PlainBlock`.
    """

    def __init__(self, width: int, norm: Norm, attention: nn.Module, mlp: nn.Module):
        super().__init__(width, norm, attention, mlp)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(width, 6 * width))

    def initialise(self) -> None:
        """As the identity."""
        nn.init.zeros_(self.adaLN_modulation[1].weight)
        nn.init.zeros_(self.adaLN_modulation[1].bias)

    def forward(self, x: torch.Tensor, condition: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens ``[B, N, width]``, their condition after its SiLU, places as in attention → tokens.

        The condition is one for all tokens, ``[B, 1, width]``, or each token's own, ``[B, N, width]``.
        """
        modulation = self.adaLN_modulation(condition)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        where = () if places is None else (places,)
        x = x + gate_attn * self.attn(modulate(self.norm1(x), shift_attn, scale_attn), *where)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens ``[B, N, width]``, modulated by the condition → ``[B, N, out]``.

    Args:
        width: of the tokens.
        out_features: of a patch.
        norm: before the modulation.
        class_token_width: D of a class token, which has a linear layer of its own; 0: there is none.
    """

    def __init__(self, width: int, out_features: int, norm: Norm, class_token_width: int = 0):
        super().__init__()
        self.norm_final = norm(width)
        self.linear = nn.Linear(width, out_features)
        self.class_token = nn.Linear(width, class_token_width) if class_token_width else None
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[B, N, out]`` and None; with a class token, which comes first, ``[B, N − 1, out]`` and ``[B, D]``.

        The condition is as in :class:`Block`.
        """
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        x = modulate(self.norm_final(x), shift, scale)
        if self.class_token is None:
            return self.linear(x), None
        return self.linear(x[:, 1:]), self.class_token(x[:, 0])


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x·(1 + scale) + shift``."""
    return torch.addcmul(shift, x, 1 + scale)
