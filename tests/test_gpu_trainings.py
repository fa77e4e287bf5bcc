"""The trainings that only a GPU runs (tests/gpu) have flags that their scripts take: no GPU time is lost on that."""

import pytest

from tests.gpu.trainings import NAMES, RECIPES, UNCOMPILED, parsed


@pytest.mark.parametrize("name", [*NAMES, *RECIPES, *UNCOMPILED])
def test_their_flags_are_taken(name):
    kind, args = parsed(name, "--no-compile")
    assert kind in NAMES
    assert (args.dry_run, args.random_weights, args.max_train_steps) == (True, True, 100)
