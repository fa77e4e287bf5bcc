"""RAE's DiT^DH and diffusion-bench's DDT from the formulas, on state dicts in their public layouts.

Nothing of ``models`` is in it: networks and converters are compared with it. A tiny one of each: six blocks of width
192, a head of two blocks of width 256. In both codes time runs from the data at 0.
"""

import torch

from tests.public_lightningdit import State, rotary_tables, rotated

WIDTH, DEPTH, HEADS = 192, 6, 3  # as Ti
HEAD_WIDTH, HEAD_DEPTH, HEAD_HEADS = 256, 2, 2
FREQUENCIES = 256  # of the time
TIME_TOKENS, LABEL_TOKENS, TOKEN_WIDTH = 4, 8, 5  # the last of a class token


class Maker:
    """Random tensors by name, none of them zero."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) * 0.06

    def linear(self, name: str, out: int, into: int) -> State:
        return {f"{name}.weight": self.normal(out, into), f"{name}.bias": self.normal(out)}

    def patches(self, name: str, out: int, channels: int, patch: int) -> State:
        return {f"{name}.proj.weight": self.normal(out, channels, patch, patch), f"{name}.proj.bias": self.normal(out)}

    def gain(self, name: str, width: int) -> State:
        return {f"{name}.weight": 1 + self.normal(width)}


def tables(name: str, grid: int, width: int, before: int = 0, after: int = 0) -> State:
    """Rotary tables of a grid, and of tokens before and after it, which are not turned."""
    cos, sin = rotary_tables(grid, width)
    cos = torch.cat([torch.ones(before, width), cos, torch.ones(after, width)])
    sin = torch.cat([torch.zeros(before, width), sin, torch.zeros(after, width)])
    return {f"{name}.freqs_cos": cos, f"{name}.freqs_sin": sin}


def sizes() -> list[tuple[int, int, int]]:
    """Of each block: number, width, heads."""
    widths = [(WIDTH, HEADS)] * DEPTH + [(HEAD_WIDTH, HEAD_HEADS)] * HEAD_DEPTH
    return [(number, width, heads) for number, (width, heads) in enumerate(widths)]


def rae_state(patch: int = 1, side: int = 4, classes: int = 6, qk_norm: bool = False, seed: int = 0) -> State:
    """As RAE's code names them; latents of 4 channels."""
    make, grid, channels = Maker(seed), side // patch, 4
    state = {"pos_embed": make.normal(1, grid**2, WIDTH)}
    state |= make.patches("x_embedder", HEAD_WIDTH, channels, patch)
    state |= make.patches("s_embedder", WIDTH, channels, patch)
    state |= make.linear("s_projector", HEAD_WIDTH, WIDTH)
    state |= {"t_embedder.W": 16 * make.normal(FREQUENCIES)}
    state |= make.linear("t_embedder.mlp.0", WIDTH, 2 * FREQUENCIES) | make.linear("t_embedder.mlp.2", WIDTH, WIDTH)
    state |= {"y_embedder.embedding_table.weight": make.normal(classes + 1, WIDTH)}
    state |= make.gain("final_layer.norm_final", HEAD_WIDTH)
    state |= make.linear("final_layer.linear", patch**2 * channels, HEAD_WIDTH)
    state |= make.linear("final_layer.adaLN_modulation.1", 2 * HEAD_WIDTH, HEAD_WIDTH)
    state |= tables("enc_feat_rope", grid, WIDTH // HEADS) | tables("dec_feat_rope", grid, HEAD_WIDTH // HEAD_HEADS)
    for number, width, heads in sizes():
        name = f"blocks.{number}"
        state |= make.gain(f"{name}.norm1", width) | make.gain(f"{name}.norm2", width)
        state |= make.linear(f"{name}.attn.qkv", 3 * width, width) | make.linear(f"{name}.attn.proj", width, width)
        if qk_norm:
            state |= make.gain(f"{name}.attn.q_norm", width // heads)
            state |= make.gain(f"{name}.attn.k_norm", width // heads)
        hidden = int(2 / 3 * int(4 * width))
        state |= make.linear(f"{name}.mlp.w12", 2 * hidden, width) | make.linear(f"{name}.mlp.w3", width, hidden)
        state |= make.linear(f"{name}.adaLN_modulation.1", 6 * width, width)
    return state


def bench_state(
    patch: int = 1, side: int = 4, classes: int = 6, has_token: bool = False, is_guided: bool = False, seed: int = 0
) -> State:
    """As diffusion-bench's code names them.

    ``has_token``: with a class token (REG) and what is left of REPA; ``is_guided``: with internal guidance, as RAEv2.
    """
    make, grid, channels, token = Maker(seed), side // patch, 4, int(has_token)
    state = make.patches("s_embedder", WIDTH, channels, patch) | make.patches("x_embedder", HEAD_WIDTH, channels, patch)
    state |= make.linear("s_projector", HEAD_WIDTH, WIDTH)
    state |= {"t_embedder.W": 16 * make.normal(FREQUENCIES)}
    state |= {"t_embedder.learnable_tokens": make.normal(TIME_TOKENS, WIDTH)}
    state |= make.linear("t_embedder.mlp.0", WIDTH, 2 * FREQUENCIES) | make.linear("t_embedder.mlp.2", WIDTH, WIDTH)
    state |= {"ctx_embedder.learnable_tokens": make.normal(LABEL_TOKENS, WIDTH)}
    state |= {"ctx_embedder.embedding_table.weight": make.normal(classes + 1, WIDTH)}
    for number, width, heads in sizes():
        name = f"blocks.{number}"
        state |= make.gain(f"{name}.norm1", width) | make.gain(f"{name}.norm2", width)
        for part in "qkv":
            state |= make.linear(f"{name}.attn.{part}", width, width)
        state |= make.linear(f"{name}.attn.proj", width, width)
        state |= make.gain(f"{name}.attn.q_norm", width // heads) | make.gain(f"{name}.attn.k_norm", width // heads)
        hidden = int(2 / 3 * width * 4)
        state |= make.linear(f"{name}.mlp.w1", hidden, width) | make.linear(f"{name}.mlp.w2", hidden, width)
        state |= make.linear(f"{name}.mlp.w3", width, hidden)
        if width == HEAD_WIDTH:
            state |= make.linear(f"{name}.adaln_modulation.1", 6 * width, width)
    state |= make.gain("final_layer.norm", HEAD_WIDTH)
    state |= make.linear("final_layer.linear", patch**2 * channels, HEAD_WIDTH)
    state |= make.linear("final_layer.adaln_modulation.1", 2 * HEAD_WIDTH, HEAD_WIDTH)
    state |= tables("enc_rope", grid, WIDTH // HEADS, token, TIME_TOKENS + LABEL_TOKENS)
    state |= tables("dec_rope", grid, HEAD_WIDTH // HEAD_HEADS, token)
    if has_token:
        state |= make.linear("final_layer.cls_linear", TOKEN_WIDTH, HEAD_WIDTH)
        state |= make.linear("repa_projector", TOKEN_WIDTH, WIDTH)
        for part, width in (("enc", WIDTH), ("dec", HEAD_WIDTH)):
            state |= make.linear(f"cls_in_proj_{part}", width, TOKEN_WIDTH) | make.gain(f"cls_in_norm_{part}", width)
    if is_guided:
        state |= make.gain("base_final_layer.norm", WIDTH)
        state |= make.linear("base_final_layer.linear", patch**2 * channels, WIDTH)
        state |= make.linear("base_final_layer.adaln_modulation.1", 2 * WIDTH, WIDTH)
    return state


def silu(value: torch.Tensor) -> torch.Tensor:
    return value / (1 + torch.exp(-value))


class Formulas:
    """What both networks have in common, in the precision of ``x``."""

    def __init__(self, state: State, x: torch.Tensor):
        self.state = {name: tensor.to(x) for name, tensor in state.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.state

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.state[name]

    def linear(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,oi->...o", value, self[f"{name}.weight"]) + self[f"{name}.bias"]

    def norm(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if f"{name}.weight" not in self:
            return value
        return value / (value.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self[f"{name}.weight"]

    def patches(self, name: str, x: torch.Tensor) -> torch.Tensor:
        kernel = self[f"{name}.proj.weight"]
        patch = kernel.shape[-1]
        cut = x.unfold(2, patch, patch).unfold(3, patch, patch)  # b c row column p q
        tokens = torch.einsum("bcrspq,dcpq->brsd", cut, kernel)
        return tokens.flatten(1, 2) + self[f"{name}.proj.bias"]

    def time(self, t: torch.Tensor) -> torch.Tensor:
        angles = 2 * torch.pi * t[:, None] * self["t_embedder.W"]
        waves = torch.cat([angles.sin(), angles.cos()], 1)
        return self.linear("t_embedder.mlp.2", silu(self.linear("t_embedder.mlp.0", waves)))

    def attention(self, name: str, h: torch.Tensor, heads: int, first: int, grid: int) -> torch.Tensor:
        """Tokens ``first`` to ``first + grid²`` are turned by where they are, the others not."""
        if f"{name}.qkv.weight" in self:
            q, k, v = self.linear(f"{name}.qkv", h).chunk(3, -1)
        else:
            q, k, v = (self.linear(f"{name}.{part}", h) for part in "qkv")
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))
        q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        last = first + grid**2
        q, k = (torch.cat([part[:, :first], rotated(part[:, first:last], grid), part[:, last:]], 1) for part in (q, k))
        shares = (torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        return self.linear(f"{name}.proj", torch.einsum("bhij,bjhd->bihd", shares, v).flatten(2))

    def mlp(self, name: str, h: torch.Tensor) -> torch.Tensor:
        if f"{name}.w12.weight" in self:
            gate, value = self.linear(f"{name}.w12", h).chunk(2, -1)
        else:
            gate, value = self.linear(f"{name}.w1", h), self.linear(f"{name}.w2", h)
        return self.linear(f"{name}.w3", silu(gate) * value)

    def modulated_block(
        self, name: str, h: torch.Tensor, modulation: torch.Tensor, heads: int, first: int, grid: int
    ) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        normed = self.norm(f"{name}.norm1", h) * (1 + scale1) + shift1
        h = h + gate1 * self.attention(f"{name}.attn", normed, heads, first, grid)
        return h + gate2 * self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", h) * (1 + scale2) + shift2)

    def image(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        patch, grid = self["x_embedder.proj.weight"].shape[-1], round(out.shape[1] ** 0.5)
        out = out.reshape(len(x), grid, grid, patch, patch, -1)
        return torch.einsum("brspqc->bcrpsq", out).reshape(x.shape)


def rae_velocity(state: State, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Velocity from data to noise. Both conditions pass through SiLU twice, as in RAE's code."""
    f = Formulas(state, x)
    time = f.time(t)
    condition = silu(time + f["y_embedder.embedding_table.weight"][y])[:, None]
    h = f.patches("s_embedder", x) + f["pos_embed"]
    grid = round(h.shape[1] ** 0.5)
    for number in range(DEPTH):
        modulation = f.linear(f"blocks.{number}.adaLN_modulation.1", silu(condition))
        h = f.modulated_block(f"blocks.{number}", h, modulation, HEADS, 0, grid)
    own = f.linear("s_projector", silu(time[:, None] + h))
    h = f.patches("x_embedder", x)
    for number in range(DEPTH, DEPTH + HEAD_DEPTH):
        modulation = f.linear(f"blocks.{number}.adaLN_modulation.1", silu(own))
        h = f.modulated_block(f"blocks.{number}", h, modulation, HEAD_HEADS, 0, grid)
    shift, scale = f.linear("final_layer.adaLN_modulation.1", silu(own)).chunk(2, -1)
    out = f.linear("final_layer.linear", f.norm("final_layer.norm_final", h) * (1 + scale) + shift)
    return f.image(out, x)


def bench_velocity(
    state: State, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, token: torch.Tensor | None = None, guide: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Velocities of latent and class token. Conditions stand behind the latent's tokens, a class token before them.

    With ``guide`` that of internal guidance, after so many blocks.
    """
    f = Formulas(state, x)
    time = f.time(t)
    of_latent = f.patches("s_embedder", x)
    grid, first = round(of_latent.shape[1] ** 0.5), 0 if token is None else 1
    parts = [of_latent, f["t_embedder.learnable_tokens"] + time[:, None]]
    parts.append(f["ctx_embedder.learnable_tokens"] + f["ctx_embedder.embedding_table.weight"][y][:, None])
    if token is not None:
        parts.insert(0, f.norm("cls_in_norm_enc", f.linear("cls_in_proj_enc", token))[:, None])
    h = torch.cat(parts, 1)
    for number in range(DEPTH):
        name = f"blocks.{number}"
        h = h + f.attention(f"{name}.attn", f.norm(f"{name}.norm1", h), HEADS, first, grid)
        h = h + f.mlp(f"{name}.mlp", f.norm(f"{name}.norm2", h))
        if number + 1 == guide:
            h = silu(time[:, None] + h[:, : grid**2])
            shift, scale = f.linear("base_final_layer.adaln_modulation.1", silu(h)).chunk(2, -1)
            out = f.linear("base_final_layer.linear", f.norm("base_final_layer.norm", h) * (1 + scale) + shift)
            return f.image(out, x), None
    own = f.linear("s_projector", silu(time[:, None] + h[:, : first + grid**2]))
    h = f.patches("x_embedder", x)
    if token is not None:
        h = torch.cat([f.norm("cls_in_norm_dec", f.linear("cls_in_proj_dec", token))[:, None], h], 1)
    for number in range(DEPTH, DEPTH + HEAD_DEPTH):
        modulation = f.linear(f"blocks.{number}.adaln_modulation.1", silu(own))
        h = f.modulated_block(f"blocks.{number}", h, modulation, HEAD_HEADS, first, grid)
    shift, scale = f.linear("final_layer.adaln_modulation.1", silu(own)).chunk(2, -1)
    h = f.norm("final_layer.norm", h) * (1 + scale) + shift
    velocity = f.image(f.linear("final_layer.linear", h[:, first:]), x)
    return velocity, None if token is None else f.linear("final_layer.cls_linear", h[:, 0])
