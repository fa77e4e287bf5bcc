"""Measurements survive writing and reading, and lie where they are looked for."""

import json

import pytest

from errors import UserError
from metrics.record import (
    Measurement,
    default_name,
    folder_beside,
    metrics_folder,
    read_measurements,
    write_measurement,
)


def test_written_is_read_back(tmp_path):
    measurement = Measurement("generation", "generation", {"FID": 1.75}, 50000, {"path": "x"}, settings={"split": 10})
    path = write_measurement(measurement, tmp_path)
    assert path == tmp_path / "metrics" / "generation.json"
    (found,) = read_measurements(tmp_path / "metrics")
    assert found.values == {"FID": 1.75} and found.count == 50000 and found.settings == {"split": 10}
    assert "torch" in found.versions and found.created.endswith("+00:00")
    assert read_measurements(tmp_path / "nothing") == []


def test_measurements_lie_beside_their_subject(tmp_path):
    (tmp_path / "samples.npz").write_bytes(b"")
    assert metrics_folder(tmp_path / "samples.npz") == tmp_path / "metrics"
    (tmp_path / "vae").mkdir()
    assert metrics_folder(tmp_path / "vae") == tmp_path / "vae" / "metrics"
    (tmp_path / "args.json").write_text("{}")
    assert metrics_folder(tmp_path / "vae") == tmp_path / "metrics"


def test_a_default_name_replaces_nothing_of_something_else(tmp_path, monkeypatch):
    """The name with the data behind it where the usual one is of other data; the same data elsewhere are the same."""
    monkeypatch.chdir(tmp_path)
    vae = {"path": "vaes/v0.pt", "vae_checksum": "0"}
    folder = tmp_path / "metrics"

    def name(data: str, fingerprint: str | None = None, **subject: str) -> str:
        return default_name(folder, "generation", tmp_path / data, lambda: fingerprint, {**vae, **subject})

    def write(name: str, data: str) -> None:
        reference = {"path": data, "fingerprint": f"of {data}"}
        write_measurement(Measurement(name, "generation", {"FID": 1.0}, 9, vae, reference), tmp_path)

    assert name("a.npz") == "generation"
    write("generation", "a.npz")
    assert name("a.npz") == name("moved.npz", "of a.npz") == "generation"
    assert name("a.npz", path="moved.pt") == name("a.npz", vae_checksum="1") == "generation"
    assert name("b.npz") == name("b.npz", "of b.npz") == "generation-b"
    write("generation-b", "b.npz")
    assert (name("a.npz"), name("b.npz"), name("val")) == ("generation", "generation-b", "generation-val")
    with pytest.raises(UserError, match=r"generation-b\.json is a measurement with b\.npz, not with .*--name"):
        name("other/b.npz")
    with pytest.raises(
        UserError, match=r"generation\.json is a measurement of vaes/v0\.pt, not of v1\.pt; give --name"
    ):
        name("a.npz", path="v1.pt", vae_checksum="1")
    (folder / "generation.json").write_text("{")
    assert name("c.npz") == "generation"


def test_nothing_is_written_into_plain_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_beside("images") == folder_beside(tmp_path / "images") == tmp_path / "images.metrics"


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"format": 2}), json.dumps({"format": 1, "name": "x"})])
def test_another_file_is_named(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(UserError, match=r"other\.json is not a measurement"):
        read_measurements(tmp_path)
