"""SiT checkpoints of REPA and REPA-E: in, sampled, continued; and out again. Against an independent network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import generate
from diffusion.counted_noise import counted_normal
from errors import UserError
from formats.sit import infer_config, read_sit
from formats.vae import build_autoencoder
from models.autoencoder import Autoencoder
from models.sit import PATCH_SIZES, SIT_SIZES, SiT, SiTConfig
from tests.command_line import argv_of
from tests.latent_caches import save_vae
from tests.public_sit import PublicSiT, public_args, write_checkpoint, write_experiment


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
def expected_images(public: PublicSiT, autoencoder: Autoencoder, statistics: tuple, labels: torch.Tensor) -> np.ndarray:
    """uint8 ``[B, H, W, 3]`` by the independent network and the loop above."""
    mean, std = (value.view(1, 4, 1, 1) for value in statistics)
    z = euler(public.eval(), 3, labels, steps=5, scale=2.0, high=0.7)
    pixels = 127.5 * (autoencoder.network.decode(z * std + mean).sample + 1)
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
    autoencoder, _ = build_autoencoder(str(vae))
    expected = expected_images(ema, autoencoder, (torch.zeros(4), torch.full((4,), 1 / 0.18215)), torch.arange(4))
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
    other = expected_images(model, autoencoder, (torch.zeros(4), torch.full((4,), 1 / 0.18215)), torch.arange(4))
    assert_same_images(sampled(tmp_path / "model", exp_path=folder, vae_ckpt=vae, weights="model"), other)


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
    with pytest.raises(UserError, match="another --ckpt .weights_sha256"):
        generate.main(argv_of(SAMPLING | flags | {"sample_dir": tmp_path / "begun", "ckpt": tmp_path / "b.pt"}))
    assert np.array_equal(sampled(tmp_path / "begun", ckpt=tmp_path / "a.pt", **flags), straight)
