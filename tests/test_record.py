"""Measurements survive writing and reading, and lie where they are looked for."""

import json

import pytest

from errors import UserError
from metrics.record import Measurement, metrics_folder, read_measurements, write_measurement


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


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"format": 2}), json.dumps({"format": 1, "name": "x"})])
def test_another_file_is_named(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(UserError, match=r"other\.json is not a measurement"):
        read_measurements(tmp_path)
