"""evaluate.py reconstruction: scores against formulas, the same values for any batch and number of processes."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from PIL import Image
from scipy.ndimage import correlate1d
from torch import Tensor

import evaluate
from dataset.images import open_images
from dataset.toy import write_toy_dataset
from errors import UserError
from files import weights_checksum
from formats.vae import load_tokenizer
from loss.perceptual import build_lpips
from loss.reconstruction import psnr
from metrics.evaluate_reconstruction import build_extractor as build_extractor_of_sets
from metrics.features import Extractor, Features, build_extractor
from metrics.reconstruction import PairScores, ssim, worst
from metrics.record import read_measurements
from models.pixels import to_uint8
from runtime.cli import run
from tests.command_line import argv_of
from tests.image_sets import random_images, write_packed
from tests.latent_caches import save_vae
from tests.stages import run_stage

COUNT = 21
RFD = "rFD-efficientnet-lite0"
SIDES = {"small": 32, "large": 64}  # px of two packed sets


def flags(data: Path, vae: Path, **changes) -> list[str]:
    values = {
        "vae": vae,
        "data": data,
        "resolution": 32,
        "num_workers": 1,
        "features": "efficientnet-lite0",
        "metrics": "rfid,psnr,ssim",
    } | changes
    return ["reconstruction", *argv_of(values)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "toy"
    write_toy_dataset(folder, COUNT, 32, seed=0, num_workers=1)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_vae(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def measured(data, vae, tmp_path_factory) -> Path:
    """The folder of a run of the command."""
    folder = tmp_path_factory.mktemp("measured")
    assert evaluate.main(flags(data, vae, output_dir=folder, batch_size=7)) == 0
    return folder / "metrics"


def random_pairs(count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    first = generator.integers(0, 256, (count, 3, side, side))
    second = np.clip(first + generator.integers(-30, 31, first.shape), 0, 255)
    return first.astype(np.uint8), second.astype(np.uint8)


def ssim_by_hand(first: np.ndarray, second: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13, over one image ``[3, H, W]``, reflected at its borders."""
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()

    def mean(x: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(x, window, 1, mode="mirror"), window, 2, mode="mirror")

    x, y = first.astype(np.float64), second.astype(np.float64)
    variances = mean(x * x) - mean(x) ** 2, mean(y * y) - mean(y) ** 2
    covariance = mean(x * y) - mean(x) * mean(y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = (2 * mean(x) * mean(y) + c1) * (2 * covariance + c2)
    return float((value / ((mean(x) ** 2 + mean(y) ** 2 + c1) * (variances[0] + variances[1] + c2))).mean())


def test_psnr_and_ssim_are_their_formulas():
    first, second = random_pairs(3, 24)
    error = ((first.astype(np.float64) - second) ** 2).reshape(3, -1).mean(1)
    tensors = torch.from_numpy(first), torch.from_numpy(second)
    np.testing.assert_allclose(psnr(*tensors), 10 * np.log10(255**2 / error), rtol=1e-12)
    np.testing.assert_allclose(ssim(*tensors), list(map(ssim_by_hand, first, second)), rtol=1e-6)
    torch.testing.assert_close(ssim(tensors[0], tensors[0]), torch.ones(3, dtype=torch.float64))


def test_lpips_alex_is_its_definition(tmp_path):
    torch.manual_seed(0)
    with torch.device("meta"):
        names = torchvision.models.alexnet().features.state_dict(prefix="features.")
    state = {name: torch.randn(tensor.shape) * 0.05 for name, tensor in names.items()}
    torch.save(state, tmp_path / "alexnet.pth")
    network = build_lpips(str(tmp_path / "alexnet.pth"), net="alex", flag="--lpips-alex-ckpt")
    with torch.device("meta"):
        trunk = torchvision.models.alexnet().features
    trunk.load_state_dict({name.removeprefix("features."): tensor for name, tensor in state.items()}, assign=True)
    first, second = (torch.from_numpy(images) for images in random_pairs(2, 64))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    taps, total = (1, 4, 7, 9, 11), torch.zeros(2, dtype=torch.float64)  # after each ReLU
    x, y = (((i / 127.5 - 1) - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for i in (first.float(), second.float()))
    with torch.no_grad():
        for place, layer in enumerate(trunk):
            x, y = layer(x), layer(y)
            if place in taps:
                unit = [f.double() / (f.double().square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (x, y)]
                head = network.state_dict()[f"lin{taps.index(place)}.model.1.weight"].double()
                total += ((unit[0] - unit[1]).square() * head).sum(1).mean((1, 2))
    scores = PairScores({"alex": network})
    assert scores.names == ["PSNR", "SSIM", "LPIPS-alex"]
    np.testing.assert_allclose(scores(torch.cat([second, first], 1))[:, 2], total, rtol=1e-4)
    assert total.min() > 1e-3


def test_the_record_is_of_8_bit_reconstructions_of_latent_modes(measured, data, vae):
    tokenizer, _ = load_tokenizer(str(vae))
    images = open_images(data, 32)
    originals = np.empty((COUNT, 3, 32, 32), np.uint8)
    images.read_into(range(COUNT), originals)
    with torch.no_grad():
        found = to_uint8(tokenizer.decode(tokenizer.encode(torch.from_numpy(originals)).mean)).numpy()
    error = ((originals.astype(np.float64) - found) ** 2).reshape(COUNT, -1).mean(1)
    expected = 10 * np.log10(255**2 / error)
    (record,) = read_measurements(measured)
    assert record.values["PSNR"] == pytest.approx(expected.mean(), rel=1e-4)
    assert record.values["SSIM"] == pytest.approx(np.mean(list(map(ssim_by_hand, originals, found))), rel=1e-3)
    assert record.count == COUNT and record.kind == "reconstruction" and record.reference["count"] == COUNT
    assert record.subject["vae_checksum"] == tokenizer.checksum()
    assert record.extractor["name"] == "efficientnet-lite0" and list(record.values) == [RFD, "PSNR", "SSIM"]
    extractor = build_extractor("efficientnet-lite0")
    theirs, ours = (extractor(torch.from_numpy(batch)).pooled.double().numpy() for batch in (originals, found))
    covariances = np.cov(theirs.T), np.cov(ours.T)
    overlap = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real.trace()  # singular: half of the digits
    expected_distance = ((theirs.mean(0) - ours.mean(0)) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * overlap
    assert record.values[RFD] == pytest.approx(expected_distance, rel=1e-2) and expected_distance > 1
    rows = list(csv.DictReader((measured / "reconstruction.csv").open()))
    assert len(rows) == COUNT and rows[3]["image"] == images.name(3) and rows[3]["class"] == "cross"
    np.testing.assert_allclose([float(row["PSNR"]) for row in rows], expected, rtol=1e-4)
    # 16 worst in rows of 8: originals above reconstructions, 2 px between
    grid = np.asarray(Image.open(measured / "reconstruction-worst.png"))
    assert grid.shape == (4 * 98 - 2, 8 * 98 - 2, 3)  # enlarged thrice
    last = int(expected.argmin())
    np.testing.assert_array_equal(grid[:96:3, :96:3], originals[last].transpose(1, 2, 0))
    assert np.abs(grid[98 : 98 + 96 : 3, :96:3].astype(int) - found[last].transpose(1, 2, 0)).max() <= 1
    assert worst(expected, 2).tolist() == np.argsort(expected)[:2].tolist()


def check_values(folder: Path, measured: Path) -> None:
    """All as in ``measured``; the Fréchet distance adds up in another order."""
    found, expected = read_measurements(folder / "metrics")[0].values, read_measurements(measured)[0].values
    assert found["PSNR"] == expected["PSNR"] and found["SSIM"] == expected["SSIM"]
    assert found[RFD] == pytest.approx(expected[RFD], rel=1e-9)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_any_batch_gives_the_same_values(measured, data, vae, tmp_path, batch_size):
    assert evaluate.main(flags(data, vae, output_dir=tmp_path, batch_size=batch_size)) == 0
    for name in ("reconstruction.csv", "reconstruction-worst.png"):
        assert (tmp_path / "metrics" / name).read_bytes() == (measured / name).read_bytes()
    check_values(tmp_path, measured)


def test_two_processes_give_the_same_values(measured, data, vae, tmp_path):
    argv = flags(data, vae, output_dir=tmp_path, batch_size=8, ref_cache=tmp_path / "kept")
    for _ in range(2):  # the second finds the features of the originals kept
        run_stage("evaluate.py", *argv, processes=2)
        found = (tmp_path / "metrics" / "reconstruction.csv").read_bytes()
        assert found == (measured / "reconstruction.csv").read_bytes()
        check_values(tmp_path, measured)
        assert list((tmp_path / "kept").iterdir())


def images_of_features(monkeypatch) -> list[Tensor]:
    """The images of each call of the extractor, from now on."""
    seen: list[Tensor] = []
    forward = Extractor.forward
    monkeypatch.setattr(Extractor, "forward", lambda self, images: (seen.append(images), forward(self, images))[1])
    return seen


def test_features_of_the_originals_are_made_once(measured, data, vae, tmp_path, monkeypatch):
    """For all VAEs, and for generated images; those of a part, of another size or damaged ones are made anew."""
    seen = images_of_features(monkeypatch)

    def made(sets: int, **changes) -> None:
        seen.clear()
        argv = flags(data, vae, output_dir=tmp_path, worst=0, ref_cache=tmp_path / "kept", **changes)
        assert evaluate.main(argv) == 0
        assert sum(map(len, seen)) == sets * 24  # the last of three chunks of 8 is filled

    made(2)
    check_values(tmp_path, measured)
    made(1)
    check_values(tmp_path, measured)
    made(2, num_images=20)
    made(2, resolution=16)
    made(1, resolution=32)
    made(0, metrics="psnr")
    for file in (tmp_path / "kept").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    made(2)
    check_values(tmp_path, measured)


def test_a_reference_of_generated_images_serves_for_reconstructions(vae, sets, tmp_path, monkeypatch):
    metrics = {"features": "efficientnet-lite0", "ref_cache": tmp_path / "kept"}
    generated = {"samples": sets[0], "ref": sets[0], **metrics, "metrics": "fid,kid"}
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["generation", *argv_of(generated)]) == 0
    seen = images_of_features(monkeypatch)
    argv = flags(sets[0], vae, resolution=None, output_dir=tmp_path, ref_cache=tmp_path / "kept")
    assert evaluate.main(argv) == 0
    found = read_measurement_named(tmp_path, "reconstruction").values[RFD]
    assert len(seen) == 1  # the reconstructions, one chunk
    assert evaluate.main([*argv, "--ref-cache", str(tmp_path / "other")]) == 0
    assert read_measurement_named(tmp_path, "reconstruction").values[RFD] == pytest.approx(found, rel=1e-9)


def test_damaged_weights_of_the_features_are_named(data, vae, tmp_path, monkeypatch):
    monkeypatch.setattr(Extractor, "forward", lambda self, images: Features(torch.full((len(images), 8), torch.nan)))
    with pytest.raises(UserError, match="features are not finite"):
        evaluate.main(flags(data, vae, output_dir=tmp_path, ref_cache=tmp_path / "kept"))
    assert not (tmp_path / "kept").exists()


def test_samples_of_the_posterior_are_counted(measured, data, vae, tmp_path):
    runs = {"first": 0, "again": 0, "other": 1}
    for name, seed in runs.items():
        argv = flags(
            data, vae, output_dir=tmp_path, sample=True, seed=seed, name=name, num_images=10, worst=0, metrics="psnr"
        )
        assert evaluate.main(argv) == 0
    first, again, other = (read_measurement_named(tmp_path, name).values for name in runs)
    assert first == again and first["PSNR"] != other["PSNR"]
    assert len((tmp_path / "metrics" / "first.csv").read_text().splitlines()) == 11
    assert not list((tmp_path / "metrics").glob("*.png"))


def read_measurement_named(folder: Path, name: str):
    return next(record for record in read_measurements(folder / "metrics") if record.name == name)


def test_files_of_vaes_in_one_folder_keep_their_measurements(data, tmp_path):
    """Two checkpoints side by side, another set of images, and one place for two VAEs."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        tokenizer, _ = load_tokenizer("f4d4-tiny", "none")
        torch.save(tokenizer.network.state_dict(), tmp_path / f"v{seed}.pt")
    other = tmp_path / "other"
    write_toy_dataset(other, 9, 32, seed=1, num_workers=1)
    for name, images in (("v0", data), ("v1", data), ("v1", other)):
        given = {"vae_ckpt": tmp_path / f"{name}.pt", "metrics": "psnr", "features": None, "worst": 2}
        assert evaluate.main(flags(images, "f4d4-tiny", **given)) == 0
    found = {record.name: record for record in read_measurements(tmp_path / "metrics")}
    assert set(found) == {"reconstruction-v0", "reconstruction-v1", "reconstruction-v1-other"}
    assert len({record.values["PSNR"] for record in found.values()}) == 3
    for name in found:
        assert {path.name for path in (tmp_path / "metrics").glob(f"{name}[.-][cjw]*")} >= {
            f"{name}.json",
            f"{name}.csv",
            f"{name}-worst.png",
        }
    given["output_dir"] = tmp_path / "one place"
    assert evaluate.main(flags(data, "f4d4-tiny", **given)) == 0
    given["vae_ckpt"] = tmp_path / "v0.pt"
    with pytest.raises(UserError, match=r"reconstruction\.json is a measurement of .*v1\.pt, not of .*v0\.pt"):
        evaluate.main(flags(data, "f4d4-tiny", **given))


def test_a_dry_run_writes_nothing(data, vae, tmp_path, capsys):
    assert evaluate.main(flags(data, vae, output_dir=tmp_path / "out", dry_run=True)) == 0
    assert "nothing was written" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_lpips_networks_are_known_by_their_checksums(data, vae, tmp_path):
    torch.save(torchvision.models.alexnet().state_dict(), tmp_path / "alexnet.pth")
    given = {"metrics": "lpips-alex", "features": None, "num_images": 2, "worst": 0}
    argv = flags(data, vae, output_dir=tmp_path, lpips_alex_ckpt=tmp_path / "alexnet.pth", **given)
    assert evaluate.main(argv) == 0
    (record,) = read_measurements(tmp_path / "metrics")
    network = build_lpips(str(tmp_path / "alexnet.pth"), net="alex", flag="--lpips-alex-ckpt")
    assert record.settings["lpips_sha256"] == {"alex": weights_checksum(network.state_dict())}


def test_lpips_without_weights_is_left_out_with_a_line(data, vae, tmp_path, capsys, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    assert evaluate.main(flags(data, vae, output_dir=tmp_path, metrics=None, features=None, num_images=2)) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == 3 and "--lpips-alex-ckpt" in lines[0] and "vgg16-397923af.pth" in lines[1]
    assert "weights-inception-2015-12-05-6726825d.pth" in lines[2]
    assert set(read_measurements(tmp_path / "metrics")[0].values) == {"PSNR", "SSIM"}


@pytest.mark.parametrize(
    ("status", "step"),
    [('{"state": "finished", "step": 7}', 7), ('{"state": "running", "step": 7}', None), ("{", None)],
)
def test_only_a_finished_run_s_step_is_the_vae_s(data, vae, tmp_path, status, step):
    shutil.copytree(vae, tmp_path / "run" / "vae")
    (tmp_path / "run" / "status.json").write_text(status)
    argv = flags(data, tmp_path / "run" / "vae", metrics="psnr", features=None, num_images=2, allow_unfinished=True)
    assert evaluate.main(argv) == 0
    (record,) = tmp_path.rglob("metrics/reconstruction.json")
    assert json.loads(record.read_text())["subject"].get("step") == step


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Path, Path]:
    """Packed images of 32 px, and of 64 px in a folder of another name."""
    folder = tmp_path_factory.mktemp("sets")
    return tuple(write_packed(folder / name, random_images(5 + side // 32, side, side)) for name, side in SIDES.items())


def several(*paths: Path) -> str:
    return ",".join(map(str, paths))


def of_several(data: str, vae: Path, folder: Path, **changes) -> list[str]:
    return flags(data, vae, output_dir=folder, resolution=None, **changes)


def without_time(path: Path) -> dict:
    return json.loads(path.read_text()) | {"created": ""}


def test_two_sets_are_measured_as_by_two_commands(sets, vae, tmp_path, capsys):
    """Files, values and names, in either order; the sides differ; a row a set."""
    for path in sets:
        assert evaluate.main(of_several(str(path), vae, tmp_path / "single")) == 0
    expected = {path.name: path for path in (tmp_path / "single" / "metrics").iterdir()}
    assert {"reconstruction.json", "reconstruction-large.json", "reconstruction-large-worst.png"} < set(expected)
    capsys.readouterr()
    for order in (sets, sets[::-1]):
        assert evaluate.main(of_several(several(*order), vae, tmp_path / "both")) == 0
        found = {path.name: path for path in (tmp_path / "both" / "metrics").iterdir()}
        assert set(found) == set(expected)
        for name in expected:
            if name.endswith(".json"):
                assert without_time(found[name]) == without_time(expected[name])
            else:
                assert found[name].read_bytes() == expected[name].read_bytes()
        title, *rows = [line.split() for line in capsys.readouterr().out.split("\n\n")[-1].splitlines()]
        assert title == ["set", "px", "images", RFD, "PSNR", "SSIM"]
        facts = {"small": ["32", "6"], "large": ["64", "7"]}
        assert [row[:3] for row in rows] == [[str(path), *facts[path.name]] for path in order]
        records = [without_time(found[f"reconstruction{'-large' if path == sets[1] else ''}.json"]) for path in order]
        assert [row[3:] for row in rows] == [[f"{value:.4f}" for value in each["values"].values()] for each in records]


def test_features_are_computed_where_the_images_are(sets):
    """On the process's device, as LPIPS is; ``meta`` stands for a GPU."""
    args = evaluate.parse_arguments(flags(sets[0], Path("vae")))
    process = SimpleNamespace(device=torch.device("meta"), is_main=True)
    extractor = build_extractor_of_sets(args, process, {sets[0]: open_images(sets[0])})
    assert extractor.device.type == "meta"


def test_each_set_has_its_own_dry_run(sets, vae, tmp_path, capsys):
    assert evaluate.main(of_several(several(*sets), vae, tmp_path / "out", dry_run=True)) == 0
    out = capsys.readouterr().out
    assert [f"{path}, {side} px: batches of" in out for path, side in zip(sets, (32, 64), strict=True)] == [True, True]
    assert out.count("parameters") == 1 and out.count("nothing was written") == 1
    assert not (tmp_path / "out").exists()


def test_a_path_with_a_comma_is_one_set(sets, vae, tmp_path):
    path = tmp_path / "large, packed"
    shutil.copytree(sets[1], path)
    assert evaluate.main(of_several(str(path), vae, tmp_path, metrics="psnr", features=None, worst=0)) == 0
    (record,) = read_measurements(tmp_path / "metrics")
    assert record.reference["path"] == str(path) and record.name == "reconstruction"


def test_names_of_several_sets(sets, vae, tmp_path, capsys):
    """--name stands for the usual one; sets that are called alike are told apart, or refused."""
    alike = [tmp_path / place / "val" for place in "abc"]
    for number, path in enumerate(alike):
        write_packed(path, random_images(3, number, 32))
    few = {"metrics": "psnr", "features": None, "worst": 0}
    assert run(evaluate.main, of_several(several(*alike), vae, tmp_path / "three", **few)) == 2
    assert f"--data {alike[2]} is called like a set before it" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()
    assert run(evaluate.main, of_several(several(*alike[:2]), vae, tmp_path / "two", name="mine", **few)) == 0
    assert run(evaluate.main, of_several(str(alike[2]), vae, tmp_path / "two", name="third", **few)) == 0
    found = {record.name: record.reference["path"] for record in read_measurements(tmp_path / "two" / "metrics")}
    assert found == {"mine": str(alike[0]), "mine-val": str(alike[1]), "third": str(alike[2])}


@pytest.mark.parametrize("bad", ["nowhere", "30 px", "one image", "twice", "empty entry", "resolution"])
def test_a_bad_set_is_refused_before_any_is_measured(bad, sets, vae, tmp_path, capsys):
    named, resolution = tmp_path / bad, None
    if bad == "30 px":
        write_packed(named, random_images(3, 0, 30))
    elif bad == "one image":
        write_packed(named, random_images(1, 0, 32))
    elif bad == "twice":
        named = sets[0].parent / "." / sets[0].name
    elif bad == "resolution":
        named, resolution = sets[1], 32
    data = f"{sets[0]},," if bad == "empty entry" else several(sets[0], named)
    argv = flags(data, vae, output_dir=tmp_path / "out", resolution=resolution)
    try:
        code = run(evaluate.main, argv)
    except SystemExit as left:  # a flag that is wrong in itself
        code = left.code
    assert code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and (str(named) in errors[0] or data in errors[0]), errors
    assert not (tmp_path / "out").exists()
