"""REG through the scripts: class tokens cached or computed, trained, resumed, sampled, exported; what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cache_latents
import export_ldm
import generate
import train_ldm
from dataset.images import open_images
from dataset.latents import LatentDataset, class_tokens_name, features_name
from models.encoders import build_encoder
from runtime.cli import run
from tests.latent_caches import flags as cache_flags
from tests.ldm_trainings import LATENTS, flags, write_data
from tests.stages import run_stage

VFM, GRID, WIDTH = "efficientnet-lite0", 4, 112
REG = {"reg_coeff": 0.03}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A packed set whose complete cache, with features, is given class tokens afterwards."""
    packed = write_data(tmp_path_factory.mktemp("data"), hflip=True)
    before = {path: path.read_bytes() for path in (packed / LATENTS).rglob("*.npy")}
    options = {"cache_class_tokens": True, "enc_type": VFM, "features_grid": GRID, "hflip": True}
    assert run(cache_latents.main, cache_flags(packed, packed.parent / "vae", LATENTS, **options)) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    return packed


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A finished run, validated, of cached class tokens."""
    output = tmp_path_factory.mktemp("exps")
    assert train(data, output, "run", val_data_dir=data, **REG) == 0
    return output / "run"


def train(data: Path, output: Path, name: str, **changes) -> int:
    return run(train_ldm.main, flags(data, output, name, **changes))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def refused(capsys, *words: str) -> None:
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


class TestCache:
    def test_class_tokens_are_those_of_the_images(self, data):
        images, encoder = open_images(data), build_encoder(VFM, GRID)
        cache = LatentDataset(data / LATENTS, hflip=True, class_token=VFM)
        assert cache.class_token_source["width"] == WIDTH
        pixels = np.empty((len(images), 3, 32, 32), np.uint8)
        images.read_into(list(range(len(images))), pixels)
        items, flips = np.arange(len(images)), np.arange(len(images)) % 2 == 1
        out = {name: torch.empty(len(items), *shape, dtype=dtype) for name, (shape, dtype) in cache.layout.items()}
        cache.read_arrays(items, flips, {name: tensor.numpy() for name, tensor in out.items()})
        pixels[flips] = pixels[flips, :, :, ::-1]
        expected = encoder(torch.from_numpy(pixels), class_token=True)[:, 0]
        found = cache.batch(out).class_token
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)

    def test_made_with_the_features_or_afterwards_they_are_the_same_bytes(self, data, tmp_path):
        """And so are the features, which the same pass through the VFM makes."""
        options = {"cache_class_tokens": True, "cache_features": True, "enc_type": VFM, "features_grid": GRID}
        vae = data.parent / "vae"
        assert run(cache_latents.main, cache_flags(data, vae, tmp_path / "both", hflip=True, **options)) == 0
        for name in (class_tokens_name, features_name):
            for flipped in (False, True):
                ours, theirs = (folder / name(VFM, flipped) for folder in (tmp_path / "both", data / LATENTS))
                shards = sorted(path.name for path in theirs.glob("*-?????.npy"))
                assert shards
                assert all((ours / shard).read_bytes() == (theirs / shard).read_bytes() for shard in shards)

    def test_a_dry_run_counts_their_bytes(self, data, tmp_path, capsys):
        options = {"cache_class_tokens": True, "enc_type": VFM, "dry_run": True}
        assert run(cache_latents.main, cache_flags(data, data.parent / "vae", tmp_path / "none", **options)) == 0
        assert f"class tokens: 24 items of {WIDTH} float16, {24 * WIDTH * 2} bytes" in capsys.readouterr().out

    def test_they_need_a_vfm(self, data, tmp_path, capsys):
        argv = cache_flags(data, data.parent / "vae", tmp_path / "none", cache_class_tokens=True)
        assert run(cache_latents.main, argv) == 2
        refused(capsys, "--cache-class-tokens needs --enc-type")


class TestTraining:
    def test_what_a_run_says(self, trained):
        first, second, validation = metrics(trained)
        assert first["loss"] == pytest.approx(
            first["denoise"] + 0.5 * first["repa"] + 0.03 * first["class_token"], rel=1e-5
        )
        names = {f"{kind}/{term}" for kind in ("val", "val_ema") for term in ("denoise", "class_token")}
        assert validation.keys() == {"step"} | names
        assert second["step"] == validation["step"] == 2
        args = json.loads((trained / "args.json").read_text())["args"]
        assert (args["reg_coeff"], args["repa_source"], args["denoiser"]["class_token_width"]) == (
            0.03,
            "features",
            WIDTH,
        )
        assert f"class token of {VFM} beside the latent, weight 0.03" in (trained / "log.txt").read_text()

    @pytest.mark.parametrize("align", ["repa", "none"])
    def test_from_images_and_from_the_cache_it_trains_alike(self, data, tmp_path, align):
        """Cached class tokens are float16: the first step agrees to its rounding."""
        options = REG | {"align": align, "val_data_dir": data}
        for source in ("images", "features"):
            assert train(data, tmp_path, source, repa_source=source, **options) == 0
        images, features = (metrics(tmp_path / source) for source in ("images", "features"))
        assert images[0]["denoise"] == pytest.approx(features[0]["denoise"], rel=1e-3)
        assert images[0]["class_token"] == pytest.approx(features[0]["class_token"], rel=1e-3)
        assert images[-1]["val/class_token"] == pytest.approx(features[-1]["val/class_token"], rel=1e-3)
        assert ("repa" in images[0]) == ("repa" in features[0]) == (align == "repa")

    def test_without_a_coefficient_nothing_is_different(self, data, tmp_path):
        assert train(data, tmp_path, "plain") == 0
        assert train(data, tmp_path, "zero", reg_coeff=0) == 0
        for name in ("model", "ema", "alignment"):
            states = [
                load_file(tmp_path / run / "checkpoints/0000002" / f"{name}.safetensors") for run in ("plain", "zero")
            ]
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        args = json.loads((tmp_path / "plain" / "args.json").read_text())["args"]
        assert "class_token_width" not in args["denoiser"]
        assert "class_token" not in metrics(tmp_path / "plain")[0]

    def test_it_resumes_exactly_and_only_as_what_it_was(self, data, tmp_path, capsys):
        options = REG | {"checkpointing_steps": 2, "align_until": 3, "hflip": True, "cfg_prob": 0.2}
        assert train(data, tmp_path, "straight", max_train_steps=4, **options) == 0
        assert train(data, tmp_path, "resumed", max_train_steps=2, **options) == 0
        assert train(data, tmp_path, "resumed", max_train_steps=4, **options) == 0
        folders = [tmp_path / name / "checkpoints" / "0000004" for name in ("straight", "resumed")]
        for name in ("model", "ema", "alignment"):
            x, y = (load_file(folder / f"{name}.safetensors") for folder in folders)
            assert all(torch.equal(x[key], y[key]) for key in x)
        assert metrics(tmp_path / "straight")[-1] == metrics(tmp_path / "resumed")[-1]
        pictures = [(tmp_path / name / "samples" / "0000004.png").read_bytes() for name in ("straight", "resumed")]
        assert pictures[0] == pictures[1]
        capsys.readouterr()
        assert train(data, tmp_path, "resumed", max_train_steps=6, **options | {"reg_coeff": 0.1}) == 2
        refused(capsys, "--reg-coeff 0.03, not 0.1")

    def test_a_run_continues_another_with_its_token_and_no_other(self, data, trained, tmp_path, capsys):
        source = {"continue_train_exp_dir": trained, "max_train_steps": 3}
        assert train(data, tmp_path, "next", **REG, **source) == 0
        assert metrics(tmp_path / "next")[-1]["step"] == 3
        capsys.readouterr()
        assert train(data, tmp_path, "plain", **source) == 2
        refused(capsys, f"class_token_width {WIDTH}, not 0", "--reg-coeff")

    def test_a_dry_run_counts_the_token_and_writes_nothing(self, data, tmp_path, capsys):
        for changes in ({}, {"align": "none"}, {"vae_latents_name": None, "data_dir": None, "vae": "f4d4-tiny"}):
            options = {"dry_run": True, "exp_name": None} | REG | changes
            assert train(data, tmp_path, "none", resolution=32, **options) == 0
            out = capsys.readouterr().out
            assert "class_token" in out
            assert not any(tmp_path.iterdir())

    @pytest.mark.slow
    def test_two_processes_resume_exactly(self, data, tmp_path):
        def argv(name: str, steps: int) -> list[str]:
            options = {"log_steps": 2, "val_data_dir": data, "checkpointing_steps": 2} | REG
            return flags(data, tmp_path, name, max_train_steps=steps, **options)

        for name, steps in (("two", 2), ("two", 4), ("straight", 4)):
            run_stage("train_ldm.py", *argv(name, steps), processes=2)
        assert metrics(tmp_path / "two")[-1] == metrics(tmp_path / "straight")[-1]
        x, y = (load_file(tmp_path / name / "checkpoints/0000004/ema.safetensors") for name in ("two", "straight"))
        assert all(torch.equal(x[key], y[key]) for key in x)

    @pytest.mark.slow
    def test_compiled_it_trains_alike(self, data, tmp_path):
        for name, flag in (("plain", "no_compile"), ("compiled", "compile")):
            assert train(data, tmp_path, name, **{flag: True}, **REG) == 0
        plain, compiled = (metrics(tmp_path / name)[-1] for name in ("plain", "compiled"))
        assert plain["loss"] == pytest.approx(compiled["loss"], rel=1e-4)


class TestAfterwards:
    def test_a_dry_run_decodes_the_latent_alone(self, trained, capsys):
        assert run(generate.main, ["--exp-path", str(trained), "--dry-run", "--num-steps", "2"]) == 0
        assert "nothing was written" in capsys.readouterr().out

    def test_generate_samples_it(self, trained, tmp_path):
        """Image i depends on its number alone, with guidance too."""
        for name, size in (("four", 4), ("three", 3)):
            argv = ["--exp-path", str(trained), "--num-fid-samples", "8", "--num-steps", "3", "--cfg-scale", "2"]
            assert (
                run(generate.main, [*argv, "--pproc-batch-size", str(size), "--sample-dir", str(tmp_path / name)]) == 0
            )
        four, three = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("four", "three"))
        assert four.shape == (8, 32, 32, 3)
        assert np.abs(four - three).max() <= 1

    def test_guidance_of_some_channels_is_refused(self, trained, tmp_path, capsys):
        argv = ["--exp-path", str(trained), "--sample-dir", str(tmp_path / "none"), "--num-fid-samples", "2"]
        for guide in ([], ["--guide", "@2"]):
            assert run(generate.main, [*argv, "--cfg-scale", "2", "--guidance-channels", "3", *guide]) == 2
            refused(capsys, "--guidance-channels 3", "--reg-coeff")

    def test_an_export_of_it_samples_an_image(self, trained, tmp_path, monkeypatch):
        assert run(export_ldm.main, [str(trained), str(tmp_path / "ldm")]) == 0
        config = json.loads((tmp_path / "ldm" / "transformer" / "config.json").read_text())
        assert config["class_token_width"] == WIDTH
        snippet = (tmp_path / "ldm" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        monkeypatch.chdir(tmp_path)
        exec(compile(snippet, "README.md", "exec"), {})  # noqa: S102
        assert (tmp_path / "sample.png").is_file()

    def test_repa_e_s_format_cannot_hold_it(self, trained, tmp_path, capsys):
        assert run(export_ldm.main, [str(trained), str(tmp_path / "out"), "--format", "repa"]) == 2
        refused(capsys, "--format repa", "class token", "--format diffusers")
        assert not (tmp_path / "out").exists()


class TestRefused:
    def test_no_cached_class_tokens(self, data, tmp_path, capsys):
        bare = tmp_path / "bare"
        shutil.copytree(data / LATENTS, bare, ignore=lambda folder, names: [n for n in names if n.startswith("class-")])
        assert train(data, tmp_path, "none", vae_latents_name=bare, repa_source="features", **REG) == 2
        refused(capsys, "has no complete class-tokens/efficientnet-lite0", f"--cache-class-tokens --enc-type {VFM}")
        assert train(data, tmp_path, "images", vae_latents_name=bare, max_train_steps=1, **REG) == 0
        args = json.loads((tmp_path / "images" / "args.json").read_text())["args"]
        assert args["repa_source"] == "images"

    def test_of_another_grid(self, data, tmp_path, capsys):
        assert train(data, tmp_path, "none", align="none", model="SiT-Ti/4", repa_source="features", **REG) == 2
        refused(capsys, "from images of 4×4 tokens", "--features-grid 2")

    def test_no_images_of_held_out_latents(self, data, tmp_path, capsys):
        held_out = {"val_vae_latents_name": data / LATENTS, "repa_source": "images"}
        assert train(data, tmp_path, "none", **held_out, **REG) == 2
        refused(capsys, "--val-data-dir is needed")

    def test_a_vfm_that_nothing_asks_for(self, data, tmp_path, capsys):
        assert train(data, tmp_path, "none", align="none", feature_norm="channel", **REG) == 2
        refused(capsys, "--feature-norm", "nothing asks for features")
