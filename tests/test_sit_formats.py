"""SiT checkpoints of REPA and REPA-E: as runs, sampled, continued; and out again. Against an independent network."""

import argparse
import json
import re
import shlex
import shutil
from dataclasses import replace
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
from formats.exported_ldm import what_repae_lacks
from formats.sit import Projectors, build_networks, infer_sizes, read_sit
from formats.vae import load_tokenizer
from inference import sample_folder
from inference.trained_ldm import open_trained_ldm
from loss.alignment import TokenGrid
from models.denoisers.config import SIT_SIZES, SiTConfig
from models.denoisers.sit import SiT
from models.pixels import to_uint8
from models.tokenizers import Tokenizer
from runtime.checkpoint import Checkpoint, CheckpointFolder
from runtime.cli import run
from tests.command_line import argv_of
from tests.latent_caches import flags as cache_flags
from tests.latent_caches import save_vae
from tests.ldm_runs import CLASS_NAMES, STEP, random_weights, write_ldm_run
from tests.ldm_steps import networks, tiny_trainer
from tests.ldm_trainings import LATENTS, write_data
from tests.ldm_trainings import flags as ldm_flags
from tests.public_sit import PublicSiT, public_args, trained, write_checkpoint, write_experiment
from tests.public_vae import TINY, PublicVAE, random_vae
from training.ldm import LDM
from training.ldm_source import open_source
from training.metrics import MeanMetrics


def probe(count: int = 3, channels: int = 4, side: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, random times, classes up to the null class."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(count, channels, side, side, generator=generator)
    return x, torch.rand(count, generator=generator), torch.tensor([0, 4, 6])[:count]


def converted(source: Path, out: Path, **flags: object) -> Path:
    """What export_ldm.py makes of a checkpoint of theirs."""
    assert export(source, out, "--format", "run", *argv_of(flags)) == 0
    return out


@torch.no_grad()
def assert_same_network(checkpoint, weights: str, public: PublicSiT) -> None:
    """Velocity, and what the projectors make of the hidden state."""
    found, projectors = checkpoint.weights[weights], checkpoint.projectors
    model, alignment = build_networks(checkpoint.config, replace(projectors, encoder_depth=public.encoder_depth))
    model = SiT(checkpoint.config).eval()  # on the CPU
    model.load_state_dict(found.denoiser)
    alignment.load_state_dict(found.alignment, assign=True)
    x, t, y = probe()
    velocity, states = model(x, t, y, alignment.taps)
    expected, projected = public.eval()(x, t, y)
    assert expected.std() > 0.1  # nothing was compared with zeros
    assert (velocity - expected).abs().max() < 1e-5
    tokens = alignment["repa"].predict(states)
    assert len(tokens) == len(projected)
    for token, other in zip(tokens, projected, strict=True):
        assert (token - other).abs().max() < 1e-5


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
    checkpoint = read_sit(path, "SOURCE")
    assert checkpoint.config == SiTConfig("SiT-Ti/2", 4, 8, 6, options.get("qk_norm", False))
    dims, depth = options.get("dims", (112,)), options.get("encoder_depth", 2)
    assert checkpoint.projectors == Projectors(dims, projector_width=32, encoder_depth=depth)
    assert checkpoint.step == 7
    assert_same_network(checkpoint, "ema", ema)
    assert_same_network(checkpoint, "model", model)
    statistics = checkpoint.weights["ema"].statistics
    if not options.get("batch_norm"):
        assert statistics is None
        return
    z = torch.randn(2, 4, 8, 8)
    assert torch.equal(statistics.var, ema.bn.running_var)
    assert (statistics.normalize(z) - ema.bn.eval()(z)).abs().max() < 1e-5


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
        checkpoint = read_sit(tmp_path / f"{name}.pt", "SOURCE")
        assert list(checkpoint.weights) == ["ema"]
        assert (checkpoint.step, checkpoint.moments) == (None, None)
        assert_same_network(checkpoint, "ema", public)
        assert checkpoint.projectors.encoder_depth == (2 if name == "legacy" else None)  # the names tell it


@pytest.mark.parametrize("size", SIT_SIZES)
def test_every_size_and_patch_is_told_by_its_tensors(size):
    for patch in SiTConfig.patches:
        config, projectors = SiTConfig(f"SiT-{size}/{patch}", 32, 32, 1000, size == "B"), Projectors((768, 1024), 64, 6)
        denoiser, alignment = build_networks(config, projectors)
        state = {key.removeprefix("repa."): tensor for key, tensor in alignment.state_dict().items()}
        assert infer_sizes(denoiser.state_dict() | state, "x", 6) == (config, projectors)


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


def test_a_repa_experiment_and_a_bare_file_are_sampled_as_runs(tmp_path, capsys):
    """REPA: no statistics in the file, its factor 0.18215; last.pt: the averaged weights alone."""
    model, ema = PublicSiT(seed=1), PublicSiT(seed=2)
    vae = save_vae(tmp_path)
    tokenizer, _ = load_tokenizer(str(vae))
    expected = expected_images(ema, tokenizer, (torch.zeros(4), torch.full((4,), 1 / 0.18215)), torch.arange(4))
    source = write_experiment(tmp_path / "repa", model, ema, public_args())
    folder = converted(source, tmp_path / "run", vae_ckpt=vae)
    shutil.rmtree(source)
    assert_same_images(sampled(tmp_path / "a", exp_path=folder), expected)
    torch.save(ema.state_dict(), tmp_path / "last.pt")
    save_file(ema.state_dict(), tmp_path / "last.safetensors")
    for name in ("last.pt", "last.safetensors"):
        flags = {"vae_ckpt": vae, "resolution": 32, "path_type": "linear"}
        bare = converted(tmp_path / name, tmp_path / f"run-{name}", **flags)
        assert_same_images(sampled(tmp_path / f"out-{name}", exp_path=bare), expected)
        assert_same_images(sampled(tmp_path / f"model-{name}", exp_path=bare, weights="model"), expected)
    said = capsys.readouterr().err
    assert "scale 0.18215" in said
    assert "does not say its step; taking 0" in said
    source = json.loads((tmp_path / "a" / "index.json").read_text())["source"]
    bare = json.loads((tmp_path / "out-last.pt" / "index.json").read_text())["source"]
    assert (source["train_steps"], bare["train_steps"]) == (7, 0)
    assert source["weights_sha256"] == bare["weights_sha256"]
    other = expected_images(model, tokenizer, (torch.zeros(4), torch.full((4,), 1 / 0.18215)), torch.arange(4))
    assert_same_images(sampled(tmp_path / "model", exp_path=folder, weights="model"), other)


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


def test_a_repae_experiment_is_sampled_as_a_run(tmp_path):
    """VAE and statistics are those in the checkpoint; nothing else is needed."""
    folder, ema, vae = repae_experiment(tmp_path / "repae")
    expected = repae_images(ema, vae, torch.arange(4))
    run_folder = converted(folder, tmp_path / "run", train_steps=7)
    assert_same_images(sampled(tmp_path / "out", exp_path=run_folder), expected)
    file = folder / "checkpoints" / "0000007.pt"
    assert_same_images(sampled(tmp_path / "bare", exp_path=converted(file, tmp_path / "file")), expected)
    tokenizer, _ = load_tokenizer(str(run_folder))
    assert torch.equal(tokenizer.statistics.var, ema.bn.running_var)


def on_a_finished_vae(folder: Path, var: torch.Tensor | None = None) -> tuple[Path, PublicSiT, PublicVAE, dict]:
    """REPA-E's train_ldm_only.py: ``pretrained/e2e.pt`` with its statistics, and an experiment on them in ``ldm``."""
    networks = [PublicSiT(seed=seed, batch_norm=True) for seed in (1, 2)]
    for network in networks:
        network.bn.load_state_dict(networks[1].bn.state_dict())  # frozen, and the same in both
        if var is not None:
            network.bn.running_var.copy_(var)
    statistics = {
        "latents_scale": networks[1].bn.running_var.rsqrt().view(1, 4, 1, 1),
        "latents_bias": networks[1].bn.running_mean.view(1, 4, 1, 1),
    }
    vae = random_vae(seed=3, **TINY)
    (folder / "pretrained").mkdir(parents=True)
    torch.save(vae.state_dict(), folder / "pretrained" / "e2e.pt")
    torch.save(statistics, folder / "pretrained" / "e2e-latents-stats.pt")
    args = public_args(vae_ckpt="pretrained/e2e.pt")
    return write_experiment(folder / "ldm", *networks, args), networks[1], vae, statistics


def test_the_vae_of_an_ldm_on_a_finished_vae(tmp_path, monkeypatch, capsys):
    """The VAE's file is the one in args.json, from where it ran, or --vae-ckpt."""
    folder, ema, vae, statistics = on_a_finished_vae(tmp_path)
    expected = repae_images(ema, vae, torch.arange(4))
    monkeypatch.chdir(tmp_path)
    assert_same_images(sampled(tmp_path / "a", exp_path=converted(folder, tmp_path / "run-a")), expected)
    monkeypatch.chdir("/")
    words = (folder, tmp_path / "run-b", "--format", "run")
    assert export(*words) == 2
    assert "--vae-ckpt is needed: SOURCE" in capsys.readouterr().err
    given = ("--vae-ckpt", tmp_path / "pretrained" / "e2e.pt")
    torch.save(statistics | {"latents_bias": statistics["latents_bias"] + 0.1}, tmp_path / "other.pt")
    assert export(*words, *given, "--vae-latents-stats", tmp_path / "other.pt") == 2
    assert "not the VAE of this SiT" in capsys.readouterr().err
    assert not (tmp_path / "run-b").exists()
    assert export(*words, *given) == 0
    assert_same_images(sampled(tmp_path / "b", exp_path=tmp_path / "run-b"), expected)


@pytest.mark.parametrize("kind", ["REPA-E's", "std alone", "ours"])
def test_a_channel_of_small_deviation_is_accepted_with_its_own_vae_only(tmp_path, capsys, kind):
    """std 0.05: 1e-4 under the root makes 2 % of it, in whichever words the VAE says it."""
    var = torch.tensor([0.05**2, 1.0, 0.7, 2.0])
    folder, ema, _, statistics = on_a_finished_vae(tmp_path, var)
    assert torch.allclose(ema.bn.running_var, var)
    mean, files = ema.bn.running_mean.clone(), {}
    for name, factor in (("own", 1.0), ("another", 1.1)):
        values = var.clone()
        values[0] *= factor**2
        files[name] = tmp_path / f"{name}-{kind.replace(' ', '-')}.pt"
        contents = {"mean": mean, "std": values.sqrt()}
        if kind == "REPA-E's":
            contents = statistics | {"latents_scale": values.rsqrt().view(1, 4, 1, 1)}
        elif kind == "ours":
            contents = {"mean": mean, "var": values, "std": (values + 1e-4).sqrt()}
        torch.save(contents, files[name])
    words = (folder, tmp_path / "run", "--format", "run", "--vae-ckpt", tmp_path / "pretrained" / "e2e.pt")
    assert export(*words, "--vae-latents-stats", files["another"]) == 2
    assert "not the VAE of this SiT" in capsys.readouterr().err
    assert export(*words, "--vae-latents-stats", files["own"]) == 0
    tokenizer, _ = load_tokenizer(str(tmp_path / "run" / "vae"))
    assert torch.equal(tokenizer.statistics.var, ema.bn.running_var)


def test_the_weights_as_trained_beside_the_vae_of_their_checkpoint(tmp_path):
    """The statistics of model are others than those of ema, and the VAE in the file is of both."""
    folder, ema, vae = repae_experiment(tmp_path / "repae")
    model = PublicSiT(seed=1, batch_norm=True)
    trained(model)  # as write_experiment left it
    run_folder = converted(folder, tmp_path / "run")
    expected = repae_images(model, vae, torch.arange(4))
    assert_same_images(sampled(tmp_path / "out", exp_path=run_folder, weights="model"), expected)
    assert_same_images(sampled(tmp_path / "ema", exp_path=run_folder), repae_images(ema, vae, torch.arange(4)))


def test_statistics_beside_the_vae_of_a_repa_checkpoint_are_said_not_to_be_taken(tmp_path, capsys):
    ema, vae = PublicSiT(seed=2), random_vae(seed=3, **TINY)
    torch.save(ema.state_dict(), tmp_path / "last.pt")
    torch.save(vae.state_dict(), tmp_path / "vae.pt")
    mean, std = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([2.0, 3.0, 2.5, 4.0])
    torch.save({"latents_scale": 1 / std.view(1, 4, 1, 1), "latents_bias": mean.view(1, 4, 1, 1)}, tmp_path / "s.pt")
    shutil.copy(tmp_path / "s.pt", tmp_path / "vae-latents-stats.pt")

    def images(name: str, **flags: object) -> np.ndarray:
        out = converted(tmp_path / "last.pt", tmp_path / f"run-{name}", vae_ckpt=tmp_path / "vae.pt", **flags)
        return sampled(tmp_path / name, exp_path=out)

    tokenizer, _ = load_tokenizer("f4d4-tiny", str(tmp_path / "vae.pt"))
    repas = expected_images(ema, tokenizer, (torch.zeros(4), torch.full((4,), 1 / 0.18215)), torch.arange(4))
    assert_same_images(images("a"), repas)
    said = capsys.readouterr().err
    assert "scale 0.18215, and not those of" in said
    assert "vae-latents-stats.pt (--vae-latents-stats takes those)" in said
    assert_same_images(images("b", vae_latents_stats="repa"), repas)
    theirs = expected_images(ema, tokenizer, (mean, std), torch.arange(4))
    assert_same_images(images("c", vae_latents_stats=tmp_path / "s.pt"), theirs)
    assert "0.18215" not in capsys.readouterr().err


def test_generate_continues_and_refuses_other_weights(tmp_path):
    vae = save_vae(tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        torch.save(PublicSiT(seed=seed).state_dict(), tmp_path / f"{name}.pt")
        converted(tmp_path / f"{name}.pt", tmp_path / name, vae_ckpt=vae)
    flags = {"shard_size": 2, "num_steps": 2}
    straight = sampled(tmp_path / "straight", exp_path=tmp_path / "a", **flags)
    begun = argv_of(SAMPLING | flags | {"sample_dir": tmp_path / "begun", "exp_path": tmp_path / "a"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_folder, "complete", lambda *args: None)
        assert generate.main(begun) == 0
    with pytest.raises(UserError, match=r"another --exp-path \(weights_sha256"):
        generate.main(argv_of(SAMPLING | flags | {"sample_dir": tmp_path / "begun", "exp_path": tmp_path / "b"}))
    assert np.array_equal(sampled(tmp_path / "begun", exp_path=tmp_path / "a", **flags), straight)


@pytest.mark.parametrize("script", ["generate", "train_ldm", "export_ldm"])
@pytest.mark.parametrize("is_file", [True, False])
def test_the_command_that_is_named_makes_the_run(tmp_path, monkeypatch, capsys, script, is_file):
    """Word for word; and what it makes is taken where the checkpoint was given."""
    folder, _, _ = repae_experiment(tmp_path / "theirs")
    source = next(folder.glob("checkpoints/*.pt")) if is_file else folder
    monkeypatch.chdir(tmp_path)
    if script == "generate":
        flags = {"ckpt": source} if is_file else {"exp_path": source, "train_steps": 7}
        assert run(generate.main, argv_of(flags)) == 2
    elif script == "train_ldm":
        assert continued(tmp_path, tmp_path, "new", continue_train_exp_dir=source) == 2
    else:
        assert export(source, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    command = re.search(r"with (?:python )?(export_ldm\.py .* --format run[^,]*), and give (.*)$", line)
    words = shlex.split(command[1])
    assert words[0] == "export_ldm.py"
    assert export(*words[1:]) == 0
    assert open_trained_ldm(Path(words[2]), None, "ema").step == 7
    assert words[2] in command[2]


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
        network.bn.running_var.copy_(statistics["var"])
    return write_experiment(tmp_path_factory.mktemp("theirs") / "sit", *networks, public_args(vae="f4d4"))


@pytest.fixture(scope="module")
def public_run(data, public_experiment, tmp_path_factory) -> Path:
    """The same as a run."""
    out = tmp_path_factory.mktemp("converted") / "sit"
    return converted(public_experiment, out, vae_ckpt=data / LATENTS / "vae")


def contents_of(path: Path) -> dict:
    """A checkpoint of theirs: tensors, and the Namespace of their arguments."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def tiny_ldm(**flags: object) -> LDM:
    """What train_ldm.py builds for the public experiment."""
    settings = {"encoder_depth": 2, "projector_width": 32, "ema_decay": 0.9, "max_grad_norm": 1e9}
    return tiny_trainer(features=[TokenGrid("efficientnet-lite0", 4, 112)], **settings | flags)


def test_the_first_update_is_the_one_of_their_optimizer(public_experiment, public_run):
    """On the same gradients: torch's AdamW over the public network, from their state, and ours after the mapping."""
    contents = contents_of(next(public_experiment.glob("checkpoints/*.pt")))
    public = PublicSiT(batch_norm=True)
    public.load_state_dict(contents["model"])
    optimizer = torch.optim.AdamW(public.parameters(), lr=1.0)
    optimizer.load_state_dict(contents["opt"])
    optimizer.param_groups[0]["lr"] = 1e-3
    before = {name: parameter.detach().clone() for name, parameter in public.named_parameters()}

    trainer, resumed = tiny_ldm(), tiny_ldm()
    facts = {"align": "repa", "resume_step": 0, "feature_widths": [112]}
    args = argparse.Namespace(**vars(trainer.args) | facts)
    source = open_source(args, trainer.denoiser.config, public_run, None, None)
    assert source.step == 7
    source.take_over(trainer)
    checkpoint = Checkpoint(public_run / "checkpoints" / "0000007")  # and by the run itself, as the loop restores it
    modules = {name: module for name, module in resumed.modules().items() if module is not None}
    for name, module in modules.items():
        checkpoint.load_module(name, module)
    resumed.optimizer.load_state_dict(checkpoint.load_state("optimizer"))
    assert checkpoint.load_state("metrics") == MeanMetrics().state_dict()
    for name, tensor in contents["ema"].items():
        if not name.startswith(("bn.", "projectors.")):
            assert torch.equal(trainer.ema.module.state_dict()[name], tensor)
    generator = torch.Generator().manual_seed(9)
    both = [by_their_names(method) for method in (trainer, resumed)]
    for name, parameter in public.named_parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            for ours in both:
                ours[name].grad = parameter.grad.clone()
    optimizer.step()
    for method in (trainer, resumed):
        method.update(0, {}, [])
    moved = dict(public.named_parameters())
    for ours in both:
        assert len(ours) == len(before) - 1  # all but the position embedding
        for name, parameter in ours.items():
            assert (moved[name] - before[name]).abs().max() > 5e-4
            assert (parameter - moved[name]).abs().max() < 1e-7, name


def by_their_names(method: LDM) -> dict[str, torch.nn.Parameter]:
    """All that is trained, as a network of theirs calls it."""
    parameters = dict(networks(method).named_parameters())
    return {re.sub(r"^(denoiser|alignment\.repa)\.", "", name): tensor for name, tensor in parameters.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda opt: opt.pop("param_groups"), "not a state dict of AdamW"),
        (lambda opt: opt.update(param_groups=[{}]), "not a state dict of AdamW"),
        (lambda opt: opt.update(state=[]), "not a state dict of AdamW"),
        (lambda opt: opt["param_groups"][0]["params"].pop(), "parameters, its model"),
        (lambda opt: opt["state"][2].pop("exp_avg_sq"), "has no exp_avg_sq"),
        (lambda opt: opt["state"].update({2: 3}), "has no exp_avg"),
        (lambda opt: opt["state"][2].update(exp_avg=torch.zeros(3)), r"has shape \(3,\), the weight"),
        (lambda opt: opt["state"][2].update(step="7"), "has no step"),
        (lambda opt: opt["param_groups"][0].pop("betas"), "not a state dict of AdamW"),
        (lambda opt: opt["state"][2].update(exp_avg=opt["state"][2]["exp_avg"].to_sparse()), "exp_avg is sparse"),
    ],
)
def test_a_malformed_optimizer_is_one_line(data, public_experiment, tmp_path, capsys, change, said):
    shutil.copytree(public_experiment, tmp_path / "theirs")
    path = next(tmp_path.glob("theirs/checkpoints/*.pt"))
    contents = contents_of(path)
    change(contents["opt"])
    torch.save(contents, path)
    capsys.readouterr()
    words = (tmp_path / "theirs", tmp_path / "out", "--format", "run", "--vae-ckpt", data / LATENTS / "vae")
    assert export(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"{path.name}.*{said}.*damaged or of another code", line)
    assert not (tmp_path / "out").exists()


def test_train_ldm_goes_on_from_their_experiment_and_then_without_it(data, public_run, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(public_run, source)
    flags = {"continue_train_exp_dir": source, "resume_step": 7, "checkpointing_steps": 1, "keep_checkpoints": 9}
    assert continued(data, tmp_path, "straight", max_train_steps=10, **flags) == 0
    assert continued(data, tmp_path, "two", max_train_steps=8, **flags) == 0
    shutil.rmtree(source)
    assert continued(data, tmp_path, "two", max_train_steps=10, **flags) == 0
    exps = tmp_path / "exps"
    assert [path.name for path in sorted((exps / "two" / "checkpoints").iterdir())] == ["0000008", "0000009", "0000010"]
    assert_same_weights(exps / "straight", exps / "two")
    steps = [json.loads(line)["step"] for line in (exps / "two" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [8, 9, 10]
    arguments = json.loads((exps / "two" / "args.json").read_text())["args"]
    assert arguments["continued_from"] == {"checkpoint": str(source / "checkpoints" / "0000007"), "step": 7}
    state = torch.load(exps / "two" / "checkpoints" / "0000010" / "optimizer.pt", weights_only=True)["state"]
    assert {int(entry["step"]) for entry in state.values()} == {3 + 3}  # write_experiment made three
    # the run itself goes on too, and is then one like any other
    shutil.copytree(public_run, exps / "itself")
    assert continued(data, tmp_path, "itself", checkpointing_steps=1, keep_checkpoints=9, max_train_steps=10) == 0
    assert_same_weights(exps / "straight", exps / "itself")
    assert continued(data, tmp_path, "itself", max_train_steps=11, path_type="cosine") == 2
    assert "--path-type linear, not cosine" in capsys.readouterr().err
    assert continued(data, tmp_path, "itself", max_train_steps=11, optimizer="muon") == 2
    assert "--optimizer adamw, not muon" in capsys.readouterr().err


def assert_same_weights(a: Path, b: Path, step: int = 10) -> None:
    for name in ("model", "alignment", "ema"):
        files = [load_file(path / "checkpoints" / f"{step:07d}" / f"{name}.safetensors") for path in (a, b)]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_train_ldm_goes_on_from_another_run_of_ours(data, tmp_path, capsys, optimizer):
    """The new run's steps are those that the old one would have made; without REPA its projectors are left out."""
    assert continued(data, tmp_path, "old", max_train_steps=4, checkpointing_steps=2, optimizer=optimizer) == 0
    old = tmp_path / "exps" / "old"
    flags = {"continue_train_exp_dir": old, "resume_step": 2, "max_train_steps": 4, "optimizer": optimizer}
    assert continued(data, tmp_path, "new", **flags) == 0
    a, b = (
        load_file(tmp_path / "exps" / name / "checkpoints" / "0000004" / "ema.safetensors") for name in ("old", "new")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert continued(data, tmp_path, "plain", **(flags | {"proj_coeff": 0})) == 0
    assert not (tmp_path / "exps" / "plain" / "checkpoints" / "0000004" / "alignment.safetensors").exists()
    capsys.readouterr()
    assert continued(data, tmp_path, "done", continue_train_exp_dir=old, max_train_steps=4) == 2
    assert "trained for 4 steps already" in capsys.readouterr().err
    other = "muon" if optimizer == "adamw" else "adamw"
    assert continued(data, tmp_path, "other", **(flags | {"optimizer": other})) == 0
    assert f"was trained with --optimizer {optimizer}" in capsys.readouterr().err


def test_train_ldm_begins_with_bare_weights(data, tmp_path, capsys):
    """No optimizer, no step: AdamW begins anew at step 0, and the average is that of the file."""
    public = PublicSiT(seed=4, batch_norm=True)
    statistics = load_file(data / LATENTS / "vae" / "latents_stats.safetensors")
    public.bn.running_mean.copy_(statistics["mean"])
    public.bn.running_var.copy_(statistics["std"].square() * 1.03**2)
    torch.save(public.state_dict(), tmp_path / "bare.pt")
    vae = {"vae_ckpt": data / LATENTS / "vae"}
    assert export(tmp_path / "bare.pt", tmp_path / "run", "--format", "run", *argv_of(vae)) == 2
    assert "differ by 0.03 standard deviations" in capsys.readouterr().err
    public.bn.running_var.copy_(statistics["std"].square() * 1.008**2)
    torch.save(public.state_dict(), tmp_path / "bare.pt")
    source = converted(tmp_path / "bare.pt", tmp_path / "run", **vae)
    assert "begins AdamW anew" in capsys.readouterr().err
    assert continued(data, tmp_path, "bare", continue_train_exp_dir=source, learning_rate=0) == 0
    found = tmp_path / "exps" / "bare" / "checkpoints" / "0000002"
    weights = load_file(found / "model.safetensors") | load_file(found / "alignment.safetensors")
    expected = {name: tensor for name, tensor in public.state_dict().items() if not name.startswith("bn.")}
    assert {name.removeprefix("repa.") for name in weights} == expected.keys()
    assert all(torch.equal(tensor, expected[name.removeprefix("repa.")]) for name, tensor in weights.items())
    state = torch.load(found / "optimizer.pt", weights_only=True)["state"]
    assert {int(entry["step"]) for entry in state.values()} == {2}


def test_train_ldm_goes_on_from_a_repa_experiment_on_a_cache_with_its_assumed_statistics(data, tmp_path, capsys):
    """REPA's checkpoints hold no statistics: mean 0, scale 0.18215, which cache_latents.py takes by the name repa."""
    source = write_experiment(tmp_path / "repa", PublicSiT(seed=1), PublicSiT(seed=2), public_args(vae="f4d4"))
    vae, features = save_vae(tmp_path), {"cache_features": True, "enc_type": "efficientnet-lite0", "features_grid": 4}
    cached = tmp_path / "latents"
    assert cache_latents.main(cache_flags(data, vae, cached, vae_latents_stats="repa", **features)) == 0
    statistics = load_file(cached / "vae" / "latents_stats.safetensors")
    assert torch.equal(statistics["mean"], torch.zeros(4))
    assert (statistics["std"] - 1 / 0.18215).abs().max() < 1e-5
    flags = {"continue_train_exp_dir": converted(source, tmp_path / "theirs", vae_ckpt=vae), "max_train_steps": 8}
    assert continued(data, tmp_path, "refused", **flags) == 2
    assert "latent statistics differ" in capsys.readouterr().err
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
    assert len(snippet.strip().splitlines()) <= 16
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


def test_an_export_samples_as_its_run_was_trained(tmp_path, monkeypatch):
    """Shifted times are shifted, and what was trained without a null class is not guided."""
    run_folder, out = write_ldm_run(tmp_path / "run"), tmp_path / "out"
    manifest = next(run_folder.glob("checkpoints/*/manifest.json"))
    content = json.loads(manifest.read_text())
    content["args"] |= {"time_shift": 0.25, "cfg_prob": 0, "path_type": "cosine"}
    manifest.write_text(json.dumps(content))
    assert export(run_folder, out) == 0
    index = json.loads((out / "model_index.json").read_text())
    assert (index["time_shift"], index["cfg_prob"], index["path_type"]) == (0.25, 0, "cosine")
    snippet = snippet_of(out)
    assert "guided" not in snippet
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})  # noqa: S102  it is what is tested
    trained = open_trained_ldm(run_folder, None, "ema")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    shifted = {"shift": 0.25, "path_type": "cosine"}
    z = sample_ode(model_velocity(trained.load_model()), noise, torch.tensor([0]), num_steps=50, **shifted)
    tokenizer = load_tokenizer(str(out / "vae"))[0]
    with torch.no_grad():
        image = to_uint8(tokenizer.decode(tokenizer.statistics.denormalize(z)))[0].permute(1, 2, 0).numpy()
    found = np.asarray(Image.open(tmp_path / "sample.png"))
    assert np.abs(found.astype(int) - image).max() <= 1


@pytest.mark.parametrize("format", ["diffusers", "repa"])
def test_a_converted_experiment_is_exported_like_any_run(tmp_path, format):
    folder, ema, _ = repae_experiment(tmp_path / "repae")
    run_folder = converted(folder, tmp_path / "run")
    assert export(run_folder, tmp_path / "out", "--format", format) == 0
    if format == "diffusers":
        assert_same_velocity(SiT.from_pretrained(tmp_path / "out" / "transformer"), ema)
        tokenizer, _ = load_tokenizer(str(tmp_path / "out" / "vae"))
        assert torch.equal(tokenizer.statistics.mean, ema.bn.running_mean)
        return
    theirs, ours = (contents_of(path / "checkpoints" / "0000007.pt") for path in (folder, tmp_path / "out"))
    for name in ("model", "ema"):
        shared = theirs["model"] if name == "model" else theirs["ema"]
        expected = {key: (theirs["model"] if key.startswith("projectors.") else shared)[key] for key in shared}
        expected |= {key: theirs["ema"][key] for key in expected if key.startswith("bn.running")}
        assert ours[name].keys() == expected.keys()
        assert all(torch.equal(ours[name][key], tensor) for key, tensor in expected.items())
    assert ours["vae"].keys() == theirs["vae"].keys()
    assert all(torch.equal(tensor, theirs["vae"][key]) for key, tensor in ours["vae"].items())
    for name in ("model", "encoder_depth", "path_type", "cfg_prob", "enc_type", "resolution", "num_classes"):
        assert getattr(ours["args"], name) == getattr(theirs["args"], name)


@torch.no_grad()
def assert_same_velocity(model: SiT, public: PublicSiT) -> None:
    expected, _ = public.eval()(*probe())
    assert expected.std() > 0.1
    assert (model.eval()(*probe())[0] - expected).abs().max() < 1e-5


def test_what_is_written_as_a_run_is_there_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    folder, _, _ = repae_experiment(tmp_path / "repae")
    out, words = tmp_path / "run", ("--format", "run")
    assert export(folder, out, *words, "--dry-run") == 0
    assert "nothing was written" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repae"]
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", lambda self, path: (_ for _ in ()).throw(UserError("no space is left")))
        assert export(folder, out, *words) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repae"]
    assert export(folder, out, *words) == 0
    before = (out / "checkpoints" / "0000007" / "manifest.json").read_bytes()
    assert export(folder, out, *words) == 2
    assert "holds an export; add --overwrite" in capsys.readouterr().err
    assert export(folder, out, *words, "--overwrite") == 0
    assert (out / "checkpoints" / "0000007" / "manifest.json").read_bytes() == before
    assert CheckpointFolder(out).newest_good().fault() is None
    assert sorted(path.name for path in out.iterdir()) == ["args.json", "checkpoints", "status.json", "vae"]


def test_the_layout_of_repae_is_read_by_independent_networks(data, tmp_path, capsys):
    """Exported, loaded strictly into the public SiT and VAE, the same numbers; and back again to the bit."""
    assert continued(data, tmp_path, "old", max_train_steps=2) == 0
    old, out = tmp_path / "exps" / "old", tmp_path / "out"
    capsys.readouterr()
    assert export(old, out, "--format", "repa") == 0
    warnings = capsys.readouterr().err
    for reason in (
        *("it builds no SiT-Ti/2", "projectors have width 2048, not 32", "256 and 512 px, not of 32"),
        *("it knows no VFM efficientnet-lite0", "class 1000 for the null class, not 6"),
    ):
        assert reason in warnings
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
        assert (trained.load_model()(x, t, y)[0] - public(x, t, y)[0]).abs().max() < 1e-5
        assert (tokenizer.decode(x) - public_vae.decode(x)).abs().max() < 1e-5
    assert torch.equal(public.bn.running_mean, tokenizer.statistics.mean)
    assert torch.equal(public.bn.running_var, tokenizer.statistics.var)

    checkpoint = read_sit(file, "x", args)
    for name in ("model", "ema"):  # REPA's projectors, which are not averaged, stand in both
        found = checkpoint.weights[name]
        for state, saved in ((found.denoiser, name), (found.alignment, "alignment")):
            expected = load_file(old / "checkpoints" / "0000002" / f"{saved}.safetensors")
            assert expected.keys() == state.keys()
            assert all(torch.equal(expected[key], tensor) for key, tensor in state.items())
    loaded, _ = load_tokenizer(str(file))
    assert loaded.checksum() == trained.vae_checksum
    sampling = SAMPLING | {"num_fid_samples": 2}
    back = converted(out, tmp_path / "back")
    images = [sampled(tmp_path / f"{path.name}-images", exp_path=path, **sampling) for path in (old, back)]
    assert np.array_equal(*images)


REPAE_FACTS = {
    "model": "SiT-XL/1", "vae": "f16d32", "resolution": 256, "enc_type": "dinov2-vit-b", "cfg_prob": 0.1,
    "num_classes": 1000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "width", "said"),
    [
        ({}, 2048, []),
        ({"enc_type": "dinov2-vit-b,mocov3-vit-l"}, 2048, []),
        ({"model": "SiT-S/2"}, 2048, ["builds no SiT-S/2"]),
        ({"vae": "f4d4"}, 2048, ["VAEs f8d4 and f16d32, not f4d4"]),
        ({"resolution": 384}, 2048, ["256 and 512 px, not of 384"]),
        ({"enc_type": "dinov3-vit-b"}, 2048, ["no VFM dinov3-vit-b"]),
        ({"enc_type": "dinov2-vit-b,mae-vit-b"}, 2048, ["no VFM mae-vit-b"]),
        ({"resolution": 512}, 2048, []),
        ({"resolution": 512, "enc_type": "jepa-vit-h"}, 2048, ["dinov2 alone, not jepa-vit-h"]),
        ({}, 1024, ["width 2048, not 1024"]),
        ({"enc_type": "None"}, None, ["a projector for each encoder"]),
        ({"cfg_prob": 0.0}, 2048, ["no null class for a cfg_prob of 0"]),
        ({"num_classes": 100}, 2048, ["class 1000 for the null class, not 100"]),
        ({"num_classes": 100, "resolution": 64}, 2048, ["px, not of 64", "null class, not 100"]),
    ],
)
def test_what_repae_cannot_read(changes, width, said):
    reasons = what_repae_lacks(REPAE_FACTS | changes, width)
    assert len(reasons) == len(said)
    for reason, part in zip(reasons, said, strict=True):
        assert part in reason


def test_a_saved_denoiser_is_loaded_as_it_was(tmp_path):
    model = SiT(SiTConfig("SiT-Ti/2", 4, 8, 6, qk_norm=True))
    random_weights(model, 3)
    model.save_pretrained(tmp_path / "sit")
    loaded = SiT.from_pretrained(tmp_path / "sit")
    assert loaded.config == model.config
    x, t, y = probe()
    velocity, states = model.eval()(x, t, y, (2, 4))
    again, same = loaded(x, t, y, (2, 4))
    assert torch.equal(velocity, again)
    assert all(torch.equal(a, b) for a, b in zip(states, same, strict=True))
    (tmp_path / "sit" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="describes a UNet2DModel"):
        SiT.from_pretrained(tmp_path / "sit")
