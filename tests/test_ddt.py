"""The networks with a wide head, DiT^DH and DDT: sizes, output against the formulas in float64, all that a SiT can."""

import json

import pytest
import torch

from errors import UserError
from formats.ddt import own_names
from loss.alignment import TokenGrid
from loss.alignment.repa import REPA
from models.denoisers import denoiser_config
from models.denoisers.base import Denoiser
from models.denoisers.config import DDTConfig, DiTDHConfig
from models.denoisers.sprint import draw_route
from tests.ldm_runs import random_weights
from tests.ldm_steps import accumulate, networks, random_batch, tiny_trainer
from tests.public_ddt import bench_state, bench_velocity, rae_state, rae_velocity
from tests.sendvae_runs import gradients
from training.method import train_step

KINDS = {"DiTDH": DiTDHConfig, "DDT": DDTConfig}


def tiny(kind: str, **changes: object) -> DiTDHConfig:
    values = {"latent_channels": 4, "latent_size": 8, "num_classes": 6, "head_width": 256} | changes
    return KINDS[kind](f"{kind}-Ti/2", **values)


def inputs(model: Denoiser, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *model.state_shape, generator=generator, dtype=dtype)
    return x, torch.rand(3, generator=generator, dtype=dtype), torch.tensor([0, 4, 6])


def randomised(config: DiTDHConfig) -> Denoiser:
    """None of its weights zero, the frequencies of its times the same each time."""
    torch.manual_seed(0)
    model = config.build()
    random_weights(model, 0, std=0.1)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_every_size_and_patch_builds_and_answers(kind):
    """On the meta device: shapes without memory; REPA taps the blocks before the head."""
    for name in KINDS[kind].model_names():
        config = KINDS[kind](name, 768, 32, num_classes=1000)
        with torch.device("meta"):
            model = config.build()
            aligned = REPA(model, [TokenGrid("vfm", model.grid, 768)], depth=4, width=2048, weight=0.5)
            x, t, y = torch.empty(2, 768, 32, 32), torch.empty(2), torch.empty(2, dtype=torch.int64)
            velocity, states = model(x, t, y, (4,))
            (tokens,) = aligned.predict(states)
        assert velocity.shape == (2, 768, 32, 32)
        assert states[0].shape == (2, model.grid**2, model.width)
        assert tokens.shape == (2, model.grid**2, 768)
        assert model.head.blocks[0].mlp.w3.weight.shape == (2048, 5461)


def test_the_published_number_of_parameters():
    """DiT^DH-XL has 839 million (RAE, table 6), with the fixed positions and frequencies that its code counts."""
    with torch.device("meta"):
        model = DiTDHConfig("DiTDH-XL/1", 768, 16, num_classes=1000).build()
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    print(f"DiTDH-XL/1: {count:,} numbers")
    assert round(count / 1e6) == 839


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_ditdh_equals_the_formulas_in_float64(patch, qk_norm):
    state = rae_state(patch, side=4 * patch, qk_norm=qk_norm)
    config = DiTDHConfig(f"DiTDH-Ti/{patch}", 4, 4 * patch, 6, qk_norm, head_width=256)
    model = config.build().double()
    model.load_state_dict(own_names(state, config, "x"))
    x, t, y = inputs(model, torch.float64)
    expected = rae_velocity(state, x, t, y)
    assert expected.std() > 0.1
    difference = (model(x, t, y)[0] - expected).abs().max().item()
    print(f"largest difference {difference:.1e} of velocities of {expected.std():.2f}")
    assert difference < 5e-6  # rotary tables are rounded to float32
    assert (model(x, 1 - t, y)[0] - expected).abs().max() > 0.1  # the direction of time is not a matter of taste


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("has_token", [False, True])
def test_ddt_equals_the_formulas_in_float64(patch, has_token):
    """Theirs has its conditions behind the tokens of the grid, ours before them."""
    state = bench_state(patch, side=4 * patch, has_token=has_token)
    width = state["final_layer.cls_linear.bias"].shape[0] if has_token else 0
    config = DDTConfig(f"DDT-Ti/{patch}", 4, 4 * patch, 6, qk_norm=True, class_token_width=width, head_width=256)
    model = config.build().double()
    model.load_state_dict(own_names(state, config, "x"))
    x, t, y = inputs(model, torch.float64)
    expected = bench_velocity(state, *(model.unpack(x)[0], t, y, model.unpack(x)[1]))
    assert expected[0].std() > 0.1
    difference = (model(x, t, y)[0] - model.pack(*expected)).abs().max().item()
    print(f"largest difference {difference:.1e} of velocities of {expected[0].std():.2f}")
    assert difference < 5e-6


@pytest.mark.parametrize("kind", KINDS)
def test_initialisation(kind):
    """Zero output, heads and adaLN blocks that are the identity."""
    model = tiny(kind).build()
    assert not model(*inputs(model))[0].any()
    tokens = torch.randn(2, 16, 256)
    assert torch.equal(model.head.blocks[0](tokens, torch.randn(2, 16, 256)), tokens)
    assert model.t_embedder.W.std() > 0.8
    assert {"time_tokens", "label_tokens"} <= model.state_dict().keys() or kind == "DiTDH"


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_after_the_taps(kind):
    model = randomised(tiny(kind, class_token_width=5))
    velocity, states = model(*inputs(model), taps=(4, 2))
    assert [state.shape for state in states] == [(3, 16, 192)] * 2
    assert torch.equal(velocity, model(*inputs(model))[0])
    alone = model.hidden_states(*inputs(model), (4, 2))
    assert all(torch.equal(one, other) for one, other in zip(alone, states, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "class_token_width": 5, "sprint": True}])
def test_gradients_reach_every_parameter_and_checkpointing_changes_none(kind, changes):
    found = []
    for switch in (False, True):
        model = randomised(tiny(kind, **changes)).train()
        model.gradient_checkpointing = switch
        route = (draw_route(3, 4, 0.75, 0.0, torch.Generator().manual_seed(3)),) if model.config.sprint else ()
        velocity, (state,) = model(*inputs(model), (4,), *route)
        (velocity.square().mean() + state.square().mean()).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None and gradient.any() for gradient in found[0].values())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_with_sprint_dropped_tokens_reach_the_head_and_conditions_are_always_seen(kind):
    """A dropped token moves its own velocity through the first blocks and the head, the class every one."""
    model = randomised(tiny(kind, sprint=True))
    x, t, y = inputs(model)
    route = draw_route(3, 4, 0.75, 0.0, torch.Generator().manual_seed(3))
    dropped = next(place for place in range(16) if place not in route.kept[0])
    row, column = 2 * (dropped // 4), 2 * (dropped % 4)
    moved = x.clone()
    moved[0, :, row : row + 2, column : column + 2] += 1
    change = (model(moved, t, y, (), route)[0] - model(x, t, y, (), route)[0]).abs()
    assert change[0, :, row : row + 2, column : column + 2].min() > 0
    assert not change[1:].any()
    (of_class,) = (model(x, t, y, (3,), route)[1][0] - model(x, t, y.flip(0), (3,), route)[1][0]).abs()[:1]
    assert of_class.shape == (4, 192)  # of a quarter of the tokens, and no condition among them
    assert of_class.min(-1).values.max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_config_and_weights_survive_a_folder(kind, tmp_path):
    """The random frequencies of the time too, which no formula gives again."""
    config = tiny(kind, qk_norm=True)
    assert denoiser_config(json.loads(json.dumps(config.to_dict()))) == config
    model = randomised(config)
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(again(*inputs(model))[0], model(*inputs(model))[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_width": 200}, "--head-width 200: give a multiple of 128"),
        ({"head_depth": 0}, "--head-depth 0: give 1 or more"),
        ({"model": "DiTDH-XXL/1"}, "give DiTDH-SIZE/PATCH with Ti, S, B, L, XL and 1, 2"),
    ],
)
def test_what_does_not_fit_is_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        denoiser_config(tiny("DiTDH").to_dict() | changes).build()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("align", [("repa",), ("vae",), ()])
def test_it_is_aligned_as_a_sit_is(kind, align):
    trainer = tiny_trainer(config=tiny(kind), align=align, weighting="lognormal")
    batch = random_batch(8)
    metrics = accumulate(trainer, batch, trainer.draws(0, 0, batch))
    assert metrics["loss"].isfinite()
    assert all(gradient.any() for gradient in gradients(networks(trainer)).values())


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind):
    trainer = tiny_trainer(config=tiny(kind), align=(), learning_rate=2e-3)
    batch = random_batch(16)
    losses = [train_step(trainer, step, [batch])["denoise"].item() for step in range(40)]
    assert sum(losses[-10:]) < 0.97 * sum(losses[:10])
