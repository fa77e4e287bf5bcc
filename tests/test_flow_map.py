"""Flow maps: the target on data whose map is known, a step against formulas, train_ldm.py and generate.py as called."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

import generate
import train_ldm
from diffusion.counted_noise import counted_normal
from diffusion.flow import add_noise, interpolant, training_times, velocity
from diffusion.samplers import model_velocity, sample_map
from errors import UserError
from export_ldm import main as export
from formats.sit import read_sit
from formats.vae import load_tokenizer
from inference.trained_ldm import open_trained_ldm
from loss.flow_map import guidance_strength, log_error, mean_velocity_target
from metrics.record import Measurement
from models.denoisers import DenoiserConfig, denoiser_config
from models.denoisers.config import LightningDiTConfig, SiTConfig
from models.denoisers.transformer import Transformer
from models.pixels import to_uint8
from reporting.results import guidance_of
from runtime.cli import run
from tests.gaussian_flow import GaussianFlow, gaussian_flow
from tests.latent_caches import save_vae
from tests.ldm_runs import CLASS_NAMES, random_weights, write_ldm_run
from tests.ldm_runs import flags as sampling_flags
from tests.ldm_steps import networks, random_batch, tiny_trainer
from tests.ldm_trainings import flags, write_data
from tests.public_sit import PublicFlowMap, write_experiment
from tests.sendvae_runs import gradients
from tests.test_experiment import commands, value
from tests.test_generate import images_in, largest_difference
from tests.test_sit_formats import snippet_of
from tests.test_train_ldm import metrics, train, weights
from training.flow_map import FlowMap, Jumps
from training.method import train_step
from training.networks import compile_networks

CONFIG = SiTConfig("SiT-Ti/2", 4, 8, 6, flow_map_blocks=2)
CONFIGS = [
    CONFIG,
    replace(CONFIG, qk_norm=True, class_token_width=12),
    replace(CONFIG, sprint=True),
    LightningDiTConfig("LightningDiT-Ti/2", 4, 8, 6, flow_map_blocks=3),
    LightningDiTConfig("LightningDiT-Ti/2", 4, 8, 6, flow_map_blocks=3, qk_norm=True, class_token_width=12),
]
FLAGS = {
    "flow_map_blocks": 2,
    "flow_map_times": (0.4, -1.2),
    "flow_map_cfg_scale": 1.0,
    "flow_map_guidance_low": 0.0,
    "flow_map_guidance_high": 0.7,
    "flow_map_tangent": "path",
}
PATHS = pytest.mark.parametrize("path_type", ["linear", "cosine"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def source(data, tmp_path_factory):
    """A trained run, to be continued."""
    folder = tmp_path_factory.mktemp("source")
    assert train(*flags(data, folder, "source", align="none", cfg_prob=0.2)) == 0
    return folder / "source"


def continued(source, **changes) -> dict:
    """Changes of flags: the run is turned into a flow map."""
    own = {"continue_train_exp_dir": source, "align": "none", "flow_map_blocks": 2, "cfg_prob": 0.2}
    return own | {"max_train_steps": 4} | changes


def built(config: DenoiserConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)
    network = config.build()
    random_weights(network, 0, std=0.1)
    return network.to(dtype).train()


def inputs(config: DenoiserConfig, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """States, times, earlier times, labels and velocities of three images."""
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 3, *config.build().state_shape, generator=generator, dtype=dtype)
    late, early = torch.rand(2, 3, generator=generator, dtype=dtype).sort(0, descending=True).values
    return x, late, early, torch.tensor([0, 3, 6]), v


# --- the map of Gaussian data -------------------------------------------------------------------------------------


class GaussianMap:
    """Where the flow of Gaussian data takes ``x_t``: along each principal axis its deviation is scaled."""

    def __init__(self, flow: GaussianFlow):
        self.flow = flow
        self.variances, self.axes = torch.linalg.eigh(flow.covariance)

    def deviations(self, t: torch.Tensor) -> torch.Tensor:
        """Along the axes, ``[B, d]``."""
        alpha, sigma = interpolant(t[:, None], self.flow.path_type)
        return (alpha**2 * self.variances + sigma**2).sqrt()

    def mean(self, t: torch.Tensor) -> torch.Tensor:
        return interpolant(t[:, None], self.flow.path_type)[0] * self.flow.mean

    def __call__(self, x: torch.Tensor, t: torch.Tensor, arrival: torch.Tensor) -> torch.Tensor:
        whitened = (x - self.mean(t)) @ self.axes / self.deviations(t)
        return self.mean(arrival) + whitened * self.deviations(arrival) @ self.axes.T

    def mean_velocity(self, x: torch.Tensor, t: torch.Tensor, arrival: torch.Tensor) -> torch.Tensor:
        return (x - self(x, t, arrival)) / (t - arrival)[:, None]


@PATHS
def test_the_true_map_is_its_own_target(path_type):
    """MeanFlow's identity, in float64: what the training asks of the true map is the true map."""
    flow = gaussian_flow(path_type)
    exact = GaussianMap(flow)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, arrival = torch.tensor([[1.0, 0.9, 0.5, 0.3], [0.0, 0.6, 0.4, 0.05]], dtype=torch.float64)
    v = torch.cat([flow.velocity(x[item : item + 1], float(t[item])) for item in range(4)])
    target = mean_velocity_target(lambda x, t: exact.mean_velocity(x, t, arrival), x, t, arrival, v)
    expected = exact.mean_velocity(x, t, arrival)
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-12)
    assert (expected - v).abs().max() > 0.1  # which the velocity itself is not


@PATHS
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_one_jump_of_the_true_map_ends_where_many_do(path_type, shift):
    exact = GaussianMap(gaussian_flow(path_type))
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ones = torch.ones(5, dtype=torch.float64)
    expected = exact(noise, ones, 0 * ones)

    def jump(x: torch.Tensor, t: float, y: torch.Tensor, arrival: float) -> torch.Tensor:
        return exact.mean_velocity(x, t * ones, arrival * ones)

    for steps in (1, 2, 7):
        found = sample_map(jump, noise, torch.zeros(5, dtype=torch.int64), steps, shift, path_type)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# --- the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_only_the_last_blocks_are_told_where_a_jump_ends(config):
    network, (x, t, arrival, y, _) = built(config), inputs(config)
    depth, first = network.depth, network.depth - config.flow_map_blocks
    still, states = network(x, t, y, range(1, depth + 1))
    jumping, told = network(x, t, y, range(1, depth + 1), arrival=arrival)
    assert all(torch.equal(*pair) for pair in list(zip(states, told, strict=True))[:first])
    assert all((a - b).abs().max() > 1e-3 for a, b in list(zip(states, told, strict=True))[first:])
    assert (still - jumping).abs().max() > 1e-3
    assert torch.equal(network(x, t, y, arrival=t)[0], still)


@pytest.mark.parametrize("config", CONFIGS)
def test_it_is_the_network_that_it_was(config):
    """The same parameters, and the same velocity, to the bit."""
    plain, (x, t, _, y, _) = built(replace(config, flow_map_blocks=0)), inputs(config)
    network = built(config)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    assert torch.equal(network(x, t, y)[0], plain(x, t, y)[0])
    assert "flow_map_blocks" not in plain.config.to_dict()
    assert denoiser_config(config.to_dict()) == config


@pytest.mark.parametrize("config", CONFIGS)
def test_the_target_equals_finite_differences(config):
    """Central ones in float64; the embeddings of the time are float32, hence 1e-4."""
    network, (x, t, arrival, y, v) = built(config, torch.float64), inputs(config, torch.float64)

    def u(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return network(x, t, y, arrival=arrival)[0]

    step = 1e-3
    with torch.no_grad():
        slope = (u(x + step * v, t + step) - u(x - step * v, t - step)) / (2 * step)
    moved = (arrival - t).reshape(-1, *[1] * (x.ndim - 1)) * slope
    target = mean_velocity_target(u, x, t, arrival, v)
    print("largest difference:", (target - v - moved).abs().max().item(), "of", moved.abs().max().item())
    assert moved.abs().max() > 0.05
    torch.testing.assert_close(target, v + moved, rtol=0, atol=1e-4)
    assert not target.requires_grad
    single = network.float()

    def autocast(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return single(x, t, y, arrival=arrival.float())[0]

    rounded = mean_velocity_target(autocast, x.float(), t.float(), arrival.float(), v.float())
    assert rounded.dtype == torch.float32
    assert (rounded - target).abs().max() < 0.05 * moved.abs().max()


@pytest.mark.parametrize("changes", [
    {"flow_map_blocks": 2.0}, {"flow_map_blocks": True}, {"flow_map_blocks": "2"}, {"flow_map_blocks": 6},
    {"model": "DiTDH-Ti/2", "head_width": 128},
])  # fmt: skip
def test_configurations_that_mean_nothing(changes):
    with pytest.raises(UserError):
        denoiser_config(CONFIG.to_dict() | changes).check()


@pytest.mark.parametrize("model", ["DiTDH-Ti/2", "DDT-Ti/2"])
def test_networks_with_a_head_do_not_jump(model, tmp_path, capsys):
    argv = ["--dry-run", "--vae", "f4d4-tiny", "--model", model, "--head-width", "128", "--align", "none"]
    assert run(train_ldm.main, [*argv, "--resolution", "32", "--flow-map-blocks", "1"]) == 2
    assert f"--model {model} cannot learn to jump" in capsys.readouterr().err


@pytest.mark.parametrize("config", CONFIGS)
def test_along_the_network_s_velocity_the_target_is_the_mean_of_those_along_the_paths(config):
    """Of all images that may lie behind a state: differences from their mean cancel."""
    network = built(config, torch.float64)
    x, late, early, labels, _ = inputs(config, torch.float64)
    with torch.no_grad():
        mean = network(x, late, labels)[0]
    differences = torch.randn(4, *x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    paths = mean + differences - differences.mean(0)

    def target(v: torch.Tensor, tangent: torch.Tensor | None = None) -> torch.Tensor:
        return mean_velocity_target(lambda x, t: network(x, t, labels, arrival=early)[0], x, late, early, v, tangent)

    along_paths = torch.stack([target(v) for v in paths])
    along_network = torch.stack([target(v, mean) for v in paths])
    torch.testing.assert_close(along_paths.mean(0), along_network.mean(0), rtol=1e-10, atol=1e-10)
    assert (along_paths - along_network).abs().max() > 1e-3


# --- a step -------------------------------------------------------------------------------------------------------


def flow_map_trainer(config: DenoiserConfig = CONFIG, **changes: object) -> FlowMap:
    return tiny_trainer(align=(), config=config, features=(), kind=FlowMap, **FLAGS | changes)


@PATHS
@pytest.mark.parametrize("tangent", ["path", "network"])
@pytest.mark.parametrize("changes", [{}, {"flow_map_cfg_scale": 2.5, "cfg_prob": 0.6, "weighting": "lognormal"}])
def test_a_step_equals_a_derivation(path_type, changes, tangent):
    """Targets by finite differences in float64, labels dropped alike in both halves; losses and gradients."""
    changes = changes | {"flow_map_tangent": tangent}
    trainer = flow_map_trainer(path_type=path_type, **changes)
    args, batch = trainer.args, random_batch(8, features=())
    draws = trainer.draws(0, 0, batch)
    generator = trainer.draws(0, 0, batch).generator  # in the same state
    x = trainer.normalised(batch, draws)
    other_noise = torch.randn(x.shape, generator=generator)
    numbers = torch.randn(2, 8, generator=generator)
    late, early = training_times(numbers + torch.tensor([[0.4], [-1.2]]), "lognormal", path_type).sort(0, True).values
    times = training_times(draws.times, args.weighting, path_type)
    dropped = draws.dropout < args.cfg_prob
    labels = torch.where(dropped, 6, batch.labels)
    assert dropped.any() == bool(args.cfg_prob)

    network = networks(trainer).denoiser
    exact = replace(CONFIG).build().double()
    exact.load_state_dict({name: tensor.double() for name, tensor in network.state_dict().items()})

    def guided(noisy, t, v):
        strength = 1 - 1 / args.flow_map_cfg_scale
        inside = ((t <= args.flow_map_guidance_high) & ~dropped)[:, None, None, None]
        of_class, of_none = (exact(noisy, t, y)[0] for y in (labels, torch.full_like(labels, 6)))
        return v + strength * inside * (of_class - of_none)

    def u(noisy, t):
        return exact(noisy, t, labels, arrival=early.double())[0]

    with torch.no_grad():
        x, t, start = x.double(), times.double(), late.double()
        still, v = (f(x, t, draws.noise.double(), path_type) for f in (add_noise, velocity))
        target = guided(still, t, v)
        jumping, v = (f(x, start, other_noise.double(), path_type) for f in (add_noise, velocity))
        v = guided(jumping, start, v)
        step = 1e-3
        along = v if tangent == "path" else exact(jumping, start, labels)[0]
        slope = (u(jumping + step * along, start + step) - u(jumping - step * along, start - step)) / (2 * step)
        jump_target = v - (start - early.double())[:, None, None, None] * slope
    errors = [
        (exact(still, t, labels)[0] - target).square().flatten(1).mean(1),
        (u(jumping, start) - jump_target).square().flatten(1).mean(1),
    ]
    expected = sum((each + 0.01).log().mean() / 2 for each in errors)
    expected.backward()

    step_metrics = trainer.accumulate(0, 0, batch, 1.0, synchronise=True)[0]
    assert step_metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    for name, each in zip(("denoise", "jump"), errors, strict=True):
        assert step_metrics[name].item() == pytest.approx(each.mean().item(), rel=1e-4)
    found = gradients(networks(trainer))
    largest = max(parameter.grad.abs().max().item() for parameter in exact.parameters())
    for name, parameter in exact.named_parameters():
        difference = (found[f"denoiser.{name}"] - parameter.grad).abs().max().item()
        assert difference < 1e-3 * parameter.grad.abs().max().item() + 1e-6 * largest, name


def test_a_class_token_jumps_along():
    """Its error comes with its weight, of which it gets its gradient; both are logged."""
    config = replace(CONFIG, class_token_width=12)
    layer = "denoiser.final_layer.class_token.weight"
    grads = {}
    for coeff in (0.0, 0.03):
        trainer = flow_map_trainer(config, reg_coeff=coeff)
        batch = random_batch(4, config=config, features=())
        logged, _ = trainer.accumulate(0, 0, batch, 1.0, synchronise=True)
        assert logged.keys() == {"loss", "denoise", "jump", "class_token", "class_token_jump"}
        grads[coeff] = gradients(networks(trainer))[layer]
    assert not grads[0.0].any()
    assert grads[0.03].abs().max() > 1e-5


def test_guidance_acts_in_its_interval_and_where_there_is_a_class():
    trainer = flow_map_trainer(flow_map_cfg_scale=2.5, flow_map_guidance_low=0.2, flow_map_guidance_high=0.6)
    t = torch.tensor([0.1, 0.2, 0.4, 0.4, 0.6, 0.7])
    x, v = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, dropped = torch.tensor([0, 1, 2, 6, 3, 4]), torch.tensor([False, False, False, True, False, False])
    at = Jumps(x, t, v, t)
    moved = trainer.guided(at, labels, dropped, trainer.own(at, labels)) - v
    is_moved = moved.flatten(1).abs().amax(1) > 0
    assert is_moved.tolist() == [False, True, True, False, True, False]
    of_class, of_none = (trainer.denoiser(x, t, y)[0].detach() for y in (labels, torch.full_like(labels, 6)))
    torch.testing.assert_close(moved[is_moved], 0.6 * (of_class - of_none)[is_moved], rtol=0, atol=1e-5)


def test_what_a_network_learns_of_guidance_is_that_scale():
    """v_g = v + ω·(v_g − v_u) has the solution v_u + scale·(v − v_u)."""
    v, v_u = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    guided = v_u + 2.5 * (v - v_u)
    torch.testing.assert_close(v + guidance_strength(2.5) * (guided - v_u), guided, rtol=0, atol=1e-12)
    assert guidance_strength(1.0) == 0


def test_the_logarithm_weighs_errors_as_meanflow_does():
    errors = torch.tensor([0.001, 0.1, 20.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(log_error(errors), errors)
    (weighted,) = torch.autograd.grad((errors / (errors.detach() + 0.01)).mean(), errors)
    torch.testing.assert_close(slope, weighted)


def test_jumps_are_drawn_as_the_method_draws_them():
    """Of 40,000: means and deviations of the logits' larger and smaller, against 400,000 of NumPy's, to 0.02."""
    trainer = flow_map_trainer()
    jumps = trainer.jumps(torch.zeros(40_000, 4, 1, 1), torch.Generator().manual_seed(0))
    assert (jumps.t >= jumps.arrival).all()
    numbers = np.random.default_rng(0).normal([[0.4], [-1.2]], 1.0, (2, 400_000))
    for found, expected in ((jumps.t, numbers.max(0)), (jumps.arrival, numbers.min(0))):
        logit = torch.logit(found.double())
        assert logit.mean().item() == pytest.approx(expected.mean(), abs=0.02)
        assert logit.std().item() == pytest.approx(expected.std(), abs=0.02)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("tangent", ["path", "network"])
def test_a_compiled_step_is_the_same(monkeypatch, tangent, scale):
    """The derivative is taken of the same weights, uncompiled; no graph breaks or is made for any number of images."""
    torch.compiler.reset()
    counters.clear()
    made: list[bool] = []
    changes = {"flow_map_tangent": tangent, "flow_map_cfg_scale": scale, "cfg_prob": 0.2, "max_grad_norm": 0.0}
    with torch._dynamo.config.patch(), torch._functorch.config.patch():
        plain, compiled = flow_map_trainer(**changes), flow_map_trainer(**changes)
        monkeypatch.setattr(compiled.denoiser, "compile", partial(compiled.denoiser.compile, backend=recording(made)))
        compile_networks(compiled.denoiser)
        for step in range(3):
            batch = random_batch(4, seed=step, features=())
            first, second = (train_step(trainer, step, [batch]) for trainer in (plain, compiled))
            if step == 1:  # validation: the rest of what is held out
                rest, t, labels = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 1, 2])
                with torch.no_grad():
                    found, expected = (each.denoiser(rest, t, labels)[0] for each in (compiled, plain))
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            for name, value in first.items():
                torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5)
        assert not counters["graph_break"]
    torch.compiler.reset()
    runs_without = (tangent, scale) != ("path", 1.0)
    # blocks and last layer, with gradients, without, and for the rest
    assert len(made) == (6 if runs_without else 4)
    assert not any(made)


def recording(made: list[bool]):
    """A backend of torch.compile that only notes of each graph whether it is made for batches of any size."""

    def backend(graph: torch.fx.GraphModule, inputs: list, **options: object):
        made.append(any(isinstance(each, torch.SymInt) for each in inputs))
        return graph.forward

    return backend


# --- the scripts --------------------------------------------------------------------------------------------------


def test_a_run_is_continued_as_a_flow_map_and_resumed_exactly(data, source, tmp_path):
    options = continued(source, flow_map_cfg_scale=2.5, val_data_dir=data)
    options |= {"max_train_steps": None, "checkpointing_steps": 2}
    for name, stops in (("halted", (4, 6)), ("straight", (6,))):
        for stop in stops:
            assert train(*flags(data, tmp_path, name, **options), "--max-train-steps", str(stop)) == 0
    trained = [[line for line in metrics(tmp_path / name) if "jump" in line] for name in ("halted", "straight")]
    assert trained[0] == trained[1]
    assert [line["step"] for line in trained[0]] == [3, 4, 5, 6]
    assert {"val/denoise", "val_ema/denoise"} <= metrics(tmp_path / "straight")[-1].keys()
    for name in ("model", "ema"):
        halted, straight = (weights(tmp_path / run_name, 6, name) for run_name in ("halted", "straight"))
        assert all(torch.equal(halted[key], straight[key]) for key in straight)
        before = weights(source, 2, name)
        assert before.keys() == straight.keys()
        assert not all(torch.equal(before[key], straight[key]) for key in before)
    arguments = json.loads((tmp_path / "straight" / "args.json").read_text())["args"]
    assert arguments["denoiser"]["flow_map_blocks"] == 2
    assert (tmp_path / "straight" / "samples" / "0000006.png").is_file()


def test_a_run_older_than_the_choice_of_a_tangent_goes_on_along_the_path(data, tmp_path, capsys):
    options = {"align": "none", "flow_map_blocks": 1}
    assert train(*flags(data, tmp_path, **options)) == 0
    path = tmp_path / "run" / "args.json"
    content = json.loads(path.read_text())
    assert content["args"].pop("flow_map_tangent") == "path"
    path.write_text(json.dumps(content))
    capsys.readouterr()
    argv = flags(data, tmp_path, max_train_steps=3, **options)
    assert train(*argv, "--flow-map-tangent", "network") == 2
    assert "was started with --flow-map-tangent path, not network" in capsys.readouterr().err
    assert train(*argv) == 0


@pytest.mark.parametrize("changes", [
    {"time_shift": 2.0, "weighting": "lognormal"}, {"model": "LightningDiT-Ti/2", "qk_norm": True},
    {"path_type": "cosine", "gradient_checkpointing": True}, {"sprint": True, "token_drop": 0, "path_drop": 0},
    {"flow_map_times": (-0.4, -2), "optimizer": "muon"}, {"mixed_precision": "bf16"},
    {"gradient_accumulation_steps": 2}, {"flow_map_tangent": "network", "time_shift": 2.0},
])  # fmt: skip
def test_it_trains(data, tmp_path, changes, capsys):
    assert train(*flags(data, tmp_path, align="none", flow_map_blocks=1, **changes)) == 0
    assert all(line["jump"] > 0 for line in metrics(tmp_path / "run") if "jump" in line)
    assert "it begins from random weights" in capsys.readouterr().err


def test_what_forgets_to_jump_is_told(data, tmp_path, capsys):
    assert train(*flags(data, tmp_path, "map", align="none", flow_map_blocks=1)) == 0
    capsys.readouterr()
    options = {"continue_train_exp_dir": tmp_path / "map", "align": "none", "max_train_steps": 3}
    assert train(*flags(data, tmp_path, "plain", **options)) == 0
    assert "without --flow-map-blocks this run forgets them" in capsys.readouterr().err


def test_it_is_written_out_as_a_dry_run(source, data, tmp_path, capsys):
    argv = flags(data, tmp_path, **continued(source, flow_map_cfg_scale=2.5, dry_run=True))
    assert train(*argv) == 0
    out = capsys.readouterr().out
    assert "SiT-Ti/2" in out and "jump" in out
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def jumping_run(tmp_path_factory):
    config = {"model": "SiT-Ti/2", "latent_channels": 4, "latent_size": 8, "num_classes": 3, "flow_map_blocks": 2}
    folder = tmp_path_factory.mktemp("exps") / "run"
    return write_ldm_run(folder, denoiser=denoiser_config(config).to_dict(), align="none")


@pytest.mark.parametrize("steps", [1, 3])
def test_images_against_a_sampler_written_out(jumping_run, tmp_path, steps):
    """With guidance on top, from the formulas; within one level."""
    options = {"mode": "map", "num_steps": steps, "num_fid_samples": 4, "label_sampling": "equal", "cfg_scale": 1.5}
    argv = sampling_flags(jumping_run, sample_dir=tmp_path / "out", **options)
    assert run(generate.main, argv) == 0
    found = images_in(tmp_path / "out")
    trained = open_trained_ldm(jumping_run, None, "ema")
    model, tokenizer = trained.load_model(), trained.load_autoencoder()
    items, labels = torch.arange(4), torch.arange(4) % len(CLASS_NAMES)
    x = counted_normal(0, items, 0, (4, 8, 8)).double()
    with torch.no_grad():
        for t, then in pairwise(1 - k / steps for k in range(steps + 1)):
            at = torch.full((4,), t), labels
            u, u_none = (
                model(x.float(), at[0], y, arrival=torch.full((4,), then))[0].double() for y in (labels, 0 * labels + 3)
            )
            x = x + (then - t) * (u_none + 1.5 * (u - u_none))
        images = tokenizer.decode(tokenizer.statistics.denormalize(x.float()))
    expected = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert largest_difference(found, expected) <= 1


def test_four_jumps_are_the_default_and_named_in_the_folder(jumping_run):
    assert run(generate.main, sampling_flags(jumping_run, mode="map", num_steps=None)) == 0
    (folder,) = jumping_run.glob("samples-*")
    assert "-map4-" in folder.name
    assert json.loads((folder / "index.json").read_text())["source"]["num_steps"] == 4


def test_guidance_that_was_learned_is_said_of_images(tmp_path, capsys):
    """In their folder, and where figures are compared: they are not unguided."""
    learned = {"flow_map_cfg_scale": 2.5, "flow_map_guidance_low": 0.0, "flow_map_guidance_high": 0.7}
    config = denoiser_config({"model": "SiT-Ti/2", "latent_channels": 4, "latent_size": 8, "num_classes": 3})
    for name, changes, expected in (("learned", learned, "2.5 on [0, 0.7]"), ("none", {}, None)):
        folder = write_ldm_run(tmp_path / name, denoiser=config.with_flow_map(2).to_dict(), **changes)
        argv = sampling_flags(folder, mode="map", num_steps=1, sample_dir=tmp_path / "out" / name)
        assert run(generate.main, argv) == 0
        made_by = json.loads((tmp_path / "out" / name / "index.json").read_text())["source"]
        assert made_by["learned_guidance"] == expected
        shown = guidance_of(Measurement("name", "generation", {}, 10, {"made_by": made_by}), None)
        assert shown == ("none" if expected is None else "2.5 on [0, 0.7], learned")
        assert run(generate.main, [*argv, "--cfg-scale", "1.5", "--sample-dir", str(tmp_path / "twice" / name)]) == 0
        warned = f"has learned guidance ({expected}); this is added to it" in capsys.readouterr().err
        assert warned == (expected is not None)
        made_by |= {"cfg_scale": 1.5}
        shown = guidance_of(Measurement("name", "generation", {}, 10, {"made_by": made_by}), None)
        assert shown == ("1.5" if expected is None else "1.5, and 2.5 on [0, 0.7], learned")


def test_random_networks_say_what_jumps_take(capsys):
    argv = ["--dry-run", "--model", "SiT-Ti/2", "--vae", "f4d4-tiny", "--resolution", "32", "--mode", "map"]
    assert run(generate.main, argv) == 0
    assert "4 forward passes an image (map, 4 steps)" in capsys.readouterr().out
    argv[2] = "DDT-Ti/2"
    assert run(generate.main, argv) == 2
    assert "cannot learn to jump" in capsys.readouterr().err


def test_its_preset_continues_the_paper_s_run():
    found, source = commands("flow_map_imagenet256"), commands("sendvae_imagenet256")
    assert list(found) == list(commands("flow_map_imagenet256", "--unguided", "yes"))
    for stage, flag in (("cache", "vae-latents-name"), ("ldm", "model"), ("ldm", "batch-size")):
        assert value(found[stage], flag) == value(source[stage], flag)
    assert value(found["ldm"], "continue-train-exp-dir") == "exps/" + value(source["ldm"], "exp-name")
    ldm = train_ldm.parse_arguments(found["ldm"][found["ldm"].index("train_ldm.py") + 1 :])
    assert (ldm.epochs, ldm.flow_map_blocks, ldm.flow_map_times) == (160, 8, [0.4, -1.2])
    assert guidance_strength(ldm.flow_map_cfg_scale) == pytest.approx(0.6)  # the method's
    samples = generate.parse_arguments(found["samples"][found["samples"].index("generate.py") + 1 :])
    assert (samples.mode, samples.num_steps, samples.cfg_scale) == ("map", 4, 1.0)


def test_the_quickstart_s_transformer_is_continued():
    found, source = commands("quickstart_map"), commands("quickstart")
    for flag in ("model", "data-dir", "vae-latents-name", "batch-size", "optimizer", "learning-rate", "ema-decay"):
        assert value(found["ldm"], flag) == value(source["ldm"], flag)
    assert value(found["ldm"], "continue-train-exp-dir") == "exps/" + value(source["ldm"], "exp-name")
    assert int(value(found["ldm"], "max-train-steps")) == int(value(source["ldm"], "max-train-steps")) + 250
    ldm = train_ldm.parse_arguments(found["ldm"][found["ldm"].index("train_ldm.py") + 1 :])
    assert (ldm.align, ldm.flow_map_cfg_scale) == ("none", float(value(source["samples"], "cfg-scale")))
    assert not {"sendvae", "cache", "reconstruction"} & found.keys()


# --- their checkpoints --------------------------------------------------------------------------------------------


def their_args(**changes: object) -> dict:
    """What Decoupled MeanFlow's train_dmf.py keeps, as far as it matters here."""
    values = {"model": "DMFT-Ti/2", "dmf_depth": 4, "num_classes": 6, "qk_norm": False, "resolution": 64}
    values |= {"path_type": "linear", "cfg_prob": 0.1, "g_type": "mg", "omega": 0.6, "g_min": 0.0, "g_max": 0.7}
    return values | changes


def their_optimizer(model: PublicFlowMap) -> torch.optim.AdamW:
    """After a step; it is given what is trained alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def test_an_experiment_of_theirs_jumps_as_it_did(tmp_path, capsys):
    """By its args, and a bare file by the flag; images of one jump against theirs, within one level."""
    theirs, vae = PublicFlowMap(seed=2).eval(), save_vae(tmp_path)
    model = PublicFlowMap(seed=1)
    optimizer = their_optimizer(model)
    parts = {"opt": optimizer.state_dict()}
    source = write_experiment(tmp_path / "dmf", model, theirs, their_args(resolution=32), **parts)
    moments = read_sit(next((source / "checkpoints").glob("*.pt")), "SOURCE").moments
    for name, parameter in model.named_parameters():
        if name != "pos_embed" and not name.startswith("logvar_linear"):
            assert torch.equal(moments[name]["exp_avg"], optimizer.state[parameter]["exp_avg"])
    torch.save(theirs.state_dict(), tmp_path / "bare.pt")
    told = ["--format", "run", "--vae-ckpt", str(vae)]
    assert run(export, [str(source), str(tmp_path / "exps" / "whole"), *told]) == 0
    assert run(export, [str(tmp_path / "bare.pt"), str(tmp_path / "exps" / "bare"), *told]) == 2
    assert "add --flow-map-blocks" in capsys.readouterr().err
    assert run(export, [str(tmp_path / "bare.pt"), str(tmp_path / "exps/bare"), *told, "--flow-map-blocks", "2"]) == 0
    items, labels = torch.arange(4), torch.arange(4)
    noise, ones = counted_normal(0, items, 0, (4, 8, 8)), torch.ones(4)
    tokenizer, _ = load_tokenizer(str(vae))
    with torch.no_grad():
        x = noise - theirs.jump(noise, ones, 0 * ones, labels)
        images = tokenizer.decode(x / 0.18215)
    expected = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for name in ("whole", "bare"):
        options = {"mode": "map", "num_steps": 1, "num_fid_samples": 4, "label_sampling": "equal"}
        argv = sampling_flags(tmp_path / "exps" / name, sample_dir=tmp_path / name, **options)
        assert run(generate.main, argv) == 0
        assert largest_difference(images_in(tmp_path / name), expected) <= 1
        learned = json.loads((tmp_path / name / "index.json").read_text())["source"]["learned_guidance"]
        assert learned == ("2.5 on [0, 0.7]" if name == "whole" else None)  # a bare file does not say


@pytest.mark.parametrize(("args", "flag", "said"), [
    ({}, 3, "--flow-map-blocks 3: "), ({"dmf_depth": 6}, None, "dmf_depth 6, of 6 blocks"),
    ({"dmf_depth": "most"}, None, "dmf_depth 'most'"), ({"model": "DMFT-B/2"}, None, "model SiT-B/2"),
    ({"dmf_depth": 0}, None, "at least one must see where a jump begins"),
])  # fmt: skip
def test_what_their_args_and_the_user_may_not_say(tmp_path, capsys, args, flag, said):
    source = write_experiment(tmp_path / "dmf", PublicFlowMap(seed=1), PublicFlowMap(seed=2), their_args(**args))
    argv = [str(source), str(tmp_path / "out"), "--format", "run", "--vae-ckpt", str(save_vae(tmp_path))]
    assert run(export, [*argv, *([] if flag is None else ["--flow-map-blocks", str(flag)])]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_exported_folder_jumps(jumping_run, tmp_path, monkeypatch):
    """The lines of its README, as they stand, make the image of four jumps."""
    assert run(export, [str(jumping_run), str(tmp_path / "out")]) == 0
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet_of(tmp_path / "out"), "README.md", "exec"), {})  # noqa: S102  it is what is tested
    trained = open_trained_ldm(jumping_run, None, "ema")
    tokenizer = trained.load_autoencoder()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    z = sample_map(model_velocity(trained.load_model()), noise, torch.tensor([0]), 4)
    with torch.no_grad():
        image = to_uint8(tokenizer.decode(tokenizer.statistics.denormalize(z)))[0].permute(1, 2, 0).numpy()
    found = np.asarray(Image.open(tmp_path / "sample.png"))
    assert found.std() > 10
    assert largest_difference(found, image) <= 1


def test_it_is_not_exported_as_what_it_is_not(jumping_run, tmp_path, capsys):
    assert run(export, [str(jumping_run), str(tmp_path / "out.pt"), "--format", "repa"]) == 2
    assert "--flow-map-blocks" in capsys.readouterr().err
