"""evaluate.py generation from files to figures: what they are, and what they do not depend on."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import evaluate
import generate
import metrics.evaluate_generation as command
import metrics.generation as generation
import report
from dataset.images import open_images
from dataset.npz_images import NpzImages
from errors import UserError
from metrics.features import Extractor, build_extractor
from metrics.frechet import Gaussian, frechet_distance
from metrics.record import Measurement, read_measurements
from metrics.sources import open_image_set
from runtime.cli import EXIT_USER_ERROR, run
from tests.command_line import argv_of
from tests.image_sets import SIDE, random_images, write_folder, write_npz, write_packed
from tests.inception_weights import write_inception_weights
from tests.ldm_runs import flags as ldm_flags
from tests.ldm_runs import write_ldm_run
from tests.stages import ROOT, run_stage, two_without_launcher
from tests.test_damage import flip_bit
from tests.test_set_metrics import mind_in_words, mmd2_in_words, precision_recall_in_words

LITE0 = "efficientnet-lite0"


class TinyNetwork(nn.Module):
    """In Inception's place: 6 pooled features, 5 spatial ones, 4 logits."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 16, 15)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(0))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.layer(nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)).split((6, 5, 4), dim=1)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Extractor:
    extractor = Extractor("inception", TinyNetwork(), "0" * 64)
    monkeypatch.setattr(command, "build_extractor", lambda *args, **kwargs: extractor)
    return extractor


def measured(samples: Path, ref: Path, **flags: object) -> Measurement:
    """Run evaluate.py generation in this process."""
    assert evaluate.main(["generation", *argv_of({"samples": samples, "ref": ref} | flags)]) == 0
    return newest(samples)


def newest(samples: Path) -> Measurement:
    (found,) = read_measurements(open_image_set(samples, "--samples").metrics_folder)
    return found


def features_of(extractor: Extractor, images: np.ndarray) -> tuple[np.ndarray, ...]:
    features = extractor(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    return tuple(x.double().numpy() for x in (features.pooled, features.spatial, features.logits))


def distance(x: np.ndarray, y: np.ndarray) -> float:
    return frechet_distance(*(Gaussian(z.mean(0), np.cov(z, rowvar=False)) for z in (x, y)))


def distance_of_few(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance of fewer vectors than dimensions, without a covariance."""
    x, y, shift = x - x.mean(0), y - y.mean(0), x.mean(0) - y.mean(0)
    x, y = x / np.sqrt(len(x) - 1), y / np.sqrt(len(y) - 1)
    overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return shift @ shift + (x**2).sum() + (y**2).sum() - 2 * overlap


def values_in_words(
    ours: tuple[np.ndarray, ...], theirs: tuple[np.ndarray, ...], distance: Callable = distance
) -> dict[str, float]:
    """All metrics from all features at once; MIND of sets of one size."""
    p = torch.from_numpy(ours[2]).softmax(1).numpy()
    pooled = [torch.from_numpy(x[0]).float() for x in (ours, theirs)]
    precision, recall = precision_recall_in_words(*pooled)
    return {
        "FID": distance(ours[0], theirs[0]),
        "sFID": distance(ours[1], theirs[1]),
        "IS": np.exp((p * np.log(p / p.mean(0))).sum(1).mean()),
        "Precision": precision,
        "Recall": recall,
        "KID": mmd2_in_words(ours[0], theirs[0]),
        **({"MIND": mind_in_words(ours[0], theirs[0])} if len(ours[0]) == len(theirs[0]) else {}),
    }


def test_all_metrics_against_definitions(tiny, tmp_path):
    """Of equal set sizes, so that KID's subsets are the sets."""
    ours, theirs = random_images(30, 0), random_images(30, 1)
    found = measured(write_packed(tmp_path / "a", ours), write_packed(tmp_path / "b", theirs), batch_size=7)
    expected = values_in_words(features_of(tiny, ours), features_of(tiny, theirs))
    assert found.values.pop("KID-std") is None
    assert list(found.values) == list(expected)
    assert found.values == pytest.approx(expected, rel=1e-5)
    assert found.name == "generation" and found.kind == "generation" and found.count == 30
    assert found.extractor == {"name": "inception-v3-2015-12-05", "weights_sha256": "0" * 64}
    assert found.reference["count"] == 30 and found.settings["kid_subset_size"] == 30


@pytest.mark.slow
def test_inception_with_adms_reference(tmp_path, capsys):
    """Statistics of the file for FID and sFID, its images for the rest; the same with another batch size.

    Of fewer images than dimensions, a distance follows from the products of all pairs of centred features.
    """
    weights = write_inception_weights(tmp_path / "inception.pth")
    extractor = build_extractor("inception", str(weights))
    ours, theirs = random_images(9, 0), random_images(7, 1)
    stored = features_of(extractor, random_images(8, 2))
    statistics = {
        f"{name}{suffix}": values
        for suffix, x in (("", stored[0]), ("_s", stored[1]))
        for name, values in (("mu", x.mean(0)), ("sigma", np.cov(x, rowvar=False)))
    }
    ref = write_npz(tmp_path / "ref" / "adm.npz", theirs, **statistics)
    samples = write_npz(tmp_path / "samples" / "samples.npz", ours)
    found = measured(samples, ref, inception_ckpt=weights, batch_size=4)
    of_ours, of_theirs = features_of(extractor, ours), features_of(extractor, theirs)
    expected = values_in_words(of_ours, of_theirs, distance_of_few)
    expected |= {name: distance_of_few(of_ours[i], stored[i]) for i, name in enumerate(("FID", "sFID"))}
    expected.pop("KID")  # of subsets of 7
    assert {name: found.values[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert found.reference["statistics_of_the_file"] == ["fid", "sfid"]
    assert min(found.values["FID"], found.values["sFID"], found.values["IS"] - 1) > 1e-3
    again = measured(samples, ref, inception_ckpt=weights, batch_size=1, metrics="is,pr,kid,mind").values
    assert again.pop("KID-std") is found.values["KID-std"] is None  # a subset is all of the 7
    assert again == pytest.approx({name: found.values[name] for name in again}, rel=1e-4)
    assert "FID " in capsys.readouterr().out


@pytest.mark.slow
def test_neither_batch_nor_layout_nor_processes_matter(tmp_path):
    """FD, Precision, Recall and KID of a real network: batches of 1, 7 and 64, four layouts, one and two processes."""
    ours, theirs = random_images(20, 0), random_images(17, 1)
    ref = write_packed(tmp_path / "ref", theirs)
    layouts = {
        "packed": write_packed(tmp_path / "packed", ours),
        "npz": write_npz(tmp_path / "npz" / "samples.npz", ours),
        "compressed": write_npz(tmp_path / "compressed" / "samples.npz", ours, compressed=True),
        "folder": write_folder(tmp_path / "folder", ours),
        "two processes": write_packed(tmp_path / "two", ours),
    }
    argv = argv_of(
        {"samples": layouts["two processes"], "ref": ref, "features": LITE0, "ref_cache": tmp_path / "two-ref"}
    )
    two = run_stage("evaluate.py", "generation", *argv, "--batch-size", "3", processes=2)
    assert two.stdout.count("written to") == 1
    found = {
        "two processes": newest(layouts["two processes"]).values,
        "packed": measured(layouts["packed"], ref, features=LITE0, batch_size=64).values,
        "npz": measured(layouts["npz"], ref, features=LITE0, batch_size=7).values,
        "compressed": measured(layouts["compressed"], ref, features=LITE0, batch_size=7).values,
        "folder": measured(layouts["folder"], ref, features=LITE0, batch_size=1).values,
    }
    expected = found.pop("packed")
    assert list(expected) == [f"{name}-{LITE0}{end}" for name, end in (
        ("FD", ""), ("Precision", ""), ("Recall", ""), ("KID", ""), ("KID", "-std"), ("MIND", ""))]  # fmt: skip
    assert expected[f"FD-{LITE0}"] > 0.01
    assert {values.pop(f"KID-{LITE0}-std") for values in (expected, *found.values())} == {None}  # subsets are the sets
    for values in found.values():
        assert values == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["generation", "reconstruction"])
def test_damage_that_one_process_finds_ends_both(tmp_path, what):
    """The second one reads the damaged shard; the first does not wait for it."""
    data = write_packed(tmp_path / "set", random_images(20, 0, 32))
    flip_bit(data / "images-00000.npy", -1)
    flags = {
        "generation": {"samples": data, "ref": write_packed(tmp_path / "ref", random_images(9, 1, 32))},
        "reconstruction": {
            "vae": ROOT / "pretrained" / "tiny_vae",
            "data": data,
            "output_dir": tmp_path,
            "metrics": "psnr,rfid",
        },
    }[what]
    (first, says_first), (second, says_second) = two_without_launcher(
        "evaluate.py", what, *argv_of(flags | {"features": LITE0})
    )
    assert first == second == EXIT_USER_ERROR
    assert "another process was refused" in says_first
    assert "images-00000.npy" in says_second


def test_features_of_the_reference_are_kept(tiny, tmp_path, monkeypatch):
    """Beside it, by its contents and the network's weights; a damaged file is made again."""
    summarise, passes = generation.summarise, []

    def watched(*args, description, **kwargs):
        passes.append(description)
        return summarise(*args, description=description, **kwargs)

    monkeypatch.setattr(generation, "summarise", watched)
    samples, ref = write_packed(tmp_path / "a", random_images(9, 0)), write_npz(tmp_path / "b.npz", random_images(8, 1))
    first = measured(samples, ref, metrics="fid").values
    assert first == measured(samples, ref, metrics="fid").values
    assert passes == ["reference", "samples", "samples"]
    everything = measured(samples, ref).values
    assert measured(samples, ref).values == everything
    assert passes[3:] == ["reference", "samples", "samples"]
    for path in (tmp_path / "b.npz.features").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert measured(samples, ref).values == everything
    write_npz(ref, random_images(8, 5))
    assert measured(samples, ref).values != everything
    tiny.weights_sha256 = "1" * 64
    measured(samples, ref, ref_cache=tmp_path / "elsewhere")
    assert passes[6:] == ["reference", "samples"] * 3
    assert len(list((tmp_path / "elsewhere").iterdir())) == 3


def test_a_reference_that_cannot_be_written_beside(tiny, tmp_path, capsys):
    samples, ref = write_packed(tmp_path / "a", random_images(9, 0)), write_packed(tmp_path / "b", random_images(8, 1))
    (tmp_path / "b.features").write_text("in the way")
    measured(samples, ref)
    assert "--ref-cache" in capsys.readouterr().err


def test_the_first_images(tiny, tmp_path):
    """--num-samples N is the set of the first N; --name is the file's."""
    images = random_images(12, 0)
    ref = write_packed(tmp_path / "ref", random_images(9, 1))
    part = measured(write_packed(tmp_path / "all", images), ref, num_samples=8)
    assert part.values == measured(write_packed(tmp_path / "first", images[:8]), ref, name="generation").values
    assert part.count == 8


def test_names_of_the_files(tiny, tmp_path):
    images = random_images(8, 0)
    ref = write_packed(tmp_path / "ref", random_images(9, 1))
    for name in ("samples", "cfg2.5"):
        evaluate.main(["generation", *argv_of({"samples": write_npz(tmp_path / f"{name}.npz", images), "ref": ref})])
    found = [measurement.name for measurement in read_measurements(tmp_path / "metrics")]
    assert found == ["generation-cfg2.5", "generation"]


def test_statistics_of_another_network_serve_as_reference(tmp_path, capsys):
    """Without images, for its Fréchet distance alone, told by their width; Inception's are never taken for them."""
    samples, theirs = write_packed(tmp_path / "a", random_images(9, 0)), random_images(8, 1)
    features = build_extractor(LITE0)(torch.from_numpy(theirs.transpose(0, 3, 1, 2).copy())).pooled.double().numpy()
    mu, sigma = features.mean(0), np.cov(features, rowvar=False)
    np.savez(tmp_path / "lite0.npz", mu=mu, sigma=sigma)
    expected = measured(samples, write_packed(tmp_path / "b", theirs), features=LITE0, metrics="fid").values
    (samples / "metrics" / f"generation-{LITE0}.json").unlink()
    found = measured(samples, tmp_path / "lite0.npz", features=LITE0, metrics="fid")
    assert list(found.values) == [f"FD-{LITE0}"] and found.values == pytest.approx(expected, rel=1e-4)
    assert found.reference["statistics_of_the_file"] == ["fid"] and found.reference["count"] is None

    def refused(ref: str, **flags: str) -> str:
        capsys.readouterr()
        argv = argv_of({"samples": samples, "ref": tmp_path / ref, "features": LITE0} | flags)
        assert run(evaluate.main, ["generation", *argv]) == EXIT_USER_ERROR
        return capsys.readouterr().err

    np.savez(tmp_path / "narrow.npz", mu=mu[1:], sigma=sigma[1:, 1:])
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert f"mu has {len(mu) - 1} numbers, {LITE0} gives {len(mu)}" in refused("narrow.npz", metrics="fid")
    assert "has no images (arr_0), which pr, kid, mind need" in refused("lite0.npz")
    assert "has no images (arr_0), which fid need" in refused("inception.npz", metrics="fid")
    assert "[2048] is needed" in refused("lite0.npz", metrics="fid", features="inception").replace(", [2048, 2048]", "")


def test_a_class_tree_keeps_its_classes(tiny, tmp_path, capsys):
    """Its measurements lie beside it, where report.py finds them by the tree's name or a pattern."""
    tree = write_folder(tmp_path / "tree", random_images(8, 0))
    before = sorted(tmp_path.rglob("tree/**"))
    values = measured(tree, write_packed(tmp_path / "ref", random_images(9, 1))).values
    assert sorted(tmp_path.rglob("tree/**")) == before and open_images(tree, SIDE).class_names == ["0", "1"]
    assert (tmp_path / "tree.metrics" / "generation.json").is_file()
    for path in (tree, tmp_path / "tr*"):
        capsys.readouterr()
        assert report.main([str(path), "--format", "json", "--no-html"]) == 0
        found = {row["metric"]: row["measured"] for row in json.loads(capsys.readouterr().out)["results"]}
        assert found == {name: value for name, value in values.items() if name != "KID-std"}


def test_another_reference_replaces_nothing(tiny, tmp_path):
    samples = write_packed(tmp_path / "a", random_images(9, 0))
    for name, seed in (("one", 1), ("two", 2), ("one", 1)):
        ref = write_npz(tmp_path / f"{name}.npz", random_images(8, seed))
        assert evaluate.main(["generation", *argv_of({"samples": samples, "ref": ref})]) == 0
    found = {m.name: Path(m.reference["path"]).stem for m in read_measurements(samples / "metrics")}
    assert found == {"generation": "one", "generation-two": "two"}


def test_samples_of_a_run(tiny, tmp_path):
    """A run's only folder of samples is found, and what made it is told."""
    run = tmp_path / "exps" / "ldm"
    run.mkdir(parents=True)
    (run / "args.json").write_text("{}")
    with pytest.raises(UserError, match=r"generate\.py --exp-path"):
        open_image_set(run, "--samples")
    folder = write_packed(run / "samples-0000010", random_images(8, 0), {"train_steps": 10, "cfg_scale": 2.5})
    assert evaluate.main(["generation", *argv_of({"samples": run, "ref": folder})]) == 0
    found = newest(folder)
    assert found.subject["made_by"] == {"train_steps": 10, "cfg_scale": 2.5}
    assert found.values["FID"] < 1e-9 and found.values["Precision"] == 1
    write_packed(run / "samples-0000020", random_images(8, 1))
    with pytest.raises(UserError, match="samples-0000010, samples-0000020"):
        open_image_set(run, "--samples")


def test_dry_run_writes_nothing(tiny, tmp_path, capsys):
    samples = write_packed(tmp_path / "a", random_images(9, 0))
    before = sorted(tmp_path.rglob("*"))
    assert evaluate.main(["generation", *argv_of({"samples": samples, "ref": samples, "dry_run": True})]) == 0
    output = capsys.readouterr().out
    assert "9 images of 32 px" in output and "images/s" in output and "6 pooled, 5 spatial, 4 logits" in output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("compressed", [False, True])
def test_images_of_an_npz(tmp_path, compressed):
    """In any order, where other arrays lie around them; a file of the same images has the same fingerprint."""
    images = random_images(11, 0)
    path = write_npz(tmp_path / "a.npz", images, compressed, mu=np.zeros(3))
    found = NpzImages(path)
    assert len(found) == 11 and found.resolution == SIDE and found.is_sequential == compressed
    for items in ([0, 1, 2], [5, 9, 10], [3], [10, 0]):
        out = np.empty((len(items), 3, SIDE, SIDE), np.uint8)
        found.read_into(items, out)
        np.testing.assert_array_equal(out, images[items].transpose(0, 3, 1, 2))
    write_npz(tmp_path / "copy.npz", images, compressed, mu=np.zeros(3))
    assert NpzImages(tmp_path / "copy.npz").fingerprint() == found.fingerprint()
    write_npz(tmp_path / "other.npz", images[::-1], compressed, mu=np.zeros(3))
    assert NpzImages(tmp_path / "other.npz").fingerprint() != found.fingerprint()


def test_a_timm_network(tmp_path):
    """What it hands to its classifier, from a file of weights, by its own name."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model("resnet10t").eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    extractor = build_extractor("timm/resnet10t", str(tmp_path / "weights.pth"))
    size = extractor.network.size
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = network.forward_head(network.forward_features((images / 255 - mean) / std), pre_logits=True)
    torch.testing.assert_close(extractor(images).pooled, expected, rtol=1e-4, atol=1e-4)
    assert generation.choose_metrics(None, extractor.name) == ("fid", "pr", "kid", "mind")
    image_set = open_image_set(write_packed(tmp_path / "a", random_images(4, 0)), "--samples")
    assert generation.measurement_name(image_set, extractor.name) == "generation-timm-resnet10t"


def test_mean_of_tokens():
    extractor = build_extractor("dinov2-vit-s", random_weights=True)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    tokens = extractor.network.encoder(images)
    assert tokens.shape == (1, 256, 384)
    torch.testing.assert_close(extractor(images).pooled, tokens.mean(1))


@pytest.mark.slow
def test_generate_evaluates(tmp_path, capsys):
    """Without an .npz, the same figures as evaluate.py afterwards; a second run does not sample again."""
    run = write_ldm_run(tmp_path / "run")
    ref = write_folder(tmp_path / "ref", random_images(8, 1))
    argv = ldm_flags(run, sample_dir=tmp_path / "out", evaluate=ref, features=LITE0, num_fid_samples=9)
    assert generate.main(argv) == 0
    found = newest(tmp_path / "out")
    assert found.subject["made_by"]["train_steps"] == 10 and found.count == 9
    assert f"FD-{LITE0}" in capsys.readouterr().out
    assert not (tmp_path / "out" / "samples.npz").exists()
    again = measured(tmp_path / "out", ref, features=LITE0).values
    assert found.values.pop(f"KID-{LITE0}-std") is again.pop(f"KID-{LITE0}-std") is None  # of 8 images
    assert again == pytest.approx(found.values, rel=1e-4)
    (tmp_path / "out" / "metrics" / f"generation-{LITE0}.json").unlink()
    assert generate.main(argv) == 0
    assert "sampling" not in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "metrics" / f"generation-{LITE0}.json").read_text())["count"] == 9
