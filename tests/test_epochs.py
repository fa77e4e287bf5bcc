"""EP_FID@k, and how classes were drawn: what a report says of several evaluated steps."""

import json
from pathlib import Path

import pytest

import report
from reporting.epochs import epochs_table, reached
from reporting.gather import gather
from tests.report_runs import UNGUIDED, write_run, write_samples


def test_reached():
    values = {8.0: 20.0, 24.0: 6.0, 32.0: 5.0, 80.0: 5.5}
    assert reached(values, 5.0) == "24 to 32"  # at most: the distance itself counts
    assert reached(values, 19.0) == "8 to 24"
    assert reached(values, 20.0) == "up to 8"
    assert reached(values, 4.0) == "over 80"
    assert reached({8.0: float("nan"), 16.0: 1.0}, 4.0) == "8 to 16"


def write_training(folder: Path, sort: str = "SiT") -> Path:
    """Of 64 images a step on 6,400: 100 steps are an epoch."""
    run = write_run(folder, sort)
    lines = [{"step": step, "loss": 1.0, "epoch": step * 64 / 6400} for step in (100, 400)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def run(tmp_path):
    run = write_training(tmp_path / "mine")
    for step, distance in ((100, 30.0), (200, 9.0), (400, 4.0)):
        write_samples(run, UNGUIDED | {"FID": distance}, name=f"at{step}", train_steps=step, label_sampling="random")
    write_samples(run, UNGUIDED | {"FID": 1.0}, 2.5, name="guided", train_steps=100, label_sampling="random")
    return run


def test_epochs_of_unguided_images_alone(run, capsys):
    table = epochs_table(gather([str(run)]).rows, (10.0, 5.0, 2.0))
    (line,) = table.rows
    assert line == ["mine", "FID", "random", "imagenet256.npz", "50,000", "1, 2, 4", "1 to 2", "2 to 4", "over 4"]
    assert report.main([str(run), "--no-html", "--ep-fid", "5"]) == 0
    out = capsys.readouterr().out
    assert "Epochs of training until" in out and "2 to 4" in out
    assert report.main([str(run), "--no-html"]) == 0
    assert "Epochs of training until" not in capsys.readouterr().out


def test_samples_older_than_a_setting_stand_beside_newer_ones(run):
    """Which say that it is off; where it is on, it is another row."""
    new = {"decoder": None, "decoder_sha256": None, "damped": False, "label_sampling": "random"}
    write_samples(run, UNGUIDED | {"FID": 3.0}, name="newer", train_steps=800, **new)
    (line,) = epochs_table(gather([str(run)]).rows, (3.5,)).rows
    assert line[-2:] == ["1, 2, 4, 8", "4 to 8"]
    other = new | {"decoder": "better", "decoder_sha256": "1"}
    write_samples(run, UNGUIDED | {"FID": 2.0}, name="decoded", train_steps=800, **other)
    assert len(epochs_table(gather([str(run)]).rows, (3.5,)).rows) == 2


def test_other_labels_and_other_sampling_are_rows_of_their_own(run, capsys):
    write_samples(run, UNGUIDED, name="equal", train_steps=400, label_sampling="equal", classes=[3, 4])
    write_samples(run, UNGUIDED, name="ode", train_steps=400, label_sampling="random", mode="ode")
    rows = gather([str(run)]).rows
    table = epochs_table(rows, (10.0,))
    assert sorted(line[2] for line in table.rows) == ["equal of 2 classes", "random", "random"]
    assert {row.labels for row in rows} == {"random", "equal of 2 classes"}
    report.main([str(run), "--no-html", "--format", "json"])
    labels = {record["labels"] for record in json.loads(capsys.readouterr().out)["results"]}
    assert labels == {"random", "equal of 2 classes"}


@pytest.mark.parametrize(("sort", "rows"), [("VAE and SiT", ["1 to 2"]), ("SiT", ["over 1", "up to 2"])])
def test_a_vae_that_is_trained_too_is_another_at_each_step(tmp_path, sort, rows):
    """Of a run of train_repae.py the steps are one row; other runs' images were made with two VAEs."""
    run = write_training(tmp_path / "mine", sort)
    for step, distance in ((100, 30.0), (200, 9.0)):
        write_samples(run, {"FID": distance}, name=f"at{step}", train_steps=step, vae=f"vae of step {step}")
    assert [line[-1] for line in epochs_table(gather([str(run)]).rows, (10.0,)).rows] == rows


def test_a_run_that_says_nothing_of_epochs_has_no_row(tmp_path):
    run = write_run(tmp_path / "mine")
    write_samples(run, UNGUIDED)
    assert epochs_table(gather([str(run)]).rows, (10.0,)) is None


def test_a_distance_is_positive(run, capsys):
    with pytest.raises(SystemExit) as ended:
        report.main([str(run), "--ep-fid", "5,-1"])
    assert ended.value.code == 2
    assert "--ep-fid" in capsys.readouterr().err
