"""SiT: sizes, the names that public checkpoints use, and its output against a plain derivation in float64."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from errors import UserError
from loss.alignment import TokenGrid
from loss.alignment.repa import REPA
from models.denoisers import denoiser_config
from models.denoisers.config import SIT_SIZES, SiTConfig
from models.denoisers.sit import SiT

TINY = SiTConfig("SiT-Ti/2", 4, 8, num_classes=6)


def randomised(config: SiTConfig = TINY, seed: int = 0) -> SiT:
    """A SiT whose zero-initialised layers are not zero: every part of it then reaches the output."""
    torch.manual_seed(seed)
    model = SiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def repa(model: SiT, depth: int = 4) -> REPA:
    """Its projector for a VFM of 112 channels, after a block."""
    return REPA(model, [TokenGrid("vfm", model.grid, 112)], depth, width=64, weight=0.5)


def inputs(count: int = 3, config: SiTConfig = TINY, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    side = config.latent_size
    x = torch.randn(count, config.latent_channels, side, side, generator=generator, dtype=dtype)
    return x, torch.rand(count, generator=generator, dtype=dtype), torch.arange(count)


@pytest.mark.parametrize("name", SiTConfig.model_names())
def test_every_size_and_patch_builds_and_answers(name):
    """Large ones on the meta device: shapes without memory."""
    patch = int(name.rsplit("/", 1)[1])
    config = SiTConfig(name, 32, 32, num_classes=1000)
    with torch.device("meta"):
        model = SiT(config)
        features = [TokenGrid("vfm", model.grid, width) for width in (768, 1024)]
        aligned = REPA(model, features, depth=4, width=2048, weight=0.5)
        x, t, y = torch.empty(2, 32, 32, 32), torch.empty(2), torch.empty(2, dtype=torch.int64)
        velocity, states = model(x, t, y, taps=(4,))
        tokens = aligned.predict(states)
    assert velocity.shape == x.shape
    assert [state.shape for state in states] == [(2, model.grid**2, model.width)]
    assert [token.shape for token in tokens] == [(2, (32 // patch) ** 2, dim) for dim in (768, 1024)]


# DiT's published sizes are 33, 130, 458 and 675 million with 1000 classes and 4 channels (8 output channels there, 4
# here): https://arxiv.org/abs/2212.09748, table 1
@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_parameter_counts_are_the_published_ones(size, millions):
    with torch.device("meta"):
        model = SiT(SiTConfig(f"SiT-{size}/2", 4, 32, num_classes=1000))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


def test_keys_are_those_of_public_checkpoints():
    expected = {"pos_embed", "y_embedder.embedding_table.weight"}
    linears = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    linears += ["final_layer.adaLN_modulation.1"]
    for number in range(6):
        parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        linears += [f"blocks.{number}.{part}" for part in parts]
    expected |= {f"{linear}.{part}" for linear in linears for part in ("weight", "bias")}
    model = SiT(TINY)
    assert set(model.state_dict()) == expected
    linears = ["projectors.0.0", "projectors.0.2", "projectors.0.4"]
    assert set(repa(model).state_dict()) == {f"{linear}.{part}" for linear in linears for part in ("weight", "bias")}


def test_initialisation():
    """Zero output, identity blocks (adaLN-Zero), Xavier bounds, 0.02 for labels and times."""
    torch.manual_seed(0)
    model = SiT(SiTConfig("SiT-S/1", 4, 8, num_classes=1000))
    x, t, y = inputs(config=model.config)
    assert torch.equal(model(x, t, y)[0], torch.zeros_like(x))
    block = model.blocks[0]
    tokens = torch.randn(2, 5, 384)
    assert torch.equal(block(tokens, torch.randn(2, 1, 384)), tokens)
    bound = math.sqrt(6 / (384 + 3 * 384))
    assert block.attn.qkv.weight.abs().max() <= bound
    assert block.attn.qkv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.t_embedder.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not model.x_embedder.proj.bias.any()
    assert model.null_class == 1000


def reference_velocity(state: dict, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """SiT-Ti/2 written out once more, with einsum and loops, from the paper's description."""

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(value: torch.Tensor) -> torch.Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    batch, channels, side, _ = x.shape
    grid = side // 2
    kernel = state["x_embedder.proj.weight"]
    tokens = torch.zeros(batch, grid * grid, 192, dtype=x.dtype)
    for row in range(grid):
        for column in range(grid):
            patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            tokens[:, row * grid + column] = torch.einsum("bcpq,dcpq->bd", patch, kernel)
    tokens = tokens + state["x_embedder.proj.bias"] + state["pos_embed"]
    angles = t[:, None] * torch.tensor([10000 ** (-k / 128) for k in range(128)], dtype=x.dtype)
    time = torch.cat([angles.cos(), angles.sin()], -1)
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", time)))
    condition = F.silu(time + state["y_embedder.embedding_table.weight"][y])
    for n in range(6):
        six = linear(f"blocks.{n}.adaLN_modulation.1", condition)[:, None].split(192, dim=-1)
        h = norm(tokens) * (1 + six[1]) + six[0]
        q, k, v = (part.reshape(batch, -1, 3, 64) for part in linear(f"blocks.{n}.attn.qkv", h).split(192, -1))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).div(8).softmax(-1)
        h = torch.einsum("bhij,bjhd->bihd", weights, v).reshape(batch, -1, 192)
        tokens = tokens + six[2] * linear(f"blocks.{n}.attn.proj", h)
        h = linear(f"blocks.{n}.mlp.fc1", norm(tokens) * (1 + six[4]) + six[3])
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        tokens = tokens + six[5] * linear(f"blocks.{n}.mlp.fc2", h)
    shift, scale = linear("final_layer.adaLN_modulation.1", condition)[:, None].split(192, dim=-1)
    out = linear("final_layer.linear", norm(tokens) * (1 + scale) + shift)
    return torch.einsum("bhwpqc->bchpwq", out.reshape(batch, grid, grid, 2, 2, channels)).reshape(x.shape)


def test_velocity_equals_the_written_out_network_in_float64():
    model = randomised().double()
    model.t_embedder.frequency.copy_(10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128))
    x, t, y = inputs(dtype=torch.float64)
    velocity, _ = model(x, t, y)
    # the embedding itself is computed in float32 (as everywhere in the field): 1e-6 is its rounding
    torch.testing.assert_close(velocity, reference_velocity(model.state_dict(), x, t, y), rtol=1e-5, atol=1e-6)


def test_time_label_and_every_position_reach_the_output():
    model = randomised()
    x, t, y = inputs()
    base, _ = model(x, t, y)
    for changed in ((x, t + 0.1, y), (x, t, y + 1), (x, t, torch.full_like(y, model.null_class))):
        assert not torch.allclose(base, model(*changed)[0])
    shifted = model(x.roll(2, dims=-1), t, y)[0].roll(-2, dims=-1)
    assert not torch.allclose(base, shifted)  # positions count


def test_samples_do_not_mix():
    model = randomised()
    x, t, y = inputs()
    (together, _), (alone, _) = model(x, t, y), model(x[1:2], t[1:2], y[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-5)


def test_hidden_states_are_those_after_the_taps():
    model = randomised()
    x, t, y = inputs()
    seen = {}
    for number, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda module, args, output, number=number: seen.update({number: output}))
    velocity, states = model(x, t, y, taps=(4, 2, 4))
    assert [*seen] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(state, seen[tap]) for state, tap in zip(states, (4, 2, 4), strict=True))
    untapped, none = model(x, t, y)
    assert none == ()
    assert torch.equal(velocity, untapped)
    seen.clear()
    alone = model.hidden_states(x, t, y, (4, 2))
    assert [*seen] == [1, 2, 3, 4]  # no block after the last tap
    assert all(torch.equal(state, before) for state, before in zip(alone, states[:2], strict=True))


def test_tokens_are_the_projected_states_of_the_chosen_block():
    model = randomised()
    aligned = repa(model)
    assert aligned.taps == (4,)
    _, states = model(*inputs(), aligned.taps)
    (tokens,) = aligned.predict(states)
    assert torch.equal(tokens, aligned.projectors[0](states[0]))


def test_qk_norm_has_its_parameters_and_changes_the_result():
    config = SiTConfig(**(TINY.to_dict() | {"qk_norm": True}))
    model = randomised(config)
    assert model.blocks[0].attn.q_norm.weight.shape == (64,)
    x, t, y = inputs()
    assert model(x, t, y)[0].isfinite().all()


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for switch in (False, True):
        model = randomised().train()
        model.gradient_checkpointing = switch
        velocity, (state,) = model(*inputs(), taps=(4,))
        (velocity.square().mean() + state.square().mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient is not None for gradient in gradients[0].values())


def test_bf16_autocast_stays_close():
    model = randomised()
    x, t, y = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = model(x, t, y)
    full, _ = model(x, t, y)
    assert ((low.float() - full).norm() / full.norm()).item() < 0.05


def test_config_survives_json():
    assert SiTConfig.from_dict(TINY.to_dict()) == TINY
    assert denoiser_config(json.loads(json.dumps(TINY.to_dict()))) == TINY
    assert (TINY.patch_size, TINY.grid, TINY.size) == (2, 4, SIT_SIZES["Ti"])
    assert set(SiTConfig.patches) == {1, 2, 4, 8, 16, 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "SiT-XXL/2"}, "--model SiT-XXL/2"),
        ({"model": "DiT-B/2"}, "--model DiT-B/2"),
        ({"model": "SiT-Ti/8", "latent_size": 12}, "patch 8 does not divide the 12×12 latent"),
    ],
)
def test_what_does_not_fit_is_one_line(changes, message):
    values = TINY.to_dict() | changes
    with pytest.raises(UserError, match=message):
        SiT(SiTConfig(**values))
    with pytest.raises(UserError, match=message):
        denoiser_config(values).build()


@pytest.mark.parametrize("depth", [0, 7])
def test_a_block_that_is_not_there_is_one_line(depth):
    with pytest.raises(UserError, match=f"--encoder-depth {depth}: SiT-Ti/2 has blocks 1 to 6"):
        repa(SiT(TINY), depth)
