"""Every reader of JSON and YAML answers a file that says something else in one line. The long run: tests/faults."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.malformed import SUBJECTS, Subject, mutations, survives

EXAMPLES = int(os.environ.get("MALFORMED_EXAMPLES", "25"))


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_one_line_or_none(subject: Subject, tmp_path: Path):
    path = subject.make(tmp_path)
    original = path.read_bytes()
    assert survives(subject, path, original) is None

    @seed(0)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def mutate(draw):
        data = draw.draw(mutations(original, path.suffix == ".yaml"))
        assert survives(subject, path, data) is None

    mutate()


def test_a_reader_that_does_not_look_is_noticed(tmp_path):
    """Else nothing above could fail."""
    careless = Subject("careless", lambda folder: folder / "file", lambda path: path.read_bytes()[7])
    path = careless.make(tmp_path)
    path.write_bytes(b"12345678")
    assert survives(careless, path, b"12345678") is None
    assert survives(careless, path, b"1234").startswith("IndexError")
