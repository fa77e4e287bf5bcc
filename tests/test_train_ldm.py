"""train_ldm.py as a user calls it, in this process: results, sources of features, dry run, a second call."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import cache_latents
import generate
import train_ldm
import train_sendvae
from formats.vae import load_tokenizer
from models.denoisers.config import SiTConfig
from models.denoisers.sit import SiT
from runtime.cli import run
from runtime.measure import count_parameters
from tests import sendvae_runs
from tests.latent_caches import flags as cache_flags
from tests.latent_caches import save_vae
from tests.ldm_trainings import LATENTS, flags, write_data
from tests.photographs import write_class_folders
from training.ldm import LDM


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), hflip=True)


def train(*argv: str) -> int:
    return run(train_ldm.main, list(argv))


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"{step:07d}" / f"{name}.safetensors")


def train_halted_and_straight(data, folder, **options) -> None:
    """Four steps with a stop after two and without: the runs ``halted`` and ``straight``, bit for bit the same."""
    options = options | {"max_train_steps": None, "checkpointing_steps": 2}
    for name, stops in (("halted", (2, 4)), ("straight", (4,))):
        for stop in stops:
            assert train(*flags(data, folder, name, **options), "--max-train-steps", str(stop)) == 0
    assert metrics(folder / "halted") == metrics(folder / "straight")
    for name in ("model", "ema", "alignment"):
        resumed, straight = (weights(folder / run_name, 4, name) for run_name in ("halted", "straight"))
        assert resumed.keys() == straight.keys()
        assert all(torch.equal(resumed[key], straight[key]) for key in resumed)


def test_a_run_leaves_everything_it_promises_and_generate_reads_it(data, tmp_path, capsys):
    argv = flags(
        data, tmp_path, "run", val_data_dir=data, max_train_steps=4, checkpointing_steps=2, milestone_steps=2,
        keep_checkpoints=1, log_steps=2, cfg_prob=0.2,
    )  # fmt: skip
    assert train(*argv) == 0
    folder = tmp_path / "run"
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [2, 4, 4]
    assert lines[0]["loss"] == pytest.approx(lines[0]["denoise"] + 0.5 * lines[0]["repa"], rel=1e-5)
    assert lines[2].keys() == {"step", "val/denoise", "val_ema/denoise"}
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["0000004"]
    assert sorted(path.name for path in (folder / "checkpoints" / "0000004").iterdir()) == [
        "alignment.safetensors", "ema.safetensors", "manifest.json", "metrics.pt", "model.safetensors", "optimizer.pt",
    ]  # fmt: skip
    assert sorted(path.name for path in (folder / "milestones").iterdir()) == ["0000002", "0000004"]
    assert sorted(path.name for path in (folder / "milestones" / "0000002").iterdir()) == [
        "ema.safetensors", "manifest.json",
    ]  # fmt: skip
    network = SiT(SiTConfig("SiT-Ti/2", 4, 8, num_classes=6)).state_dict()
    assert weights(folder, 4, "model").keys() == weights(folder, 4, "ema").keys() == network.keys()
    projector = {f"repa.projectors.0.{layer}.{part}" for layer in (0, 2, 4) for part in ("weight", "bias")}
    assert weights(folder, 4, "alignment").keys() == projector
    assert Image.open(folder / "samples" / "0000004.png").size == (8 * 98 - 2, 4 * 98 - 2)

    args = json.loads((folder / "args.json").read_text())["args"]
    tokenizer, known = load_tokenizer(str(folder / "vae"))
    assert known
    assert args["vae_checksum"] == tokenizer.checksum()
    assert args["denoiser"]["num_classes"] == len(args["class_names"]) == 6

    sampling = ["--exp-path", str(folder), "--num-fid-samples", "6", "--num-steps", "2", "--cfg-scale", "2"]
    assert run(generate.main, [*sampling, "--sample-dir", str(tmp_path / "generated")]) == 0
    assert np.load(tmp_path / "generated" / "samples.npz", allow_pickle=False)["arr_0"].shape == (6, 32, 32, 3)

    before = (folder / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert train(*argv) == 0  # finished: nothing is done again
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert "is finished" in capsys.readouterr().err


def test_features_from_images_and_from_the_cache_train_alike(data, tmp_path):
    """Cached features are float16: the first step agrees to its rounding."""
    for source in ("images", "features"):
        assert train(*flags(data, tmp_path, source, repa_source=source, hflip=True)) == 0
    images, features = (metrics(tmp_path / source)[0] for source in ("images", "features"))
    assert images["denoise"] == features["denoise"]
    assert images["repa"] == pytest.approx(features["repa"], rel=1e-3)


@pytest.mark.parametrize("source", ["images", "features"])
def test_what_is_copied_to_a_local_disk_trains_alike(data, tmp_path, source):
    """--stage-dir takes the parts of the cache that are used, checksums included, and the images where they are."""
    options, local = {"repa_source": source, "hflip": True, "verify": True}, tmp_path / "local"
    assert train(*flags(data, tmp_path, "there", **options)) == 0
    assert train(*flags(data, tmp_path, "here", stage_dir=local, **options)) == 0
    assert metrics(tmp_path / "there") == metrics(tmp_path / "here")
    copies = {path.name.rpartition("-")[0]: path for path in local.iterdir()}
    assert copies.keys() == {LATENTS} | ({data.name} if source == "images" else set())
    folders = {path.name for path in copies[LATENTS].iterdir() if path.is_dir()}
    assert folders == {"vae", "flipped"} | ({"features", "features-flipped"} if source == "features" else set())


def test_what_a_cache_lacks_is_said_before_it_is_copied(tmp_path, capsys):
    data = write_data(tmp_path / "data", images=6)
    for changes, words in (
        ({"hflip": True}, "no complete flipped/; run the same cache_latents.py command again with --hflip"),
        (
            {"enc_type": "timm/vit_tiny_patch16_224", "repa_source": "features"},
            "--cache-features --enc-type timm/vit_tiny_patch16_224",
        ),
        ({"reg_coeff": 0.03, "repa_source": "features"}, "--cache-class-tokens --enc-type efficientnet-lite0"),
    ):
        for staged in ({}, {"stage_dir": tmp_path / "local"}):
            assert train(*flags(data, tmp_path, "x", **changes, **staged)) == 2
            assert words in capsys.readouterr().err
    assert not (tmp_path / "local").exists()


def test_auto_takes_cached_features_and_images_otherwise(data, tmp_path):
    assert train(*flags(data, tmp_path, "auto")) == 0
    assert train(*flags(data, tmp_path, "other", enc_type="efficientnet-lite0-s32", model="SiT-Ti/4")) == 0
    sources = [
        json.loads((tmp_path / name / "args.json").read_text())["args"]["repa_source"] for name in ("auto", "other")
    ]
    assert sources == ["features", "images"]


def test_class_folders_are_read_at_the_cache_s_resolution(tmp_path):
    """They do not say one; the cache does, and 32 px are not the usual 256."""
    images, cache = write_class_folders(tmp_path / "images", per_class=8), tmp_path / "latents"
    features = {"cache_features": True, "enc_type": "efficientnet-lite0", "features_grid": 4, "resolution": 32}
    assert cache_latents.main(cache_flags(images, save_vae(tmp_path), cache, **features)) == 0
    argv = {"vae_latents_name": cache, "val_data_dir": images, "val_vae_latents_name": cache}
    assert train(*flags(images, tmp_path, "run", repa_source="images", reg_coeff=0.03, **argv)) == 0
    stage_1 = {"cached_features": cache, "resolution": None, "val_data_dir": images, "mapper_grid": 4}
    assert run(train_sendvae.main, sendvae_runs.flags(images, tmp_path, "vae", **stage_1)) == 0


def test_another_cache_s_features_are_as_good_as_one_s_own(data, tmp_path, capsys):
    bare = tmp_path / "bare"
    assert cache_latents.main(cache_flags(data, save_vae(tmp_path), bare)) == 0
    changes = {"vae_latents_name": bare, "enc_type": "efficientnet-lite0"}
    assert train(*flags(data, tmp_path, "other", cached_features=LATENTS, **changes)) == 0
    assert train(*flags(data, tmp_path, "images", repa_source="images", **changes)) == 0
    other, images = (metrics(tmp_path / name)[0] for name in ("other", "images"))
    assert other["denoise"] == images["denoise"]
    assert other["repa"] == pytest.approx(images["repa"], rel=1e-3)

    capsys.readouterr()
    assert train(*flags(data, tmp_path, "x", cached_features=bare, **changes)) == 2
    assert f"{bare} has no complete features/efficientnet-lite0/" in capsys.readouterr().err
    strangers = write_data(tmp_path / "strangers", images=24, seed=1)
    assert train(*flags(data, tmp_path, "x", cached_features=strangers / LATENTS, **changes)) == 2
    assert f"belongs to another dataset than {bare}" in capsys.readouterr().err


def test_without_repa_no_image_is_read_and_a_path_is_enough(data, tmp_path):
    argv = flags(data, tmp_path, "run", data_dir=None, vae_latents_name=data / LATENTS, proj_coeff=0)
    assert train(*argv) == 0
    assert "repa" not in metrics(tmp_path / "run")[0]
    assert not (tmp_path / "run" / "checkpoints" / "0000002" / "alignment.safetensors").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"path_type": "cosine", "weighting": "lognormal", "qk_norm": True, "time_shift": 2.0},
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
        {"ema_decay": 0, "grid_cfg_scale": 1, "gradient_accumulation_steps": 2},
    ],
)
def test_switches_train(data, tmp_path, changes):
    assert train(*flags(data, tmp_path, "run", **changes)) == 0
    last = metrics(tmp_path / "run")[-1]
    assert np.isfinite(last["loss"])
    assert last["skipped"] == 0


def test_a_cache_without_its_statistics_or_with_another_vae_is_refused(data, tmp_path, capsys):
    shutil.copytree(data / LATENTS, tmp_path / "cache")
    argv = flags(data, tmp_path, vae_latents_name=tmp_path / "cache")
    stats = tmp_path / "cache" / "vae" / "latents_stats.safetensors"
    content = stats.read_bytes()
    stats.unlink()
    assert train(*argv) == 2
    assert "has no latent statistics (latents_stats.safetensors): copy the cache" in capsys.readouterr().err
    other, _ = load_tokenizer(str(stats.parent))
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    other.save(stats.parent)
    stats.write_bytes(content)
    assert train(*argv) == 2
    assert "is not the VAE that" in capsys.readouterr().err


def test_a_held_out_value_that_is_not_finite_is_left_out_of_the_log(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LDM, "validate", lambda method: {"val/denoise": math.nan, "val/other": 1.5})
    assert train(*flags(data, tmp_path, "run", val_steps=1)) == 0
    assert metrics(tmp_path / "run")[-1] == {"step": 2, "val/other": 1.5}
    assert "non-finite held-out values at step 2, left out of the log: val/denoise" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [("grad_norm", 1), ("disc_grad_norm", 0)])
def test_a_vanished_gradient_is_named(data, tmp_path, monkeypatch, capsys, name, code):
    """Of the network: the training has failed. Of a discriminator: a warning."""
    update = LDM.update
    monkeypatch.setattr(LDM, "update", lambda *args: update(*args) | {name: torch.zeros(())})
    assert train(*flags(data, tmp_path, "run")) == code
    said = "training has collapsed: grad_norm fell to" if code else "the discriminator learns nothing any more"
    assert said in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == ("failed" if code else "finished")


def test_longer_training_continues_a_finished_run(data, tmp_path):
    argv = flags(data, tmp_path, "run", max_train_steps=None)
    assert train(*argv, "--max-train-steps", "2") == 0
    assert train(*argv, "--max-train-steps", "4") == 0
    assert train(*[a if a != "run" else "straight" for a in argv], "--max-train-steps", "4") == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")
    for name in ("model", "ema", "alignment"):
        resumed, straight = (weights(tmp_path / run_name, 4, name) for run_name in ("run", "straight"))
        assert all(torch.equal(resumed[key], straight[key]) for key in straight)


def test_resume_step_goes_back_and_the_same_command_goes_on_from_there(data, tmp_path):
    argv = flags(data, tmp_path, "run", max_train_steps=4, checkpointing_steps=1, keep_checkpoints=9)
    assert train(*argv) == 0
    first, log = weights(tmp_path / "run", 4), metrics(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert train(*argv, "--resume-step", "2") == 0
    assert sorted(path.name for path in (folder / "abandoned-at-0000002").iterdir()) == ["0000003", "0000004"]
    again = weights(tmp_path / "run", 4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert metrics(tmp_path / "run") == log
    marked = (folder / "0000004" / "manifest.json").stat().st_mtime_ns
    assert train(*argv, "--resume-step", "2") == 0  # a requeued job: finished, not trained once more
    assert (folder / "0000004" / "manifest.json").stat().st_mtime_ns == marked


def test_a_failed_start_leaves_nothing_that_the_next_one_trusts(data, tmp_path):
    """Other flags and another cache under the same name: no checkpoint, so a new run, with its own VAE."""
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "args.json").write_text(json.dumps({"args": {"cfg_prob": 0.9, "vae_checksum": "x"}}))
    save_vae(run_folder, seed=7)
    assert train(*flags(data, tmp_path)) == 0
    stored, _ = load_tokenizer(str(run_folder / "vae"))
    cached, _ = load_tokenizer(str(data / LATENTS / "vae"))
    assert stored.checksum() == cached.checksum()
    assert torch.equal(stored.statistics.mean, cached.statistics.mean)


@pytest.mark.parametrize("changes", [{"encoder_depth": 7}, {"model": "SiT-Ti/16"}, {"enc_type": "x"}])
def test_a_command_that_is_refused_claims_no_folder(data, tmp_path, changes):
    assert train(*flags(data, tmp_path, **changes)) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vae", [None, "f8d4"])
def test_dry_run_needs_no_data_and_leaves_nothing(vae, tmp_path, capsys):
    argv = ["--dry-run", "--model", "SiT-S/2", "--vae", vae or "f16d32", "--resolution", "64", "--proj-coeff", "0"]
    assert train(*argv, "--output-dir", str(tmp_path)) == 0
    out = capsys.readouterr().out
    with torch.device("meta"):
        channels, side = (4, 8) if vae else (32, 4)
        parameters = count_parameters(SiT(SiTConfig("SiT-S/2", channels, side, 1000)))[0]
    assert f"{parameters:,}" in out
    assert "step 2:" in out
    assert not list(tmp_path.iterdir())


def test_a_dry_run_reads_no_cache_into_memory(data, tmp_path, monkeypatch):
    """--micro-batch-size auto makes one in a process of its own, while the others wait."""
    held = []
    opened = train_ldm.open_latents
    monkeypatch.setattr(train_ldm, "open_latents", lambda *args: held.append(opened(*args)) or held[-1])
    for options in ({"dry_run": True, "val_data_dir": data}, {"max_train_steps": 1, "val_data_dir": data}):
        assert train(*flags(data, tmp_path, **options)) == 0
    assert [[latents.held_bytes > 0 for latents in both] for both in held] == [[False, False], [True, True]]


def test_dry_run_on_a_cache_says_what_its_training_would_be(data, tmp_path, capsys):
    assert train(*flags(data, tmp_path, dry_run=True)) == 0
    assert "step 2:" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_sample_grid_does_not_disturb_the_training(data, tmp_path):
    """Grids and validations draw from streams of their own."""
    assert train(*flags(data, tmp_path, "often", max_train_steps=4, sampling_steps=1, val_steps=1)) == 0
    assert train(*flags(data, tmp_path, "never", max_train_steps=4)) == 0
    often, never = (weights(tmp_path / name, 4) for name in ("often", "never"))
    assert all(torch.equal(often[key], never[key]) for key in never)
