"""probe.py on the toy set: what it writes, whatever the batch, twice the same."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import preprocessing
import probe
from dataset.attributes import TEST, TRAIN, VALIDATION
from dataset.toy import write_toy_dataset
from errors import UserError
from formats.vae import load_tokenizer
from metrics.encoding import normalise
from metrics.probe_data import open_probe_data
from metrics.record import read_measurements
from models.latent_statistics import EPSILON
from models.tokenizers.kl import KLTokenizer
from tests.annotated_sets import write_celeba
from tests.command_line import argv_of
from tests.latent_caches import save_vae

COUNT = 200


def flags(what: str, data: Path, vae: Path | None, **changes) -> list[str]:
    values = {"vae": vae, "data": data, "resolution": 32, "num_workers": 1} | changes
    return [*what.split(), *argv_of(values)]


def values_of(folder: Path) -> dict[str, dict[str, float]]:
    return {record.name: record.values for record in read_measurements(folder / "metrics")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "toy"
    write_toy_dataset(folder, COUNT, 32, seed=0, num_workers=1)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_vae(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def probed(data, vae, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("probed")
    changes = {"output_dir": folder, "num_points": 100, "components": "5", "num_pictures": 6, "steps": 3}
    assert probe.main(flags("all", data, vae, tsne=None, **changes)) == 0
    return folder


def test_all_probes_leave_their_records(probed, data, vae):
    found = values_of(probed)
    assert set(found) == {f"probe-{what}" for what in probe.PROBES}
    assert set(found["probe-attributes"]) == {
        f"attributes/{name}" for name in ("F1-macro", "F1-micro", "mAP", "top5-recall", "positives")
    }
    assert found["probe-attributes"]["attributes/positives"] == pytest.approx(6 / 26)  # 6 columns with 26 values
    assert set(found["probe-discrimination"]) >= {"discrimination/gain-5", "discrimination/AMI-5"}
    assert 0 < found["probe-uniformity"]["uniformity/gini"] < 1
    record = next(record for record in read_measurements(probed / "metrics") if record.name == "probe-classes")
    assert record.count == COUNT and record.settings["dimensions"] == 4 * 8 * 8
    assert record.settings["split"] == {"train": 140, "validation": 20, "test": 40}
    assert record.subject["vae_checksum"] == load_tokenizer(str(vae))[0].checksum()
    losses = record.settings["validation_losses"]
    assert record.settings["penalty"] == float(min(losses, key=losses.get)) and len(losses) == 6
    rows = list(csv.DictReader((probed / "metrics" / "probe-attributes.csv").open()))
    assert len(rows) == 26 and rows[0]["attribute"] == "shape=circle"
    macro = np.mean([float(row["F1"]) for row in rows])
    assert macro == pytest.approx(found["probe-attributes"]["attributes/F1-macro"], abs=1e-4)


def test_several_vaes_are_compared_and_the_batch_changes_no_bit(data, vae, tmp_path, capsys):
    """Two VAEs into one folder, then one of them alone, with another batch: the same figures, and a table of both."""
    other = save_vae(tmp_path / "other-run", seed=1)
    both = ["diffusability", "attributes", "--vae", str(vae), "--vae", str(other)]
    rest = {"data": data, "resolution": 32, "num_workers": 1, "max_images": 80}
    assert probe.main([*both, *argv_of(rest | {"output_dir": tmp_path / "both"})]) == 0
    table = capsys.readouterr().out.splitlines()[-4:]
    found, labels = values_of(tmp_path / "both"), [vae.parent.name, "other-run"]
    assert set(found) == {f"probe-{what}-{label}" for what in ("diffusability", "attributes") for label in labels}
    assert table[0].split()[:3] == ["VAE", "F1-macro", "F1-micro"] and "velocity-variance" in table[0]
    for label, line in zip(labels, table[2:], strict=True):
        values = found[f"probe-attributes-{label}"] | found[f"probe-diffusability-{label}"]
        assert line.split() == [label, *(f"{value:.4f}" for value in values.values())]
        assert all(np.isfinite(value) for value in values.values())
    alone = flags("diffusability", data, other, max_images=80, output_dir=tmp_path / "alone", batch_size=1)
    assert probe.main(alone) == 0
    assert values_of(tmp_path / "alone")["probe-diffusability"] == found["probe-diffusability-other-run"]


def test_several_vaes_that_cannot_be_meant_are_refused(data, vae):
    for changes, words in (
        ({"vae": [vae, vae]}, "given twice"),
        ({"vae": [vae, "f4d4-tiny"], "vae_ckpt": "none"}, "--vae-ckpt is for one VAE, and there are 2"),
        ({"features": "pixels"}, "diffusability is of a VAE"),
    ):
        vaes = [word for path in changes.pop("vae", []) for word in ("--vae", str(path))]
        with pytest.raises(UserError, match=words):
            probe.parse_arguments(["diffusability", "--data", str(data), *vaes, *argv_of(changes)])


def test_a_vae_that_cannot_be_probed_is_refused_before_the_first_is(data, vae, tmp_path):
    argv = flags("classes", data, vae, output_dir=tmp_path / "out")
    with pytest.raises(UserError, match="nowhere"):
        probe.main([*argv, "--vae", str(tmp_path / "nowhere")])
    assert not (tmp_path / "out").exists()


def test_pictures_have_their_sizes(probed):
    sizes = {path.stem: Image.open(path).size for path in (probed / "metrics").glob("*.png")}
    # 6 images, then their colours below; 3 pairs with 3 steps between, 2 px apart
    assert sizes["probe-pictures-colours"] == (6 * 98 - 2, 2 * 98 - 2)
    assert sizes["probe-pictures-ways"] == (5 * 98 - 2, 3 * 98 - 2)
    assert sizes["probe-pictures-map"] == (960, 720)
    assert np.asarray(Image.open(probed / "metrics" / "probe-pictures-map.png").convert("L")).std() > 10


def test_the_same_bits_again_with_another_batch(probed, data, vae, tmp_path):
    assert probe.main(flags("attributes", data, vae, output_dir=tmp_path, batch_size=1)) == 0
    name = "probe-attributes"
    assert values_of(tmp_path) == {name: values_of(probed)[name]}
    table = f"metrics/{name}.csv"
    assert (tmp_path / table).read_bytes() == (probed / table).read_bytes()


def test_raw_pixels_tell_the_background(data, tmp_path):
    argv = flags("attributes", data, None, features="pixels", resolution=16, output_dir=tmp_path)
    assert probe.main(argv) == 0
    rows = list(csv.DictReader((tmp_path / "metrics" / "probe-attributes.csv").open()))
    scores = {row["attribute"]: float(row["F1"]) for row in rows}
    assert scores["background=white"] > 0.9 and scores["background=black"] > 0.9
    found = values_of(tmp_path)
    assert found["probe-attributes"]["attributes/mAP"] > 0.5 > found["probe-attributes"]["attributes/positives"]


def test_tokens_of_a_vfm_tell_the_background(data, tmp_path):
    for grid in (4, 1):
        output = tmp_path / str(grid)
        argv = flags("attributes", data, None, features="efficientnet-lite0", features_grid=grid, output_dir=output)
        assert probe.main(argv) == 0
        record = json.loads((output / "metrics" / "probe-attributes.json").read_text())
        assert record["subject"]["path"] == f"{grid}×{grid} tokens of efficientnet-lite0"
        rows = list(csv.DictReader((output / "metrics" / "probe-attributes.csv").open()))
        scores = {row["attribute"]: float(row["F1"]) for row in rows}
        assert scores["background=white"] > 0.9 and scores["background=black"] > 0.9


def test_latents_are_normalised_with_the_vae_s_statistics_or_their_own():
    values = torch.randn(50, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    raw = values.clone()
    statistics = normalise(values, None)
    assert values.double().mean((0, 2, 3)).abs().max() < 1e-6
    variance = raw.double().var((0, 2, 3))
    torch.testing.assert_close(values.double().var((0, 2, 3)), variance / (variance + EPSILON), rtol=1e-5, atol=0)
    torch.testing.assert_close(statistics.denormalize(values), raw, rtol=1e-5, atol=1e-5)


def test_the_data_s_own_split_is_used(tmp_path):
    data = open_probe_data(write_celeba(tmp_path), 16, default=256)
    assert data.split.tolist() == [TRAIN, TRAIN, VALIDATION, TEST] and data.splits_as_given
    assert data.kind == "celeba" and data.attributes.shape == (4, 3)


def test_a_split_without_validation_images_spares_some_of_the_training_images(tmp_path):
    write_toy_dataset(tmp_path / "toy", 40, 16, seed=0, num_workers=1)
    path = tmp_path / "toy" / "attributes.csv"
    header, *rows = path.read_text().splitlines()
    lines = [f"{row},{'test' if number % 4 == 0 else 'train'}" for number, row in enumerate(rows)]
    path.write_text("\n".join([f"{header},split", *lines]))
    first, again, other = (open_probe_data(tmp_path / "toy", 16, default=256, seed=seed) for seed in (0, 0, 1))
    assert first.counts() == {"train": 27, "validation": 3, "test": 10}
    assert np.array_equal(first.split == TEST, np.arange(40) % 4 == 0)
    assert np.array_equal(first.split, again.split) and not np.array_equal(first.split, other.split)


def test_all_goes_on_without_what_cannot_be_done(tmp_path, capsys):
    """Twelve images of a collapsed VAE: a line for each probe that is left out, a record of each other one."""

    def spoil(tokenizer) -> None:
        with torch.no_grad():
            tokenizer.network.quant_conv.weight.zero_()

    write_toy_dataset(tmp_path / "toy", 12, 32, seed=0, num_workers=1)
    folder = save_vae(tmp_path / "run", change=spoil)
    assert probe.main(flags("all", tmp_path / "toy", folder, output_dir=tmp_path / "out")) == 0
    assert set(values_of(tmp_path / "out")) == {f"probe-{what}" for what in ("attributes", "classes", "diffusability")}
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert [line.partition(" ")[0] for line in lines] == ["discrimination", "uniformity", "pictures"]
    assert "8 training images" in lines[0] and all("has collapsed" in line for line in lines[1:])


def test_a_test_set_of_its_own(data, vae, tmp_path):
    write_toy_dataset(tmp_path / "val", 60, 32, seed=1, num_workers=1)
    for folder in (data, tmp_path / "val"):
        argv = ["--imagenet-path", str(folder), "--output-path", str(tmp_path / f"packed-{folder.name}")]
        assert preprocessing.main([*argv, "--resolution", "32", "--num-workers", "1"]) == 0
    argv = flags("classes", tmp_path / "packed-toy", vae, val_data=tmp_path / "packed-val", output_dir=tmp_path)
    assert probe.main(argv) == 0
    (record,) = read_measurements(tmp_path / "metrics")
    assert record.settings["split"] == {"train": 180, "validation": 20, "test": 60}
    joined = open_probe_data(tmp_path / "packed-toy", None, default=256, val_path=tmp_path / "packed-val")
    pixels, expected = np.empty((2, 3, 32, 32), np.uint8), np.empty((2, 3, 32, 32), np.uint8)
    joined.images.read_into([201, 0], pixels)
    open_probe_data(tmp_path / "packed-val", None, default=256).images.read_into([1], expected[:1])
    open_probe_data(tmp_path / "packed-toy", None, default=256).images.read_into([0], expected[1:])
    np.testing.assert_array_equal(pixels, expected)


def test_random_weights_come_from_the_seed(data, tmp_path):
    runs = {"first": 0, "again": 0, "other": 1}
    for name, seed in runs.items():
        changes = {"vae_ckpt": "none", "seed": seed, "output_dir": tmp_path / name, "max_images": 60, "tsne": None}
        assert probe.main(flags("discrimination", data, "f4d4-tiny", components="2", **changes)) == 0
    first, again, other = (values_of(tmp_path / name)["probe-discrimination"] for name in runs)
    assert first == again and first != other


def test_what_a_vae_cannot_encode_is_said_before_anything_is_encoded(data, vae, tmp_path, capsys, monkeypatch):
    """Half the side, of a VAE of one resolution: a line, also of a dry run, and a record without that figure."""
    shape = KLTokenizer.latent_shape

    def of_one_resolution(tokenizer, resolution):
        if resolution != 32:
            raise UserError("32 px only")
        return shape(tokenizer, resolution)

    monkeypatch.setattr(KLTokenizer, "latent_shape", of_one_resolution)
    line = "scale-error of diffusability is left out: this VAE encodes no images of 16 px\n"
    argv = flags("diffusability", data, vae, max_images=20, output_dir=tmp_path)
    assert probe.main([*argv, "--dry-run"]) == 0 and capsys.readouterr().err.startswith(line)
    assert probe.main(argv) == 0 and capsys.readouterr().err.startswith(line)
    undefined = [name for name, value in values_of(tmp_path)["probe-diffusability"].items() if value is None]
    assert undefined == ["diffusability/scale-error"]


def test_latents_of_a_vae_without_statistics_are_as_wide_as_white_noise(data, tmp_path):
    """Of unit variance, no latents have a larger velocity-gaussian than white noise: a mean of roots (Jensen)."""
    changes = {"vae_ckpt": "none", "max_images": 60, "output_dir": tmp_path}
    assert probe.main(flags("diffusability", data, "f4d4-tiny", **changes)) == 0
    found = values_of(tmp_path)["probe-diffusability"]["diffusability/velocity-gaussian"]
    assert 0 < found <= np.pi / 2


def test_a_dry_run_writes_nothing(data, vae, tmp_path, capsys):
    assert probe.main(flags("all", data, vae, output_dir=tmp_path / "out", dry_run=True)) == 0
    out = capsys.readouterr().out
    assert "nothing was written" in out and "26 attributes" in out and not (tmp_path / "out").exists()
