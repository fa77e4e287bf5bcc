"""The four seams: the classes of docs/extending.md, each through the real scripts, resumed bit for bit."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cache_latents
import evaluate
import generate
import train_ldm
import train_repae
import train_sendvae
from dataset.toy import main as make_toy
from loss.alignment import DENOISER_ALIGNMENTS, TOKENIZER_ALIGNMENTS
from models.denoisers import DENOISERS
from models.tokenizers import TOKENIZERS
from runtime.cli import run
from tests.command_line import argv_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
REGISTRIES = (TOKENIZER_ALIGNMENTS, DENOISER_ALIGNMENTS, TOKENIZERS, DENOISERS)
COMMON = {"batch_size": 4, "num_workers": 0, "log_steps": 1, "max_val_images": 4, "val_steps": 1}


@pytest.fixture(scope="module", autouse=True)
def extended():
    """Run the page's code; the registries are as before afterwards."""
    before = [dict(registry) for registry in REGISTRIES]
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {"__name__": "extension"})  # noqa: S102
    for registry, old in zip(REGISTRIES, before, strict=True):
        assert len(registry) == len(old) + 1
    yield
    for registry, old in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(old)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("seams")
    assert make_toy(["--output", str(path / "images"), "--num-images", "24", "--resolution", "32"]) == 0
    return path


def script(main, **flags) -> None:
    assert run(main, argv_of(flags)) == 0


def train(main, folder: Path, name: str, **flags) -> Path:
    """Two steps, once in one go and once resumed after the first: the same bits. Gives the run's folder."""
    flags = COMMON | {"output_dir": folder, "checkpointing_steps": 1, "sampling_steps": 2} | flags
    script(main, **flags | {"exp_name": f"{name}-straight", "max_train_steps": 2})
    for steps in (1, 2):
        script(main, **flags | {"exp_name": name, "max_train_steps": steps})
    runs = folder / f"{name}-straight", folder / name
    states = [{p.name: load_file(p) for p in (r / "checkpoints/0000002").glob("*.safetensors")} for r in runs]
    assert states[0].keys() == states[1].keys()
    for file, tensors in states[0].items():
        assert tensors.keys() == states[1][file].keys()
        assert all(torch.equal(tensor, states[1][file][key]) for key, tensor in tensors.items()), file
    assert (runs[0] / "metrics.jsonl").read_text() == (runs[1] / "metrics.jsonl").read_text()
    return runs[1]


def checkpoint(run_folder: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run_folder / f"checkpoints/{step:07d}/{name}.safetensors")


def records(run_folder: Path) -> dict:
    merged = {}
    for line in (run_folder / "metrics.jsonl").read_text().splitlines():
        merged |= json.loads(line)
    return merged


def vae_flags(folder: Path, **flags) -> dict:
    images = folder / "images"
    common = {"data_dir": images, "val_data_dir": images, "resolution": 32, "loss_cfg_path": "configs/l1_kl_gan.yaml"}
    return common | {"vae_ckpt": "none", "enc_type": "efficientnet-lite0"} | flags


@pytest.fixture(scope="module")
def tokenizer_run(folder):
    """The new tokenizer, trained with a GAN and an average, aligned by the new alignment."""
    flags = vae_flags(folder, vae="PatchTokenizer", align_loss="mse", mse_weight=0.25, ema_decay=0.5)
    return train(train_sendvae.main, folder, "tokenizer", **flags)


def test_an_alignment_of_a_vae_trains_with_it(folder, tokenizer_run):
    """Its head moves, its term is logged and weighted, and it is not part of the tokenizer's weights."""
    before, after = (checkpoint(tokenizer_run, step, "alignment") for step in (1, 2))
    assert before.keys() == {"heads.0.weight", "heads.0.bias"}
    assert not any(torch.equal(before[key], after[key]) for key in before)
    logged = records(tokenizer_run)
    expected = logged["reconstruction"] + 0.1 * logged["gan"] + 0.25 * logged["mse"]
    assert logged["loss"] == pytest.approx(expected, rel=1e-6)
    assert not any("head" in key for key in checkpoint(tokenizer_run, 2, "model"))


def test_a_new_alignment_serves_a_known_vae(folder):
    run_folder = train(train_sendvae.main, folder, "known-vae", **vae_flags(folder, vae="f4d4-tiny", align_loss="mse"))
    assert {"mse", "kl"} <= records(run_folder).keys()


def test_a_tokenizer_is_cached_and_evaluated(folder, tokenizer_run):
    """By its folder alone, in every script; a known alignment takes it too."""
    vae = tokenizer_run / "vae"
    assert json.loads((vae / "config.json").read_text()) == {"_class_name": "PatchTokenizer"}
    evaluation = folder / "evaluation"
    flags = {"data": folder / "images", "resolution": 32, "vae": vae, "metrics": "psnr,ssim", "output_dir": evaluation}
    assert run(evaluate.main, ["reconstruction", *argv_of(flags)]) == 0
    (record,) = (evaluation / "metrics").glob("*.json")
    assert json.loads(record.read_text())["values"]["PSNR"] > 0
    script(train_sendvae.main, **COMMON | vae_flags(folder, vae=vae, vae_ckpt=None, mapper_grid=2, output_dir=folder,
           exp_name="known-alignment", max_train_steps=1))  # fmt: skip
    assert 0 < records(folder / "known-alignment")["val/align_cosine"] < 1


@pytest.fixture(scope="module")
def cache(folder, tokenizer_run):
    name = folder / "latents"
    images = {"data_dir": folder / "images", "resolution": 32}
    script(cache_latents.main, **images, vae=tokenizer_run / "vae", vae_latents_name=name, num_workers=0)
    return name


def test_a_denoiser_and_its_alignment_train_sample_and_evaluate(folder, cache):
    """On the new tokenizer's latents, with REPA beside the new alignment."""
    flags = {"data_dir": folder / "images", "resolution": 32, "vae_latents_name": cache, "val_vae_latents_name": cache}
    flags |= {"model": "Conv-4", "conv_width": 16, "align": "repa+mean", "mean_coeff": 0.2, "encoder_depth": 3}
    flags |= {"enc_type": "efficientnet-lite0", "projector_width": 16, "grid_steps": 2}
    run_folder = train(train_ldm.main, folder, "denoiser", **flags)
    assert {"mean.head.weight", "repa.projectors.0.0.weight"} <= checkpoint(run_folder, 2, "alignment").keys()
    model, average = (checkpoint(run_folder, 2, name) for name in ("model", "ema"))
    assert model.keys() == average.keys()
    assert not any("head.weight" in key and "mean" in key for key in model)
    logged = records(run_folder)
    assert logged["loss"] == pytest.approx(logged["denoise"] + 0.5 * logged["repa"] + 0.2 * logged["mean"], rel=1e-6)

    samples = folder / "samples"
    sampling = {"exp_path": run_folder, "num_fid_samples": 6, "num_steps": 2, "mode": "ode", "sample_dir": samples}
    script(generate.main, **sampling, cfg_scale=1.5, preview=0)
    measured = {"samples": samples, "ref": folder / "images", "features": "efficientnet-lite0", "metrics": "fid"}
    assert run(evaluate.main, ["generation", *argv_of(measured)]) == 0
    (record,) = (samples / "metrics").glob("generation*.json")
    assert json.loads(record.read_text())["values"]


def test_a_run_goes_on_with_another_alignment(folder, cache):
    """Moments and weights are taken over by name; what is new is refused rather than begun at random."""
    flags = {"data_dir": folder / "images", "resolution": 32, "vae_latents_name": cache, "model": "Conv-2"}
    flags |= COMMON | {"output_dir": folder, "grid_steps": 2}
    script(train_ldm.main, **flags, align="mean", exp_name="first", max_train_steps=2)
    goes_on = {"continue_train_exp_dir": folder / "first", "max_train_steps": 3}
    script(train_ldm.main, **flags, align="none", exp_name="second", **goes_on)
    assert json.loads((folder / "second/args.json").read_text())["args"]["continued_from"]["step"] == 2
    script(train_ldm.main, **flags, align="mean", exp_name="third", **goes_on)
    assert run(train_ldm.main, argv_of(flags | {"align": "repa", "exp_name": "fourth"} | goes_on)) == 2


def test_end_to_end_training_takes_both(folder):
    """REPA-E's step with the new tokenizer and the new denoiser."""
    flags = vae_flags(folder, vae="PatchTokenizer", model="Conv-3", encoder_depth=2, projector_width=16, grid_steps=2)
    run_folder = train(train_repae.main, folder, "together", **flags)
    assert {"alignment", "repa", "vae_loss", "val_ema/denoise"} <= records(run_folder).keys()


NAMED = {"exp_name": "x", "data_dir": "x", "vae_latents_name": "x"}


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (train_sendvae.main, {"exp_name": "x", "data_dir": "x", "mse_weight": 1}, "--mse-weight belongs to"),
        (train_ldm.main, NAMED | {"mean_coeff": 1}, "--mean-coeff belongs to --align mean"),
        (train_ldm.main, NAMED | {"align": "repa+x"}, "give repa, irepa, vae, mean"),
        (train_ldm.main, {"model": "Conv-x", "dry_run": True, "align": "none"}, "give Conv-DEPTH"),
        (train_ldm.main, {"model": "U-4", "dry_run": True, "align": "none"}, "Conv-DEPTH"),
    ],
)  # fmt: skip
def test_flags_of_parts_that_were_not_chosen(capsys, main, flags, message):
    assert run(main, argv_of(flags)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
