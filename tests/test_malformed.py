"""Every reader of JSON and YAML answers a file that says something else in one line. The long run: tests/faults."""

from pathlib import Path

import pytest

from tests.faults.malformed import SUBJECTS, Subject, outcomes, survives

MUTATIONS = 8  # of each subject


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_one_line_or_none(subject: Subject, tmp_path: Path):
    path = subject.make(tmp_path)
    assert survives(subject, path, path.read_bytes()) is None
    found = outcomes(subject, path, MUTATIONS)
    assert len(found) >= MUTATIONS
    assert not list(filter(None, found))


def test_a_reader_that_does_not_look_is_noticed(tmp_path):
    """Else nothing above could fail."""
    careless = Subject("careless", lambda folder: folder / "file", lambda path: path.read_bytes()[7])
    path = careless.make(tmp_path)
    path.write_bytes(b"12345678")
    assert survives(careless, path, b"12345678") is None
    assert survives(careless, path, b"1234").startswith("IndexError")
