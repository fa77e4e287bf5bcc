"""JiT from the formulas, on a state dict in its public names (arXiv 2511.13720). Its time runs to the image at 1.

Nothing of ``models`` is in it: network and converter are compared with it. A tiny one: six blocks of width 192, three
heads, a bottleneck of 128, tokens of the class from the third block on.
"""

import torch

from tests.public_ddt import Formulas, Maker, silu
from tests.public_lightningdit import State

WIDTH, DEPTH, HEADS, BOTTLENECK = 192, 6, 3, 128
CLASS_TOKENS, BEFORE = 32, 2
LEAST = 0.05


def jit_state(patch: int = 8, side: int = 32, classes: int = 6, seed: int = 0) -> State:
    make = Maker(seed)
    state = {
        "pos_embed": make.normal(1, (side // patch) ** 2, WIDTH),
        "in_context_posemb": make.normal(1, CLASS_TOKENS, WIDTH),
        "y_embedder.embedding_table.weight": make.normal(classes + 1, WIDTH),
        "x_embedder.proj1.weight": make.normal(BOTTLENECK, 3, patch, patch),
        "x_embedder.proj2.weight": make.normal(WIDTH, BOTTLENECK, 1, 1),
        "x_embedder.proj2.bias": make.normal(WIDTH),
    }
    state |= make.linear("t_embedder.mlp.0", WIDTH, 256) | make.linear("t_embedder.mlp.2", WIDTH, WIDTH)
    for number in range(DEPTH):
        name = f"blocks.{number}"
        state |= make.gain(f"{name}.norm1", WIDTH) | make.gain(f"{name}.norm2", WIDTH)
        state |= make.gain(f"{name}.attn.q_norm", WIDTH // HEADS) | make.gain(f"{name}.attn.k_norm", WIDTH // HEADS)
        state |= make.linear(f"{name}.attn.qkv", 3 * WIDTH, WIDTH) | make.linear(f"{name}.attn.proj", WIDTH, WIDTH)
        hidden = int(4 * WIDTH * 2 / 3)
        state |= make.linear(f"{name}.mlp.w12", 2 * hidden, WIDTH) | make.linear(f"{name}.mlp.w3", WIDTH, hidden)
        state |= make.linear(f"{name}.adaLN_modulation.1", 6 * WIDTH, WIDTH)
    state |= make.gain("final_layer.norm_final", WIDTH) | make.linear("final_layer.linear", 3 * patch**2, WIDTH)
    return state | make.linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)


def jit_image(state: State, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The image that a network with these weights sees in ``z``, ``t·image + (1 − t)·noise``."""
    f = Formulas(state, z)
    frequency = 10000 ** (-torch.arange(128).to(z) / 128)
    angles = t[:, None] * frequency
    time = torch.cat([angles.cos(), angles.sin()], 1)
    time = f.linear("t_embedder.mlp.2", silu(f.linear("t_embedder.mlp.0", time)))
    of_class = f["y_embedder.embedding_table.weight"][y]
    kernel = f["x_embedder.proj1.weight"]
    patch = kernel.shape[-1]
    cut = z.unfold(2, patch, patch).unfold(3, patch, patch)
    h = torch.einsum("bcrspq,dcpq->brsd", cut, kernel).flatten(1, 2)
    h = h @ f["x_embedder.proj2.weight"][:, :, 0, 0].T + f["x_embedder.proj2.bias"] + f["pos_embed"]
    grid = round(h.shape[1] ** 0.5)
    condition = silu(time + of_class)[:, None]
    for number in range(DEPTH):
        if number == BEFORE:
            h = torch.cat([of_class[:, None] + f["in_context_posemb"], h], 1)
        first = CLASS_TOKENS if number >= BEFORE else 0
        modulation = f.linear(f"blocks.{number}.adaLN_modulation.1", condition)
        h = f.modulated_block(f"blocks.{number}", h, modulation, HEADS, first, grid)
    shift, scale = f.linear("final_layer.adaLN_modulation.1", condition).chunk(2, -1)
    h = f.norm("final_layer.norm_final", h[:, CLASS_TOKENS:]) * (1 + scale) + shift
    out = f.linear("final_layer.linear", h).reshape(len(z), grid, grid, patch, patch, 3)
    return torch.einsum("brspqc->bcrpsq", out).reshape(z.shape)


def to_the_image(state: State, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The velocity of ``z`` towards that image, as its training and its sampler have it."""
    return (jit_image(state, z, t, y) - z) / (1 - t).clamp(min=LEAST)[:, None, None, None]
