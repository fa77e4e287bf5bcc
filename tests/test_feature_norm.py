"""--feature-norm: what is standardised, by which numbers, and that a run keeps them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_ldm
import train_repae
import train_sendvae
from dataset.images import open_images
from models.encoders import build_encoder
from models.feature_norm import SMALLEST_DEVIATION, FeatureNorm
from runtime.cli import EXIT_USER_ERROR, run
from tests import ldm_trainings, repae_runs, sendvae_runs
from tests.stages import run_stage

KINDS = ("channel", "token")
PLAIN = {"loss_cfg_path": "configs/l1_kl.yaml"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """24 toy images with a latent cache and features on a 4×4 grid."""
    return ldm_trainings.write_data(tmp_path_factory.mktemp("data"))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def statistics(folder: Path, step: int = 2) -> dict[str, np.ndarray]:
    tensors = load_file(folder / "checkpoints" / f"{step:07d}" / "feature_norm.safetensors")
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def features_of(data: Path, grid: int) -> np.ndarray:
    """Of all images, float64 ``[n, grid², D]``."""
    images = open_images(data)
    batch = np.empty((len(images), 3, 32, 32), np.uint8)
    images.read_into(range(len(images)), batch)
    return build_encoder("efficientnet-lite0", grid)(torch.from_numpy(batch)).double().numpy()


def expected(features: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    axes = (0,) if kind == "token" else (0, 1)
    std = features.std(axes, ddof=1)
    return {"mean_0": features.mean(axes), "std_0": std.clip(min=SMALLEST_DEVIATION * std.mean())}


def assert_near(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], rtol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol, atol=rtol * theirs["std_0"].mean())


@pytest.mark.parametrize("kind", KINDS)
def test_every_channel_has_mean_zero_and_variance_one(kind):
    """Two VFMs, in batches of unequal size; a channel that never changes stays finite, and says nothing."""
    generator = np.random.default_rng(0)
    parts = [generator.normal(3.0, 2.0, (60, tokens, width)) for tokens, width in ((4, 5), (9, 3))]
    parts[0] *= np.linspace(0.1, 5, 20).reshape(4, 5)  # no two tokens or channels alike
    parts[1][..., 2] = 7.0
    norm = FeatureNorm([part.shape[1:] for part in parts], per_token=kind == "token")
    tensors = [torch.from_numpy(part) for part in parts]
    assert all(torch.equal(ours, part.float()) for ours, part in zip(norm(tensors), tensors, strict=True))
    batches = zip(*(part.split((11, 49)) for part in tensors), strict=True)
    norm.load([sum(sums) for sums in zip(*map(norm.moments, batches), strict=True)])
    for part, ours in zip(parts, norm(tensors), strict=True):
        want = expected(part, kind)
        np.testing.assert_allclose(ours.numpy(), (part - want["mean_0"]) / want["std_0"], rtol=1e-4, atol=1e-5)
    assert norm(tensors)[1][..., 2].abs().max() < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_sendvae_measures_once_keeps_and_resumes(data, tmp_path, kind):
    argv = sendvae_runs.flags(data, tmp_path, max_train_steps=None, feature_norm=kind, val_data_dir=data, **PLAIN)
    straight = [a if a != "run" else "straight" for a in argv]
    assert run(train_sendvae.main, [*argv, "--max-train-steps", "2"]) == 0
    assert_near(statistics(tmp_path / "run"), expected(features_of(data, 2), kind), rtol=1e-5)
    assert run(train_sendvae.main, [*argv, "--max-train-steps", "4"]) == 0
    assert run(train_sendvae.main, [*straight, "--max-train-steps", "4"]) == 0
    lines = [[line for line in metrics(tmp_path / name) if "loss" in line] for name in ("run", "straight")]
    assert lines[0] == lines[1]
    ours, theirs = (statistics(tmp_path / name, 4) for name in ("run", "straight"))
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    changed = [a if a != kind else "none" for a in argv]
    assert run(train_sendvae.main, [*changed, "--max-train-steps", "6"]) == EXIT_USER_ERROR


def test_a_constant_says_less_of_standardised_features(data, tmp_path):
    """Of so few images the mean of each token is exact, so that the best constant is worth least there."""
    cosines = {}
    for kind in ("none", *KINDS):
        argv = sendvae_runs.flags(data, tmp_path, kind, feature_norm=kind, val_data_dir=data, **PLAIN)
        assert run(train_sendvae.main, argv) == 0
        cosines[kind] = metrics(tmp_path / kind)[-1]["val/constant_cosine"]
        features = features_of(data, 2)
        if kind != "none":
            want = expected(features, kind)
            features = (features - want["mean_0"]) / want["std_0"]
        unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
        assert cosines[kind] == pytest.approx(np.linalg.norm(unit.mean(0), axis=-1).mean(), rel=1e-4)
    assert cosines["none"] > cosines["channel"] > cosines["token"]


def test_cached_features_are_standardised_alike_in_both_stages(data, tmp_path, capsys):
    """Cached ones are float16."""
    cached = {"cached_features": ldm_trainings.LATENTS, "mapper_grid": 4, "feature_norm": "token"}
    assert run(train_sendvae.main, sendvae_runs.flags(data, tmp_path, "vae", **cached, **PLAIN)) == 0
    argv = ldm_trainings.flags(data, tmp_path, "ldm", feature_norm="token")
    assert run(train_ldm.main, argv) == 0
    want = expected(features_of(data, 4), "token")
    for name in ("vae", "ldm"):
        assert_near(statistics(tmp_path / name), want, rtol=2e-3)
    plain = ldm_trainings.flags(data, tmp_path, "plain")
    assert run(train_ldm.main, plain) == 0
    ours, theirs = (metrics(tmp_path / name)[0] for name in ("ldm", "plain"))
    assert ours["denoise"] == theirs["denoise"]
    assert ours["repa"] != theirs["repa"]

    # a run that continues another one keeps its statistics, and must be of the same kind
    source = {"continue_train_exp_dir": tmp_path / "ldm", "max_train_steps": 3}
    argv = ldm_trainings.flags(data, tmp_path, "next", feature_norm="token", seed=5, **source)
    assert run(train_ldm.main, argv) == 0
    ours, theirs = statistics(tmp_path / "next", 3), statistics(tmp_path / "ldm")
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    capsys.readouterr()
    assert run(train_ldm.main, ldm_trainings.flags(data, tmp_path, "other", **source)) == EXIT_USER_ERROR
    assert "--feature-norm token, not none: give the former" in capsys.readouterr().err


def test_both_halves_of_repae_see_the_same_features(data, tmp_path):
    assert run(train_repae.main, repae_runs.flags(data, tmp_path, "plain", **PLAIN)) == 0
    argv = repae_runs.flags(data, tmp_path, "run", feature_norm="channel", **PLAIN)
    assert run(train_repae.main, argv) == 0
    assert_near(statistics(tmp_path / "run"), expected(features_of(data, 4), "channel"), rtol=1e-5)
    ours, theirs = (metrics(tmp_path / name)[0] for name in ("run", "plain"))
    assert ours["reconstruction"] == theirs["reconstruction"]
    assert ours["alignment"] != theirs["alignment"]
    assert ours["repa"] != theirs["repa"]


def test_repae_reads_cached_features(data, tmp_path, monkeypatch):
    """Which are float16; no VFM runs in a step."""
    argv = {name: repae_runs.flags(data, tmp_path, name, **PLAIN) for name in ("computed", "cached")}
    assert run(train_repae.main, argv["computed"]) == 0
    monkeypatch.setattr("models.encoders.encoder.Encoder.forward", lambda *args: pytest.fail("a VFM ran"))
    assert run(train_repae.main, [*argv["cached"], "--cached-features", ldm_trainings.LATENTS]) == 0
    ours, theirs = (metrics(tmp_path / name)[0] for name in ("cached", "computed"))
    assert ours["reconstruction"] == theirs["reconstruction"]
    assert ours["alignment"] == pytest.approx(theirs["alignment"], rel=1e-3)
    assert ours["repa"] == pytest.approx(theirs["repa"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_measure_together(data, tmp_path):
    argv = sendvae_runs.flags(data, tmp_path, "two", feature_norm="token", **PLAIN)
    run_stage("train_sendvae.py", *argv, processes=2)
    assert_near(statistics(tmp_path / "two"), expected(features_of(data, 2), "token"), rtol=1e-5)


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        (train_sendvae, sendvae_runs.flags("d", "o", feature_norm="token", align_coeff=0)),
        (train_ldm, ldm_trainings.flags("d", "o", feature_norm="token", align="vae")),
        (train_ldm, ldm_trainings.flags("d", "o", feature_norm="channel", proj_coeff=0)),
        (train_sendvae, sendvae_runs.flags("d", "o", cached_features="latents", align_coeff=0)),
        (train_ldm, ldm_trainings.flags("d", "o", cached_features="latents", align="none")),
        (train_repae, repae_runs.flags("d", "o", feature_norm="token", proj_coeff=0, vae_align_proj_coeff=0)),
    ],
)
def test_without_features_it_is_refused(script, argv, capsys):
    assert run(script.main, argv) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--feature-norm" in error or "--cached-features" in error
    assert "nothing asks for features" in error
