"""Real processes on a GPU: the same bits with --deterministic, all stages, a micro-batch that fits."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import argv_of
from tests.gpu import needs_gpu
from tests.repae_runs import flags as repae_flags
from tests.sendvae_runs import flags as sendvae_flags

pytestmark = needs_gpu
ROOT = Path(__file__).resolve().parents[2]


def start(script: str, argv: list[str]) -> str:
    """Run to its end, which must be good; the output."""
    answer = subprocess.run([sys.executable, script, *argv], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-4000:]
    return answer.stdout + answer.stderr


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A packed toy set at 64 px, which the PatchGAN can look at."""
    folder = tmp_path_factory.mktemp("toy")
    start("-m", ["dataset.toy", "--output", str(folder / "images"), "--num-images", "48", "--resolution", "64"])
    argv = {"imagenet_path": folder / "images", "output_path": folder / "packed", "resolution": 64}
    start("preprocessing.py", argv_of(argv))
    return folder / "packed"


def checksums(run: Path, step: int) -> dict:
    """SHA-256 of everything in a checkpoint."""
    manifest = json.loads((run / "checkpoints" / f"{step:07d}" / "manifest.json").read_text())
    return manifest["files"]


@pytest.mark.parametrize("script", ["train_sendvae.py", "train_repae.py"])
def test_deterministic_runs_are_equal_and_resume(packed, tmp_path, script):
    """Two runs and one that was resumed, in bf16: every byte of weights, averages, moments and counters."""
    flags = sendvae_flags if script == "train_sendvae.py" else repae_flags
    common = {
        "resolution": 64, "deterministic": True, "batch_size": 8, "max_train_steps": 4, "checkpointing_steps": 2,
        "mixed_precision": "bf16", "ema_decay": 0.9,
    }  # fmt: skip
    for name in ("first", "second"):
        start(script, [*flags(packed, tmp_path, name, **common), "--no-compile"])
    start(script, [*flags(packed, tmp_path, "resumed", **common | {"max_train_steps": 2}), "--no-compile"])
    start(script, [*flags(packed, tmp_path, "resumed", **common), "--no-compile"])
    first = checksums(tmp_path / "first", 4)
    assert checksums(tmp_path / "second", 4) == first
    assert checksums(tmp_path / "resumed", 4) == first


def test_every_stage(packed, tmp_path):
    """VAE, cache, denoiser, samples and their measures, with the defaults of a GPU: bf16, compiled."""
    start("train_sendvae.py", sendvae_flags(packed, tmp_path, "vae", resolution=64, batch_size=8, max_train_steps=3))
    cache = {"data_dir": packed, "vae": tmp_path / "vae" / "vae", "vae_latents_name": "latents"}
    features = {"cache_features": True, "enc_type": "efficientnet-lite0", "features_grid": 4}
    start("cache_latents.py", argv_of(cache | features))
    training = {
        "output_dir": tmp_path, "exp_name": "ldm", "data_dir": packed, "vae_latents_name": "latents",
        "model": "SiT-Ti/2", "enc_type": "efficientnet-lite0", "repa_source": "images", "encoder_depth": 2,
        "batch_size": 8, "max_train_steps": 3,
    }  # fmt: skip
    output = start("train_ldm.py", argv_of(training))
    assert "precision bf16" in output
    sampling = {"exp_path": tmp_path / "ldm", "num_fid_samples": 20, "num_steps": 4, "cfg_scale": 2.0}
    images = {}
    for name, flags in {"float32": {}, "bf16": {"mixed_precision": "bf16", "compile": True}}.items():
        images[name] = tmp_path / name
        assert "is complete: 20 images" in start(
            "generate.py", argv_of(sampling | flags | {"sample_dir": images[name]})
        )


def test_the_largest_micro_batch_is_found_and_kept(packed, tmp_path):
    """A dry run and a run with --micro-batch-size auto; resumed, it keeps what it found."""
    flags = {"resolution": 64, "batch_size": 24, "max_train_steps": 1, "micro_batch_size": "auto"}
    argv = [*sendvae_flags(packed, tmp_path, "auto", **flags), "--no-compile"]
    assert re.search(r"auto: 24 images at once fit", start("train_sendvae.py", argv))
    argv = [*sendvae_flags(packed, tmp_path, "auto", **flags | {"max_train_steps": 2}), "--no-compile"]
    assert "images at once fit" not in start("train_sendvae.py", argv)
