"""Real processes on a GPU: the same bits with --deterministic, all stages, a micro-batch that fits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import argv_of
from tests.gpu import needs_gpu
from tests.repae_runs import flags as repae_flags
from tests.sendvae_runs import flags as sendvae_flags
from training.micro_batch import FOUND

pytestmark = needs_gpu
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 400  # seconds for a process: one that hangs is ended, and what it said is shown


def start(script: str, argv: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, script, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def output_of(*processes: subprocess.Popen) -> str:
    """What they said until their end, which must be good and come within ``LIMIT``."""
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=LIMIT)[0])
        except subprocess.TimeoutExpired:
            process.kill()
            outputs.append(f"{process.communicate()[0]}\nended after {LIMIT} s")
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return "".join(outputs)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A packed toy set at 64 px, which the PatchGAN can look at."""
    folder = tmp_path_factory.mktemp("toy")
    toy = {"output": folder / "images", "num_images": 48, "resolution": 64}
    output_of(start("-m", ["dataset.toy", *argv_of(toy)]))
    argv = {"imagenet_path": folder / "images", "output_path": folder / "packed", "resolution": 64}
    output_of(start("preprocessing.py", argv_of(argv)))
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

    def training(name: str, **changes) -> subprocess.Popen:
        return start(script, [*flags(packed, tmp_path, name, **common | changes), "--no-compile"])

    output_of(training("first"), training("second"), training("resumed", max_train_steps=2))
    output_of(training("resumed"))
    first = checksums(tmp_path / "first", 4)
    assert checksums(tmp_path / "second", 4) == first
    assert checksums(tmp_path / "resumed", 4) == first


def test_every_stage(packed, tmp_path):
    """VAE, cache, denoiser and samples; the denoiser with the defaults of a GPU: bf16, compiled."""
    vae = {"resolution": 64, "batch_size": 8, "max_train_steps": 3}
    output_of(start("train_sendvae.py", [*sendvae_flags(packed, tmp_path, "vae", **vae), "--no-compile"]))
    cache = {"data_dir": packed, "vae": tmp_path / "vae" / "vae", "vae_latents_name": "latents"}
    output_of(start("cache_latents.py", argv_of(cache)))
    training = {
        "output_dir": tmp_path, "exp_name": "ldm", "data_dir": packed, "vae_latents_name": "latents",
        "model": "SiT-Ti/2", "enc_type": "efficientnet-lite0", "encoder_depth": 2, "batch_size": 8,
        "max_train_steps": 3,
    }  # fmt: skip
    assert "precision bf16" in output_of(start("train_ldm.py", argv_of(training)))
    continued = {"exp_name": "next", "continue_train_exp_dir": tmp_path / "ldm", "max_train_steps": 4}
    assert "step 4/4" in output_of(start("train_ldm.py", [*argv_of(training | continued), "--no-compile"]))
    sampling = {"exp_path": tmp_path / "ldm", "num_fid_samples": 20, "num_steps": 4, "cfg_scale": 2.0}
    precisions = {"float32": {}, "bf16": {"mixed_precision": "bf16", "compile": True}}
    output = output_of(
        *(
            start("generate.py", argv_of(sampling | flags | {"sample_dir": tmp_path / name}))
            for name, flags in precisions.items()
        )
    )
    assert output.count("is complete: 20 images") == 2


def test_the_largest_micro_batch_is_found_and_kept(packed, tmp_path):
    """A run with --micro-batch-size auto; resumed, it keeps what it found."""

    def training(steps: int) -> subprocess.Popen:
        flags = {"resolution": 64, "batch_size": 24, "max_train_steps": steps, "micro_batch_size": "auto"}
        return start("train_sendvae.py", [*sendvae_flags(packed, tmp_path, "auto", **flags), "--no-compile"])

    assert FOUND.format(24) in output_of(training(1))
    assert FOUND.partition("{}")[0] not in output_of(training(2))
