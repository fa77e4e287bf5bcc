"""Fixtures of all tests."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Several trainings in one process may ask for different precisions; accelerate remembers the first."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
