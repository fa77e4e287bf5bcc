"""LightningDiT's checkpoints as runs: the same velocities, images in the right direction of time, the next update."""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import export_ldm
import generate
import train_ldm
from diffusion.counted_noise import counted_normal
from formats.sit import Projectors, build_networks, infer_sizes, read_sit
from formats.vae import load_tokenizer
from models.denoisers.config import LightningDiTConfig
from models.denoisers.lightningdit import LightningDiT
from models.tokenizers import Tokenizer
from runtime.cli import run
from tests.command_line import argv_of
from tests.foreign_runs import assert_refused, export
from tests.latent_caches import save_vae
from tests.ldm_steps import networks, tiny_trainer
from tests.ldm_trainings import LATENTS, write_data
from tests.ldm_trainings import flags as ldm_flags
from tests.public_lightningdit import State, parameters, public_config, public_state, public_velocity, write_experiment
from tests.public_sit import PublicSiT
from training.ldm_source import open_source

CONFIG = LightningDiTConfig("LightningDiT-Ti/2", 4, 8, num_classes=6)
STATISTICS = {"mean": torch.tensor([0.5, -0.2, 0.1, 0.0]), "std": torch.tensor([1.5, 0.7, 1.0, 2.0])}


def statistics_file(folder: Path) -> Path:
    """As LightningDiT stores them."""
    torch.save({name: value.view(1, 4, 1, 1) for name, value in STATISTICS.items()}, folder / "stats.pt")
    return folder / "stats.pt"


@torch.no_grad()
def assert_same_network(denoiser: State, public: State, config: LightningDiTConfig = CONFIG) -> None:
    """Ours at t is theirs at 1 − t, pointing the other way."""
    model = LightningDiT(config).eval()
    model.load_state_dict(denoiser)
    generator = torch.Generator().manual_seed(11)
    x, t = torch.randn(3, 4, 8, 8, generator=generator), torch.rand(3, generator=generator)
    y = torch.tensor([0, 4, 6])
    expected = -public_velocity(public, x, 1 - t, y)
    assert expected.std() > 0.1
    assert (model(x, t, y)[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_training_checkpoint_is_the_same_network(tmp_path, qk_norm):
    """Weights as they are, the step from the file's name, the rest from its config."""
    model, ema = public_state(qk_norm=qk_norm, seed=1), public_state(qk_norm=qk_norm, seed=2)
    config = public_config(model_use_qknorm=qk_norm, transport_path_type="GVP", transport_use_lognorm=False)
    folder, model = write_experiment(tmp_path / "theirs", model, ema, config)
    checkpoint = read_sit(folder / "checkpoints" / "0000007.pt", "SOURCE")
    assert checkpoint.config == LightningDiTConfig("LightningDiT-Ti/2", 4, 8, 6, qk_norm)
    assert (checkpoint.step, checkpoint.projectors.feature_widths) == (7, ())
    assert checkpoint.facts == {
        "model": "LightningDiT-Ti/2", "qk_norm": qk_norm, "num_classes": 6, "resolution": 32, "path_type": "cosine",
        "prediction": "v", "weighting": "uniform", "velocity_cosine_coeff": 1.0, "vae": "f4d4",
    }  # fmt: skip
    for name, public in (("model", model), ("ema", ema)):
        weights = checkpoint.weights[name].denoiser
        assert all(torch.equal(tensor, public[key]) for key, tensor in weights.items())
        assert_same_network(weights, public, checkpoint.config)


@pytest.mark.parametrize("kind", ["bare", "ema", "wrapped"])
def test_released_weights(tmp_path, kind):
    """Averaged weights alone, as the files on the hub; also with DDP's prefix, and patch 1."""
    public = public_state(patch=1)
    contents = {
        "bare": public,
        "ema": {"ema": public},
        "wrapped": {"ema": {f"module.{key}": tensor for key, tensor in public.items()}},
    }[kind]
    torch.save(contents, tmp_path / "lightningdit.pt")
    checkpoint = read_sit(tmp_path / "lightningdit.pt", "SOURCE")
    assert checkpoint.config.model == "LightningDiT-Ti/1"
    assert (list(checkpoint.weights), checkpoint.step, checkpoint.moments) == (["ema"], None, None)
    assert_same_network(checkpoint.weights["ema"].denoiser, public, checkpoint.config)


@pytest.mark.parametrize("size", LightningDiTConfig.sizes)
def test_every_size_is_told_by_its_tensors(size):
    for patch in LightningDiTConfig.patches:
        config = LightningDiTConfig(f"LightningDiT-{size}/{patch}", 32, 32, 1000, size == "B")
        denoiser, _ = build_networks(config, Projectors())
        assert infer_sizes(denoiser.state_dict(), "x") == (config, Projectors())


STEPS, SCALE, BEGIN, SHIFT, CHANNELS = 6, 3.0, 0.1, 0.3, 3  # as in LightningDiT's configurations, fewer steps


@torch.no_grad()
def public_images(public: State, tokenizer: Tokenizer, labels: torch.Tensor) -> np.ndarray:
    """Sampled as in their code: from time 0, noise, to 1; guided from a time on, in three channels; uint8 NHWC."""
    t = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    t = SHIFT * t / (1 + (SHIFT - 1) * t)
    x = counted_normal(3, torch.arange(len(labels)), 0, (4, 8, 8)).double()
    for now, then in pairwise(t):
        times = now.float().expand(len(labels))
        velocity = public_velocity(public, x.float(), times, labels).double()
        if now >= BEGIN:
            without = public_velocity(public, x.float(), times, torch.full_like(labels, 6)).double()
            guided = without + SCALE * (velocity - without)
            velocity = torch.cat([guided[:, :CHANNELS], velocity[:, CHANNELS:]], dim=1)
        x = x + (then - now) * velocity
    mean, std = (STATISTICS[name].view(1, 4, 1, 1) for name in ("mean", "std"))
    pixels = 127.5 * (tokenizer.network.decode(x.float() * std + mean).sample + 1)
    return pixels.round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)


SAMPLING = {
    "mode": "ode", "num_steps": STEPS, "time_shift": 1 / SHIFT, "cfg_scale": SCALE, "guidance_high": 1 - BEGIN,
    "guidance_channels": CHANNELS, "num_fid_samples": 4, "seed": 3, "label_sampling": "equal",
}  # fmt: skip


def sampled(folder: Path, **flags: object) -> np.ndarray:
    assert generate.main(argv_of(SAMPLING | {"sample_dir": folder} | flags)) == 0
    with np.load(folder / "samples.npz", allow_pickle=False) as file:
        return file["arr_0"]


def test_images_of_a_converted_checkpoint_are_those_of_their_sampler(tmp_path, capsys):
    """Of an experiment and of a bare file, as their code integrates them; other settings give other images."""
    model, ema = public_state(seed=1), public_state(seed=2)
    folder, model = write_experiment(tmp_path / "theirs", model, ema, public_config())
    vae = save_vae(tmp_path)
    tokenizer, _ = load_tokenizer(str(vae))
    flags = {"vae_ckpt": vae, "vae_latents_stats": statistics_file(tmp_path)}
    assert export(folder, tmp_path / "run", **flags) == 0
    torch.save({"ema": ema}, tmp_path / "released.pt")
    assert export(tmp_path / "released.pt", tmp_path / "bare", **flags) == 0
    assert "does not say its step; taking 0" in capsys.readouterr().err
    for name, exp_path, weights, public in (
        ("a", "run", "ema", ema), ("b", "run", "model", model), ("c", "bare", "ema", ema),
    ):  # fmt: skip
        expected = public_images(public, tokenizer, torch.arange(4))
        found = sampled(tmp_path / name, exp_path=tmp_path / exp_path, weights=weights)
        assert expected.std() > 20
        assert np.abs(found.astype(int) - expected).max() <= 1, name
    for name, change in {"shift": {"time_shift": 1}, "all": {"guidance_channels": None}}.items():
        other = sampled(tmp_path / name, exp_path=tmp_path / "bare", **change)
        assert np.abs(other.astype(int) - expected).max() > 3, name
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "0000007" / "manifest.json").read_text())["args"]
    assert (manifest["weighting"], manifest["velocity_cosine_coeff"], manifest["adam_beta2"]) == ("lognormal", 1, 0.95)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State, State]:
    ema = public_state(seed=2)
    folder, model = write_experiment(
        tmp_path_factory.mktemp("theirs") / "a", public_state(seed=1), ema, public_config()
    )
    return folder, model, ema


@pytest.fixture(scope="module")
def converted(data, theirs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "run"
    assert export(theirs[0], out, vae_ckpt=data / LATENTS / "vae") == 0
    return out


def test_the_first_update_is_the_one_of_their_optimizer(theirs, converted):
    """On the same gradients: AdamW over the public parameters, from their state, and ours."""
    folder, model, _ = theirs
    contents = torch.load(folder / "checkpoints" / "0000007.pt", weights_only=True)
    public = parameters(model)
    optimizer = torch.optim.AdamW(public.values(), lr=1.0)
    optimizer.load_state_dict(contents["opt"])
    optimizer.param_groups[0]["lr"] = 1e-3
    trainer = tiny_trainer(config=CONFIG, align=(), ema_decay=0.9, max_grad_norm=1e9, adam_beta2=0.95)
    args = argparse.Namespace(**vars(trainer.args) | {"align": "none", "resume_step": 0, "feature_widths": []})
    open_source(args, CONFIG, converted, None, None).take_over(trainer)
    ours = {name.removeprefix("denoiser."): p for name, p in networks(trainer).named_parameters()}
    before = {name: p.detach().clone() for name, p in public.items()}
    generator = torch.Generator().manual_seed(9)
    for name, parameter in ours.items():
        public[name].grad = torch.randn(parameter.shape, generator=generator)
        parameter.grad = public[name].grad.clone()
    optimizer.step()
    trainer.update(0, {}, [])
    assert ours.keys() == public.keys() - {"pos_embed"}
    for name, parameter in ours.items():
        assert (public[name] - before[name]).abs().max() > 5e-4
        assert (parameter - public[name]).abs().max() < 1e-7, name


def test_train_ldm_continues_it_and_resumes_to_the_bit(data, converted, tmp_path):
    """In one go and in two; with the run's own objective."""
    recipe = {"model": "LightningDiT-Ti/2", "align": "none", "weighting": "lognormal", "velocity_cosine_coeff": 1}
    recipe |= {"enc_type": None, "encoder_depth": None, "projector_width": None, "adam_beta2": 0.95}
    recipe |= {"continue_train_exp_dir": converted, "checkpointing_steps": 1}
    for name, steps in (("straight", 9), ("two", 8), ("two", 9)):
        assert run(train_ldm.main, ldm_flags(data, tmp_path, name, **recipe | {"max_train_steps": steps})) == 0
    files = [tmp_path / name / "checkpoints" / "0000009" / "ema.safetensors" for name in ("straight", "two")]
    first, second = map(load_file, files)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("straight", "two")]
    assert logs[0] == logs[1]
    assert {"denoise", "velocity_cosine"} <= json.loads(logs[0].splitlines()[-1]).keys()


def test_its_folder_for_elsewhere_and_none_for_repae(converted, theirs, tmp_path, capsys):
    assert run(export_ldm.main, [str(converted), str(tmp_path / "out")]) == 0
    model = LightningDiT.from_pretrained(tmp_path / "out" / "transformer")
    assert_same_network(model.state_dict(), theirs[2])
    assert run(export_ldm.main, [str(converted), str(tmp_path / "repa"), "--format", "repa"]) == 2
    assert "REPA-E knows no LightningDiT-Ti/2, only SiTs" in capsys.readouterr().err


def without(name: str) -> State:
    return {key: tensor for key, tensor in public_state().items() if name not in key}


def configured(**changes: object) -> dict:
    return {"ema": public_state(), "config": public_config(**changes)}


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (configured(data_num_classes="6"), "num_classes '6', which is not a whole number"),
        (configured(transport_path_type=["Linear"]), "path_type list, which is neither number nor text"),
        (configured(model_wo_shift=True), "its config says model.wo_shift True; only False is known here"),
        (configured(data_latent_multiplier=0.18215), "data.latent_multiplier 0.18215; only 1.0"),
        (
            configured(transport_prediction="noise"),
            "it predicts noise; of LightningDiT-Ti/2 on 4 channels only the velocity (v) is known here",
        ),
        (configured(transport_path_type="VP"), "path_type VP is none of linear, cosine"),
        (configured(model_model_type="LightningDiT-Ti/1"), "its args say model LightningDiT-Ti/1, its weights"),
        (configured(vae_downsample_ratio=8), "its args say resolution 32, its weights 64"),
        (without("freqs_cos"), "holds no feat_rope.freqs_cos"),
        (public_state() | {"feat_rope.freqs_sin": torch.zeros(16, 64)}, "feat_rope.freqs_sin is of other rotary"),
        (without("w3"), "is not a complete LightningDiT-Ti/2: it lacks blocks.0.mlp.w3"),
        (without("norm1"), "it lacks blocks.0.norm1.weight"),
        (without("blocks.5"), "a LightningDiT of 5 blocks of width 192 with patch 2 is none that is known"),
        (public_state() | {"final_layer.linear.bias": torch.zeros(32)}, "predicts a variance too"),
    ],
)
def test_what_is_another_network_is_one_line(tmp_path, capsys, contents, said):
    assert_refused(contents, said, tmp_path, capsys)


def test_statistics_are_needed_and_never_taken_to_be_repas(tmp_path, capsys):
    tokenizer, _ = load_tokenizer("f4d4-tiny", "none")
    torch.save(tokenizer.network.state_dict(), tmp_path / "vae.pt")
    torch.save(public_state(), tmp_path / "file.pt")
    assert export(tmp_path / "file.pt", tmp_path / "out", vae_ckpt=tmp_path / "vae.pt") == 2
    assert "--vae-latents-stats is needed" in capsys.readouterr().err


def test_a_folder_of_repas_still_wants_its_args(tmp_path, capsys):
    (tmp_path / "theirs" / "checkpoints").mkdir(parents=True)
    torch.save(PublicSiT().state_dict(), tmp_path / "theirs" / "checkpoints" / "0000007.pt")
    assert export(tmp_path / "theirs", tmp_path / "out") == 2
    assert "no args.json, which says how it was trained" in capsys.readouterr().err
