"""LightningDiT: its published sizes, and its output against the papers' formulas in float64."""

import json
import warnings

import pytest
import torch

from errors import UserError
from loss.alignment import TokenGrid
from loss.alignment.repa import REPA
from models.denoisers import denoiser_config
from models.denoisers.config import LightningDiTConfig
from models.denoisers.lightningdit import LightningDiT, RMSNorm, RotaryPositions
from tests.ldm_runs import random_weights
from tests.ldm_steps import accumulate, networks, random_batch, tiny_trainer
from tests.public_lightningdit import public_state, public_velocity, rotary_tables, rotated
from tests.sendvae_runs import gradients
from training.method import train_step

TINY = LightningDiTConfig("LightningDiT-Ti/2", 4, 8, num_classes=6)


def inputs(count: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, 8, 8, generator=generator, dtype=dtype)
    return x, torch.rand(count, generator=generator, dtype=dtype), torch.tensor([0, 4, 6])[:count]


def randomised(config: LightningDiTConfig = TINY) -> LightningDiT:
    """None of its weights zero."""
    model = LightningDiT(config)
    random_weights(model, 0, std=0.1)
    return model.eval()


@pytest.mark.parametrize("name", LightningDiTConfig.model_names())
def test_every_size_and_patch_builds_and_answers(name):
    """On the meta device: shapes without memory; REPA taps it."""
    config = LightningDiTConfig(name, 32, 32, num_classes=1000)
    with torch.device("meta"):
        model = config.build()
        aligned = REPA(model, [TokenGrid("vfm", model.grid, 768)], depth=4, width=2048, weight=0.5)
        velocity, states = model(torch.empty(2, 32, 32, 32), torch.empty(2), torch.empty(2, dtype=torch.int64), (4,))
        (tokens,) = aligned.predict(states)
    assert velocity.shape == (2, 32, 32, 32)
    assert states[0].shape == (2, model.grid**2, model.width)
    assert tokens.shape == (2, model.grid**2, 768)


# XL/1: 675.26 million by the public log of its training, which counts the fixed positions; the others are named by
# their number, or follow DiT's sizes (arXiv 2212.09748, table 1: B 130, L 458), which SwiGLU's width is chosen to keep.
@pytest.mark.parametrize(("name", "millions", "digits"), [
    ("XL/1", 675.26, 2), ("B/1", 130, 0), ("L/1", 458, 0), ("1p0B/1", 1000, -2), ("1p6B/1", 1600, -2),
])  # fmt: skip
def test_parameter_counts_are_the_published_ones(name, millions, digits):
    with torch.device("meta"):
        model = LightningDiT(LightningDiTConfig(f"LightningDiT-{name}", 32, 16, num_classes=1000))
    count = sum(parameter.numel() for parameter in model.parameters())
    with_positions = count + model.pos_embed.numel()
    print(f"LightningDiT-{name}: {count:,} trained, {with_positions:,} with the positions")
    assert round((with_positions if digits == 2 else count) / 1e6, digits) == millions


def test_names_and_shapes_are_those_of_public_checkpoints():
    for qk_norm in (False, True):
        config = LightningDiTConfig(**TINY.to_dict() | {"qk_norm": qk_norm})
        public = {name: t.shape for name, t in public_state(qk_norm=qk_norm).items() if not name.startswith("feat_")}
        assert {name: tensor.shape for name, tensor in LightningDiT(config).state_dict().items()} == public


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_velocity_equals_the_formulas_in_float64(patch, qk_norm):
    """At 1 − t, and the other way: the public network counts time from the noise."""
    state = public_state(patch=patch, qk_norm=qk_norm)
    model = LightningDiT(LightningDiTConfig(f"LightningDiT-Ti/{patch}", 4, 8, 6, qk_norm)).double()
    model.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("feat_rope.")})
    x, t, y = inputs(dtype=torch.float64)
    expected = -public_velocity(state, x, 1 - t, y)
    assert expected.std() > 0.1
    difference = (model(x, t, y)[0] - expected).abs().max().item()
    print(
        f"patch {patch}, qk-norm {qk_norm}: largest difference {difference:.1e} of velocities of {expected.std():.2f}"
    )
    assert difference < 5e-6  # the embedding of times and the rotary tables are rounded to float32
    assert (model(x, 1 - t, y)[0] - expected).abs().max() > 0.1  # the direction of time is not a matter of taste


def test_rotary_positions_are_turns_in_the_plane_and_the_public_tables():
    rotary, x = RotaryPositions(24, 5), torch.randn(2, 25, 3, 24)
    expected = rotated(x, 5)
    torch.testing.assert_close(rotary(x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotary(x).norm(dim=-1), x.norm(dim=-1))
    for ours, table in zip((rotary.cos, rotary.sin), rotary_tables(5, 24), strict=True):
        torch.testing.assert_close(ours.repeat_interleave(2, -1), table, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 4"):
        RotaryPositions(6, 4)


def test_attention_scores_depend_on_relative_positions_only():
    """The same query and key everywhere: one score for each (row, column) difference, and not for its mirror image."""
    grid = 6
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64).expand(2, 1, grid**2, 1, 64)
    rotary = RotaryPositions(64, grid).double()
    scores = rotary(q)[0, :, 0] @ rotary(k)[0, :, 0].T
    places = [(n // grid, n % grid) for n in range(grid**2)]
    found: dict[tuple[int, int], list[float]] = {}
    for i, (row, column) in enumerate(places):
        for j, (other_row, other_column) in enumerate(places):
            found.setdefault((row - other_row, column - other_column), []).append(scores[i, j].item())
    assert len(found) == (2 * grid - 1) ** 2
    spread = max(max(values) - min(values) for values in found.values())
    print(f"scores of one displacement differ by {spread:.1e}, scores of all by {scores.std():.2f}")
    assert spread < 1e-5
    means = [round(sum(values) / len(values), 4) for values in found.values()]
    assert len(set(means)) == len(means)  # every displacement has its own


def test_initialisation():
    """Zero output, identity blocks, norms of gain 1."""
    model = LightningDiT(TINY)
    x, t, y = inputs()
    assert not model(x, t, y)[0].any()
    tokens = torch.randn(2, 16, 192)
    assert torch.equal(model.blocks[0](tokens, torch.randn(2, 1, 192)), tokens)
    assert all(bool((module.weight == 1).all()) for module in model.modules() if isinstance(module, RMSNorm))


def test_hidden_states_are_those_after_the_taps():
    model = randomised()
    velocity, states = model(*inputs(), taps=(4, 2))
    assert torch.equal(velocity, model(*inputs())[0])
    alone = model.hidden_states(*inputs(), (4, 2))
    assert all(torch.equal(one, other) for one, other in zip(alone, states, strict=True))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_gradients_reach_every_parameter_and_checkpointing_changes_none(qk_norm):
    found = []
    for switch in (False, True):
        model = randomised(LightningDiTConfig(**TINY.to_dict() | {"qk_norm": qk_norm})).train()
        model.gradient_checkpointing = switch
        velocity, (state,) = model(*inputs(), taps=(4,))
        (velocity.square().mean() + state.square().mean()).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None and gradient.any() for gradient in found[0].values())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_bf16_autocast_stays_close_and_says_nothing():
    model = randomised(LightningDiTConfig(**TINY.to_dict() | {"qk_norm": True}))
    full, _ = model(*inputs())
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        low, _ = model(*inputs())
    assert ((low.float() - full).norm() / full.norm()).item() < 0.05


def test_config_and_weights_survive_a_folder(tmp_path):
    assert denoiser_config(json.loads(json.dumps(TINY.to_dict()))) == TINY
    model = randomised()
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(LightningDiT.from_pretrained(tmp_path / "model")(*inputs())[0], model(*inputs())[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "LightningDiT-XXL/1"},
            "--model LightningDiT-XXL/1 is not known; give LightningDiT-SIZE/PATCH with Ti",
        ),
        ({"model": "LightningDiT-XL/3"}, "and 1, 2, 4, 8, 16, 32"),
        ({"model": "LightningDiT-Ti/2", "latent_size": 7}, "patch 2 does not divide the 7×7 latent"),
    ],
)
def test_what_does_not_fit_is_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        denoiser_config(TINY.to_dict() | changes).build()


@pytest.mark.parametrize("align", [("repa",), ("irepa",), ("vae",), ()])
def test_it_is_aligned_as_a_sit_is(align):
    """Its hidden state reaches the projector, and the loss every parameter of both; with LightningDiT's own losses."""
    trainer = tiny_trainer(config=TINY, align=align, velocity_cosine_coeff=1.0, weighting="lognormal")
    assert isinstance(trainer.denoiser, LightningDiT)
    batch = random_batch(8)
    metrics = accumulate(trainer, batch, trainer.draws(0, 0, batch))
    terms = {"repa": 0.5, "irepa": 0.5, "vae_repa": 1.0, "velocity_cosine": 1.0, "denoise": 1.0}
    expected = sum(weight * metrics[name].item() for name, weight in terms.items() if name in metrics)
    assert metrics["loss"].item() == pytest.approx(expected, rel=1e-6)
    assert all(gradient.any() for gradient in gradients(networks(trainer)).values())


def test_it_learns():
    trainer = tiny_trainer(config=TINY, align=(), learning_rate=2e-3, velocity_cosine_coeff=1.0)
    batch = random_batch(16)
    losses = [train_step(trainer, step, [batch])["denoise"].item() for step in range(40)]
    assert sum(losses[-10:]) < 0.97 * sum(losses[:10])
