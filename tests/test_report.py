"""report.py: measured beside published, runs that belong together, correlations, formats."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import report
from errors import UserError
from metrics.record import Measurement, write_measurement
from reporting import coefficients
from reporting.coefficients import bootstrap_interval, partial_correlation, pearson
from reporting.correlation import distinguishing_parts
from reporting.differences import paired_difference
from reporting.gather import gather
from reporting.results import with_means
from reporting.runs import find_runs
from reporting.tables import as_text
from runtime.cli import run
from tests.report_runs import (
    UNGUIDED,
    write_preset,
    write_probe,
    write_reconstruction,
    write_run,
    write_samples,
)


def printed(capsys, *words: object) -> str:
    assert report.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def records(capsys, *words: object) -> dict[tuple[str, str], dict]:
    found = json.loads(printed(capsys, *words, "--format", "json", "--no-html"))["results"]
    return {(record["run"], record["metric"]): record for record in found}


def test_published_figures_stand_in_the_next_column(tmp_path, capsys):
    """The whole text, once."""
    run = write_run(tmp_path / "mine")
    write_samples(run, UNGUIDED)
    out = printed(capsys, run, "--no-html", "--published", "mine=table2/depth1")
    lines = out.splitlines()
    assert lines[0] == "Generated images"
    assert _cells(lines[1]) == [
        "run", "guidance", "reference", "images", "FID ↓", "published", "sFID ↓", "published", "IS ↑", "published",
        "Precision ↑", "published", "Recall ↑", "published", "published row",
    ]  # fmt: skip
    assert _cells(lines[3]) == [
        "mine", "none", "imagenet256.npz", "50,000", "8.00", "8.42", "5.25", "5.05", "110.5", "108.3",
        "0.741", "0.74", "0.602", "0.60", "table2/depth1",
    ]  # fmt: skip
    assert lines[1].index("FID") + 5 == lines[3].index("8.00") + 4  # numbers end below their title's end
    assert "published table2: Send-VAE, arXiv 2601.05823v2, Table 2." in out
    assert "not comparable" not in out


def _cells(line: str) -> list[str]:
    return [part.strip() for part in line.split("  ") if part.strip()]


def test_guided_samples_stand_beside_guided_ones(tmp_path, capsys):
    run = write_run(tmp_path / "mine")
    write_samples(run, {"FID": 3.0}, name="plain")
    write_samples(run, {"FID": 1.5}, cfg_scale=2.5, name="guided")
    found = json.loads(printed(capsys, run, "--format", "json", "--no-html", "--published", "mine=table1/sendvae-80"))[
        "results"
    ]
    assert {record["guidance"]: (record["measured"], record["published"]) for record in found} == {
        "none": (3.0, 2.88),
        "2.5 on [0, 0.75]": (1.5, 1.41),
    }


def test_another_extractor_is_never_beside_an_fid(tmp_path, capsys):
    run = write_run(tmp_path / "mine")
    write_samples(run, {"FD-dinov2-vit-l": 80.0, "KID-dinov2-vit-l": 0.5, "Precision-dinov2-vit-l": 0.5})
    words = (run, "--published", "mine=table2/depth1", "--no-html")
    found = records(capsys, *words)
    assert set(found) == {("mine", f"{m}-dinov2-vit-l") for m in ("FD", "KID", "Precision")}
    assert all(record["published"] is None for record in found.values())
    out = printed(capsys, *words)
    assert "Generated images, features of dinov2-vit-l" in out
    assert "FID" not in out and "8.42" not in out


def test_guidance_that_nobody_knows_is_compared_with_nothing(tmp_path, capsys):
    npz = tmp_path / "samples.npz"
    npz.write_bytes(b"")
    write_measurement(Measurement("generation", "generation", {"FID": 2.0}, 50_000, {"path": str(npz)}), npz)
    name = find_runs([str(npz)])[0].name
    found = records(capsys, npz, "--published", f"{npz}=table1/sendvae-80")
    assert found[name, "FID"]["guidance"] == "unknown" and found[name, "FID"]["published"] is None


def test_a_preset_s_runs_stand_beside_its_row(tmp_path, capsys):
    """The VAE's reconstruction and the SiT's images beside one row of Table 5, another VAE's probe beside Table 8."""
    write_reconstruction(write_run(tmp_path / "five-vae", "VAE"), {"rFID": 0.3, "PSNR": 27.0}, count=1000)
    write_samples(write_run(tmp_path / "five-ldm"), {"FID": 8.0})
    folder = write_preset(tmp_path, "table5/f16d32", ["five-vae", "five-ldm"], "table5/f16d32")
    found = records(capsys, folder)
    assert found["five-vae", "rFID"]["published"] == 0.26
    assert found["five-vae", "PSNR"]["published"] == 28.59  # Table 7, the same VAE
    assert found["five-ldm", "FID"]["published"] == 17.43
    assert {record["preset"] for record in found.values()} == {"table5/f16d32"}
    out = printed(capsys, folder, "--no-html")
    assert "five-vae: measured on 1,000 images, published on 50,000: not comparable as they stand" in out
    assert "five-ldm: measured" not in out


def test_what_an_experiment_measured_itself_stands_beside_its_row(tmp_path, capsys):
    """Tables 7 and 8 train nothing: their figures lie in the experiment's own folder."""
    seven = write_preset(tmp_path, "table7/vavae", [], "table7/vavae")
    write_reconstruction(seven, {"rFID": 0.31, "PSNR": 27.5})
    eight = write_preset(tmp_path, "table8/vavae", [], "table8/vavae")
    write_probe(eight, 0.5, "data/celeba")
    write_reconstruction(write_run(tmp_path / "both-vae", "VAE"), {"rFID": 0.2})
    both = write_preset(tmp_path, "both", ["both-vae"], "table7/sendvae")
    write_reconstruction(both, {"PSNR": 28.0})
    for words in ((seven, eight, both), (tmp_path / "table*", both)):
        found = records(capsys, *words)
        assert {key: record["published"] for key, record in found.items()} == {
            ("table7-vavae", "rFID"): 0.28,
            ("table7-vavae", "PSNR"): 27.96,
            ("table8-vavae", "attributes/F1-macro"): 0.6347,
            ("both-vae", "rFID"): 0.31,
            ("both", "PSNR"): 27.62,
        }
        assert found["table7-vavae", "rFID"]["preset"] == "table7/vavae"


def test_a_given_row_replaces_the_preset_s(tmp_path, capsys):
    write_samples(write_run(tmp_path / "a-ldm"), {"FID": 8.0})
    folder = write_preset(tmp_path, "a", ["a-ldm"], "table2/depth1")
    assert records(capsys, folder)["a-ldm", "FID"]["published"] == 8.42
    assert records(capsys, folder, "--published", "a-ldm=table4/mae")["a-ldm", "FID"]["published"] == 10.01


@pytest.mark.parametrize(("data", "published"), [("data/CelebA", 0.6647), ("AwA2", 0.6623), ("data/hawaii", None)])
def test_probes_stand_beside_the_same_benchmark_only(tmp_path, capsys, data, published):
    write_probe(write_run(tmp_path / "v", "VAE"), 0.5, data, mAP=0.4)
    found = records(capsys, tmp_path / "v", "--published", "v=table8/sendvae")
    assert found["v", "attributes/F1-macro"]["published"] == published
    assert found["v", "attributes/mAP"]["published"] is None


def test_seeds_have_their_mean_and_standard_deviation(tmp_path, capsys):
    values = [7.0, 8.0, 10.0]
    for seed, value in enumerate(values):
        write_samples(write_run(tmp_path / f"t-seed{seed}-ldm", seed=seed), {"FID": value})
    write_preset(tmp_path, "table2/depth1", [f"t-seed{seed}-ldm" for seed in range(3)], "table2/depth1")
    found = records(capsys, tmp_path / "t-*")
    mean = found["table2/depth1, mean of 3", "FID"]
    assert mean["measured"] == pytest.approx(np.mean(values))
    assert mean["std"] == pytest.approx(np.std(values, ddof=1))
    assert (mean["seeds"], mean["published"]) == (3, 8.42)
    assert len(found) == 4


def test_presets_differ_from_a_baseline_seed_by_seed(tmp_path, capsys):
    """Student's t for 2 degrees of freedom has its 97.5 % quantile at 4.302653 (any table of it)."""
    figures = {"none": {0: 20.0, 1: 24.0, 2: 31.0}, "vavae": {0: 15.0, 1: 18.5, 2: 26.5}, "depth2": {1: 25.0}}
    for name, by_seed in figures.items():
        for seed, value in by_seed.items():
            values = {"FD-dinov2-vit-b": value, "KID-dinov2-vit-b": value / 10}
            write_samples(write_run(tmp_path / f"{name}-seed{seed}-ldm", seed=seed), values)
        runs = [f"{name}-seed{seed}-ldm" for seed in by_seed]
        write_preset(tmp_path, f"miniature/{name}", runs, None, name=name)
    out = printed(capsys, tmp_path / "*-ldm", "--no-html", "--baseline", "miniature/none")
    lines = out[out.index("differences to miniature/none of the same seeds") :].splitlines()
    half = 4.302653 * np.array([-5.0, -5.5, -4.5]).std(ddof=1) / np.sqrt(3)
    row = next(line for line in lines if line.startswith("miniature/vavae"))
    expected = f"miniature/vavae 3 -5 ± {half:.4g} * -0.5 ± {half / 10:.4g} *"
    assert row.split() == expected.split()
    assert next(line for line in lines if line.startswith("miniature/depth2")).split()[1:] == ["1", "+1", "+0.1"]

    values = {"FD-dinov2-vit-b": 15.0, "KID-dinov2-vit-b": 1.5}
    write_samples(write_run(tmp_path / "depth2-seed0-ldm", seed=0), values)
    write_preset(tmp_path, "miniature/depth2", ["depth2-seed0-ldm", "depth2-seed1-ldm"], None, name="depth2")
    out = printed(capsys, tmp_path / "*-ldm", "--no-html", "--baseline", "miniature/none", "--format", "markdown")
    row = next(line for line in out.splitlines() if line.startswith("| miniature/depth2 | 2 | -2 ±"))
    assert "*" not in row  # one is better, one worse
    assert all(map(math.isnan, paired_difference([1.0, math.nan], [2.0, 3.0])))
    page = tmp_path / "page.html"
    assert report.main([str(tmp_path / "*-ldm"), "--html", str(page), "--baseline", "miniature/none"]) == 0
    assert "differences to miniature/none" in page.read_text()
    capsys.readouterr()
    assert run(report.main, [str(tmp_path / "*-ldm"), "--no-html", "--baseline", "miniature"]) == 2
    assert "there are miniature/depth2, miniature/none, miniature/vavae" in capsys.readouterr().err


def test_runs_with_other_flags_are_no_seeds_of_the_preset_s(tmp_path, capsys):
    for name, fid in (("a", 7.0), ("b", 9.0), ("c", 20.0), ("d", 24.0)):
        write_samples(write_run(tmp_path / f"{name}-ldm"), {"FID": fid})
    changes = ("--ldm.epochs 10",)
    for name in "abcd":
        write_preset(
            tmp_path, "table2/depth1", [f"{name}-ldm"], "table2/depth1", changes if name in "cd" else (), name=name
        )
    found = records(capsys, *(tmp_path / f"{name}-ldm" for name in "abcd"))
    means = {run: record["measured"] for (run, _), record in found.items() if "mean" in run}
    assert means == {"table2/depth1, mean of 2": 8.0, "table2/depth1 --ldm.epochs 10, mean of 2": 22.0}
    assert report.main([str(tmp_path / "c-ldm"), "--no-html"]) == 0
    assert "c-ldm: run with --ldm.epochs 10, not as its preset table2/depth1" in capsys.readouterr().out


def test_a_mean_is_of_runs_and_of_the_same_measurement(tmp_path, capsys):
    """One row a run, the newest; another name or number of images is another measurement; NaN spreads."""
    kept = {"FID": 7.0, "IS": math.nan, "KID": math.inf}, {"FID": 9.0, "IS": 3.0, "KID": -math.inf}
    for seed, values in enumerate(kept):
        run = write_run(tmp_path / f"t-seed{seed}", seed=seed)
        for created, (fid, count, name) in enumerate([(100.0, 50_000, "old"), (values["FID"], 50_000, "new")]):
            folder = write_samples(run, values | {"FID": fid}, 1.0, count, name)
            path = folder / "metrics" / "generation.json"
            record = json.loads(path.read_text()) | {"created": f"2026-01-0{1 + created}"}
            record["name"] += seed * "-imagenet256"  # where another reference came first
            path.write_text(json.dumps(record))
        write_samples(run, {"FID": 50.0 + seed}, 1.0, 1000 + seed, "few")
    write_preset(tmp_path, "p", ["t-seed0", "t-seed1"])
    rows = gather([str(tmp_path / "t-*")]).rows
    rows = [replace(row, detail="") for row in rows if row.seeds == 1]  # as though the folders were named alike
    (mean,) = [row for row in with_means(rows) if row.seeds > 1]
    assert (mean.run, mean.seeds, mean.images) == ("p, mean of 2", 2, 50_000)
    assert (mean.cells["FID"].value, mean.cells["FID"].std) == (8.0, pytest.approx(2**0.5))
    figures = [figure for metric in ("IS", "KID") for figure in (mean.cells[metric].value, mean.cells[metric].std)]
    assert all(map(math.isnan, figures))
    write_reconstruction(tmp_path / "t-seed0", {"PSNR": 20.0})
    bf16 = Measurement("bf16", "reconstruction", {"PSNR": 10.0}, 50_000, {}, settings={"data": "data/imagenet256-val"})
    write_measurement(bf16, tmp_path / "t-seed1")
    assert not any("PSNR" in row.cells for row in gather([str(tmp_path / "t-*")]).rows if row.seeds > 1)


def test_reconstructions_of_several_sets_are_rows_of_their_own(tmp_path, capsys):
    """Sides are told where they differ, and only those of 256 px stand beside published ones."""
    run = write_run(tmp_path / "mine", "VAE")
    others = {"data": "data/coco/val", "name": "reconstruction-val"}
    write_reconstruction(run, {"rFID": 0.3}, resolution=256)
    write_reconstruction(run, {"rFID": 0.9}, 5000, resolution=256, **others)
    words = (run, "--published", "mine=table7/sendvae", "--no-html")
    lines = printed(capsys, *words).splitlines()
    assert _cells(lines[1])[:3] == ["run", "of", "images"]
    assert [_cells(line)[:5] for line in lines[3:5]] == [
        ["mine", "coco/val", "5,000", "0.90", "0.31"],
        ["mine", "imagenet256-val", "50,000", "0.30", "0.31"],
    ]
    write_reconstruction(run, {"rFID": 0.9}, 5000, resolution=512, **others)
    lines = printed(capsys, *words).splitlines()
    assert [_cells(line)[:5] for line in lines[3:5]] == [
        ["mine", "coco/val, 512 px", "5,000", "0.90", "–"],
        ["mine", "imagenet256-val, 256 px", "50,000", "0.30", "0.31"],
    ]


def test_pearson_is_numpy_s():
    generator = np.random.default_rng(0)
    for count in (3, 7, 50):
        x, y = generator.normal(size=count), generator.normal(size=count)
        assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert pearson([1, 2, 3], [30, 20, 10]) == -1
    assert pearson([1e8 + 1, 1e8 + 2, 1e8 + 3], [1, 2, 3]) == pytest.approx(1)
    assert math.isnan(pearson([1, 1, 1], [1, 2, 3]))


def published_table_8(exps, with_guided: bool = False) -> None:
    """The paper's four VAEs, as if they had been measured here."""
    f1s, fids = (0.6222, 0.6347, 0.6439, 0.6647), (17.43, 11.40, 8.96, 7.57)
    for number, (f1, fid) in enumerate(zip(f1s, fids, strict=True)):
        run = write_run(exps / f"ldm{number}", vae_checksum=f"vae{number}")
        write_probe(run, f1, "data/celeba", f"vae{number}", **{"top5-recall": 1 - f1})
        write_samples(run, {"FID": fid}, vae=f"vae{number}")
        if with_guided:
            write_samples(run, {"FID": fid / 2}, cfg_scale=2.0, vae=f"vae{number}", name="guided")


def test_probe_and_distance_stand_together_with_their_correlation(tmp_path, capsys):
    published_table_8(tmp_path, with_guided=True)
    out = printed(capsys, tmp_path / "ldm*", "--no-html")
    r = np.corrcoef([0.6222, 0.6347, 0.6439, 0.6647], [17.43, 11.40, 8.96, 7.57])[0, 1]
    assert f"Pearson's r of F1-macro with FID: {r:.4f} (4 SiTs, 4 VAEs)" in out
    assert f"Pearson's r of top5-recall with FID: {-r:.4f}" in out
    assert "published: -0.9572 over 6 VAEs" in out
    how = "50,000 images, SDE, 250 steps, reference imagenet256.npz"
    start = out.index(f"Probe F1 on celeba against FID (SiT-Ti/2, 400 steps; {how})")
    assert [_cells(line) for line in out[start:].splitlines()[3:5]] == [
        ["ldm3", "ldm3", "0.6647", "0.3353", "7.57"],
        ["ldm2", "ldm2", "0.6439", "0.3561", "8.96"],
    ]
    correlations = json.loads(printed(capsys, tmp_path / "ldm*", "--no-html", "--format", "json"))["correlations"]
    assert [(view["guidance"], view["vaes"]) for view in correlations] == [("none", 4), ("2 on [0, 0.75]", 4)]
    assert correlations[0]["pearson"]["attributes/F1-macro"] == pytest.approx(r)


def write_measures(folder: Path, vae: str, values: dict[str, float | None], data: str = "data/celeba") -> None:
    """What probe.py diffusability leaves, in a folder of its own or in a common one."""
    found = {f"diffusability/{name}": value for name, value in values.items()}
    subject = {"path": f"exps/{vae}/vae", "vae_checksum": vae}
    write_measurement(
        Measurement(f"probe-diffusability-{vae}", "probe", found, 100, subject, settings={"data": data}), folder
    )


def test_measures_of_latents_stand_beside_f1_with_intervals_and_given_rfid(tmp_path, capsys):
    published_table_8(tmp_path)
    slopes, rfids = [-0.3, -0.9, -1.1, -2.0], [1.0, 0.4, 0.7, 0.5]
    for number, (slope, rfid) in enumerate(zip(slopes, rfids, strict=True)):
        write_measures(tmp_path / "measured", f"vae{number}", {"spectral-slope": slope, "SRSS": None})
        subject = {"path": "x", "vae_checksum": f"vae{number}"}
        settings = {"data": "data/val"}
        found = Measurement("reconstruction", "reconstruction", {"rFID": rfid}, 50, subject, settings=settings)
        write_measurement(found, tmp_path / f"ldm{number}")
    runs = [tmp_path / "measured", tmp_path / "ldm*"]
    out = printed(capsys, *runs, "--no-html")
    fids = [17.43, 11.40, 8.96, 7.57]
    r = np.corrcoef(slopes, fids)[0, 1]
    rest = [np.array(values) - np.polyval(np.polyfit(rfids, values, 1), rfids) for values in (slopes, fids)]
    given = np.corrcoef(*rest)[0, 1]
    line = next(line for line in out.splitlines() if line.startswith("Pearson's r of spectral-slope"))
    low, high = bootstrap_interval(slopes, fids, "abcd")
    assert line == (
        f"Pearson's r of spectral-slope with FID: {r:.4f} (4 SiTs, 4 VAEs); 95 % interval {low:.2f} to {high:.2f}; "
        f"given rFID {given:.2f}"
    )
    assert "r of SRSS" not in out and "4 VAEs are few" in out
    assert [_cells(line)[0] for line in out.split("measures of latents\n")[1].splitlines()[2:6]] == [
        f"vae{number}" for number in range(4)
    ]
    (view,) = json.loads(printed(capsys, *runs, "--no-html", "--format", "json"))["correlations"]
    assert view["given_reconstruction"]["diffusability/spectral-slope"] == pytest.approx(given)
    assert view["interval"]["diffusability/spectral-slope"] == pytest.approx([low, high])
    assert "diffusability/SRSS" not in view["interval"]
    assert view["reconstructed"] == "50 images of data/val" and "rFID is that of 50 images of data/val" in out
    assert {point["reconstructions"]["50 images of data/val"] for point in view["points"]} == set(rfids)


def test_rfid_is_that_of_the_largest_set_common_to_all_vaes(tmp_path, capsys):
    """Each VAE has some; until all have one of the same set, nothing is correlated given them, and a line says so."""

    def reconstruct(number: int, data: str, count: int, rfid: float) -> None:
        subject = {"path": "x", "vae_checksum": f"vae{number}"}
        values, settings = {"rFID": rfid}, {"data": f"data/{data}", "latent": "mean"}
        found = Measurement(f"r-{data}", "reconstruction", values, count, subject, settings=settings)
        write_measurement(found, tmp_path / f"ldm{number}")

    def seen() -> tuple[str, dict]:
        (view,) = json.loads(printed(capsys, tmp_path / "ldm*", "--no-html", "--format", "json"))["correlations"]
        return printed(capsys, tmp_path / "ldm*", "--no-html"), view

    published_table_8(tmp_path)
    out, view = seen()
    assert "rFID" not in out and view["reconstructed"] is None and view["given_reconstruction"] == {}
    rfids = [1.0, 0.4, 0.7, 0.5]
    for number, rfid in enumerate(rfids):
        reconstruct(number, "small", 50, 9.0 - number**2)
        if number:
            reconstruct(number, "large", 500, rfid)
    reconstruct(3, "small", 40, 5.0)
    out, view = seen()
    assert "given rFID: nothing, because no set was reconstructed with each of the VAEs" in out
    assert view["given_reconstruction"] == {}
    reconstruct(3, "small", 50, 0.0)
    assert seen()[1]["reconstructed"] == "50 images of small"
    reconstruct(0, "large", 500, rfids[0])
    out, view = seen()
    assert view["reconstructed"] == "500 images of large" and "rFID is that of 500 images of large" in out
    given = partial_correlation([0.6222, 0.6347, 0.6439, 0.6647], [17.43, 11.40, 8.96, 7.57], rfids)
    assert view["given_reconstruction"]["attributes/F1-macro"] == pytest.approx(given)


def test_measures_without_f1_are_correlated_but_not_drawn(tmp_path, capsys):
    for number in range(3):
        run = write_run(tmp_path / f"ldm{number}", vae_checksum=f"vae{number}")
        write_measures(run, f"vae{number}", {"LDS": 0.1 * number})
        write_samples(run, {"FID": 5.0 + number**2}, vae=f"vae{number}")
    html = tmp_path / "report.html"
    out = printed(capsys, tmp_path / "ldm*", "--html", html)
    assert "Measures of latents on celeba against FID" in out and "published: -0.95" not in out
    assert f"Pearson's r of LDS with FID: {np.corrcoef([0, 1, 2], [0, 1, 4])[0, 1]:.4f} (3 SiTs, 3 VAEs)\n" in out
    assert "Measures of latents on celeba" in html.read_text()
    with pytest.raises(UserError, match="there are 0"):
        report.main([str(tmp_path / "ldm*"), "--no-html", "--figure1", str(tmp_path / "f.png")])


def test_a_vae_without_f1_does_not_take_it_from_the_others(tmp_path):
    published_table_8(tmp_path)
    run = write_run(tmp_path / "ldm9", vae_checksum="vae9")
    write_measures(run, "vae9", {"LDS": 0.1})
    write_samples(run, {"FID": 5.0}, vae="vae9")
    found = gather([str(tmp_path / "ldm*")]).views
    assert [(view.vaes, view.has_f1) for view in found] == [(4, True), (1, False)]


def test_an_interval_is_that_of_draws_one_by_one(monkeypatch):
    monkeypatch.setattr(coefficients, "RESAMPLES", 300)
    generator = np.random.default_rng(5)
    x, groups = generator.normal(size=7), ["a", "a", "b", "c", "d", "e", "e"]
    y = x + generator.normal(size=7)
    names, found = ["a", "b", "c", "d", "e"], []
    for drawn in np.random.default_rng(0).integers(5, size=(300, 5)):
        if len(set(drawn)) >= 3:
            places = [place for number in drawn for place, group in enumerate(groups) if group == names[number]]
            found.append(np.corrcoef(x[places], y[places])[0, 1])
    assert bootstrap_interval(x, y, groups) == pytest.approx(np.quantile(found, [0.025, 0.975]), abs=1e-12)
    assert all(math.isnan(end) for end in bootstrap_interval(x[:3], y[:3], "abc"))
    assert all(math.isnan(end) for end in bootstrap_interval(np.ones(7), y, "abcdefg"))


def test_an_interval_of_many_points_is_fisher_s():
    generator = np.random.default_rng(0)
    x = generator.normal(size=400)
    y = 0.6 * x + 0.8 * generator.normal(size=400)
    z = np.arctanh(np.corrcoef(x, y)[0, 1])
    expected = np.tanh([z - 1.96 / np.sqrt(397), z + 1.96 / np.sqrt(397)])
    assert bootstrap_interval(x, y, [str(n) for n in range(400)]) == pytest.approx(expected, abs=0.02)


def test_a_partial_correlation_is_that_of_what_a_line_leaves():
    generator = np.random.default_rng(1)
    x, y, z = generator.normal(size=(3, 8))
    rest = [values - np.polyval(np.polyfit(z, values, 1), z) for values in (x + z, y - z)]
    assert partial_correlation(x + z, y - z, z) == pytest.approx(np.corrcoef(*rest)[0, 1], abs=1e-12)
    assert math.isnan(partial_correlation(x, z, z)) and math.isnan(partial_correlation(x[:3], y[:3], z[:3]))


@pytest.mark.parametrize(
    "other",
    [
        {"count": 1000},
        {"reference": "coco.npz"},
        {"label_sampling": "random"},
        {"mode": "ode"},
        {"num_steps": 50},
        {"heun": True},
        {"time_shift": 2.0},
        {"weights": "ema_0.999"},
    ],
)
def test_images_made_otherwise_are_not_mixed(tmp_path, other):
    published_table_8(tmp_path)
    write_samples(tmp_path / "ldm3", {"FID": 2.0}, vae="vae3", **other)
    found = gather([str(tmp_path / "ldm*")]).views
    assert [view.vaes for view in found] == [3, 1] and len({view.title for view in found}) == 2


def test_sits_of_other_lengths_are_not_mixed(tmp_path):
    published_table_8(tmp_path)
    settings = json.loads((tmp_path / "ldm3" / "generated" / "index.json").read_text())
    settings["source"]["train_steps"] = 800
    (tmp_path / "ldm3" / "generated" / "index.json").write_text(json.dumps(settings))
    assert sorted(view.vaes for view in gather([str(tmp_path / "ldm*")]).views) == [1, 3]


def test_distances_to_other_references_are_not_mixed(tmp_path):
    published_table_8(tmp_path)
    run = write_run(tmp_path / "ldm9", vae_checksum="vae0")
    write_samples(run, {"FID": 17.0}, vae="vae0", reference="validation.npz")
    found = {view.reference: view.vaes for view in gather([str(tmp_path / "ldm*")]).views}
    assert found == {"imagenet256.npz": 4, "validation.npz": 1}


def test_several_sits_on_one_vae_are_one_vae(tmp_path):
    published_table_8(tmp_path)
    write_samples(write_run(tmp_path / "ldm9", vae_checksum="vae0"), {"FID": 17.0}, vae="vae0")
    write_probe(tmp_path / "ldm9", 0.6224, "data/celeba", "vae0")
    (view,) = gather([str(tmp_path / "ldm*")]).views
    assert (view.vaes, len(view.points)) == (4, 5)
    probes = {point.sit: point.probes["attributes/F1-macro"] for point in view.points}
    assert probes["ldm0"] == probes["ldm9"] == pytest.approx((0.6222 + 0.6224) / 2)


def test_a_sit_finds_its_vae_by_the_weights(tmp_path):
    """A VAE run whose weights are those that the SiT's run names, another whose are not, a bare folder, raw pixels."""
    write_probe(write_run(tmp_path / "right-vae", "VAE"), 0.7, vae="right")
    write_probe(write_run(tmp_path / "wrong-vae", "VAE"), 0.2, vae="wrong")
    write_probe(tmp_path / "bare", 0.5, "data/other", "right")
    write_probe(tmp_path / "pixels", 0.1)
    write_samples(write_run(tmp_path / "ldm", vae_checksum="right"), {"FD-x": 9.0})
    names = ("ldm", "right-vae", "wrong-vae", "bare", "pixels")
    found = gather([str(tmp_path / name) for name in names]).views
    assert {
        view.data: [(p.vae, p.probes["attributes/F1-macro"], p.distance) for p in view.points] for view in found
    } == {
        "toy": [("right-vae", 0.7, 9.0)],
        "other": [("bare", 0.5, 9.0)],
    }


def test_the_spread_of_an_estimate_stands_beside_it(tmp_path, capsys):
    run = write_run(tmp_path / "mine")
    write_samples(run, {"FD-timm/x": 3.5, "KID-timm/x": 0.0123, "KID-timm/x-std": 0.0004})
    out = printed(capsys, run, "--no-html")
    assert "Generated images, features of timm/x" in out
    assert _cells(out.splitlines()[1])[-2:] == ["FD ↓", "KID ↓"]
    assert _cells(out.splitlines()[3])[-2:] == ["3.5", "0.0123 ± 0.0004"]
    assert set(records(capsys, run)) == {("mine", "FD-timm/x"), ("mine", "KID-timm/x")}


def test_figure1_is_written(tmp_path, capsys):
    published_table_8(tmp_path)
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        picture = tmp_path / f"figure{suffix}"
        printed(capsys, tmp_path / "ldm*", "--no-html", "--figure1", picture)
        assert picture.read_bytes().startswith(start)


def test_markdown_and_csv_hold_the_same_figures(tmp_path, capsys):
    run = write_run(tmp_path / "a|b")
    write_samples(run, UNGUIDED)
    words = (run, "--no-html", "--published", "a|b=table2/depth1")
    lines = printed(capsys, *words, "--format", "markdown").splitlines()
    assert lines[0] == "### Generated images"
    assert lines[4].startswith("| a\\|b | none | imagenet256.npz | 50,000 | 8.00 | 8.42 | 5.25 | 5.05 |")
    assert set(lines[3]) == set("|- :")
    rows = list(csv.DictReader(io.StringIO(printed(capsys, *words, "--format", "csv"))))
    assert {row["metric"]: float(row["measured"]) for row in rows} == UNGUIDED
    assert rows[0]["published"] == "8.42" and rows[0]["published_row"] == "table2/depth1"


def test_runs_are_found_once_in_the_order_given(tmp_path):
    for name in ("b-ldm", "a-vae", "c"):
        write_run(tmp_path / name)
    (tmp_path / "c" / "vae").mkdir()
    (tmp_path / "c" / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "stray").mkdir()
    (tmp_path / "notes.txt").write_text("")
    experiment = write_preset(tmp_path, "x", ["a-vae", "missing", "b-ldm"])
    paths = [str(experiment), str(tmp_path / "b-ldm"), str(tmp_path / "c" / "vae"), str(tmp_path / "*")]
    assert [run.name for run in find_runs(paths)] == ["a-vae", "b-ldm", "c"]


def test_the_folder_of_an_experiment_may_be_its_run(tmp_path, capsys):
    """As of a preset with ``exp-name: "{name}"``; whether the run is noted or, by an older program, is not."""
    for name, noted in (("new", ["new"]), ("old", [])):
        write_samples(write_run(tmp_path / name), {"FID": 8.0})
        experiment = write_preset(tmp_path, "table2/depth1", noted, "table2/depth1", name=name)
        (run,) = find_runs([str(experiment)])
        assert (run.name, run.sort, run.preset.name) == (name, "SiT", "table2/depth1")
        assert records(capsys, experiment)[name, "FID"]["published_row"] == "table2/depth1"
    assert [run.name for run in find_runs([str(tmp_path / "*")])] == ["new", "old"]


def test_figures_that_are_not_finite_are_said_to_be(tmp_path, capsys):
    write_samples(write_run(tmp_path / "mine"), {"FID": math.nan, "IS": 3.0})
    assert "not finite" in printed(capsys, tmp_path / "mine", "--no-html")
    assert records(capsys, tmp_path / "mine")["mine", "FID"]["measured"] is None


def test_a_name_cannot_steer_the_terminal(tmp_path):
    run = write_run(tmp_path / "red\x1b[31m")
    write_samples(run, {"FID": 1.0})
    text = as_text(gather([str(run)]).tables)
    assert "\x1b" not in text and "red [31m" in text


def test_a_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_samples(write_run(tmp_path / "exps" / "mine"), {"FID": 1.0})
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert "1.00" in printed(capsys, "exps/mine", "--dry-run")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert "1.00" in printed(capsys, "exps/mine")
    assert (tmp_path / "report.html").is_file()


def test_damage_in_one_run_of_a_pattern_is_named(tmp_path):
    write_run(tmp_path / "good")
    (write_run(tmp_path / "worse") / "args.json").write_text("[]")
    with pytest.raises(UserError, match=r"worse/args\.json is damaged"):
        gather([str(tmp_path / "*")])


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["study-none-vae", "study-no-noise-vae"], ["none", "no-noise"]),
        (["study-vae", "study-long-vae"], ["vae", "long-vae"]),  # something is always left
        (["one", "two"], ["one", "two"]),
        (["a-b", "a-b"], ["a-b", "a-b"]),
        (["alone-vae"], ["alone-vae"]),
        ([], []),
    ],
)
def test_labels_leave_out_what_all_share(names, short):
    assert distinguishing_parts(names) == short


def test_what_was_read_in_samples_has_a_table(tmp_path, capsys):
    """With guidance and data, each figure better the higher it is; nothing published is compared."""
    run = write_run(tmp_path / "exps" / "ldm")
    folder = write_samples(run, {"FD-vfm": 9.0}, cfg_scale=2.5)
    values = {"asked-class": 0.8125, "clear-class": 0.75, "held-out-class": 0.988, "clear-colour": 1.0}
    subject, reference = {"path": str(folder)}, {"path": "data/toy", "count": 4000}
    found = Measurement("reading-vfm", "reading", values, 500, subject, reference)
    write_measurement(found, folder)
    assert report.main([str(run), "--no-html"]) == 0
    table = capsys.readouterr().out.partition("Generated images, read")[2].splitlines()
    assert all(f"{name} ↑" in table[1] for name in values)
    assert all(word in table[3] for word in ("ldm", "2.5", "toy", "500", "0.8125", "0.988"))
