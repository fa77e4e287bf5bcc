"""KID, MIND, Inception Score, Precision and Recall against definitions written out."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from metrics import precision_recall as module
from metrics.frechet import Gaussian, frechet_distance
from metrics.inception_score import InceptionScore
from metrics.kid import choose_subset_size, kernel_distance, unbiased_mmd2
from metrics.mind import choose_size, monge_distance
from metrics.precision_recall import count_pairs, precision_recall, squared_radii


def normal(count: int, dim: int, seed: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) * std + mean


def mmd2_in_words(x: np.ndarray, y: np.ndarray) -> float:
    """Every pair of different vectors, one after the other."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    within = sum(np.mean([kernel(*pair) for pair in itertools.permutations(z, 2)]) for z in (x, y))
    return within - 2 * np.mean([kernel(a, b) for a in x for b in y])


def mind_in_words(x: np.ndarray, y: np.ndarray, seed: int = 0) -> float:
    """Of two sets of one size: along each direction the cheapest assignment, found among all that there are."""
    directions = np.random.Generator(np.random.PCG64(seed)).standard_normal((x.shape[1], 1000)).T
    costs = []
    for direction in directions:
        along = [z @ (direction / np.sqrt(direction @ direction)) for z in (x, y)]
        cost = (along[0][:, None] - along[1][None]) ** 2
        costs.append(cost[linear_sum_assignment(cost)].mean())
    return 3 * x.shape[1] * np.mean(costs)


def test_mind_against_assignments():
    x, y = normal(12, 5, 0), normal(12, 5, 1, 0.3, 1.5)
    expected = mind_in_words(x.double().numpy(), y.double().numpy())
    assert monge_distance(x, y, size=12) == pytest.approx(expected, rel=1e-9)
    assert monge_distance(x, x.flip(0), size=12) == 0


def test_mind_of_a_shift_and_of_a_scale():
    """Three times the squared length of a shift (1,000 directions: within 5 %); of N(0, s²), 3·D·(s − 1)²."""
    x = normal(4000, 6, 0)
    shift = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.0, 0.3])
    assert monge_distance(x, x + shift, size=4000) == pytest.approx(3 * shift.square().sum().item(), rel=0.05)
    assert monge_distance(x, 1.5 * normal(4000, 6, 1), size=4000) == pytest.approx(3 * 6 * 0.5**2, rel=0.05)
    assert monge_distance(x[:, :1], 2 + x[:, :1], size=4000) == pytest.approx(12, rel=1e-9)  # one direction only


def test_mind_ranks_as_the_frechet_distance_does_and_counts_its_draws():
    reference = normal(3000, 8, 0)
    sets = [normal(3000, 8, 1), *(normal(3000, 8, 2 + i, 0.1 * i, 1 + 0.1 * i) for i in range(1, 5))]
    distances = [monge_distance(each, reference, size=1000) for each in sets]
    gaussians = [Gaussian(z.double().mean(0).numpy(), np.cov(z.double().numpy(), rowvar=False)) for z in sets]
    theirs = Gaussian(reference.double().mean(0).numpy(), np.cov(reference.double().numpy(), rowvar=False))
    assert np.argsort(distances).tolist() == np.argsort([frechet_distance(g, theirs) for g in gaussians]).tolist()
    assert monge_distance(sets[1], reference, size=1000) == distances[1]
    assert monge_distance(sets[1], reference, size=1000, seed=1) != distances[1]
    assert (choose_size(50_000, 10_000), choose_size(300, 10_000)) == (5000, 300)


def test_mmd_against_all_pairs():
    x, y = normal(17, 5, 0), normal(23, 5, 1, 0.3, 1.5)
    expected = mmd2_in_words(x.double().numpy(), y.double().numpy())
    assert unbiased_mmd2(x, y) == pytest.approx(expected, rel=1e-6)


def test_mmd_by_hand():
    """One dimension, {0, 1} and {2, 3}: kernels 1, 1, 1, 8 / 27, 64, 343; across 1, 1, 27, 64."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    assert unbiased_mmd2(x, y) == pytest.approx(1 + 343 - 2 * (1 + 1 + 27 + 64) / 4, rel=1e-12)


def test_kid_is_unbiased_and_its_subsets_are_counted():
    """0 on average for one distribution, about the population's value for two; the same draws for the same seed."""
    x, y, z = normal(3000, 4, 0), normal(3000, 4, 1), normal(3000, 4, 2, mean=0.5)
    mean, std = kernel_distance(x, y, subset_size=100, subsets=400)
    assert abs(mean) < 0.2 * std and std > 0
    assert kernel_distance(x, z, subset_size=100, subsets=400)[0] == pytest.approx(unbiased_mmd2(x, z), rel=0.1)
    assert kernel_distance(x, z, subset_size=50, subsets=5, seed=3) == kernel_distance(
        x, z, subset_size=50, subsets=5, seed=3
    )
    assert kernel_distance(x, z, subset_size=50, subsets=5, seed=3) != kernel_distance(
        x, z, subset_size=50, subsets=5, seed=4
    )


def test_kid_of_whole_sets():
    """Where a subset is everything, its order does not matter."""
    x, y = normal(40, 4, 0), normal(40, 4, 1, mean=0.5)
    assert choose_subset_size(40, 5000) == 40
    assert choose_subset_size(5000, 50000) == 1000
    mean, std = kernel_distance(x, y, subset_size=40, subsets=7)
    assert mean == pytest.approx(unbiased_mmd2(x, y), rel=1e-9)
    assert std is None
    assert kernel_distance(x[:20], y, subset_size=20, subsets=3)[1] is None  # the other set's subsets vary alone
    assert kernel_distance(x, y, subset_size=39, subsets=3)[1] > 0


def test_inception_score_by_adms_definition():
    """exp of the mean divergence from the split's mean, a shorter split at the end, batches in any order."""
    logits = normal(530, 12, 0, std=3)
    p = logits.double().softmax(1).numpy()
    scores = []
    for first in range(0, 530, 200):
        part = p[first : first + 200]
        divergence = (part * (np.log(part) - np.log(part.mean(0, keepdims=True)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    assert len(scores) == 3
    found = InceptionScore(530, 12, split_size=200)
    for items in torch.randperm(530, generator=torch.Generator().manual_seed(1)).split(64):
        found.update(items, logits[items])
    assert found.score() == pytest.approx(np.mean(scores), rel=1e-6)


def test_inception_score_at_its_ends():
    """1 where all images look alike, the number of classes where each is surely one of them, equally often."""
    alike, sure = InceptionScore(60, 6), InceptionScore(60, 6)
    alike.update(torch.arange(60), normal(1, 6, 0).expand(60, 6))
    sure.update(torch.arange(60), torch.eye(6).repeat(10, 1) * 1e4)
    assert alike.score() == pytest.approx(1, rel=1e-6)
    assert sure.score() == pytest.approx(6, rel=1e-6)


def precision_recall_in_words(samples: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """ADM's: the radius is index 3 of the sorted distances within a set; inside is at most the radius away."""
    samples, reference = samples.double(), reference.double()

    def squared(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x[:, None] - y[None]).square().sum(-1)

    radii = [squared(x, x).sort(1).values[:, 3] for x in (samples, reference)]
    across = squared(samples, reference)
    precision = (across <= radii[1][None, :]).any(1).double().mean()
    recall = (across <= radii[0][:, None]).any(0).double().mean()
    return precision.item(), recall.item()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(module, "EXACT_PAIRS", 50)


@pytest.mark.parametrize("dim", [2, 8, 40])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_precision_and_recall(small_blocks, dim, offset):
    samples, reference = normal(300, dim, 0, offset), normal(217, dim, 1, offset, 1.2)
    found = precision_recall(samples, reference)
    assert found == pytest.approx(precision_recall_in_words(samples, reference), rel=1e-6)
    assert 0.1 < min(found) < 1


def test_precision_and_recall_where_distances_tie(small_blocks):
    """Collapsed samples (radii of 0), samples that are reference vectors, and integer grids full of equal distances."""
    generator = torch.Generator().manual_seed(0)
    few = normal(5, 8, 2, 100)[torch.randint(5, (200,), generator=generator)]
    collapsed = few, torch.cat([few[:3], normal(90, 8, 3, 100)])
    inside = normal(300, 8, 0), torch.cat([normal(300, 8, 0)[:100], normal(50, 8, 4, std=3)])
    grids = torch.randint(6, (150, 3), generator=generator).float(), torch.randint(7, (140, 3), generator=generator)
    for samples, reference in (collapsed, inside, (grids[0], grids[1].float())):
        expected = precision_recall_in_words(samples, reference)
        assert precision_recall(samples, reference) == pytest.approx(expected, rel=1e-6)


def test_precision_and_recall_at_their_ends(small_blocks):
    x = normal(200, 6, 0)
    assert precision_recall(x[:90], x) == (1.0, pytest.approx(precision_recall_in_words(x[:90], x)[1]))
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 1000) == (0.0, 0.0)


def test_radii_and_progress(small_blocks):
    x = normal(150, 6, 0)
    expected = torch.cdist(x.double(), x.double()).sort(1).values[:, 3].square()
    torch.testing.assert_close(squared_radii(x, x.mean(0)), expected, rtol=1e-9, atol=0)
    told = []
    precision_recall(x, x[:70], told.append)
    assert sum(told) == count_pairs(150, 70)
    with pytest.raises(ValueError, match="of 3 vectors"):
        squared_radii(x[:3], x.mean(0))
