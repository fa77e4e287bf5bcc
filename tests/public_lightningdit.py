"""LightningDiT from the formulas of its papers, on state dicts in its public layout; and a writer of its checkpoints.

Nothing of ``models`` is in it: networks and converters are compared with it. As in the public code, time runs from
noise at 0 to data at 1 and a velocity points to the data.
"""

from pathlib import Path

import torch

State = dict[str, torch.Tensor]
WIDTH, DEPTH, HEADS = 192, 6, 3  # LightningDiT-Ti
FREQUENCIES = 128  # of the time


def public_state(
    patch: int = 2,
    channels: int = 4,
    side: int = 8,
    classes: int = 6,
    qk_norm: bool = False,
    is_guided: bool = False,
    seed: int = 0,
) -> State:
    """All weights random and none zero, in the order of the public code's state dict; or of internal guidance's."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.06

    def linear(name: str, out: int, into: int) -> State:
        return {f"{name}.weight": normal(out, into), f"{name}.bias": normal(out)}

    def gain(name: str, width: int) -> State:
        return {f"{name}.weight": 1 + normal(width)}

    grid = side // patch
    state = {"pos_embed": normal(1, grid**2, WIDTH)}
    state |= {"x_embedder.proj.weight": normal(WIDTH, channels, patch, patch), "x_embedder.proj.bias": normal(WIDTH)}
    state |= linear("t_embedder.mlp.0", WIDTH, 2 * FREQUENCIES) | linear("t_embedder.mlp.2", WIDTH, WIDTH)
    state |= {"y_embedder.embedding_table.weight": normal(classes + 1, WIDTH)}
    state |= dict(zip(("feat_rope.freqs_cos", "feat_rope.freqs_sin"), rotary_tables(grid, WIDTH // HEADS), strict=True))
    hidden = int(2 / 3 * 4 * WIDTH)
    for n in (f"blocks.{number}" for number in range(DEPTH)):
        state |= gain(f"{n}.norm1", WIDTH) | gain(f"{n}.norm2", WIDTH) | linear(f"{n}.attn.qkv", 3 * WIDTH, WIDTH)
        if qk_norm:
            state |= gain(f"{n}.attn.q_norm", WIDTH // HEADS) | gain(f"{n}.attn.k_norm", WIDTH // HEADS)
        state |= linear(f"{n}.attn.proj", WIDTH, WIDTH)
        state |= linear(f"{n}.mlp.w12", 2 * hidden, WIDTH) | linear(f"{n}.mlp.w3", WIDTH, hidden)
        state |= linear(f"{n}.adaLN_modulation.1", 6 * WIDTH, WIDTH)
    for layer in ("final_layer_xr", "final_layer") if is_guided else ("final_layer",):
        state |= gain(f"{layer}.norm_final", WIDTH) | linear(f"{layer}.linear", patch**2 * channels, WIDTH)
        state |= linear(f"{layer}.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    return state


def rotary_tables(grid: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines that the public code keeps, ``[grid², width]``: rows, then columns, each angle twice."""
    angles = torch.zeros(grid, grid, width)
    for row in range(grid):
        for column in range(grid):
            for pair in range(width // 2):
                place, number = (row, pair) if pair < width // 4 else (column, pair - width // 4)
                angles[row, column, 2 * pair : 2 * pair + 2] = place * 10000 ** (-number / (width // 4))
    angles = angles.reshape(grid * grid, width)
    return angles.cos(), angles.sin()


def rotated(x: torch.Tensor, grid: int) -> torch.Tensor:
    """Pairs of channels as complex numbers, times e^(i·place·frequency): ``[B, grid², heads, width]`` → the same."""
    count = x.shape[-1] // 4
    frequency = torch.tensor([10000 ** (-k / count) for k in range(count)], dtype=torch.float64)
    row, column = (place.flatten() for place in torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij"))
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], dim=1)  # [grid², width/2]
    points = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
    turned = points * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x)


def public_velocity(
    state: State, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, guide: int | None = None
) -> torch.Tensor:
    """From noise to data, in the precision of its arguments; blocks after the last one of the state are not there.

    ``guide``: by the second output, after that block.
    """
    state = {name: tensor.to(x) for name, tensor in state.items()}

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,oi->...o", value, state[f"{name}.weight"]) + state[f"{name}.bias"]

    def norm(name: str, value: torch.Tensor) -> torch.Tensor:
        if f"{name}.weight" not in state:
            return value
        return value / (value.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def silu(value: torch.Tensor) -> torch.Tensor:
        return value / (1 + torch.exp(-value))

    kernel, batch = state["x_embedder.proj.weight"], len(x)
    patch, grid, head = kernel.shape[-1], x.shape[-1] // kernel.shape[-1], WIDTH // HEADS
    patches = x.unfold(2, patch, patch).unfold(3, patch, patch)  # b c row column p q
    h = torch.einsum("bcrspq,dcpq->brsd", patches, kernel).reshape(batch, grid**2, WIDTH)
    h = h + state["x_embedder.proj.bias"] + state["pos_embed"]
    angles = t[:, None] * torch.tensor([10000 ** (-k / FREQUENCIES) for k in range(FREQUENCIES)]).to(x)
    time = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    condition = silu(time + state["y_embedder.embedding_table.weight"][y])[:, None]
    number = 0
    while f"blocks.{number}.norm1.weight" in state and number != guide:
        n = f"blocks.{number}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{n}.adaLN_modulation.1", condition).chunk(6, -1)
        a = linear(f"{n}.attn.qkv", norm(f"{n}.norm1", h) * (1 + scale1) + shift1)
        q, k, v = a.reshape(batch, grid**2, 3, HEADS, head).unbind(2)
        q, k = rotated(norm(f"{n}.attn.q_norm", q), grid), rotated(norm(f"{n}.attn.k_norm", k), grid)
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) / head**0.5).softmax(-1)
        a = torch.einsum("bhij,bjhd->bihd", weights, v).reshape(batch, grid**2, WIDTH)
        h = h + gate1 * linear(f"{n}.attn.proj", a)
        gate, value = linear(f"{n}.mlp.w12", norm(f"{n}.norm2", h) * (1 + scale2) + shift2).chunk(2, -1)
        h = h + gate2 * linear(f"{n}.mlp.w3", silu(gate) * value)
        number += 1
    last = "final_layer" if guide is None else "final_layer_xr"
    shift, scale = linear(f"{last}.adaLN_modulation.1", condition).chunk(2, -1)
    out = linear(f"{last}.linear", norm(f"{last}.norm_final", h) * (1 + scale) + shift)
    out = out.reshape(batch, grid, grid, patch, patch, -1)
    return torch.einsum("brspqc->bcrpsq", out).reshape(x.shape)


def public_config(**changes: object) -> dict:
    """Of a training on f4d4 latents of 32 px images, as its YAML file has it; ``SECTION_NAME=value`` changes it."""
    config = {
        "data": {"image_size": 32, "num_classes": 6, "latent_norm": True, "latent_multiplier": 1.0},
        "vae": {"model_name": "vavae_f4d4", "downsample_ratio": 4},
        "model": {
            "model_type": "LightningDiT-Ti/2", "use_qknorm": False, "use_swiglu": True, "use_rope": True,
            "use_rmsnorm": True, "wo_shift": False, "in_chans": 4,
        },
        "train": {"global_batch_size": 1024, "max_steps": 80000},
        "optimizer": {"lr": 2e-4, "beta2": 0.95},
        "transport": {
            "path_type": "Linear", "prediction": "velocity", "use_cosine_loss": True, "use_lognorm": True,
        },
    }  # fmt: skip
    for name, value in changes.items():
        section, _, key = name.partition("_")
        config[section][key] = value
    return config


def parameters(state: State) -> dict[str, torch.nn.Parameter]:
    """What ``model.parameters()`` of the public code yields, by name: the frozen positions too, tables not."""
    found = {name: torch.nn.Parameter(t.clone()) for name, t in state.items() if not name.startswith("feat_rope.")}
    found["pos_embed"].requires_grad_(False)
    return found


def trained(weights: dict[str, torch.nn.Parameter], steps: int = 3, seed: int = 5) -> torch.optim.AdamW:
    """Train on made-up gradients, so that AdamW has moments."""
    optimizer = torch.optim.AdamW(weights.values(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in weights.values():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def write_experiment(folder: Path, model: State, ema: State, config: dict, steps: int = 7) -> tuple[Path, State]:
    """A folder as their training leaves it, ``checkpoints/0000007.pt`` alone; and its ``model``, three steps on."""
    weights = parameters(model)
    optimizer = trained(weights)
    model = model | {name: parameter.detach() for name, parameter in weights.items()}
    (folder / "checkpoints").mkdir(parents=True)
    contents = {"model": model, "ema": ema, "opt": optimizer.state_dict(), "config": config}
    torch.save(contents, folder / "checkpoints" / f"{steps:07d}.pt")
    return folder, model
