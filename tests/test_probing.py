"""Linear probes against brute force, scikit-learn and planted labels."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from metrics.probing import (
    ProbeFeatures,
    attribute_scores,
    choose_probe,
    class_scores,
    each_attribute,
    fit_probe,
    standardisation,
    top_k_recall,
)

CPU = torch.device("cpu")


def plain(values: np.ndarray) -> ProbeFeatures:
    """Features that are left as they are."""
    tensor = torch.from_numpy(values).float()
    dims = tensor.shape[1]
    return ProbeFeatures(tensor, np.arange(len(tensor)), torch.zeros(dims), torch.ones(dims), CPU)


def planted(count: int, dims: int, attributes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features, and attributes that a hyperplane through each decides."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(count, dims))
    return values, values @ generator.normal(size=(dims, attributes)) + generator.normal(size=attributes) > 0


def test_figures_against_counting():
    generator = np.random.default_rng(1)
    scores, targets = generator.normal(size=(60, 9)), generator.random((60, 9)) < 0.3
    targets[:, 4] = False  # an attribute that no image has: left out of the means, but its false alarms count in micro
    f1, precisions, counts = [], [], np.zeros(3)
    for score, target in zip(scores.T, targets.T, strict=True):
        predicted = 1 / (1 + np.exp(-score)) >= 0.5
        hit, alarm, miss = (predicted & target).sum(), (predicted & ~target).sum(), (~predicted & target).sum()
        counts += hit, alarm, miss
        if target.any():
            f1.append(2 * hit / (2 * hit + alarm + miss))
            ranked = target[np.argsort(-score)]
            precisions.append(np.mean([ranked[: place + 1].mean() for place in np.flatnonzero(ranked)]))
    found = 0
    for score, target in zip(scores, targets, strict=True):
        found += sum(target[place] for place in sorted(range(9), key=lambda a: -score[a])[:5])
    result = attribute_scores(scores, targets)
    assert result["F1-macro"] == pytest.approx(np.mean(f1), rel=1e-12) and len(f1) == 8
    assert result["F1-micro"] == pytest.approx(2 * counts[0] / (2 * counts[0] + counts[1] + counts[2]), rel=1e-12)
    assert result["mAP"] == pytest.approx(np.mean(precisions), rel=1e-12)
    assert result["top5-recall"] == pytest.approx(found / targets.sum(), rel=1e-12)
    each = each_attribute(scores, targets)
    assert np.isnan(each[0][4]) and np.isnan(each[1][4])
    np.testing.assert_allclose(np.delete(each[0], 4), f1, rtol=1e-12)


def test_a_single_attribute_is_no_pair_of_classes():
    scores, targets = np.array([[1.0], [1.0], [-1.0], [-1.0]]), np.array([[True], [False], [True], [False]])
    assert attribute_scores(scores, targets)["F1-macro"] == 0.5


def test_equal_scores_are_ranked_in_the_table_s_order():
    scores = np.zeros((1, 7))
    assert top_k_recall(scores, np.array([[0, 0, 0, 0, 1, 1, 1]], bool)) == pytest.approx(1 / 3)
    assert class_scores(np.zeros((4, 6)), np.array([0, 0, 4, 5])) == {"top1": 0.5, "top5": 0.75}


def test_standardised_features_have_zero_mean_and_unit_variance():
    values = np.random.default_rng(2).normal(1000.0, [0.1, 3.0, 50.0], (9000, 3)).astype(np.float32)
    values = np.concatenate([values, np.full((9000, 1), 7.0, np.float32)], 1)
    tensor, items = torch.from_numpy(values), np.arange(0, 9000, 2)
    mean, scale = standardisation(tensor, items)
    np.testing.assert_allclose(mean[:3], values[::2, :3].astype(np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(1 / scale[:3], values[::2, :3].astype(np.float64).std(0), rtol=1e-5)
    found = torch.cat(list(ProbeFeatures(tensor, items, mean, scale, CPU).blocks()))
    assert found.shape == (4500, 4)
    torch.testing.assert_close(found[:, :3].std(0, correction=0), torch.ones(3), rtol=1e-3, atol=0)
    assert not found[:, 3].any()


@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_the_optimum_is_scikit_learn_s(penalty):
    generator = np.random.default_rng(3)
    values, labels = generator.normal(size=(300, 6)), generator.integers(0, 4, 300)
    values[np.arange(300), labels] += 1.0
    probe = fit_probe(plain(values), torch.from_numpy(labels), 4, penalty)
    expected = LogisticRegression(C=1 / (penalty * 300), tol=1e-9, max_iter=2000).fit(values, labels)
    np.testing.assert_allclose(probe.weight, expected.coef_, atol=2e-4)
    np.testing.assert_allclose(
        probe.bias - probe.bias.mean(), expected.intercept_ - expected.intercept_.mean(), atol=2e-4
    )
    attribute = labels == 2
    probe = fit_probe(plain(values), torch.from_numpy(attribute[:, None]), 1, penalty)
    expected = LogisticRegression(C=1 / (penalty * 300), tol=1e-9, max_iter=2000).fit(values, attribute)
    np.testing.assert_allclose(probe.weight, expected.coef_, atol=2e-4)


def run_probe(values: np.ndarray, targets: np.ndarray) -> tuple[dict, np.ndarray, object]:
    """Choose on the first 3/4 and the next eighth, measure on the rest."""
    first, second = len(values) * 3 // 4, len(values) * 7 // 8
    tensors = torch.from_numpy(targets)
    chosen = choose_probe(
        plain(values[:first]), tensors[:first], plain(values[first:second]), tensors[first:second], targets.shape[1]
    )
    scores = chosen.probe.scores(plain(values[second:])).numpy()
    return attribute_scores(scores, targets[second:]), scores, chosen


def test_planted_attributes_are_found_twice_with_the_same_bits():
    values, targets = planted(8000, 12, 3)
    result, scores, chosen = run_probe(values, targets)
    assert result["F1-macro"] > 0.99 and result["mAP"] > 0.999
    assert chosen.penalty == 0.0001 == min(chosen.losses, key=chosen.losses.get)
    assert np.array_equal(scores, run_probe(values, targets)[1])


def test_random_labels_are_found_by_chance_only():
    values = np.random.default_rng(4).normal(size=(4000, 12))
    targets = np.random.default_rng(5).random((4000, 4)) < 0.4
    result, _, chosen = run_probe(values, targets)
    prevalence = targets[3500:].mean()
    assert abs(result["mAP"] - prevalence) < 0.05
    assert result["F1-macro"] < 0.05  # below a probability of one half, nothing is predicted
    assert chosen.penalty >= 0.1  # the strongest: nothing is to be learnt
