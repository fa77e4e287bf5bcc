"""SiT checkpoints of REPA and REPA-E: in, sampled, continued; and out again. Against an independent network."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import cache_latents
import export_ldm
import generate
import train_ldm
from diffusion.counted_noise import counted_normal
from diffusion.guidance import guided
from diffusion.samplers import model_velocity, sample_ode
from errors import UserError
from formats.sit import infer_config, read_sit
from formats.vae import load_tokenizer
from inference.trained_ldm import open_trained_ldm
from models.denoisers.sit import PATCH_SIZES, SIT_SIZES, SiT, SiTConfig
from models.pixels import to_uint8
from models.tokenizers import Tokenizer
from runtime.cli import run
from tests.command_line import argv_of
from tests.latent_caches import flags as cache_flags
from tests.latent_caches import save_vae
from tests.ldm_runs import CLASS_NAMES, STEP, random_weights, write_ldm_run
from tests.ldm_steps import tiny_trainer
from tests.ldm_trainings import LATENTS, write_data
from tests.ldm_trainings import flags as ldm_flags
from tests.public_sit import PublicSiT, public_args, trained, write_checkpoint, write_experiment
from tests.public_vae import TINY, PublicVAE, random_vae
from training.ldm_source import open_source


def probe(count: int = 3, channels: int = 4, side: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, random times, classes up to the null class."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(count, channels, side, side, generator=generator)
    return x, torch.rand(count, generator=generator), torch.tensor([0, 4, 6])[:count]


def ours(checkpoint, weights: str = "ema") -> SiT:
    model = SiT(checkpoint.config).eval()
    model.load_state_dict(checkpoint.weights[weights].state)
    return model


@torch.no_grad()
def assert_same_network(model: SiT, public: PublicSiT) -> None:
    x, t, y = probe()
    velocity, tokens = model(x, t, y, with_tokens=True)
    expected, projected = public(x, t, y)
    assert expected.std() > 0.1  # nothing was compared with zeros
    assert (velocity - expected).abs().max() < 1e-5
    assert len(tokens) == len(projected)
    for found, token in zip(tokens, projected, strict=True):
        assert (found - token).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "args"),
    [
        ({}, {}),
        ({"batch_norm": True}, {"vae": "f4d4-tiny"}),
        ({"qk_norm": True, "dims": (24, 40), "encoder_depth": 4},
         {"qk_norm": True, "enc_type": "dinov2-vit-b,clip-vit-L", "encoder_depth": 4}),
    ],
)  # fmt: skip
def test_a_training_checkpoint_is_the_same_network(tmp_path, options, args):
    """REPA's, REPA-E's with its BatchNorm, and one with qk-norm and two encoders."""
    model, ema = PublicSiT(seed=1, **options), PublicSiT(seed=2, **options)
    path = write_checkpoint(tmp_path / "0000007.pt", model, ema, public_args(**args), 7)
    checkpoint = read_sit(path, "--ckpt")
    dims = options.get("dims", (112,))
    assert checkpoint.config == SiTConfig(
        "SiT-Ti/2", 4, 8, 6, options.get("qk_norm", False), options.get("encoder_depth", 2), dims, 32
    )
    assert checkpoint.step == 7
    assert_same_network(ours(checkpoint), ema.eval())
    assert_same_network(ours(checkpoint, "model"), model.eval())
    statistics = checkpoint.weights["ema"].statistics
    if not options.get("batch_norm"):
        assert statistics is None
        return
    z = torch.randn(2, 4, 8, 8)
    decoded = z * ema.bn.running_var.view(1, 4, 1, 1).sqrt() + ema.bn.running_mean.view(1, 4, 1, 1)
    assert torch.equal(z * statistics.std.view(1, 4, 1, 1) + statistics.mean.view(1, 4, 1, 1), decoded)


def legacy(state: dict) -> dict:
    """REPA's first layout: the blocks after the second are called decoder_blocks, from 0."""
    renamed = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] == "blocks" and int(parts[1]) >= 2:
            key = ".".join(["decoder_blocks", str(int(parts[1]) - 2), *parts[2:]])
        renamed[key] = tensor
    return renamed


def test_bare_weights_wrapped_and_legacy_names(tmp_path):
    public = PublicSiT().eval()
    wrapped = {f"module._orig_mod.{key}": tensor for key, tensor in public.state_dict().items()}
    for name, state in (("bare", public.state_dict()), ("wrapped", wrapped), ("legacy", legacy(public.state_dict()))):
        torch.save(state, tmp_path / f"{name}.pt")
        checkpoint = read_sit(tmp_path / f"{name}.pt", "--ckpt", {"encoder_depth": 2})
        assert list(checkpoint.weights) == ["ema"]
        assert (checkpoint.step, checkpoint.moments) == (None, None)
        assert_same_network(ours(checkpoint), public)
    assert read_sit(tmp_path / "legacy.pt", "--ckpt").config.encoder_depth == 2  # the names tell it


@pytest.mark.parametrize("size", SIT_SIZES)
def test_every_size_and_patch_is_told_by_its_tensors(size):
    for patch in PATCH_SIZES:
        config = SiTConfig(f"SiT-{size}/{patch}", 32, 16, 1000, size == "B", 8 if size != "Ti" else 6, (768, 1024), 64)
        with torch.device("meta"):
            state = SiT(config).state_dict()
        assert infer_config(state, "x", {"encoder_depth": config.encoder_depth}) == config


def euler(public: PublicSiT, seed: int, labels: torch.Tensor, steps: int, scale: float, high: float) -> torch.Tensor:
    """Guided Euler steps, written out; ``[B, C, h, w]``."""
    x = counted_normal(seed, torch.arange(len(labels)), 0, (4, 8, 8)).double()
    for k in range(steps):
        t = torch.full((len(labels),), 1 - k / steps)
        v = public(x.float(), t, labels)[0].double()
        if 1 - k / steps <= high:
            without = public(x.float(), t, torch.full_like(labels, 6))[0].double()
            v = without + scale * (v - without)
        x = x - v / steps
    return x.float()


@torch.no_grad()
def expected_images(public: PublicSiT, tokenizer: Tokenizer, statistics: tuple, labels: torch.Tensor) -> np.ndarray:
    """uint8 ``[B, H, W, 3]`` by the independent network and the loop above."""
    mean, std = (value.view(1, 4, 1, 1) for value in statistics)
    z = euler(public.eval(), 3, labels, steps=5, scale=2.0, high=0.7)
    pixels = 127.5 * (tokenizer.network.decode(z * std + mean).sample + 1)
    return pixels.round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)


SAMPLING = {
    "mode": "ode", "num_steps": 5, "cfg_scale": 2.0, "guidance_high": 0.7, "num_fid_samples": 4, "seed": 3,
    "label_sampling": "equal", "pproc_batch_size": 4,
}  # fmt: skip


def sampled(folder: Path, **flags: object) -> np.ndarray:
    assert generate.main(argv_of(SAMPLING | {"sample_dir": folder} | flags)) == 0
    with np.load(folder / "samples.npz", allow_pickle=False) as file:
        return file["arr_0"]


def assert_same_images(found: np.ndarray, expected: np.ndarray) -> None:
    assert expected.std() > 20
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_generate_samples_a_repa_experiment_and_a_bare_file(tmp_path, capsys):
    """REPA: no statistics in the file, its factor 0.18215; last.pt: the averaged weights alone."""
    model, ema = PublicSiT(seed=1), PublicSiT(seed=2)
    vae = save_vae(tmp_path)
    tokenizer, _ = load_tokenizer(str(vae))
    expected = expected_images(ema, tokenizer, (torch.zeros(4), torch.full((4,), 1 / 0.18215)), torch.arange(4))
    folder = write_experiment(tmp_path / "repa", model, ema, public_args())
    assert_same_images(sampled(tmp_path / "a", exp_path=folder, vae_ckpt=vae), expected)
    torch.save(ema.state_dict(), tmp_path / "last.pt")
    save_file(ema.state_dict(), tmp_path / "last.safetensors")
    for name in ("last.pt", "last.safetensors"):
        flags = {"ckpt": tmp_path / name, "vae_ckpt": vae, "resolution": 32, "path_type": "linear"}
        assert_same_images(sampled(tmp_path / f"out-{name}", **flags), expected)
    assert "scale 0.18215" in capsys.readouterr().err
    source = json.loads((tmp_path / "a" / "index.json").read_text())["source"]
    bare = json.loads((tmp_path / "out-last.pt" / "index.json").read_text())["source"]
    assert (source["train_steps"], bare["train_steps"]) == (7, None)
    assert source["weights_sha256"] == bare["weights_sha256"]
    other = expected_images(model, tokenizer, (torch.zeros(4), torch.full((4,), 1 / 0.18215)), torch.arange(4))
    assert_same_images(sampled(tmp_path / "model", exp_path=folder, vae_ckpt=vae, weights="model"), other)


def repae_experiment(folder: Path) -> tuple[Path, PublicSiT, PublicVAE]:
    """REPA-E's end-to-end training: the VAE in its layout beside the SiT, whose BatchNorm holds the statistics."""
    ema, vae = PublicSiT(seed=2, batch_norm=True), random_vae(seed=3, **TINY)
    parts = {"vae": vae.state_dict(), "discriminator": {}, "opt_vae": {}, "opt_disc": {}}
    args = public_args(vae_ckpt="pretrained/sdvae/sdvae-f8d4.pt")
    return write_experiment(folder, PublicSiT(seed=1, batch_norm=True), ema, args, **parts), ema, vae


@torch.no_grad()
def repae_images(ema: PublicSiT, vae: PublicVAE, labels: torch.Tensor) -> np.ndarray:
    """As REPA-E decodes: ``z·sqrt(var) + mean`` by the BatchNorm of the averaged SiT, without the epsilon."""
    z = euler(ema.eval(), 3, labels, steps=5, scale=2.0, high=0.7)
    z = z * ema.bn.running_var.view(1, 4, 1, 1).sqrt() + ema.bn.running_mean.view(1, 4, 1, 1)
    pixels = 127.5 * (vae.decode(z) + 1)
    return pixels.round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)


def test_generate_samples_a_repae_experiment(tmp_path):
    """VAE and statistics are those in the checkpoint; nothing else is needed."""
    folder, ema, vae = repae_experiment(tmp_path / "repae")
    expected = repae_images(ema, vae, torch.arange(4))
    assert_same_images(sampled(tmp_path / "out", exp_path=folder, train_steps=7), expected)
    file = folder / "checkpoints" / "0000007.pt"
    assert_same_images(sampled(tmp_path / "bare", ckpt=file), expected)


def test_generate_samples_an_ldm_on_a_finished_vae(tmp_path, monkeypatch, capsys):
    """REPA-E's train_ldm_only.py: the VAE's file is the one in args.json, from where it ran, or --vae-ckpt."""
    ema, vae = PublicSiT(seed=2, batch_norm=True), random_vae(seed=3, **TINY)
    statistics = {
        "latents_scale": ema.bn.running_var.rsqrt().view(1, 4, 1, 1),
        "latents_bias": ema.bn.running_mean.view(1, 4, 1, 1),
    }
    (tmp_path / "pretrained").mkdir()
    torch.save(vae.state_dict(), tmp_path / "pretrained" / "e2e.pt")
    torch.save(statistics, tmp_path / "pretrained" / "e2e-latents-stats.pt")
    args = public_args(vae_ckpt="pretrained/e2e.pt")
    folder = write_experiment(tmp_path / "ldm", PublicSiT(seed=1, batch_norm=True), ema, args)
    expected = repae_images(ema, vae, torch.arange(4))
    monkeypatch.chdir(tmp_path)
    assert_same_images(sampled(tmp_path / "a", exp_path=folder), expected)
    monkeypatch.chdir("/")
    argv = {"exp_path": folder, "sample_dir": tmp_path / "b"} | SAMPLING
    assert run(generate.main, argv_of(argv)) == 2
    assert "--vae-ckpt is needed" in capsys.readouterr().err
    given = {"vae_ckpt": tmp_path / "pretrained" / "e2e.pt"}
    assert_same_images(sampled(tmp_path / "b", exp_path=folder, **given), expected)
    torch.save(statistics | {"latents_bias": statistics["latents_bias"] + 0.1}, tmp_path / "other.pt")
    assert run(generate.main, argv_of(argv | given | {"vae_latents_stats": tmp_path / "other.pt"})) == 2
    assert "not the VAE of this SiT" in capsys.readouterr().err


def test_the_weights_as_trained_beside_the_vae_of_their_checkpoint(tmp_path):
    """The statistics of model are others than those of ema, and the VAE in the file is of both."""
    folder, _, vae = repae_experiment(tmp_path / "repae")
    model = PublicSiT(seed=1, batch_norm=True)
    trained(model)  # as write_experiment left it
    expected = repae_images(model, vae, torch.arange(4))
    assert_same_images(sampled(tmp_path / "out", exp_path=folder, weights="model"), expected)


def test_statistics_beside_the_vae_of_a_repa_checkpoint_are_said_not_to_be_taken(tmp_path, capsys):
    ema, vae = PublicSiT(seed=2), random_vae(seed=3, **TINY)
    torch.save(ema.state_dict(), tmp_path / "last.pt")
    torch.save(vae.state_dict(), tmp_path / "vae.pt")
    mean, std = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([2.0, 3.0, 2.5, 4.0])
    torch.save({"latents_scale": 1 / std.view(1, 4, 1, 1), "latents_bias": mean.view(1, 4, 1, 1)}, tmp_path / "s.pt")
    shutil.copy(tmp_path / "s.pt", tmp_path / "vae-latents-stats.pt")
    given = {"ckpt": tmp_path / "last.pt", "vae_ckpt": tmp_path / "vae.pt"}
    tokenizer, _ = load_tokenizer("f4d4-tiny", str(tmp_path / "vae.pt"))
    repas = expected_images(ema, tokenizer, (torch.zeros(4), torch.full((4,), 1 / 0.18215)), torch.arange(4))
    assert_same_images(sampled(tmp_path / "a", **given), repas)
    said = capsys.readouterr().err
    assert "scale 0.18215, and not those of" in said
    assert "vae-latents-stats.pt (--vae-latents-stats takes those)" in said
    assert_same_images(sampled(tmp_path / "b", **given, vae_latents_stats="repa"), repas)
    theirs = expected_images(ema, tokenizer, (mean, std), torch.arange(4))
    assert_same_images(sampled(tmp_path / "c", **given, vae_latents_stats=tmp_path / "s.pt"), theirs)
    assert "0.18215" not in capsys.readouterr().err


def test_generate_continues_and_refuses_other_weights(tmp_path):
    vae = save_vae(tmp_path)
    torch.save(PublicSiT(seed=1).state_dict(), tmp_path / "a.pt")
    torch.save(PublicSiT(seed=2).state_dict(), tmp_path / "b.pt")
    flags = {"vae_ckpt": vae, "shard_size": 2, "num_steps": 2}
    straight = sampled(tmp_path / "straight", ckpt=tmp_path / "a.pt", **flags)
    begun = argv_of(SAMPLING | flags | {"sample_dir": tmp_path / "begun", "ckpt": tmp_path / "a.pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "complete", lambda *args: None)
        assert generate.main(begun) == 0
    with pytest.raises(UserError, match=r"another --ckpt \(weights_sha256"):
        generate.main(argv_of(SAMPLING | flags | {"sample_dir": tmp_path / "begun", "ckpt": tmp_path / "b.pt"}))
    assert np.array_equal(sampled(tmp_path / "begun", ckpt=tmp_path / "a.pt", **flags), straight)


def continued(data: Path, tmp_path: Path, name: str, **changes: object) -> int:
    """train_ldm.py on the tiny cache with what :func:`public_experiment` was trained with."""
    return run(train_ldm.main, ldm_flags(data, tmp_path / "exps", name, **({"learning_rate": 1e-4} | changes)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def public_experiment(data, tmp_path_factory) -> Path:
    """REPA-E's LDM training on the tiny cache, 7 steps long."""
    statistics = load_file(data / LATENTS / "vae" / "latents_stats.safetensors")
    networks = [PublicSiT(seed=seed, batch_norm=True) for seed in (1, 2)]
    for network in networks:
        network.bn.running_mean.copy_(statistics["mean"])
        network.bn.running_var.copy_(statistics["std"].square())
    return write_experiment(tmp_path_factory.mktemp("theirs") / "sit", *networks, public_args(vae="f4d4"))


def contents_of(path: Path) -> dict:
    """A checkpoint of theirs: tensors, and the Namespace of their arguments."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def test_the_first_update_is_the_one_of_their_optimizer(public_experiment):
    """On the same gradients: torch's AdamW over the public network, from their state, and ours after the mapping."""
    contents = contents_of(next(public_experiment.glob("checkpoints/*.pt")))
    public = PublicSiT(batch_norm=True)
    public.load_state_dict(contents["model"])
    optimizer = torch.optim.AdamW(public.parameters(), lr=1.0)
    optimizer.load_state_dict(contents["opt"])
    optimizer.param_groups[0]["lr"] = 1e-3
    before = {name: parameter.detach().clone() for name, parameter in public.named_parameters()}

    source = open_source(public_experiment, 0)
    assert source.step == 7
    trainer = tiny_trainer(config=source.config, ema_decay=0.9, max_grad_norm=1e9)
    source.take_over(trainer)
    for name, tensor in contents["ema"].items():
        if not name.startswith("bn."):
            assert torch.equal(trainer.ema.module.state_dict()[name], tensor)
    generator = torch.Generator().manual_seed(9)
    ours = dict(trainer.model.named_parameters())
    for name, parameter in public.named_parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            ours[name].grad = parameter.grad.clone()
    optimizer.step()
    trainer.update(1e-3)
    assert len(ours) == len(before) - 1  # all but the position embedding
    for name, parameter in ours.items():
        expected = dict(public.named_parameters())[name]
        assert (expected - before[name]).abs().max() > 5e-4  # it moved
        assert (parameter - expected).abs().max() < 1e-7, name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda opt: opt.pop("param_groups"), "no state dict of AdamW"),
        (lambda opt: opt.update(param_groups=[{}]), "no state dict of AdamW"),
        (lambda opt: opt.update(state=[]), "no state dict of AdamW"),
        (lambda opt: opt["param_groups"][0]["params"].pop(), "parameters, its model"),
        (lambda opt: opt["state"][2].pop("exp_avg_sq"), "has no exp_avg_sq"),
        (lambda opt: opt["state"].update({2: 3}), "has no exp_avg"),
        (lambda opt: opt["state"][2].update(exp_avg=torch.zeros(3)), r"has shape \(3,\), the weight"),
        (lambda opt: opt["state"][2].update(step="7"), "has no step"),
    ],
)
def test_a_malformed_optimizer_is_one_line(public_experiment, tmp_path, change, said):
    shutil.copytree(public_experiment, tmp_path / "theirs")
    path = next(tmp_path.glob("theirs/checkpoints/*.pt"))
    contents = contents_of(path)
    change(contents["opt"])
    torch.save(contents, path)
    with pytest.raises(UserError, match=rf"{path.name}.*{said}.*damaged or of another code"):
        open_source(tmp_path / "theirs", 0)


def test_train_ldm_goes_on_from_their_experiment_and_then_without_it(data, public_experiment, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(public_experiment, source)
    flags = {"continue_train_exp_dir": source, "resume_step": 7, "checkpointing_steps": 1, "keep_checkpoints": 9}
    assert continued(data, tmp_path, "straight", max_train_steps=10, **flags) == 0
    assert continued(data, tmp_path, "two", max_train_steps=8, **flags) == 0
    shutil.rmtree(source)
    assert continued(data, tmp_path, "two", max_train_steps=10, **flags) == 0
    exps = tmp_path / "exps"
    assert [path.name for path in sorted((exps / "two" / "checkpoints").iterdir())] == ["0000008", "0000009", "0000010"]
    for name in ("model", "ema"):
        a, b = (
            load_file(exps / run / "checkpoints" / "0000010" / f"{name}.safetensors") for run in ("straight", "two")
        )
        assert all(torch.equal(a[key], b[key]) for key in a)
    steps = [json.loads(line)["step"] for line in (exps / "two" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [8, 9, 10]
    arguments = json.loads((exps / "two" / "args.json").read_text())["args"]
    assert arguments["continued_from"] == {"checkpoint": str(source / "checkpoints" / "0000007.pt"), "step": 7}
    state = torch.load(exps / "two" / "checkpoints" / "0000010" / "optimizer.pt", weights_only=True)["state"]
    assert {int(entry["step"]) for entry in state.values()} == {3 + 3}  # write_experiment made three


def test_train_ldm_goes_on_from_another_run_of_ours(data, tmp_path, capsys):
    """The new run's steps are those that the old one would have made; without REPA its projectors are left out."""
    assert continued(data, tmp_path, "old", max_train_steps=4, checkpointing_steps=2) == 0
    old = tmp_path / "exps" / "old"
    flags = {"continue_train_exp_dir": old, "resume_step": 2, "max_train_steps": 4}
    assert continued(data, tmp_path, "new", **flags) == 0
    a, b = (
        load_file(tmp_path / "exps" / name / "checkpoints" / "0000004" / "ema.safetensors") for name in ("old", "new")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert continued(data, tmp_path, "plain", **(flags | {"proj_coeff": 0})) == 0
    weights = load_file(tmp_path / "exps" / "plain" / "checkpoints" / "0000004" / "model.safetensors")
    assert not any(name.startswith("projectors.") for name in weights)
    capsys.readouterr()
    assert continued(data, tmp_path, "done", continue_train_exp_dir=old, max_train_steps=4) == 2
    assert "trained for 4 steps already" in capsys.readouterr().err


def test_train_ldm_begins_with_bare_weights(data, tmp_path, capsys):
    """No optimizer, no step: AdamW begins anew at step 0, and the average is that of the file."""
    public = PublicSiT(seed=4, batch_norm=True)
    statistics = load_file(data / LATENTS / "vae" / "latents_stats.safetensors")
    public.bn.running_mean.copy_(statistics["mean"])
    public.bn.running_var.copy_(statistics["std"].square() * 1.03**2)
    torch.save(public.state_dict(), tmp_path / "bare.pt")
    assert continued(data, tmp_path, "bare", continue_train_exp_dir=tmp_path / "bare.pt", learning_rate=0) == 0
    weights = load_file(tmp_path / "exps" / "bare" / "checkpoints" / "0000002" / "model.safetensors")
    assert all(torch.equal(tensor, public.state_dict()[name]) for name, tensor in weights.items())
    log = (tmp_path / "exps" / "bare" / "log.txt").read_text()
    assert "AdamW begins anew" in log
    assert "differ from its by 0.029 standard deviations" in log


def test_train_ldm_goes_on_from_a_repa_experiment_on_a_cache_with_its_assumed_statistics(data, tmp_path, capsys):
    """REPA's checkpoints hold no statistics: mean 0, scale 0.18215, which cache_latents.py takes by the name repa."""
    source = write_experiment(tmp_path / "repa", PublicSiT(seed=1), PublicSiT(seed=2), public_args(vae="f4d4"))
    vae, features = save_vae(tmp_path), {"cache_features": True, "enc_type": "efficientnet-lite0", "features_grid": 4}
    cached = tmp_path / "latents"
    assert cache_latents.main(cache_flags(data, vae, cached, vae_latents_stats="repa", **features)) == 0
    statistics = load_file(cached / "vae" / "latents_stats.safetensors")
    assert torch.equal(statistics["mean"], torch.zeros(4))
    assert (statistics["std"] - 1 / 0.18215).abs().max() < 1e-5
    flags = {"continue_train_exp_dir": source, "max_train_steps": 8}
    assert continued(data, tmp_path, "refused", **flags) == 2
    assert "cache_latents.py --vae-latents-stats repa" in capsys.readouterr().err
    assert continued(data, tmp_path, "repa", vae_latents_name=cached, **flags) == 0
    run_folder = tmp_path / "exps" / "repa"
    assert [json.loads(line)["step"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()] == [8]
    assert "differ from its" not in (run_folder / "log.txt").read_text()
    weights = load_file(run_folder / "checkpoints" / "0000008" / "model.safetensors")
    before = PublicSiT(seed=1)
    trained(before)  # as write_experiment left it
    moved = (weights["x_embedder.proj.weight"] - before.x_embedder.proj.weight).abs().max()
    assert 0 < moved < 2e-4  # one step at a learning rate of 1e-4


def export(*argv: object) -> int:
    return run(export_ldm.main, [str(word) for word in argv])


def snippet_of(folder: Path) -> str:
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


def test_the_exported_folder_and_its_snippet(tmp_path, monkeypatch):
    """Weights to the bit; the README's lines, as they stand, make the image of generate.py's sampler."""
    trained_run = write_ldm_run(tmp_path / "run")
    assert export(trained_run, tmp_path / "dry", "--dry-run") == 0
    assert not (tmp_path / "dry").exists()
    out = tmp_path / "out"
    assert export(trained_run, out) == 0
    assert export(trained_run, out, "--overwrite") == 0
    trained = open_trained_ldm(trained_run, None, "ema")
    expected, loaded = trained.load_model(), SiT.from_pretrained(out / "transformer")
    assert loaded.config == trained.config
    assert expected.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in expected.state_dict().items())
    tokenizer, known = load_tokenizer(str(out / "vae"))
    assert known
    assert tokenizer.checksum() == trained.vae_checksum
    index = json.loads((out / "model_index.json").read_text())
    assert index["class_names"] == CLASS_NAMES
    assert (index["path_type"], index["resolution"], index["steps"]) == ("linear", 32, STEP)

    snippet = snippet_of(out)
    assert len(snippet.strip().splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})  # noqa: S102  it is what is tested
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    velocity = guided(model_velocity(expected), 2.5, 3, high=0.75)
    z = sample_ode(velocity, noise, torch.tensor([0]), num_steps=50)
    with torch.no_grad():
        image = to_uint8(tokenizer.decode(tokenizer.statistics.denormalize(z)))[0].permute(1, 2, 0).numpy()
    found = np.asarray(Image.open(tmp_path / "sample.png"))
    assert found.std() > 10
    assert np.abs(found.astype(int) - image).max() <= 1


def test_an_experiment_of_repa_is_exported_with_the_vae_that_is_given(tmp_path, capsys):
    folder = write_experiment(tmp_path / "repa", PublicSiT(seed=1), PublicSiT(seed=2), public_args(vae_ckpt="gone.pt"))
    torch.save(random_vae(seed=3, **TINY).state_dict(), tmp_path / "vae.pt")
    assert export(folder, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "--vae-ckpt is needed: RUN" in error
    assert "--exp-path" not in error
    flags = ("--vae", "f4d4-tiny", "--vae-ckpt", tmp_path / "vae.pt", "--vae-latents-stats", "repa")
    assert export(folder, tmp_path / "out", *flags) == 0
    assert_same_network_without_projectors(SiT.from_pretrained(tmp_path / "out" / "transformer"), PublicSiT(seed=2))
    wanted, _ = load_tokenizer("f4d4-tiny", str(tmp_path / "vae.pt"))
    found, _ = load_tokenizer(str(tmp_path / "out" / "vae"))
    assert found.checksum() == wanted.checksum()
    assert (found.statistics.std - 1 / 0.18215).abs().max() < 1e-5


@torch.no_grad()
def assert_same_network_without_projectors(model: SiT, public: PublicSiT) -> None:
    expected, _ = public(*probe())
    assert expected.std() > 0.1
    assert (model.eval()(*probe()) - expected).abs().max() < 1e-5


def test_the_layout_of_repae_is_read_by_independent_networks(data, tmp_path, capsys):
    """Exported, loaded strictly into the public SiT and VAE, the same numbers; and back again to the bit."""
    assert continued(data, tmp_path, "old", max_train_steps=2) == 0
    old, out = tmp_path / "exps" / "old", tmp_path / "out"
    capsys.readouterr()
    assert export(old, out, "--format", "repa") == 0
    warnings = capsys.readouterr().err
    assert "it builds no SiT-Ti/2" in warnings
    assert "projectors have width 2048, not 32" in warnings
    file = out / "checkpoints" / "0000002.pt"
    contents = contents_of(file)
    args = json.loads((out / "args.json").read_text())
    assert (args["model"], args["vae"], args["enc_type"]) == ("SiT-Ti/2", "f4d4", "efficientnet-lite0")
    assert contents["args"].encoder_depth == 2
    public = PublicSiT(batch_norm=True).eval()
    public.load_state_dict(contents["ema"])
    public_vae = PublicVAE(**TINY)
    public_vae.load_state_dict(contents["vae"])

    trained = open_trained_ldm(old, None, "ema")
    tokenizer = trained.load_autoencoder()
    x, t, y = probe()
    with torch.no_grad():
        assert (trained.load_model()(x, t, y) - public(x, t, y)[0]).abs().max() < 1e-5
        assert (tokenizer.decode(x) - public_vae.decode(x)).abs().max() < 1e-5
    assert torch.equal(public.bn.running_mean, tokenizer.statistics.mean)
    assert torch.equal(public.bn.running_var, tokenizer.statistics.var)

    checkpoint = read_sit(file, "x", args)
    for name in ("model", "ema"):
        saved = load_file(old / "checkpoints" / "0000002" / f"{name}.safetensors")
        assert saved.keys() == checkpoint.weights[name].state.keys()
        assert all(torch.equal(saved[key], tensor) for key, tensor in checkpoint.weights[name].state.items())
    loaded, _ = load_tokenizer(str(file))
    assert loaded.checksum() == trained.vae_checksum
    sampling = SAMPLING | {"num_fid_samples": 2}
    images = [sampled(tmp_path / path.name / "images", exp_path=path, **sampling) for path in (old, out)]
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1


def test_projectors_are_saved_where_they_are_wanted(tmp_path):
    config = SiTConfig("SiT-Ti/2", 4, 8, 6, True, 4, (24, 40), 32)
    model = SiT(config)
    random_weights(model, 3)
    model.save_pretrained(tmp_path / "sit", projectors=True)
    loaded = SiT.from_pretrained(tmp_path / "sit")
    assert loaded.config == config
    x, t, y = probe()
    velocity, tokens = model.eval()(x, t, y, with_tokens=True)
    again, same = loaded(x, t, y, with_tokens=True)
    assert torch.equal(velocity, again)
    assert all(torch.equal(a, b) for a, b in zip(tokens, same, strict=True))
    (tmp_path / "sit" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="describes a UNet2DModel"):
        SiT.from_pretrained(tmp_path / "sit")
