"""What a user can get wrong with train_repae.py, and what the one line must say."""

import json
from pathlib import Path

import pytest
import torch

from runtime.checkpoint import CheckpointFolder
from tests.bad_inputs.case import Case
from tests.bad_inputs.train_sendvae_cases import (
    other_discriminator,
    photographs,
    removed_data,
    saved_vae,
    truncated,
    written,
)
from tests.repae_runs import flags


def with_flags(**changes):
    """A case that differs from a working command in some flags; callables are given the case's folder."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        data = photographs(tmp_path / "images")
        values = {key: value(tmp_path) if callable(value) else value for key, value in changes.items()}
        return flags(data, tmp_path / "exps", **values)

    return prepare


def empty_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    removed_data(tmp_path, monkeypatch)
    return flags(tmp_path / "images", tmp_path / "exps")


def other_classes(folder: Path) -> Path:
    held_out = photographs(folder / "held_out")
    (held_out / "b").rename(held_out / "c")
    return held_out


def begun_run(**arguments):
    """A run of this name with a checkpoint, that was started with these arguments."""

    def make(folder: Path) -> str:
        run = folder / "exps" / "run"
        run.mkdir(parents=True)
        (run / "args.json").write_text(json.dumps({"args": arguments}))
        CheckpointFolder(run).save(1, {"model": torch.nn.Linear(1, 1)}, {}, {})
        return "run"

    return make


def no_dinov2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.delenv("VFM_DIR", raising=False)
    monkeypatch.setattr("models.encoders.weights.try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr("models.encoders.weights.hub_answers", lambda: False)
    return flags(photographs(tmp_path / "images"), tmp_path / "exps", enc_type="dinov2-vit-s")


def disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "vae.safetensors")

    monkeypatch.setattr("runtime.checkpoint.write_safetensors", full)
    return flags(photographs(tmp_path / "images"), tmp_path / "exps", max_train_steps=1)


CASES = [
    Case("no run name", with_flags(exp_name=None), ("--exp-name",)),
    Case("no data", with_flags(data_dir=None), ("--data-dir", "preprocessing.py")),
    Case("data empty", empty_data, ("images",)),
    Case("held-out data of other classes", with_flags(val_data_dir=other_classes), ("--val-data-dir", "classes")),
    Case("architecture without weights", with_flags(vae_ckpt=None), ("f4d4-tiny", "--vae-ckpt none")),
    Case("VAE of another architecture", with_flags(vae="f8d4", vae_ckpt=saved_vae()), ("block_out_channels", "f8d4")),
    Case("VAE weights truncated", with_flags(vae_ckpt=saved_vae(truncated)), ("--vae-ckpt", "do not load")),
    Case("unknown SiT", with_flags(model="SiT-M/2"), ("SiT-M/2", "XL")),
    Case("patch does not divide", with_flags(model="SiT-Ti/8", resolution=48), ("SiT-Ti/8", "12×12")),
    Case("depth beyond the SiT", with_flags(encoder_depth=7), ("--encoder-depth 7", "1 to 6")),
    Case("unknown VFM", with_flags(enc_type="dino9"), ("dino9", "dinov2-vit-b")),
    Case("VFM without weights", no_dinov2, ("--enc-ckpt", "VFM_DIR", "vit_small_patch14_dinov2.lvd142m")),
    Case("momentum above 1", with_flags(bn_momentum="1.5"), ("--bn-momentum", "[0, 1]")),
    Case("negative alignment", with_flags(vae_align_proj_coeff="-1"), ("--vae-align-proj-coeff", "-1")),
    Case("another prediction", with_flags(prediction="eps"), ("--prediction", "eps")),
    Case("loss file not YAML", with_flags(loss_cfg_path=written("l.yaml", "a: [1")), ("l.yaml", "YAML")),
    Case("other discriminator", with_flags(disc_pretrained_ckpt=other_discriminator), ("disc.pt", "PatchGAN")),
    Case("too small for the PatchGAN", with_flags(resolution=16), ("24 px", "discriminator_weight=0")),
    Case("batch does not divide", with_flags(batch_size=4, gradient_accumulation_steps=3), ("4", "3", "multiple")),
    Case("random weights for real", with_flags(random_weights=True), ("--random-weights", "--dry-run")),
    Case(
        "changed flag on resume",
        with_flags(exp_name=begun_run(vae_align_proj_coeff=1.0)),
        ("--vae-align-proj-coeff 1.0, not 1.5", "--exp-name"),
    ),
    Case("another VAE on resume", with_flags(exp_name=begun_run(vae_config={})), ("a VAE of another architecture",)),
    Case("disk full", disk_full, ("no space left", "vae.safetensors"), keeps_work=True),
]
