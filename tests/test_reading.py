"""evaluate.py reading: questions, readers on constructed features, and the script on the toy set."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from dataset.attributes import TEST, TRAIN, VALIDATION
from dataset.toy import main as make_toy
from errors import UserError
from metrics.probe_data import ProbeData
from metrics.reading import Question, Readers, questions_of
from metrics.record import read_measurements
from preprocessing import main as preprocess
from tests.command_line import argv_of

CPU = torch.device("cpu")


@dataclass
class NamedClasses:
    """As much of an image dataset as questions need."""

    class_names: list[str] = field(default_factory=lambda: ["cat", "dog", "fish"])


def labelled(count: int, attributes: np.ndarray | None = None, names: tuple[str, ...] = (), classes=3) -> ProbeData:
    """Images split 60, 20, 20, their classes in turn."""
    split = np.array([TRAIN, TRAIN, TRAIN, VALIDATION, TEST], np.int8)[np.arange(count) % 5]
    labels = np.arange(count) % classes
    images = NamedClasses(["cat", "dog", "fish"][:classes])
    return ProbeData(images, np.arange(count), split, labels, attributes, list(names), "csv", True)


def clusters(labels: np.ndarray, spread: float = 0.1, seed: int = 0) -> torch.Tensor:
    """Vectors around three corners of a cube, ``[N, 3]``."""
    noise = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(seed))
    return torch.eye(3)[torch.from_numpy(labels)] + spread * noise


def test_questions_have_one_answer_for_each_image():
    """The class, a column with values, one of yes and no; not values that hold together, nor a constant column."""
    attributes = np.zeros((30, 7), bool)
    attributes[np.arange(30), np.arange(30) % 2] = True  # colour
    attributes[::3, 2] = True  # smiling
    attributes[:, 3] = attributes[::2, 4] = True  # tag: both at once
    attributes[:, 5] = True  # kind: one value everywhere
    names = ("colour=red", "colour=blue", "smiling", "tag=a", "tag=b", "kind=x", "kind=y")
    data = labelled(30, attributes, names)
    found = {question.name: question for question in questions_of(data)}
    assert list(found) == ["class", "colour", "smiling"]
    assert found["class"].answers == ("cat", "dog", "fish")
    assert found["colour"].answers == ("red", "blue")
    assert found["smiling"].answers == ("no", "yes")
    np.testing.assert_array_equal(found["colour"].targets, np.arange(30) % 2)
    np.testing.assert_array_equal(found["smiling"].targets, np.arange(30) % 3 == 0)


def test_data_without_labels_ask_nothing():
    assert questions_of(labelled(10, classes=1)) == []


def test_what_is_read_of_constructed_features():
    """Clusters: read as asked, or never where others were asked for; half way between two of them nothing is clear."""
    data = labelled(600)
    readers = Readers(clusters(data.labels), data, questions_of(data), CPU)
    labels = np.arange(90) % 3
    names = np.array(data.images.class_names)
    good = readers.read(clusters(labels, seed=1), names[labels].tolist())
    assert good["asked-class"] == good["held-out-class"] == 1.0
    assert good["clear-class"] == pytest.approx(0.99, abs=0.03)
    swapped = readers.read(clusters(labels, seed=1), names[(labels + 1) % 3].tolist())
    assert swapped["asked-class"] == 0.0
    assert swapped["clear-class"] == good["clear-class"]
    between = (clusters(labels, 0.01, 2) + clusters((labels + 1) % 3, 0.01, 3)) / 2
    blurred = readers.read(between, None)
    assert blurred["clear-class"] == 0.0
    assert "asked-class" not in blurred


def test_a_reader_that_cannot_read_says_so():
    """Features that know nothing: a third is read rightly, in real images too."""
    data = labelled(3000)
    features = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0))
    question = Question("class", ("cat", "dog", "fish"), data.labels)
    values = Readers(features, data, [question], CPU).read(features[:300], ["cat"] * 300)
    assert values["held-out-class"] == pytest.approx(1 / 3, abs=0.06)  # 600 images: a standard error of 0.019


# -- the script


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A labelled set, and a packed one that stands for samples."""
    folder = tmp_path_factory.mktemp("toy")
    for name, count, seed in (("real", 400, 0), ("others", 40, 1)):
        make_toy(argv_of({"output": folder / name, "num_images": count, "resolution": 32, "seed": seed}))
    preprocess(argv_of({"imagenet_path": folder / "others", "output_path": folder / "samples", "resolution": 32}))
    return folder


def read(toy: Path, **changes: object) -> dict:
    """The record that is left in the samples' metrics."""
    values = {"samples": toy / "samples", "data": toy / "real", "features": "efficientnet-lite0", "features_grid": 2}
    assert evaluate.main(["reading", *argv_of(values | changes)]) == 0
    name = changes.get("name", "reading-efficientnet-lite0")
    return json.loads((toy / "samples" / "metrics" / f"{name}.json").read_text())


def test_real_images_are_read(toy, capsys):
    """Far above chance with 240 training images; what is written, and what is printed."""
    record = read(toy)
    values = record["values"]
    assert record["kind"] == "reading"
    assert record["count"] == 40
    assert values["asked-class"] > 0.5  # chance 1/6
    assert values["held-out-background"] > 0.9
    assert {key.partition("-")[0] for key in values} == {"asked", "clear", "held"}
    assert record["extractor"]["name"] == "efficientnet-lite0"
    assert record["settings"]["split"] == {"train": 280, "validation": 40, "test": 80}
    assert "class" in (out := capsys.readouterr().out)
    assert f"{values['asked-class']:6.1%} as asked" in out
    assert [found.name for found in read_measurements(toy / "samples" / "metrics")] == ["reading-efficientnet-lite0"]
    assert read(toy, name="again", batch_size=7)["values"] == values


def test_a_dry_run_says_what_would_be_read_and_writes_nothing(toy, tmp_path, capsys):
    argv = {"samples": toy / "samples", "data": toy / "real", "features": "efficientnet-lite0", "name": "dry"}
    assert evaluate.main(["reading", *argv_of(argv | {"dry_run": True})]) == 0
    out = capsys.readouterr().out
    assert "efficientnet-lite0 on 400 images" in out
    assert "class, shape, colour" in out
    assert not (toy / "samples" / "metrics" / "dry.json").exists()


def test_images_without_classes_are_read_but_not_asked(toy, tmp_path):
    """Two .npz in one folder: what is in each is read, nothing was asked for, and each has a record of its own."""
    argv = {"data": toy / "real", "features": "efficientnet-lite0", "features_grid": 2}
    for name, count in (("grey", 6), ("light", 7), ("samples", 8)):
        np.savez(tmp_path / f"{name}.npz", arr_0=np.full((count, 32, 32, 3), 20 * count, np.uint8))
        assert evaluate.main(["reading", *argv_of(argv | {"samples": tmp_path / f"{name}.npz"})]) == 0
    found = {
        record.name.removesuffix("efficientnet-lite0"): record for record in read_measurements(tmp_path / "metrics")
    }
    assert {name: record.count for name, record in found.items()} == {
        "reading-grey-": 6, "reading-light-": 7, "reading-": 8
    }  # fmt: skip
    assert "asked-class" not in found["reading-grey-"].values
    assert 0 <= found["reading-grey-"].values["clear-shape"] <= 1


@pytest.mark.parametrize(
    ("resolution", "classes", "message"),
    [
        (64, ["circle", "cross"], "has 32 px, --data .* 64 px"),
        (32, ["all"], "nothing to read"),
        (32, ["robin", "wren"], "has class circle, which --data does not have"),
    ],
)
def test_what_does_not_go_together_is_refused(toy, tmp_path, resolution, classes, message):
    for name in classes:
        (tmp_path / "tree" / name).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (resolution, resolution)).save(tmp_path / "tree" / name / f"{number}.png")
    packed = {"imagenet_path": tmp_path / "tree", "output_path": tmp_path / "packed", "resolution": resolution}
    preprocess(argv_of(packed))
    with pytest.raises(UserError, match=message):
        read(toy, data=tmp_path / "packed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": "nowhere"}, "does not exist"),
        ({"num_samples": 41}, "--num-samples 41: .* has 40 images"),
        ({"name": "../elsewhere"}, "not a name of a file"),
        ({"features": "efficientnet"}, "--features efficientnet"),
    ],
)
def test_wrong_flags_are_refused(toy, changes, message):
    """Before any image is read; samples are never fewer than was asked for."""
    with pytest.raises(UserError, match=message):
        read(toy, **changes)


def test_several_processes_are_refused(toy, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        read(toy)
