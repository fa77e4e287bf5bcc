"""train_sendvae.py as a user calls it, in this process: results, dry run, frozen VAE, a second call."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

import cache_latents
import train_sendvae
from dataset.toy import main as make_toy
from files import checksum
from models.discriminator import PatchDiscriminator
from preprocessing import main as preprocess
from runtime.cli import EXIT_FAILED, EXIT_USER_ERROR, run
from runtime.measure import count_parameters
from tests.command_line import argv_of
from tests.latent_caches import save_vae
from tests.photographs import PHOTOGRAPHS, needs_photographs
from tests.sendvae_runs import flags

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_toy(["--output", str(folder / "images"), "--num-images", "48", "--resolution", "32"])
    packed = ["--imagenet-path", str(folder / "images"), "--output-path", str(folder / "packed"), "--resolution", "32"]
    preprocess(packed)
    return folder / "packed"


def train(*argv: str) -> int:
    return run(train_sendvae.main, list(argv))


@pytest.mark.parametrize(
    ("images", "words"), [(4, "add --micro-batch-size 2, which keeps the global batch"), (1, "add --gradient-checkpoi")]
)
def test_out_of_memory_is_one_line_with_a_remedy(toy, tmp_path, monkeypatch, capsys, images, words):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total …")

    monkeypatch.setattr("training.loop.train_step", fail)
    assert train(*flags(toy, tmp_path, batch_size=images)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)" in last
    assert words in last


@pytest.mark.slow
def test_a_resumed_run_is_one_run_of_wandb(toy, tmp_path):
    """Without a key it is kept for later (offline), and nobody is asked for one. With --deterministic, too."""
    options = {"report_to": "wandb", "deterministic": True, "align_coeff": 0, "loss_cfg_path": "configs/l1_kl.yaml"}
    hidden = {name for name in os.environ if name.startswith("WANDB")}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"NETRC": "/no/netrc"}
    identities = []
    for steps in (1, 2):
        argv = flags(toy, tmp_path, max_train_steps=steps, checkpointing_steps=1, **options)
        command = [sys.executable, "train_sendvae.py", *argv]
        answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr[-2000:]
        identities.append((tmp_path / "run" / "wandb_id.txt").read_text())
    assert identities[0] == identities[1]
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(f"-{identities[0]}") and any(folder.glob("*.wandb")) for folder in folders)


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_it_promises(toy, tmp_path, capsys):
    argv = flags(
        toy, tmp_path, "run", val_data_dir=toy, ema_decay=0.5, max_train_steps=4, checkpointing_steps=2,
        milestone_steps=2, keep_checkpoints=1, log_steps=2, report_to="tensorboard",
    )  # fmt: skip
    assert train(*argv) == 0
    folder = tmp_path / "run"
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [2, 4, 4]
    weights = {"reconstruction": 1.0, "kl": 1e-6, "gan": 0.1, "alignment": 1.0}
    assert lines[0]["loss"] == pytest.approx(sum(weight * lines[0][name] for name, weight in weights.items()), rel=1e-5)
    assert {"val/psnr", "val/align_cosine", "val/constant_cosine", "val_ema/psnr"} <= lines[2].keys()
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["0000004"]
    assert sorted(path.name for path in (folder / "milestones").iterdir()) == ["0000002", "0000004"]
    assert Image.open(folder / "samples" / "0000004.png").size == (8 * 98 - 2, 3 * 98 - 2)  # enlarged thrice
    assert any("tfevents" in path.name for path in folder.rglob("*"))

    vae = AutoencoderKL.from_pretrained(folder / "vae")
    averaged = load_file(folder / "checkpoints" / "0000004" / "ema.safetensors")
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, averaged[f"network.{name}"])
    stats = load_file(folder / "vae" / "latents_stats.safetensors")
    torch.testing.assert_close(stats["std"], (averaged["statistics.var"] + 1e-4).sqrt())

    before = (folder / "metrics.jsonl").read_bytes()
    assert train(*argv) == 0  # finished: nothing is done again
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert "is finished" in capsys.readouterr().err


def test_the_finished_vae_is_the_next_run_s_checkpoint(toy, tmp_path):
    assert train(*flags(toy, tmp_path, "first", align_coeff=0, loss_cfg_path="configs/l1_kl.yaml")) == 0
    vae = tmp_path / "first" / "vae"
    start = load_file(vae / "latents_stats.safetensors")
    assert train(*flags(toy, tmp_path, "second", vae_ckpt=vae, freeze_vae=True)) == 0
    for name in ("diffusion_pytorch_model.safetensors", "latents_stats.safetensors"):
        kept, ours = load_file(tmp_path / "second" / "vae" / name), load_file(vae / name)
        assert all(torch.allclose(kept[key], ours[key], rtol=1e-6, atol=0) for key in ours), name
    assert (start["std"] > 0).all()
    assert "reconstruction" not in metrics(tmp_path / "second")[0]


def test_a_frozen_vae_is_not_left_without_anything_to_train(toy, tmp_path, capsys):
    assert train(*flags(toy, tmp_path, "frozen", freeze_vae=True, align_until=1)) == EXIT_USER_ERROR
    assert "--freeze-vae with --align-until" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_longer_training_continues_a_finished_run(toy, tmp_path, optimizer):
    plain = {"align_coeff": 0, "loss_cfg_path": "configs/l1_kl.yaml", "optimizer": optimizer}
    argv = flags(toy, tmp_path, "run", max_train_steps=None, **plain)
    assert train(*argv, "--max-train-steps", "2") == 0
    assert train(*argv, "--max-train-steps", "4") == 0
    assert train(*[a if a != "run" else "straight" for a in argv], "--max-train-steps", "4") == 0
    runs = [metrics(tmp_path / name) for name in ("run", "straight")]
    assert runs[0] == runs[1]


def test_cached_features_are_the_features(toy, tmp_path, monkeypatch, capsys):
    """Two runs that differ in where the features come from; with the cache no VFM runs in a step."""
    vae = save_vae(tmp_path)
    cached = {"cache_features": True, "enc_type": "efficientnet-lite0", "features_grid": 2, "dtype": "float32"}
    cache_flags = argv_of({"data_dir": toy, "vae": vae, "vae_latents_name": "start", "num_workers": 1} | cached)
    assert run(cache_latents.main, cache_flags) == 0
    assert train(*flags(toy, tmp_path, "computed", vae=vae, vae_ckpt=None)) == 0
    with monkeypatch.context() as patch:
        patch.setattr("models.encoders.encoder.Encoder.forward", lambda *args: pytest.fail("a VFM ran"))
        assert train(*flags(toy, tmp_path, "cached", vae=vae, vae_ckpt=None, cached_features="start")) == 0
    computed, from_cache = metrics(tmp_path / "computed"), metrics(tmp_path / "cached")
    assert len(computed) == len(from_cache) > 0
    for ours, theirs in zip(from_cache, computed, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    wrong = flags(toy, tmp_path, "wrong", vae=vae, vae_ckpt=None, cached_features="start", mapper_grid=4)
    capsys.readouterr()
    assert train(*wrong) == EXIT_USER_ERROR
    assert "--features-grid 4" in capsys.readouterr().err


@pytest.mark.parametrize("vae", ["f4d4-tiny"])
def test_dry_run_prints_sizes_and_leaves_nothing(vae, tmp_path, capsys, monkeypatch):
    argv = ["--dry-run", "--random-weights", "--vae", vae, "--vae-ckpt", "none", "--resolution", "32"]
    argv += ["--enc-type", "dinov2-vit-s", "--loss-cfg-path", "configs/l1_kl_gan.yaml", "--output-dir", str(tmp_path)]
    assert train(*argv) == 0
    out = capsys.readouterr().out
    assert "681,911" in out
    assert f"{count_parameters(PatchDiscriminator())[0]:,}" in out
    assert "step 2:" in out
    assert "peak memory" in out
    assert not list(tmp_path.iterdir())


def test_bf16_trains_on_a_cpu(toy, tmp_path):
    assert train(*flags(toy, tmp_path, "run", mixed_precision="bf16", gradient_checkpointing=True)) == 0
    line = metrics(tmp_path / "run")[-1]
    assert np.isfinite(line["loss"])
    assert line["skipped"] == 0


def test_gradient_checkpointing_changes_no_bit(toy, tmp_path):
    for name, flag in (("plain", None), ("recomputed", True)):
        assert train(*flags(toy, tmp_path, name, gradient_checkpointing=flag)) == 0
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "recomputed")


def test_divergence_stops_the_run_with_its_reason(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.loop.MAX_CONSECUTIVE_SKIPS", 3)
    monkeypatch.setattr("loss.alignment.mapper.patch_cosine_loss", lambda tokens, features: tokens.sum() * float("nan"))
    argv = flags(toy, tmp_path, "run", max_train_steps=9, checkpointing_steps=1, loss_cfg_path="configs/l1_kl.yaml")
    assert train(*argv) == EXIT_FAILED
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "alignment" in status["reason"]
    assert status["step"] == 3
    line = [line for line in capsys.readouterr().err.splitlines() if "training failed" in line]
    assert len(line) == 1


@pytest.mark.slow
class TestPhotographs:
    pytestmark = needs_photographs

    def test_the_photographs_are_packed_and_trained_on(self, tmp_path):
        packed = ["--imagenet-path", str(PHOTOGRAPHS), "--output-path", str(tmp_path / "packed")]
        assert preprocess([*packed, "--resolution", "64"]) == 0
        argv = flags(
            tmp_path / "packed",
            tmp_path / "exps",
            "photographs",
            resolution=64,
            batch_size=16,
            max_train_steps=24,
            log_steps=8,
            loss_cfg_path="configs/l1_kl.yaml",
            val_data_dir=tmp_path / "packed",
            max_val_images=16,
            vae_learning_rate=1e-3,
        )
        assert train(*argv) == 0
        first, _, last, held_out = metrics(tmp_path / "exps" / "photographs")
        assert last["reconstruction"] < 0.9 * first["reconstruction"]
        assert last["alignment"] < 0.95 * first["alignment"]
        assert 10 < held_out["val/psnr"] < 25
        assert 0.2 < held_out["val/align_cosine"] < 1


def contents(folder) -> dict[str, bytes]:
    """Every file of a folder but its log and its lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("log.txt", ".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_batch_that_cannot_be_split_leaves_no_run(toy, tmp_path, capsys):
    argv = flags(toy, tmp_path, "run", batch_size=5, gradient_accumulation_steps=2)
    assert train(*argv) == 2
    assert "cannot be split" in capsys.readouterr().err
    assert not contents(tmp_path / "run")


@pytest.mark.parametrize("choice", [{}, {"resume_step": 1}])
def test_a_run_of_earlier_code_is_refused_and_stays_as_it_is(toy, tmp_path, capsys, choice):
    changes = {"checkpointing_steps": 1, "loss_cfg_path": "configs/l1_kl.yaml", "align_coeff": 0}
    assert train(*flags(toy, tmp_path, "run", **changes)) == 0
    for manifest in (tmp_path / "run").glob("checkpoints/*/manifest.json"):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 1}))
    before = contents(tmp_path / "run")
    capsys.readouterr()
    assert train(*flags(toy, tmp_path, "run", **changes | {"max_train_steps": 3} | choice)) == 2
    assert "written by other code, in format 1" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


def test_weights_that_do_not_fit_are_refused_before_anything_is_cut(toy, tmp_path, capsys):
    """What is refused while it is restored leaves checkpoints, metrics and arguments."""
    changes = {"checkpointing_steps": 1, "loss_cfg_path": "configs/l1_kl.yaml", "align_coeff": 0}
    assert train(*flags(toy, tmp_path, "run", **changes)) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "0000001"
    weights = load_file(checkpoint / "model.safetensors")
    weights.pop("statistics.mean")
    save_file(weights, checkpoint / "model.safetensors")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = checksum(checkpoint / "model.safetensors")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    before = contents(tmp_path / "run")
    assert train(*flags(toy, tmp_path, "run", **changes | {"max_train_steps": 3, "resume_step": 1})) == 2
    assert "does not fit the network" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


def test_what_changes_no_mathematics_may_change_on_resume(toy, tmp_path, capsys):
    same = {"checkpointing_steps": 2, "max_train_steps": 2}
    before = {"gradient_accumulation_steps": 2, "mixed_precision": "bf16", "channels_last": True}
    now = {"no_channels_last": True, "mixed_precision": "no", "no_allow_tf32": True}
    assert train(*flags(toy, tmp_path, **same | before)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(*flags(toy, tmp_path, **same | now, batch_size=8)) == EXIT_USER_ERROR
    assert "--batch-size 4, not 8" in capsys.readouterr().err
    assert train(*flags(toy, tmp_path, **same | now | {"max_train_steps": 4})) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    noise, rounding = "from here on noise is drawn otherwise", "from here on results are rounded otherwise"
    for change in (
        f"--gradient-accumulation-steps 2 before, 1 now: {noise}",
        f"--mixed-precision bf16 before, no now: {rounding}",
        f"--channels-last True before, False now: {rounding}",
        f"--allow-tf32 True before, False now: {rounding}",
    ):
        assert log[: log.rindex("step 3/4")].count(change) == 1
    assert "number of processes" not in log
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_fp16_may_begin_and_end_on_resume(toy, tmp_path, monkeypatch):
    """A CPU has no fp16; the scaler, which is what of it is saved, works here too."""
    begin = train_sendvae.begin

    def begin_with_scaler(*arguments):
        accelerator = begin(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    monkeypatch.setattr(train_sendvae, "begin", begin_with_scaler)
    assert train(*flags(toy, tmp_path)) == 0
    assert (tmp_path / "run" / "checkpoints" / "0000002" / "scaler.pt").is_file()
    monkeypatch.setattr(train_sendvae, "begin", begin)
    assert train(*flags(toy, tmp_path, max_train_steps=4)) == 0
    assert "is of an fp16 training, whose loss scale is left out" in (tmp_path / "run" / "log.txt").read_text()
    monkeypatch.setattr(train_sendvae, "begin", begin_with_scaler)
    assert train(*flags(toy, tmp_path, max_train_steps=6)) == 0
    assert "is not of an fp16 training: the loss scale begins anew" in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_that_ends_in_skipped_steps_is_not_finished(toy, tmp_path, capsys):
    """Nor by the same command again."""
    plain = {"align_coeff": 0, "loss_cfg_path": "configs/l1_kl.yaml", "checkpointing_steps": 8}
    argv = flags(toy, tmp_path, "run", max_train_steps=8, vae_learning_rate=1e6, **plain)
    for _ in range(2):
        assert train(*argv) == EXIT_FAILED
        assert "steps were skipped" in capsys.readouterr().err
        assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
        assert not (tmp_path / "run" / "vae").exists()


def test_a_longer_cosine_run_says_what_becomes_of_the_rate(toy, tmp_path):
    plain = {"align_coeff": 0, "loss_cfg_path": "configs/l1_kl.yaml", "lr_schedule": "cosine"}
    argv = flags(toy, tmp_path, "run", max_train_steps=None, **plain)
    for steps in ("3", "9"):
        assert train(*argv, "--max-train-steps", steps) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "3 steps in all before, 9 now: the cosine schedule goes on at 0.75 times the peak rate, not 0" in log
    assert log.index("3 steps in all before") < log.index("step 4/9")


def test_the_shell_s_accelerate_settings_change_nothing_and_are_named(toy, tmp_path, monkeypatch):
    plain = {"align_coeff": 0, "loss_cfg_path": "configs/l1_kl.yaml"}
    assert train(*flags(toy, tmp_path, "clean", **plain)) == 0
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # what a launcher says
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    assert train(*flags(toy, tmp_path, "shell", **plain)) == 0
    assert metrics(tmp_path / "shell") == metrics(tmp_path / "clean")
    log = (tmp_path / "shell" / "log.txt").read_text()
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 in the environment: ignored, the flags decide" in log
    assert "DYNAMO" not in log
    assert "NCCL_DEBUG=WARN" in log
