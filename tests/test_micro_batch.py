"""--micro-batch-size: accumulation that follows from it, and the choice of the largest that fits."""

import argparse

import pytest

from errors import UserError
from training.arguments import divisors, settle_micro_batch
from training.micro_batch import PROBES, largest_fitting

GIB = 2**30


def flags(batch: int, micro: int | str | None, accumulation: int = 1) -> argparse.Namespace:
    return argparse.Namespace(batch_size=batch, micro_batch_size=micro, gradient_accumulation_steps=accumulation)


@pytest.mark.parametrize(("batch", "processes", "micro", "steps"), [(256, 1, 64, 4), (256, 8, 32, 1), (96, 2, 3, 16)])
def test_accumulation_follows(batch, processes, micro, steps):
    args = flags(batch, micro)
    settle_micro_batch(args, processes)
    assert args.gradient_accumulation_steps == steps


@pytest.mark.parametrize("micro", [None, "auto"])
def test_nothing_is_settled_before_a_trial(micro):
    args = flags(256, micro)
    settle_micro_batch(args, 8)
    assert args.gradient_accumulation_steps == 1


def test_what_does_not_divide_is_refused_with_what_does():
    with pytest.raises(UserError, match=r"64 images of each process .* take one of 1, 2, 4, 8, 16, 32, 64"):
        settle_micro_batch(flags(256, 48), 4)


def test_both_flags_are_refused():
    with pytest.raises(UserError, match="give one of them"):
        settle_micro_batch(flags(256, 32, accumulation=2), 1)


def test_accumulation_that_is_given_leaves_nothing_to_find():
    """The wrappers say auto; a user appends accumulation."""
    args = flags(256, "auto", accumulation=2)
    settle_micro_batch(args, 1)
    assert (args.micro_batch_size, args.gradient_accumulation_steps) == (None, 2)


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]


@pytest.mark.parametrize(
    ("fixed", "each", "room", "fits"),
    [(10, 1.0, 80, 64), (10, 1.0, 74, 64), (10, 1.0, 73.9, 32), (10, 0.01, 80, 256), (70, 4, 75, 1), (0.5, 79, 80, 1)],
)
def test_the_largest_divisor_that_fits(fixed, each, room, fits):
    """Of a memory that grows linearly, GiB."""
    tried = []

    def peak(images: int) -> int:
        tried.append(images)
        return round((fixed + each * images) * GIB)

    assert largest_fitting(256, peak, round(room * GIB)) == fits
    assert tuple(tried) == PROBES


def test_less_than_one_image_is_refused():
    with pytest.raises(UserError, match=r"one image needs 24\.0 GiB and there are 16\.0; add --gradient-checkpointing"):
        largest_fitting(8, lambda images: round((20 + 4 * images) * GIB), 16 * GIB)
