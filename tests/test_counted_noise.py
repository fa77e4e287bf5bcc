"""Philox against its published vectors; normal numbers and labels against their distributions."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffusion.counted_noise import MAX_SEED, Purpose, counted_integers, counted_normal, philox

ALL = 0xFFFFFFFF
KNOWN_ANSWERS = [  # counter, key, output of philox4x32-10 in the Random123 distribution's kat_vectors
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_words_broadcast():
    counter = (torch.arange(5), torch.arange(3)[:, None], torch.tensor(7), torch.tensor(1))
    together = torch.stack(philox(counter, (1, 2)))
    assert together.shape == (4, 3, 5)
    alone = philox((torch.tensor(4), torch.tensor(2), torch.tensor(7), torch.tensor(1)), (1, 2))
    assert together[:, 2, 4].tolist() == [int(word) for word in alone]


def test_normal_distribution():
    """200,000 numbers: mean and variance within 4 standard errors, Kolmogorov–Smirnov p above 1e-3."""
    count = 200_000
    numbers = counted_normal(0, torch.arange(50), 0, (count // 50,), dtype=torch.float64).flatten().numpy()
    p = stats.kstest(numbers, "norm").pvalue
    print(
        f"mean {numbers.mean():.5f}, variance {numbers.var():.5f}, kurtosis {stats.kurtosis(numbers):.4f}, KS p {p:.3f}"
    )
    assert abs(numbers.mean()) < 4 / math.sqrt(count)
    assert abs(numbers.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs(stats.skew(numbers)) < 4 * math.sqrt(6 / count)
    assert abs(stats.kurtosis(numbers)) < 4 * math.sqrt(24 / count)
    assert p > 1e-3


@pytest.mark.parametrize("seed", [0, 1, 12345, MAX_SEED])
def test_items_steps_seeds_and_purposes_are_independent(seed):
    """Correlations of 4096 numbers stay within 5 standard errors, also of neighbours and of sizes."""
    items = torch.arange(8)
    draws = [counted_normal(seed, items, step, (4096,)).double() for step in (0, 1, 250)]
    draws.append(counted_normal((seed + 1) % 2**64, items, 0, (4096,)).double())
    draws.append(counted_normal(seed, items, 0, (4096,), Purpose.LABEL).double())
    rows = torch.cat(draws)
    for numbers in (torch.cat([rows, rows.roll(1, dims=1)]), rows.abs()):
        correlation = torch.corrcoef(numbers) - torch.eye(len(numbers))
        assert correlation.abs().max() < 5 / math.sqrt(4096)


def test_an_item_does_not_depend_on_the_batch():
    whole = counted_normal(3, torch.arange(10), 5, (4, 3, 5))
    assert whole.shape == (10, 4, 3, 5)
    assert whole.dtype == torch.float32
    parts = [counted_normal(3, items, 5, (4, 3, 5)) for items in torch.arange(10).split([4, 1, 5])]
    assert torch.equal(whole, torch.cat(parts))
    shuffled = torch.tensor([7, 0, 7])
    assert torch.equal(counted_normal(3, shuffled, 5, (4, 3, 5)), whole[shuffled])


def test_large_items_and_seeds():
    items = torch.tensor([0, 2**31, 2**32 - 1])
    for seed in (0, 2**32, MAX_SEED):
        assert counted_normal(seed, items, 2**31, (6,)).isfinite().all()
    assert not torch.equal(counted_normal(0, items, 0, (6,)), counted_normal(2**32, items, 0, (6,)))
    with pytest.raises(ValueError, match="seed"):
        counted_normal(MAX_SEED + 1, items, 0, (6,))


@pytest.mark.parametrize("bound", [1, 2, 10, 1000])
def test_integers_are_uniform(bound):
    """χ² of 100,000 labels, p above 1e-3."""
    labels = counted_integers(0, torch.arange(100_000), bound).numpy()
    assert labels.min() >= 0
    assert labels.max() == bound - 1
    if bound > 1:
        p = stats.chisquare(np.bincount(labels, minlength=bound)).pvalue
        print(f"bound {bound}: χ² p {p:.3f}")
        assert p > 1e-3


def test_integers_pass_over_words_that_favour_small_numbers():
    """With a bound of 3·2³⁰ a quarter of the words is refused; the rest must still be uniform (KS p above 1e-3)."""
    bound = 3 * 2**30
    labels = counted_integers(1, torch.arange(50_000), bound)
    assert stats.kstest(labels.double().numpy() / bound, "uniform").pvalue > 1e-3
    assert torch.equal(labels[7:9], counted_integers(1, torch.tensor([7, 8]), bound))
