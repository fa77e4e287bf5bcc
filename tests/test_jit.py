"""JiT and predicted data: the networks, a step's loss, public checkpoints as runs."""

import argparse
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import export_ldm
import generate
import train_ldm
from diffusion.counted_noise import counted_normal
from diffusion.flow import add_noise, training_times, velocity
from diffusion.samplers import model_velocity, sample_ode
from errors import UserError
from formats.sit import read_sit
from loss.alignment import TokenGrid
from loss.alignment.repa import REPA
from models.denoisers import denoiser_config
from models.denoisers.base import LEAST_TIME
from models.denoisers.config import DDTConfig, DiTDHConfig, JiTConfig, LightningDiTConfig, SiTConfig
from models.denoisers.sit import SiT
from runtime.cli import run
from tests.command_line import argv_of
from tests.foreign_runs import assert_refused, export
from tests.ldm_runs import random_weights, write_ldm_run
from tests.ldm_steps import accumulate, networks, random_batch, tiny_trainer
from tests.public_ddt import bench_state
from tests.public_jit import jit_image, jit_state, to_the_image

TINY = JiTConfig("JiT-Ti/8", 3, 32, num_classes=6)
OF_DATA = [
    SiTConfig("SiT-Ti/2", 4, 8, 6, prediction="x"),
    LightningDiTConfig("LightningDiT-Ti/2", 4, 8, 6, prediction="x"),
    LightningDiTConfig("LightningDiT-Ti/2", 4, 8, 6, prediction="x", class_token_width=5),
    DiTDHConfig("DiTDH-Ti/2", 4, 8, 6, head_width=256, prediction="x"),
    DDTConfig("DDT-Ti/2", 4, 8, 6, head_width=256, prediction="x"),
    JiTConfig("JiT-Ti/2", 4, 8, 6),
    JiTConfig("JiT-Ti/2", 4, 8, 6, class_token_width=5),
]


def identifier(config: object) -> str:
    return f"{config.model}{'-token' if config.class_token_width else ''}"


def states(config, seed: int = 3, dtype: torch.dtype = torch.float32):
    """States, times on both sides of ``LEAST_TIME``, labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, *config.build().state_shape, generator=generator, dtype=dtype)
    return x, torch.tensor([0.9, 0.3, 0.05, 0.01], dtype=dtype), torch.tensor([0, 4, 6, 2])


# --- the network --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_it_is_the_public_network():
    """In float64, velocities point from the data to the noise and time runs from the data here."""
    state = jit_state(seed=1)
    model = TINY.build().double().eval()
    model.load_state_dict(state)
    x, t, y = states(TINY, dtype=torch.float64)
    found, (early, late) = model(x, t, y, taps=(1, 6))
    expected = -to_the_image({key: tensor.double() for key, tensor in state.items()}, x, 1 - t, y)
    assert expected.std() > 0.5
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()  # rotary tables are float32
    assert early.shape == late.shape == (4, 16, 192)
    alone = model.hidden_states(x, t, y, (1, 6))
    assert torch.equal(alone[0], early)
    assert torch.equal(alone[1], late)


@pytest.mark.parametrize("name", JiTConfig.model_names())
def test_every_size_and_patch_builds_and_answers(name):
    """On the meta device: shapes without memory; REPA taps it."""
    config = JiTConfig(name, 3, 64, num_classes=1000)
    with torch.device("meta"):
        model = config.build()
        aligned = REPA(model, [TokenGrid("vfm", model.grid, 768)], depth=4, width=2048, weight=0.5)
        out, hidden = model(torch.empty(2, 3, 64, 64), torch.empty(2), torch.empty(2, dtype=torch.int64), (4,))
        (tokens,) = aligned.predict(hidden)
    assert out.shape == (2, 3, 64, 64)
    assert tokens.shape == (2, model.grid**2, 768)


@pytest.mark.parametrize(("name", "millions", "before"), [("B/16", 131, 4), ("L/16", 459, 8), ("H/16", 953, 10)])
def test_sizes_are_the_published_ones(name, millions, before):
    """Parameters in millions, and the block before which tokens of the class come, as its paper and its code say."""
    config = JiTConfig(f"JiT-{name}", 3, 256, num_classes=1000)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in config.build().parameters())
    assert round(count / 1e6) == millions
    assert config.blocks_before_class == before


def test_a_new_one_predicts_grey():
    """Its last layer is 0: the image is, whatever the noise."""
    model = TINY.build()
    x, t, y = states(TINY)
    assert torch.equal(model(x, t, y)[0], x / t.clamp_min(0.05)[:, None, None, None])


def test_configurations_survive_json():
    for config in OF_DATA:
        assert denoiser_config(config.to_dict()) == config
    assert "prediction" not in SiTConfig("SiT-Ti/2", 4, 8, 6).to_dict()  # as before there was such a thing
    of_velocity = replace(TINY, prediction="v")
    assert denoiser_config(of_velocity.to_dict()) == of_velocity


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (TINY, {"model": "JiT-XL/8"}, "--model JiT-XL/8 is not known"),
        (TINY, {"sprint": True}, "--sprint: JiT-Ti/8"),
        (TINY, {"flow_map_blocks": 2}, "cannot learn to jump"),
        (TINY, {"prediction": "v", "flow_map_blocks": 2}, "cannot learn to jump"),
        (OF_DATA[0], {"flow_map_blocks": 2}, "cannot learn to jump"),
        (OF_DATA[0], {"prediction": "eps"}, "--prediction eps is not known; give v or x"),
    ],
)
def test_what_does_not_fit_is_one_line(config, changes, message):
    with pytest.raises(UserError, match=message):
        denoiser_config(config.to_dict() | changes)


# --- predicted data -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("config", OF_DATA, ids=identifier)
def test_the_velocity_leads_to_the_predicted_data(config):
    """What the network makes is what its other kind makes, up to the sign of LightningDiT's; and a step from t to 0
    ends there, once nothing is damped."""
    model, plain = config.build().eval(), replace(config, prediction="v").build().eval()
    random_weights(model, 0, std=0.1)
    plain.load_state_dict(model.state_dict())
    x, t, y = states(config)
    data = plain(x, t, y)[0] * (-1 if model.counts_to_data else 1)
    each = t.reshape(-1, *[1] * (x.ndim - 1))
    found = model(x, t, y)[0]
    assert torch.equal(found, (x - data) / each.clamp_min(0.05))
    for number, time in enumerate(t.tolist()):
        one = slice(number, number + 1)
        arrived = x[one] - time * model_velocity(model)(x[one], time, y[one])
        torch.testing.assert_close(arrived, data[one], rtol=1e-3, atol=1e-3)  # float32, in a batch of another size
        damped = model_velocity(model, damped=True)(x[one], time, y[one])
        torch.testing.assert_close(damped, found[one], rtol=1e-3, atol=1e-3)  # divided by 0.05


def test_velocities_are_not_undamped():
    model = SiTConfig("SiT-Ti/2", 4, 8, 6).build().eval()
    random_weights(model, 0, std=0.1)
    x, t, y = states(model.config)
    assert torch.equal(model_velocity(model)(x[3:], 0.01, y[3:]), model(x[3:], t[3:], y[3:])[0])
    assert torch.equal(model.target(x, t), x)


@pytest.mark.parametrize("config", [OF_DATA[0], OF_DATA[4], OF_DATA[5]], ids=identifier)
def test_the_loss_is_the_images_weighted(config):
    """Mean of |x̂ − x|² / max(t, 0.05)², in float64 beside the trainer's float32; and every parameter's gradient."""
    trainer = tiny_trainer(config=config, align=(), weighting="lognormal", time_mean=-2.0, time_std=1.5)
    batch = random_batch(8, config=config, features=())
    draws = trainer.draws(0, 0, batch)
    found = accumulate(trainer, batch, draws)
    model = networks(trainer).denoiser
    twin = replace(config, prediction="v").build().double()
    twin.load_state_dict(model.state_dict())
    x = trainer.normalised(batch, draws).double()
    t = torch.sigmoid(-2.0 + 1.5 * draws.times.double())
    assert 0 < (t < 0.05).sum() < len(t)  # on both sides
    each = t[:, None, None, None]
    data = twin((1 - each) * x + each * draws.noise.double(), t, batch.labels)[0] * (-1 if model.counts_to_data else 1)
    loss = ((data - x) / each.clamp_min(0.05)).square().mean()
    assert found["denoise"].item() == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        reference = expected[name]
        assert (parameter.grad - reference).abs().max() < 2e-3 * reference.abs().max() + 1e-6, name


def test_times_have_the_mean_and_deviation_that_are_asked_for():
    """Of the logarithm of noise to data; of the shift the mean rises by its logarithm."""
    draws = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for path_type in ("linear", "cosine"):
        t = training_times(draws, "lognormal", path_type, 2.0, mean=0.8, std=0.5)
        ratio = t / (1 - t) if path_type == "linear" else torch.tan(t * torch.pi / 2)
        assert ratio.log().mean().item() == pytest.approx(0.8 + np.log(2), abs=0.005)
        assert ratio.log().std().item() == pytest.approx(0.5, abs=0.005)
    assert torch.equal(training_times(draws, "lognormal"), torch.sigmoid(draws))


def test_held_out_errors_are_those_of_training():
    """At small times too: a network that predicts the data exactly has none."""
    model = OF_DATA[0].build()
    x, t, _ = states(OF_DATA[0])
    noise = torch.randn_like(x)
    exact = (add_noise(x, t, noise) - x) / t.clamp_min(LEAST_TIME)[:, None, None, None]
    torch.testing.assert_close(model.target(velocity(x, t, noise), t), exact, rtol=1e-4, atol=1e-4)


# --- public checkpoints -------------------------------------------------------------------------------------------


def public_checkpoint(scale: float = 1.0, patch: int = 8, side: int = 32, **changes: object) -> dict:
    """As its training leaves it."""
    args = {
        "model": f"JiT-Ti/{patch}", "img_size": side, "class_num": 6, "label_drop_prob": 0.1, "P_mean": -0.8,
        "P_std": 0.7, "noise_scale": scale, "t_eps": 0.05, "proj_dropout": 0.0, "ema_decay1": 0.9999,
    }  # fmt: skip
    sets = {
        key: {f"net.{name}": tensor for name, tensor in jit_state(patch, side, seed=seed).items()}
        for seed, key in enumerate(("model", "model_ema1", "model_ema2"))
    }
    return sets | {"optimizer": {"state": {}, "param_groups": []}, "epoch": 3, "args": argparse.Namespace(**args)}


@torch.no_grad()
@pytest.mark.parametrize(("scale", "patch", "side"), [(1.0, 8, 32), (2.0, 8, 32)])
def test_a_checkpoint_is_the_same_network(tmp_path, scale, patch, side):
    """With noise of another size too: images are divided by it, and so is what the network makes of them."""
    torch.save(public_checkpoint(scale), tmp_path / "checkpoint-last.pth")
    checkpoint = read_sit(tmp_path / "checkpoint-last.pth", "SOURCE")
    assert checkpoint.config == TINY
    assert checkpoint.is_of_pixels
    assert checkpoint.facts == {
        "model": "JiT-Ti/8", "num_classes": 6, "resolution": 32, "cfg_prob": 0.1, "time_mean": 0.8, "time_std": 0.7,
        "noise_scale": scale, "path_type": "linear", "prediction": "x", "weighting": "lognormal", "adam_beta2": 0.95,
    }  # fmt: skip
    assert list(checkpoint.weights) == ["ema", "model"]
    x, t, y = states(TINY)
    for seed, name in enumerate(("model", "ema")):
        weights, model = checkpoint.weights[name], TINY.build().eval()
        model.load_state_dict(weights.denoiser)
        z = scale * weights.statistics.normalize(x)
        torch.testing.assert_close(z, x)
        expected = -to_the_image(jit_state(seed=seed), z, 1 - t, y)
        found = scale * model(weights.statistics.normalize(x), t, y)[0]
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_bare_weights_are_read_with_the_noise_of_their_size(tmp_path):
    """At 512 px JiT's noise has a standard deviation of 2."""
    torch.save(jit_state(patch=32, side=512), tmp_path / "bare.pth")
    checkpoint = read_sit(tmp_path / "bare.pth", "SOURCE")
    assert checkpoint.config == JiTConfig("JiT-Ti/32", 3, 512, num_classes=6)
    assert checkpoint.weights["ema"].statistics.std.tolist() == [2, 2, 2]


@torch.no_grad()
def their_images(scale: float, labels: torch.Tensor, steps: int) -> np.ndarray:
    """JiT's sampler: Heun, the last step Euler's, guided above 0.1 of its time; uint8 NHWC."""
    state = jit_state(seed=1)
    z = scale * counted_normal(3, torch.arange(len(labels)), 0, (3, 32, 32)).double()

    def slope(z: torch.Tensor, t: float) -> torch.Tensor:
        time = torch.full((len(labels),), t)
        with_class = to_the_image(state, z.float(), time, labels).double()
        without = to_the_image(state, z.float(), time, torch.full_like(labels, 6)).double()
        return without + (2.9 if t > 0.1 else 1.0) * (with_class - without)

    times = torch.linspace(0, 1, steps + 1).tolist()
    for number, (now, then) in enumerate(pairwise(times)):
        first = slope(z, now)
        ahead = z + (then - now) * first
        if number < steps - 1:
            ahead = z + (then - now) * (first + slope(ahead, then)) / 2
        z = ahead
    return ((z.float() + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_images_are_those_of_its_sampler(tmp_path, capsys, scale):
    torch.save(public_checkpoint(scale), tmp_path / "checkpoint-last.pth")
    assert export(tmp_path / "checkpoint-last.pth", tmp_path / "run") == 0
    assert "does not say its step; taking 0" in capsys.readouterr().err
    sampling = {
        "exp_path": tmp_path / "run", "sample_dir": tmp_path / "images", "mode": "ode", "heun": True, "num_steps": 6,
        "cfg_scale": 2.9, "guidance_high": 0.9, "num_fid_samples": 4, "seed": 3, "label_sampling": "equal",
        "damped": True,
    }  # fmt: skip
    assert generate.main(argv_of(sampling)) == 0
    with np.load(tmp_path / "images" / "samples.npz", allow_pickle=False) as file:
        found = file["arr_0"]
    expected = their_images(scale, torch.arange(4), 6)
    assert expected.std() > 20
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_without_damping_the_last_step_ends_at_the_image():
    """Of the sampler's last time; with damping, at 0.02, three fifths of the noise are left."""
    model = TINY.build().eval()
    model.load_state_dict(jit_state(seed=1))
    x, _, y = states(TINY)
    ends = {}
    for damped in (False, True):
        seen: list[torch.Tensor] = []

        def recorded(x, t, y, damped=damped, seen=seen):
            seen.append((x, t))
            return model_velocity(model, damped=damped)(x, t, y)

        ends[damped] = sample_ode(recorded, x, y, 50)
        last, t = seen[-1]
        image = jit_image(jit_state(seed=1), last, torch.full((4,), 1 - t), y)
        left = (ends[damped] - image).norm() / (last - image).norm()
        assert t == pytest.approx(0.02)
        assert left.item() == pytest.approx(0.6 if damped else 0.0, abs=1e-3)


@pytest.mark.parametrize(("prediction", "mean", "std"), [("x", -1.1, 0.8), ("v", -1.94, 1.0)])
def test_diffusion_bench_s_on_pixels_do_not_say_what_they_predict(tmp_path, prediction, mean, std, capsys):
    """Their DDT of three channels: jit-ddt predicts the image, pixnerd-ddt the velocity, with the same tensors."""
    state = bench_state(patch=2, side=8)
    for name in ("s_embedder", "x_embedder"):
        state[f"{name}.proj.weight"] = state[f"{name}.proj.weight"][:, :3]
    for name in ("weight", "bias"):
        state[f"final_layer.linear.{name}"] = state[f"final_layer.linear.{name}"][: 3 * 4]
    torch.save(state, tmp_path / "jit-ddt.pt")
    assert export(tmp_path / "jit-ddt.pt", tmp_path / "run") == 2
    assert (
        "add --prediction x (jit-ddt-… and pixelgen-ddt-…) or --prediction v (pixnerd-ddt-…)" in capsys.readouterr().err
    )
    checkpoint = read_sit(tmp_path / "jit-ddt.pt", "SOURCE", prediction=prediction)
    assert checkpoint.config == DDTConfig("DDT-Ti/2", 3, 8, 6, qk_norm=True, head_width=256, prediction=prediction)
    assert checkpoint.is_of_pixels
    assert {name: checkpoint.facts[name] for name in ("prediction", "time_mean", "time_std", "time_shift")} == {
        "prediction": prediction, "time_mean": mean, "time_std": std, "time_shift": (3 * 64 / 4096) ** 0.5,
    }  # fmt: skip
    assert export(tmp_path / "jit-ddt.pt", tmp_path / "run", prediction=prediction) == 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda state: state.pop("net.pos_embed"), "it lacks pos_embed"),
        (lambda state: state.pop("net.in_context_posemb"), "without tokens of the class is not known here"),
        (lambda state: state.pop("net.blocks.3.mlp.w3.bias"), "it lacks blocks.3.mlp.w3.bias"),
        (
            lambda state: state.update({"net.x_embedder.proj1.weight": torch.zeros(64, 3, 8, 8)}),
            "a bottleneck of 64 channels",
        ),
        (lambda state: state.update({"net.x_embedder.proj1.weight": torch.zeros(64)}), "has 1 dimensions instead of 4"),
        (lambda state: state.update({"net.pos_embed": torch.zeros(1, 15, 192)}), "15 tokens, which is not a square"),
    ],
)
def test_other_networks_are_refused(tmp_path, capsys, spoil, said):
    contents = public_checkpoint()
    for name in ("model", "model_ema1"):
        spoil(contents[name])
    assert_refused(contents, said, tmp_path, capsys)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), "two"])
def test_noise_of_no_size_is_refused(tmp_path, capsys, scale):
    assert_refused(public_checkpoint(scale), "which is no number above 0", tmp_path, capsys)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("P_mean", "x", "time_mean 'x', which is not a number"),
        ("P_mean", float("nan"), "time_mean nan, which is not a number"),
        ("P_std", "y", "time_std 'y', which is not a number"),
        ("P_std", -1.0, "time_std -1.0, which is not above 0"),
        ("label_drop_prob", "a", "cfg_prob 'a', which is not a number"),
        ("label_drop_prob", 0, "without dropping labels"),
        ("img_size", 64, "its args say 64 px"),
        ("class_num", 7, "its args say num_classes 7, its weights 6"),
    ],
)
def test_flags_of_another_training_are_refused(tmp_path, capsys, name, value, said):
    contents = public_checkpoint()
    setattr(contents["args"], name, value)
    assert_refused_without_vae(contents, said, tmp_path, capsys)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_ema1": [1]}, "holds no weights (ema), but a list; the file is damaged"),
        ({"model": None}, "holds no weights (model), but a NoneType; the file is damaged"),
    ],
)
def test_what_are_no_weights_is_said(tmp_path, capsys, changes, said):
    assert_refused_without_vae(public_checkpoint() | changes, said, tmp_path, capsys)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("net.blocks.².x", "it has in addition blocks.²"),
        ("final_layer.linear.bias", "final_layer.linear.bias is there under two names"),
    ],
)
def test_names_that_are_none(tmp_path, capsys, key, said):
    contents = public_checkpoint()
    contents["model_ema1"][key] = torch.zeros(192)
    assert_refused_without_vae(contents, said, tmp_path, capsys)


def test_a_bare_one_is_of_the_linear_path_too(tmp_path, capsys):
    torch.save(jit_state(), tmp_path / "bare.pth")
    assert export(tmp_path / "bare.pth", tmp_path / "run", path_type="cosine") == 2
    assert "--path-type cosine" in capsys.readouterr().err
    assert export(tmp_path / "bare.pth", tmp_path / "run", prediction="v") == 2
    assert "--prediction v: SOURCE" in capsys.readouterr().err
    assert export(tmp_path / "bare.pth", tmp_path / "run") == 0
    assert "does not say its path" not in capsys.readouterr().err


def assert_refused_without_vae(contents: object, said: str, tmp_path: Path, capsys) -> None:
    torch.save(contents, tmp_path / "file.pth")
    assert export(tmp_path / "file.pth", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


def test_a_vae_is_refused(tmp_path, capsys):
    torch.save(public_checkpoint(), tmp_path / "file.pth")
    assert export(tmp_path / "file.pth", tmp_path / "run", vae_ckpt="f8d4") == 2
    assert "was trained on pixels, without a VAE; leave the flag out" in capsys.readouterr().err


def test_wrong_command_lines(capsys):
    base = ["--dry-run", "--random-weights", "--model", "JiT-Ti/8"]
    for wrong, said in (
        (["--path-type", "cosine"], "--path-type cosine: with predicted data"),
        (["--time-mean", "0.8"], "--time-mean and --time-std are of --weighting lognormal"),
    ):
        with pytest.raises(UserError, match=said):
            train_ldm.parse_arguments([*base, *wrong])


def test_exports_say_what_is_predicted(tmp_path, capsys):
    """The folder builds the same network, and REPA-E's layout cannot say it."""
    run_folder = write_ldm_run(tmp_path / "run", denoiser=replace(OF_DATA[0], num_classes=3).to_dict())
    assert run(export_ldm.main, [str(run_folder), str(tmp_path / "out")]) == 0
    assert SiT.from_pretrained(tmp_path / "out" / "transformer").config.prediction == "x"
    capsys.readouterr()
    assert run(export_ldm.main, [str(run_folder), str(tmp_path / "repa"), "--format", "repa"]) == 2
    assert "REPA-E knows no predicted data (--prediction x)" in capsys.readouterr().err
