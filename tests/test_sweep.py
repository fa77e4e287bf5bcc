"""generate.py --sweep: its points, its figures and what they leave open, its table, its resume, its last word."""

import csv
import json
import os
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

import evaluate
import generate
import metrics.evaluate_generation as command
from errors import UserError
from files import write_json
from inference.sample_folder import at_point, default_folder
from inference.sweep import Point, axis, points_of
from inference.trained_ldm import open_trained_ldm
from metrics import guidance_sweep
from metrics.arguments import SWEEP_METRICS
from metrics.features import Extractor
from metrics.record import Measurement, read_measurements, write_measurement
from metrics.summary import Summary
from metrics.sweep import (
    FEW_ERRORS,
    GROUPS,
    MEASURES,
    WITHOUT,
    Figure,
    PointRecords,
    Row,
    figure_of,
    jackknife_error,
    rank,
    remarks,
    table,
)
from metrics.sweep_picture import save_sweep
from runtime import cli
from tests.image_sets import random_images, write_packed
from tests.ldm_runs import STEP, flags, write_ldm_run
from tests.stages import Stage
from tests.test_evaluate_generation import TinyNetwork
from tests.test_generate import wait_for

OTHERS = {"scale": 2.0, "low": 0.0, "high": 1.0, "guide": None}
GRID = ("scale=1,1.5,3", "high=0.5,1")
NAMES = ["unguided", "cfg1.5-0-0.5", "cfg3-0-0.5", "cfg1.5-0-1", "cfg3-0-1"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ldm_run(tmp_path_factory.mktemp("exps") / "run", milestone=True)


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("refs") / "ref", random_images(12, 1))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Extractor:
    extractor = Extractor("inception", TinyNetwork(), "0" * 64)
    monkeypatch.setattr(command, "build_extractor", lambda *args, **kwargs: extractor)
    return extractor


def sweep_flags(run: Path, ref: Path, folder: Path, *grid: str, **changes: object) -> list[str]:
    values = {"sample_dir": folder, "evaluate": ref, "num_fid_samples": 6, "shard_size": 3, "mode": "ode"} | changes
    return [*flags(run, **values), "--sweep", *(grid or GRID)]


def result(folder: Path) -> dict:
    return json.loads((folder / "sweep.json").read_text())


def test_points():
    """Every combination once, without guidance once for all intervals, no interval that ends before it begins."""
    axes = [axis("scale=1,2,1.5,2"), axis("high=0.5,1"), axis("low=0,0.75")]
    assert points_of(axes, OTHERS) == [
        Point(1.0),
        *(Point(scale, low, high) for low, high in ((0, 0.5), (0, 1), (0.75, 1)) for scale in (1.5, 2)),
    ]
    assert points_of([axis("high=0.5,0.25")], OTHERS) == [Point(2, 0, 0.25), Point(2, 0, 0.5)]
    assert points_of([axis("scale=3")], OTHERS | {"low": 0.1}) == [Point(3, 0.1, 1)]
    assert Point(1.0, 0.0, 1.0).flags() == []
    assert Point(1.5, 0.1, 0.75).flags() == ["--cfg-scale", "1.5", "--guidance-low", "0.1", "--guidance-high", "0.75"]


def mean_of(features: torch.Tensor, reference: Summary | None) -> float:
    return features.mean().item()


def test_a_figure_and_its_standard_error():
    """Of a mean over groups of one size the jackknife is exact: the standard error of the groups' means."""
    torch.manual_seed(0)
    features = torch.randn(GROUPS * 50, 1).double()
    figure = figure_of(features, None, mean_of)
    assert figure.value == pytest.approx(features.mean().item(), abs=1e-12)
    n = len(features)  # the mean of a group, from what the others have
    means = [(n * figure.value - (n - n // GROUPS) * rest) / (n // GROUPS) for rest in figure.without]
    assert np.mean(means) == pytest.approx(figure.value, abs=1e-12)
    assert jackknife_error(figure.without) == pytest.approx(np.std(means, ddof=1) / np.sqrt(GROUPS), rel=1e-9)
    assert figure.without == figure_of(features, None, mean_of).without


def test_the_standard_error_is_that_of_other_samples():
    """Of a squared mean, which is biased as FD is, over 200 samples of 400: the mean of the errors is the true one."""
    generator = torch.Generator().manual_seed(0)
    samples = 0.5 + torch.randn(200, 400, 1, generator=generator, dtype=torch.float64)
    figures = [figure_of(sample, None, lambda x, _: x.mean().item() ** 2) for sample in samples]
    true = np.std([figure.value for figure in figures], ddof=1)
    estimated = np.sqrt(np.mean([jackknife_error(figure.without) ** 2 for figure in figures]))
    print(f"true {true:.4f}, estimated {estimated:.4f}")
    assert estimated == pytest.approx(true, rel=0.15)


def test_every_measure_has_its_name_among_the_flags():
    assert tuple(MEASURES) == SWEEP_METRICS


def test_few_images_tell_no_error():
    assert figure_of(torch.randn(3, 2), None, mean_of).without == ()
    assert len(figure_of(torch.randn(4, 2), None, mean_of).without) == 2
    assert jackknife_error(()) is None


def constructed(values: dict[str, float], noise: float = 0.0) -> dict[str, Figure]:
    """Figures whose leave-outs are all moved by the same draws, and each by ``noise`` times draws of its own."""
    draws = np.random.default_rng(0)
    common = draws.normal(size=GROUPS)
    return {
        name: Figure(value, tuple(value + common + noise * draws.normal(size=GROUPS))) for name, value in values.items()
    }


def test_ranks_are_of_pairs():
    """What moves all points alike, however far, says nothing against the best of them."""
    points = {f"p{scale}": Point(float(scale)) for scale in (1, 2, 3, 4)}
    values = {"p1": 9.0, "p2": 8.0, "p3": 8.1, "p4": 8.5}
    rows, best = rank(points, constructed(values))
    assert best.name == "p2" and [row.behind for row in rows] == pytest.approx([1, 0, 0.1, 0.5])
    assert all(row.error > 1 for row in rows)
    assert max(row.behind_error for row in rows) < 1e-12 and not any(row.is_noise for row in rows)
    assert "standard errors" not in " ".join(remarks(rows, best, 6))
    figures = constructed(values, noise=0.1)
    rows, best = rank(points, figures)
    for row in rows:
        difference = np.subtract(figures[row.name].without, figures["p2"].without)
        expected = np.sqrt((GROUPS - 1) * np.var(difference))  # (K − 1)/K · Σ
        assert row.behind_error == pytest.approx(expected, abs=1e-12)
        assert row.is_noise == (0 < row.behind < FEW_ERRORS * expected)
    assert [row.name for row in rows if row.is_noise] == ["p3", "p4"]
    said = remarks(rows, best, 6)
    assert "at 6 images" in said[0] and said[1].startswith("note: 2 of the others (~) are less than 2 standard errors")
    lines = table(rows, best, "FID").splitlines()
    assert lines[0].split() == ["scale", "low", "high", "FID", "±", "behind", "±"]
    assert lines[1].split()[:4] == ["1", "-", "-", "9"] and lines[3].split()[1:5] == ["3", "0", "1", "8.1"]
    assert [line[0] for line in lines[1:]] == [" ", "*", "~", "~"]


def test_equals_are_decided_for_less_guidance():
    points = {f"p{scale}": Point(float(scale)) for scale in (1, 2)}
    _, best = rank(points, {"p1": Figure(1.0), "p2": Figure(1.0)})
    assert best.name == "p1"
    assert "too few images" in remarks(*rank(points, {"p1": Figure(1.0), "p2": Figure(2.0)}), 3)[1]


@pytest.mark.parametrize("metric", SWEEP_METRICS)
def test_figures_are_those_of_evaluate(run, ref, tiny, tmp_path, capsys, metric):
    """Of every point what evaluate.py finds, all of the same labels and noise; table, picture, last word."""
    folder = tmp_path / "sweep"
    assert generate.main([*sweep_flags(run, ref, folder), "--metrics", metric]) == 0
    output = capsys.readouterr().out
    found = result(folder)
    assert [row["name"] for row in found["points"]] == NAMES
    for row in found["points"]:
        argv = ["generation", "--samples", str(folder / row["name"]), "--ref", str(ref)]
        assert evaluate.main([*argv, "--metrics", metric, "--batch-size", "4"]) == 0
        (measured,) = read_measurements(folder / row["name"] / "metrics")
        assert row["value"] == pytest.approx(measured.values[metric.upper()], rel=1e-9)
        assert row["measure"] == metric.upper() and row["error"] > 0
    values = {row["name"]: row["value"] for row in found["points"]}
    assert found["best"] == min(values, key=values.get) and len(set(values.values())) == len(NAMES)
    with open(folder / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [row["value"] for row in found["points"]]
    assert [float(row["scale"]) for row in rows] == [1, 1.5, 3, 1.5, 3]
    labels = {(folder / name / "labels.npy").read_bytes() for name in NAMES}
    assert len(labels) == 1
    with Image.open(folder / "sweep.png") as picture:
        assert picture.width > 500 and len(picture.convert("RGB").getcolors(10**6)) > 20
    assert found["command"] in output and "at 6 images" in output and output.count("the full sample at the best") == 1


def with_values(monkeypatch: pytest.MonkeyPatch, values: dict[str, float]) -> list[str]:
    """In the measure's place: figures by name; the names that were measured."""
    asked = []

    def measure(self, name, samples, process):
        asked.append(name)
        record = Measurement(name, "generation", {self.title: values[name]}, 6, samples.describe(), **self._against)
        record.settings[WITHOUT] = [values[name] + k for k in range(GROUPS)]
        write_measurement(record, self.folder)

    monkeypatch.setattr(PointRecords, "measure", measure)
    return asked


@pytest.mark.parametrize(
    ("guide", "names", "best"),
    [
        (None, ["unguided", "cfg1.5-0-0.5-3ch", "cfg3-0-0.5-3ch"], 2),
        (f"@{STEP // 2}", ["unguided", "auto1.5-0-0.5-3ch-0000005", "auto3-0-0.5-3ch-0000005"], 1),
        (f"@{STEP // 2}", ["unguided", "auto1.5-0-0.5-3ch-0000005", "auto3-0-0.5-3ch-0000005"], 0),
    ],
)
def test_the_printed_command_makes_the_best(run, ref, tiny, tmp_path, monkeypatch, capsys, guide, names, best):
    """It parses, has the best point's settings and the usual number, and makes the point's own images first."""
    with_values(monkeypatch, {name: abs(number - best) + 1.0 for number, name in enumerate(names)})
    folder = tmp_path / "sweep"
    argv = sweep_flags(run, ref, folder, *GRID, "--guide", guide) if guide else sweep_flags(run, ref, folder)
    argv += ["--sweep", "scale=1,1.5,3", "high=0.5", "--keep-images", "--preview=0", "--guidance-high", "0.9"]
    assert generate.main([*argv, "--time-shift", "2", "--guidance-channels", "3"]) == 0
    assert result(folder)["best"] == names[best]
    command = result(folder)["command"]
    assert capsys.readouterr().out.rstrip().splitlines()[-1] == command
    words = shlex.split(command)
    assert words[:2] == ["python", "generate.py"]
    args = generate.parse_arguments(words[2:])
    assert args.num_fid_samples == 50_000 and args.sweep is None and args.sample_dir is None
    assert args.evaluate == ref and args.preview == 0 and (args.guide is None) == (guide is None or best == 0)
    monkeypatch.setattr(generate, "evaluate_complete", lambda *args: None)
    made = tmp_path / "made"
    assert generate.main([*words[2:], "--num-fid-samples", "6", "--sample-dir", str(made)]) == 0
    places = (made, folder / names[best])
    settings = [json.loads((place / "index.json").read_text())["source"] for place in places]
    assert settings[0] == settings[1]
    for shard in ("images-00000.npy", "images-00001.npy"):
        assert (made / shard).read_bytes() == (folder / names[best] / shard).read_bytes()


def test_a_sweep_goes_on_and_grows(run, ref, tiny, tmp_path, monkeypatch, capsys):
    """Measured points are not made again, also where more are wanted; other settings are refused."""
    values = {name: 5.0 - number for number, name in enumerate([*NAMES, "cfg4-0-1", "cfg4-0-0.5"])}
    asked = with_values(monkeypatch, values)
    folder = tmp_path / "sweep"
    argv = sweep_flags(run, ref, folder)
    assert generate.main(argv) == 0 and asked == NAMES
    first = {path: path.stat().st_mtime_ns for path in folder.glob("*/images-*.npy")}
    tables = [(folder / f"sweep.{kind}").read_bytes() for kind in ("json", "csv", "png")]
    assert generate.main(argv) == 0 and asked == NAMES
    assert [(folder / f"sweep.{kind}").read_bytes() for kind in ("json", "csv", "png")] == tables
    assert "0 are still to be measured" in capsys.readouterr().out
    assert generate.main(sweep_flags(run, ref, folder, "scale=1,1.5,3,4", "high=0.5,1")) == 0
    assert set(asked[len(NAMES) :]) == {"cfg4-0-0.5", "cfg4-0-1"} and len(asked) == len(NAMES) + 2
    assert first.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("*/images-*.npy")}.items()
    assert result(folder)["best"] == "cfg4-0-0.5"
    with pytest.raises(UserError, match="another --seed"):
        generate.main(sweep_flags(run, ref, folder, seed=1))
    other = write_packed(tmp_path / "other", random_images(12, 2))
    assert generate.main(sweep_flags(run, other, folder)) == 0  # the same images, another reference
    assert asked[-len(NAMES) :] == NAMES
    assert first.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("*/images-*.npy")}.items()


def test_images_may_go_figures_stay(run, ref, tiny, tmp_path, monkeypatch):
    """Each point's images before the next one's are made; a rerun needs none, and refuses other settings still."""
    folder, there = tmp_path / "sweep", []
    asked = with_values(monkeypatch, dict.fromkeys(NAMES, 5.0))
    make = guidance_sweep.make_samples

    def watched(args, job):
        there.append(sorted(path.name for path in folder.glob("*") if path.name != "metrics"))
        return make(args, job)

    monkeypatch.setattr(guidance_sweep, "make_samples", watched)
    argv = [*sweep_flags(run, ref, folder), "--no-keep-images"]
    assert generate.main(argv) == 0
    assert there == [[]] * len(NAMES) and asked == NAMES
    assert sorted(path.name for path in folder.iterdir()) == ["metrics", "sweep.csv", "sweep.json", "sweep.png"]
    assert generate.main(argv) == 0 and asked == NAMES
    with pytest.raises(UserError, match="another --num-steps"):
        generate.main([*argv, "--num-steps", "4"])


def test_the_space_of_all_points_is_asked_for_first(run, ref, tiny, tmp_path, monkeypatch, capsys):
    asked = with_values(monkeypatch, dict.fromkeys(NAMES, 5.0))
    needed = []
    monkeypatch.setattr(guidance_sweep, "check_space", lambda folder, size, advice: needed.append(size))
    folder = tmp_path / "sweep"
    own = generate.parse_arguments(sweep_flags(run, ref, folder))
    assert [point.scale for point in own.points] == [1, 1.5, 3, 1.5, 3]
    assert generate.main(flags(run, sample_dir=folder / "cfg3-0-1", cfg_scale=3, num_fid_samples=6, shard_size=3,
                               mode="ode", npz=None, evaluate=ref)) == 0  # fmt: skip
    needed.clear()
    assert generate.main(sweep_flags(run, ref, folder)) == 0
    assert needed[0] == 4 * 6 * 3 * 32 * 32 and asked == NAMES
    assert "sweep of 5 points, 6 images each; 5 are still" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_in_the_second_point(run, ref, tmp_path):
    """By SIGKILL, in its second shard: then the same table, and what was complete is not made again."""
    real = {"features": "efficientnet-lite0", "num_steps": 20, "pproc_batch_size": 3}
    begun, straight = tmp_path / "begun", tmp_path / "straight"
    process = Stage("generate.py", *sweep_flags(run, ref, begun, **real))
    wait_for(begun / NAMES[1] / "images-00000.json", process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (begun / "sweep.json").exists() and not (begun / NAMES[2]).exists()
    kept = {path: path.stat().st_mtime_ns for path in begun.glob("*/images-?????.npy")}
    assert len(kept) >= 3
    for folder in (begun, straight):
        assert generate.main(sweep_flags(run, ref, folder, **real)) == 0
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in begun.glob("*/images-?????.npy")}.items()
    tables = [result(folder) for folder in (begun, straight)]
    assert tables[0]["points"] == tables[1]["points"] and tables[0]["best"] == tables[1]["best"]
    for name in NAMES:
        for number in (0, 1):
            shard = f"{name}/images-{number:05d}.npy"
            assert (begun / shard).read_bytes() == (straight / shard).read_bytes()


@pytest.mark.slow
def test_two_processes_make_one_table(run, ref, tmp_path):
    argv = {"features": "efficientnet-lite0", "ref_cache": tmp_path / "cache"}
    two, one = tmp_path / "two", tmp_path / "one"
    process = Stage("generate.py", *sweep_flags(run, ref, two, "scale=1,2", "high=0.5", **argv), processes=2)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert output.count("the full sample at the best") == 1
    assert generate.main(sweep_flags(run, ref, one, "scale=1,2", "high=0.5", **argv)) == 0
    assert [row["value"] for row in result(two)["points"]] == pytest.approx(
        [row["value"] for row in result(one)["points"]], rel=1e-5
    )
    for name in ("unguided", "cfg2-0-0.5"):
        shard = f"{name}/images-00001.npy"
        assert (two / shard).read_bytes() == (one / shard).read_bytes()


def test_several_processes_delete_nothing(run, ref, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", os.environ | {"RANK": "0", "WORLD_SIZE": "2"})
    assert cli.run(generate.main, [*sweep_flags(run, ref, tmp_path / "sweep"), "--no-keep-images"]) == 2
    assert "--no-keep-images is for one process" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_dry_run_of_a_sweep(run, ref, tiny, tmp_path, capsys):
    argv = sweep_flags(run, ref, tmp_path / "sweep", num_steps=10, dry_run=True)
    assert generate.main(argv) == 0
    output = capsys.readouterr().out
    passes = 10 + 2 * (10 + 5) + 2 * 20  # times 1, 0.9, … 0.1, five of them up to 0.5
    assert f"{passes} forward passes an image over the 5 points" in output and "for 30 images" in output
    assert f"{5 * 6 * 3 * 32**2} bytes of shards" in output
    assert not (tmp_path / "sweep").exists()


def test_default_folders(run, ref):
    trained = open_trained_ldm(run, None, "ema")
    args = generate.parse_arguments([*flags(run, evaluate=ref, num_fid_samples=None), "--sweep", *GRID])
    folder = default_folder(args, trained)
    assert folder == run / "sweep-0000010-sde3-5000-seed0" and args.num_fid_samples == 5000
    args.sample_dir = folder
    assert [at_point(args, point, trained).sample_dir.name for point in args.points] == NAMES


def test_a_record_that_is_no_measurement_is_named(run, ref, tiny, tmp_path):
    path = tmp_path / "sweep" / "metrics" / "unguided.json"
    path.parent.mkdir(parents=True)
    write_json(path, {})
    with pytest.raises(UserError, match=r"unguided\.json is not a measurement"):
        generate.main(sweep_flags(run, ref, tmp_path / "sweep"))


def test_points_of_a_guide_beside_the_null_class():
    axes = [axis("guide=1,1.5"), axis("scale=1,2"), axis("high=0.5,1")]
    points = points_of(axes, OTHERS)
    assert points == [
        Point(1.0, guide=1.0),
        *(Point(2, 0, high, 1.0) for high in (0.5, 1)),
        Point(1.0, guide=1.5),
        *(Point(2, 0, high, 1.5) for high in (0.5, 1)),
    ]
    assert [(point.is_guided, point.has_guide) for point in points] == [(False, False), *[(True, False)] * 2] + [
        (True, True)
    ] * 3
    assert points[3].flags() == ["--guide-scale", "1.5"]
    null = ["--cfg-scale", "2", "--guidance-low", "0", "--guidance-high", "0.5"]
    assert (points[1].flags(), points[4].flags()) == (null, [*null, "--guide-scale", "1.5"])


@pytest.mark.parametrize(
    ("axes", "lines"),
    [
        (
            ["scale=0.5,1,2", "guide=1,1.5"],
            {"guide 1, on [0, 0.75]": [0.5, 2], "guide 1.5, on [0, 0.75]": [0.5, 1, 2]},
        ),
        (
            ["scale=1,2", "guide=1.5", "high=0.5,1"],
            {"guide 1.5, on [0, 0.5]": [1, 2], "guide 1.5, on [0, 1]": [1, 2]},
        ),
        (["guide=1.2,1.5"], {"without the null class": [1.2, 1.5]}),
    ],
)
def test_the_picture_of_a_guide_beside_the_null_class(tmp_path, axes, lines):
    """What a guide does alone is on each of its lines, in the order of the scales, and says no interval of its own."""
    points = points_of([axis(each) for each in axes], OTHERS | {"scale": 1.0, "high": 0.75})
    rows = [Row(point, str(number), 2.0 + number, 0.1, float(number), 0.1) for number, point in enumerate(points)]
    drawn = {}
    errorbar = Axes.errorbar

    def kept(self, x, y, *args, label, **options):
        drawn[label] = x
        return errorbar(self, x, y, *args, label=label, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "errorbar", kept)
        save_sweep(tmp_path / "sweep.png", rows, rows[0], "FID", 6)
    assert drawn == lines


GUIDED_NAMES = ["unguided", "cfg2-0-0.5", "internal1.5-0.1-1", "internal1.5-0.1-1-cfg2-0-0.5"]


@pytest.mark.parametrize("best", range(len(GUIDED_NAMES)))
def test_a_sweep_over_a_guide_and_the_null_class(ref, tiny, tmp_path, monkeypatch, capsys, best):
    """Of the null class alone, of the guide alone and of both; the last word's command makes the best one's images."""
    run = write_ldm_run(tmp_path / "run", guide_depth=2)
    with_values(monkeypatch, {name: abs(number - best) + 1.0 for number, name in enumerate(GUIDED_NAMES)})
    folder = tmp_path / "sweep"
    argv = sweep_flags(run, ref, folder, "guide=1,1.5", "scale=1,2", "high=0.5", guide="internal", guide_low=0.1)
    assert generate.main(argv) == 0
    found, output = result(folder), capsys.readouterr().out
    assert [row["name"] for row in found["points"]] == GUIDED_NAMES and found["best"] == GUIDED_NAMES[best]
    assert [(row["guide"], row["scale"]) for row in found["points"]] == [(1, 1), (1, 2), (1.5, 1), (1.5, 2)]
    header = next(line for line in output.splitlines() if "behind" in line)
    assert header.split()[:4] == ["guide", "scale", "low", "high"]
    with Image.open(folder / "sweep.png") as picture:
        assert picture.width > 500
    words = shlex.split(found["command"])
    assert ("--guide" in words, "--guide-low" in words) == (best > 1, best > 1)
    made = tmp_path / "made"
    monkeypatch.setattr(generate, "evaluate_complete", lambda *args: None)
    assert generate.main([*words[2:], "--num-fid-samples", "6", "--sample-dir", str(made)]) == 0
    places = (made, folder / GUIDED_NAMES[best])
    settings = [json.loads((place / "index.json").read_text())["source"] for place in places]
    assert settings[0] == settings[1]
    assert (made / "images-00000.npy").read_bytes() == (places[1] / "images-00000.npy").read_bytes()
