"""Fixtures of all tests."""

import random

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from runtime.log import logger


def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def seeded_module():
    """What the fixtures of a file draw does not depend on the files before it, which every run shares out anew."""
    seed()


@pytest.fixture(autouse=True)
def seeded():
    """Nor does what a test draws."""
    seed()


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Several trainings in one process may ask for different precisions; accelerate remembers the first."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def fresh_logger():
    """As a new process has it: a run that a test opened and left would log into the output of those that follow."""
    yield
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
    logger.setLevel("NOTSET")


@pytest.fixture
def no_vfm_no_images(monkeypatch):
    """Whoever builds a VFM or opens an image fails."""

    def refuse(*args, **kwargs):
        pytest.fail("a VFM was built, or an image opened")

    for name in ("build_encoders", "build_encoder", "find_weights"):
        monkeypatch.setattr(f"models.encoders.build.{name}", refuse)
    for place in ("training.latent_data.open_images", "dataset.images.ImageDataset.read_into", "PIL.Image.open"):
        monkeypatch.setattr(place, refuse)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: of files shared among processes, a long one that starts last decides the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
