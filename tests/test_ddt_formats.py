"""Checkpoints of RAE and diffusion-bench as runs: the same velocities, the images of their sampler, training on."""

import json
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
from errors import UserError
from formats.sit import read_sit
from formats.vae import load_tokenizer
from models.denoisers.config import DDTConfig, DiTDHConfig
from models.denoisers.ddt import DDT
from models.denoisers.ditdh import DiTDH
from models.tokenizers import Tokenizer
from runtime.cli import run
from tests.command_line import argv_of
from tests.foreign_runs import assert_refused, export
from tests.latent_caches import save_vae
from tests.ldm_trainings import LATENTS, write_data
from tests.ldm_trainings import flags as ldm_flags
from tests.public_ddt import TOKEN_WIDTH, bench_state, bench_velocity, rae_state, rae_velocity
from tests.public_lightningdit import State

CONFIGS = {
    "rae": DiTDHConfig("DiTDH-Ti/2", 4, 8, 6, head_width=256),
    "bench": DDTConfig("DDT-Ti/2", 4, 8, 6, qk_norm=True, head_width=256),
    "bench-reg": DDTConfig("DDT-Ti/2", 4, 8, 6, qk_norm=True, class_token_width=TOKEN_WIDTH, head_width=256),
}
SHIFT = 0.25  # √(4·8·8 / 4096)


def state_of(kind: str, **options: object) -> State:
    if kind == "rae":
        return rae_state(patch=2, side=8, **options)
    return bench_state(patch=2, side=8, has_token=kind == "bench-reg", **options)


def velocity_of(kind: str, state: State, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return rae_velocity(state, x, t, y) if kind == "rae" else bench_velocity(state, x, t, y)[0]


@torch.no_grad()
def assert_same_network(denoiser: State, public: State, kind: str) -> None:
    model = CONFIGS[kind].build().eval()
    model.load_state_dict(denoiser)
    generator = torch.Generator().manual_seed(11)
    x, t = torch.randn(3, *model.state_shape, generator=generator), torch.rand(3, generator=generator)
    y = torch.tensor([0, 4, 6])
    latent, token = model.unpack(x)
    if token is None:
        expected = velocity_of(kind, public, x, t, y)
    else:
        expected = model.pack(*bench_velocity(public, latent, t, y, token))
    assert expected.std() > 0.1
    assert (model(x, t, y)[0] - expected).abs().max() < 1e-5 * expected.abs().max()  # float32


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("form", ["bare", "ema", "training"])
def test_a_checkpoint_is_the_same_network(tmp_path, kind, form):
    """Averaged weights as on the hub; and what a training leaves, with DDP's prefix."""
    model, ema = state_of(kind, seed=1), state_of(kind, seed=2)
    contents = {
        "bare": ema,
        "ema": {"ema": ema},
        "training": {
            "model": {f"module.{key}": tensor for key, tensor in model.items()}, "ema": ema, "step": 7, "epoch": 1,
            "optimizer": {"state": {}, "param_groups": []}, "scheduler": None,
        },
    }[form]  # fmt: skip
    torch.save(contents, tmp_path / "theirs.pt")
    checkpoint = read_sit(tmp_path / "theirs.pt", "SOURCE")
    assert checkpoint.config == CONFIGS[kind]
    assert (checkpoint.step, checkpoint.moments) == (7 if form == "training" else None, None)
    assert checkpoint.facts == {
        "path_type": "linear", "prediction": "v", "weighting": "lognormal", "time_shift": SHIFT, "adam_beta2": 0.95,
    }  # fmt: skip
    for name, weights in checkpoint.weights.items():
        assert_same_network(weights.denoiser, {"model": model, "ema": ema}[name], kind)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["x", "v"])
def test_internal_guidance_is_the_same(tmp_path, monkeypatch, prediction):
    """RAEv2's network, whose data both outputs predict: both velocities."""
    monkeypatch.setattr("formats.ddt.GUIDE_DEPTH", 2)  # of six blocks
    public = state_of("bench", is_guided=True, seed=2)
    torch.save({"ema": public}, tmp_path / "theirs.pt")
    with pytest.raises(UserError, match=r"does not say what it predicts: add --prediction x \(RAEv2's\)"):
        read_sit(tmp_path / "theirs.pt", "SOURCE")
    checkpoint = read_sit(tmp_path / "theirs.pt", "SOURCE", prediction=prediction)
    assert checkpoint.config == replace(CONFIGS["bench"], guide_depth=2, prediction=prediction)
    model = checkpoint.config.build().eval()
    model.load_state_dict(checkpoint.weights["ema"].denoiser)
    generator = torch.Generator().manual_seed(11)
    x, y = torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([0, 4, 6])
    t = torch.tensor([0.02, 0.5, 0.9])
    for found, depth in zip(model.with_guide(x, t, y), (0, 2), strict=True):
        expected, _ = bench_velocity(public, x, t, y, guide=depth)
        if prediction == "x":
            expected = (x - expected) / t.clamp_min(0.05)[:, None, None, None]
        assert expected.std() > 0.05
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def their_images(kind: str, public: State, tokenizer: Tokenizer, labels: torch.Tensor) -> np.ndarray:
    """diffusion-bench's sampler: Euler from 1 to 0 at shifted times, guided up to 0.9; uint8 NHWC."""
    t = torch.linspace(1, 0, 7, dtype=torch.float64)
    t = SHIFT * t / (1 + (SHIFT - 1) * t)
    x = counted_normal(3, torch.arange(len(labels)), 0, (4, 8, 8)).double()
    for now, then in pairwise(t):
        times = now.float().expand(len(labels))
        velocity = velocity_of(kind, public, x.float(), times, labels).double()
        if now <= 0.9:
            without = velocity_of(kind, public, x.float(), times, torch.full_like(labels, 6)).double()
            velocity = without + 1.8 * (velocity - without)
        x = x + (then - now) * velocity
    z = tokenizer.statistics.denormalize(x.float())
    pixels = 127.5 * (tokenizer.network.decode(z).sample + 1)
    return pixels.round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)


@pytest.mark.parametrize("kind", ["rae", "bench"])
def test_images_are_those_of_their_sampler(tmp_path, capsys, kind):
    """The run knows the shift of its times: no flag says it."""
    public = state_of(kind, seed=2)
    torch.save(public, tmp_path / "released.pt")
    vae = save_vae(tmp_path)
    assert export(tmp_path / "released.pt", tmp_path / "run", vae_ckpt=vae) == 0
    said = capsys.readouterr().err
    assert "does not say its step; taking 0" in said
    assert "does not say its path" not in said
    sampling = {
        "exp_path": tmp_path / "run", "sample_dir": tmp_path / "images", "mode": "ode", "num_steps": 6,
        "cfg_scale": 1.8, "guidance_high": 0.9, "num_fid_samples": 4, "seed": 3, "label_sampling": "equal",
    }  # fmt: skip
    assert generate.main(argv_of(sampling)) == 0
    with np.load(tmp_path / "images" / "samples.npz", allow_pickle=False) as file:
        found = file["arr_0"]
    expected = their_images(kind, public, load_tokenizer(str(vae))[0], torch.arange(4))
    assert expected.std() > 20
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("kind", ["rae", "bench"])
def test_train_ldm_continues_it_and_resumes_to_the_bit(data, tmp_path, kind, capsys):
    """In one go and in two, with gradient checkpointing in one of them; then it is exported."""
    torch.save({"ema": state_of(kind, seed=2)}, tmp_path / "released.pt")
    assert export(tmp_path / "released.pt", tmp_path / "run", vae_ckpt=data / LATENTS / "vae") == 0
    assert "holds no optimizer state that is read here" in capsys.readouterr().err
    config = CONFIGS[kind]
    recipe = {"model": config.model, "head_width": 256, "qk_norm": config.qk_norm or None, "weighting": "lognormal"}
    recipe |= {"time_shift": "auto", "align": "none", "enc_type": None, "encoder_depth": None, "projector_width": None}
    recipe |= {"continue_train_exp_dir": tmp_path / "run", "checkpointing_steps": 1}
    for name, steps in (("straight", 3), ("two", 2), ("two", 3)):
        recipe["gradient_checkpointing"] = (name, steps) == ("two", 3) or None
        assert run(train_ldm.main, ldm_flags(data, tmp_path, name, **recipe | {"max_train_steps": steps})) == 0
    files = [tmp_path / name / "checkpoints" / "0000003" / "ema.safetensors" for name in ("straight", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("straight", "two")]
    assert logs[0] == logs[1]
    assert run(export_ldm.main, [str(tmp_path / "two"), str(tmp_path / "out")]) == 0
    network = {"rae": DiTDH, "bench": DDT}[kind]
    assert network.from_pretrained(tmp_path / "out" / "transformer").config == config
    assert run(export_ldm.main, [str(tmp_path / "two"), str(tmp_path / "repa"), "--format", "repa"]) == 2
    assert f"REPA-E knows no {config.model}, only SiTs" in capsys.readouterr().err


def without(kind: str, name: str) -> State:
    return {key: tensor for key, tensor in state_of(kind).items() if name not in key}


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (without("rae", "enc_feat_rope.freqs_cos"), "is not a complete DiTDH: it lacks enc_feat_rope.freqs_cos"),
        (without("rae", "dec_feat_rope.freqs_sin"), "dec_feat_rope.freqs_sin is not there or of other rotary"),
        (state_of("bench") | {"enc_rope.freqs_sin": torch.zeros(28, 64)}, "enc_rope.freqs_sin is not there or of"),
        (without("rae", "s_projector"), "is not a complete DiTDH-Ti/2: it lacks head.projector.weight"),
        (without("bench", "blocks.3.attn.k."), "is not a complete DDT-Ti/2: it lacks blocks.3.attn.qkv.weight"),
        (without("rae", "blocks.5"), "a DiTDH of 5 blocks of width 192 and a head of width 256, with patch 2"),
        (without("rae", "blocks.7.mlp.w3"), "it lacks head.blocks.1.mlp.w3.weight"),
        (state_of("rae") | {"s_embedder.proj.weight": torch.zeros(3)}, "s_embedder.proj.weight has 1 dimensions"),
        (state_of("rae") | {"head.blocks.9.x": torch.zeros(3)}, "it has in addition head.blocks.9.x"),
        (state_of("bench-reg", is_guided=True), "with internal guidance and a class token, which is not known here"),
        (
            state_of("bench", is_guided=True),
            "has internal guidance and 6 blocks; that it comes after block 8 is assumed",
        ),
        (state_of("bench") | {"t_abs_embedder.W": torch.zeros(3)}, "is a DDT of MeanFlow, which is not known here"),
        (without("bench", "ctx_") | {"ctx_embedder.proj.bias": torch.zeros(3)}, "is a DDT of text"),
        (without("bench", "ctx_embedder.embedding"), "is not a complete DDT: it lacks ctx_embedder.embedding_table"),
        (state_of("rae") | {"blocks.5.norm1.weight": torch.tensor(1.0)}, "a DiTDH of 5 blocks of width 192"),
        (state_of("rae") | {"x_embedder.proj.weight": torch.zeros(96, 4, 2, 2)}, "a head of width 96"),
        (state_of("bench-reg") | {"cls_in_proj_enc.weight": torch.zeros(3)}, "cls_in_proj_enc.weight has 1 dimensions"),
        (state_of("bench") | {"dec_rope.freqs_cos": torch.zeros(0, 128)}, "0 tokens and 6 classes are no DDT"),
        (state_of("rae") | {"y_embedder.embedding_table.weight": torch.zeros(1, 192)}, "16 tokens and 0 classes"),
        (state_of("bench") | {"blocks.2.attn.q.weight": torch.zeros(96, 192)}, "it lacks blocks.2.attn.qkv.weight"),
        (state_of("bench") | {"blocks.2.mlp.w1.bias": torch.tensor(1.0)}, "blocks.2.mlp.w1.bias has 0 dimensions"),
        (state_of("bench") | {"time_tokens": torch.zeros(4, 192)}, "time_tokens is there under two names"),
        (state_of("rae") | {"head.projector.bias": torch.zeros(256)}, "head.projector.bias is there under two names"),
    ],
)
def test_what_is_another_network_is_one_line(tmp_path, capsys, contents, said):
    assert_refused(contents, said, tmp_path, capsys)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_other_precisions(tmp_path, precision):
    """Tables are compared as they are kept."""
    torch.save({name: tensor.to(precision) for name, tensor in state_of("rae").items()}, tmp_path / "file.pt")
    assert read_sit(tmp_path / "file.pt", "SOURCE").config == CONFIGS["rae"]


def test_an_experiments_folder_names_a_file_of_it(tmp_path, capsys):
    (tmp_path / "theirs" / "checkpoints").mkdir(parents=True)
    for epoch in (5, 10):
        torch.save({"ema": state_of("rae")}, tmp_path / "theirs" / "checkpoints" / f"ep-{epoch:07d}.pt")
    assert export(tmp_path / "theirs", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"such as {tmp_path / 'theirs' / 'checkpoints' / 'ep-0000010.pt'}")


MEAN, STD = [0.5, -0.2, 0.1, 0.0], [1.5, 0.7, 1.0, 2.0]


@pytest.mark.parametrize(
    ("said", "mean", "std"),
    [
        ({"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.18215}, MEAN, STD),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, [0.1159] * 4, [1 / 0.3611] * 4),
        ({"scaling_factor": 0.13025, "shift_factor": None}, [0] * 4, [1 / 0.13025] * 4),
    ],
)
def test_latents_are_normalised_as_diffusion_bench_does(tmp_path, capsys, said, mean, std):
    """By the VAE's configuration, its scaling factor left out where it has statistics, unlike diffusers' pipelines."""
    vae = save_vae(tmp_path)
    for path in vae.glob("latents_stats*"):
        path.unlink()
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | said))
    torch.save(state_of("bench"), tmp_path / "file.pt")
    assert export(tmp_path / "file.pt", tmp_path / "run", vae_ckpt=vae) == 0
    assert "taking what diffusion-bench takes of the VAE" in capsys.readouterr().err
    statistics = load_tokenizer(str(tmp_path / "run" / "vae"))[0].statistics
    assert statistics.mean.tolist() == pytest.approx(mean)
    assert statistics.std.tolist() == pytest.approx(std)


def test_what_the_run_says_of_its_training(tmp_path):
    torch.save(state_of("bench-reg"), tmp_path / "file.pt")
    assert export(tmp_path / "file.pt", tmp_path / "run", vae_ckpt=save_vae(tmp_path)) == 0
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "0000000" / "manifest.json").read_text())["args"]
    assert (manifest["weighting"], manifest["time_shift"], manifest["align"]) == ("lognormal", SHIFT, "none")
    assert manifest["denoiser"]["class_token_width"] == TOKEN_WIDTH
