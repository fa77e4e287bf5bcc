"""Averages of any length: the power function's profile, its combination out of snapshots, and the names of averages."""

import argparse

import numpy as np
import pytest
import torch
from torch import nn

from errors import UserError
from formats import averages
from formats.power_average import LARGEST_LENGTH, combination, gamma_of, half_life
from inference.posthoc import PosthocCheckpoint
from runtime.checkpoint import CheckpointFolder
from training.ema import PowerAverage, build_averages

LENGTHS = (0.05, 0.1)
STEPS, EVERY = 400, 20


def profile_weights(length: float, step: int) -> np.ndarray:
    """Of the weights after steps 1 … step, ``[step]``: ∫ (γ + 1)·τ^γ / t^(γ+1) dτ over each step, float64."""
    edges = (np.arange(step + 1) / step) ** (gamma_of(length) + 1)
    return np.diff(edges)


def random_walk(size: int = 50, steps: int = STEPS, seed: int = 0) -> np.ndarray:
    """Parameters after each step, ``[steps, size]``, float64."""
    return np.random.default_rng(seed).standard_normal((steps, size)).cumsum(0)


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("length", [0.005, 0.05, 0.1, 0.25, LARGEST_LENGTH])
def test_lengths_and_exponents(length):
    """Back and forth; and the length is the profile's standard deviation, by numerical integration."""
    gamma = gamma_of(length)
    assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(length, rel=1e-12)
    times = (np.arange(200_000) + 0.5) / 200_000
    density = (gamma + 1) * times**gamma / len(times)
    mean = density @ times
    assert np.sqrt(density @ (times - mean) ** 2) == pytest.approx(length, rel=1e-4)
    age = half_life(1000, gamma) / 1000
    assert density[times > 1 - age].sum() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("length", [*LENGTHS, 0.2])
def test_the_update_rule_gives_the_profile(length):
    """β(t) = (1 − 1/t)^(γ+1), step after step on float64 parameters, against the closed form."""
    module, walk = nn.Linear(1, 50, bias=False).double(), random_walk()
    average = PowerAverage(module, length)
    for step in range(STEPS):
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(walk[step, :, None]))
        average.update(step)
    wanted = profile_weights(length, STEPS) @ walk
    assert relative_error(average.module.weight[:, 0].numpy(), wanted) < 1e-12


def snapshots(walk: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps and exponents ``[n]`` of stored averages, and the averages ``[n, size]``, computed directly."""
    stored = [(step, length) for step in range(EVERY, STEPS + 1, EVERY) for length in LENGTHS]
    found = [profile_weights(length, step) @ walk[:step] for step, length in stored]
    return np.array([step for step, _ in stored]), np.array([gamma_of(x) for _, x in stored]), np.array(found)


@pytest.mark.parametrize(("length", "tolerance"), [(0.03, 3e-3), (0.07, 2e-4), (0.08, 2e-4), (0.15, 4e-4)])
def test_a_third_length_from_snapshots_of_two(length, tolerance):
    """Of a random walk, 20 snapshots in 400 steps, against the directly computed average."""
    walk = random_walk()
    steps, gammas, stored = snapshots(walk)
    shares, missed = combination(steps, gammas, STEPS, gamma_of(length))
    wanted = profile_weights(length, STEPS) @ walk
    assert relative_error(shares @ stored, wanted) < tolerance
    nearest = min(relative_error(each, wanted) for each in stored[-2:])
    assert relative_error(shares @ stored, wanted) < nearest / 10  # better than any stored length by far
    assert missed < 0.05
    assert shares.sum() == pytest.approx(1, abs=1e-12)  # what never moves stays as it is


def test_a_stored_length_is_found_again():
    steps, gammas, _ = snapshots(random_walk())
    for number, length in enumerate(LENGTHS):
        shares, missed = combination(steps, gammas, STEPS, gamma_of(length))
        expected = np.zeros(len(steps))
        expected[len(steps) - len(LENGTHS) + number] = 1
        assert np.abs(shares - expected).max() < 1e-9
        assert missed < 1e-6


def test_shares_are_the_best_sum_of_profiles():
    """Against least squares over sampled profiles, with the same constraint put in as a large penalty."""
    steps, length = np.array([100, 100, 200, 200, 400, 400]), 0.07
    gammas = np.array([gamma_of(x) for x in LENGTHS * 3])
    times = (np.arange(40_000) + 0.5) / 100

    def density(step, gamma):
        return np.where(times <= step, (gamma + 1) * (times / step) ** gamma / step, 0)

    matrix = np.stack([density(*each) for each in zip(steps, gammas, strict=True)], 1)
    wanted, penalty = density(400, gamma_of(length)), 1e3
    system = np.vstack([matrix, np.full((1, len(steps)), penalty)])
    expected = np.linalg.lstsq(system, np.append(wanted, penalty), rcond=None)[0]
    shares, missed = combination(steps, gammas, 400, gamma_of(length))
    assert np.abs(shares - expected).max() < 1e-3
    assert missed == pytest.approx(relative_error(matrix @ shares, wanted), rel=0.01)


def saved_run(folder, lengths: str = "0.05,0.1") -> tuple[np.ndarray, CheckpointFolder]:
    """Snapshots of a module that walks, as the loop keeps them."""
    module, walk = nn.Linear(1, 50, bias=False), random_walk()
    args = argparse.Namespace(ema_decay=0.0, posthoc_ema=lengths)
    kept, places = build_averages(args, module), CheckpointFolder(folder)
    for step in range(STEPS):
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(walk[step, :, None]))
        for average in kept.values():
            average.update(step)
        if (step + 1) % EVERY == 0:
            modules = {name: average.module for name, average in kept.items()}
            checkpoint = places.save(step + 1, modules, {}, {})
            places.keep_snapshot(checkpoint, list(kept), (), {})
    return walk, places


def test_weights_out_of_snapshots_on_disk(tmp_path):
    walk, places = saved_run(tmp_path)
    module = nn.Linear(1, 50, bias=False)
    checkpoint = PosthocCheckpoint(places.snapshots / "0000400", "posthoc_0.07")
    assert (checkpoint.fault("posthoc_0.07"), checkpoint.doubts()) == (None, None)
    checkpoint.load_module("posthoc_0.07", module)
    wanted = profile_weights(0.07, STEPS) @ walk
    assert relative_error(module.weight.detach()[:, 0].double().numpy(), wanted) < 1e-3  # in float16
    # one that is stored is read as it stands, from one file
    exact = PosthocCheckpoint(places.snapshots / "0000400", "posthoc_0.1")
    exact.load_module("posthoc_0.1", module)
    whole = places.of_step(400).read_module("posthoc_0.1")["weight"]
    assert torch.equal(module.weight.detach(), whole.half().float())
    assert len(exact.parts) == 1
    # of an earlier step, without what came later
    early = PosthocCheckpoint(places.snapshots / "0000200", "posthoc_0.07")
    assert max(part.snapshot.step for part in early.parts) == 200
    assert len({each.checksum(each.weights) for each in (checkpoint, exact, early)}) == 3


def test_too_short_a_length_and_a_damaged_snapshot_are_told(tmp_path):
    _, places = saved_run(tmp_path)
    short = PosthocCheckpoint(places.snapshots / "0000400", "posthoc_0.005")
    assert "misses its profile by" in short.doubts()
    path = places.snapshots / "0000380" / "posthoc_0.05.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    checkpoint = PosthocCheckpoint(places.snapshots / "0000400", "posthoc_0.07")
    assert "0000380: posthoc_0.05.safetensors has another checksum" in checkpoint.fault("posthoc_0.07")


def test_a_shape_that_does_not_fit_is_one_line(tmp_path):
    _, places = saved_run(tmp_path)
    with pytest.raises(UserError, match=r"posthoc_0\.07\.safetensors does not fit"):
        PosthocCheckpoint(places.snapshots / "0000400", "posthoc_0.07").load_module("posthoc_0.07", nn.Linear(1, 3))


def test_names():
    assert averages.ema_decays("0.9999") == 0.9999 and averages.ema_decays("0") == 0.0
    assert averages.ema_names(0.0) == {}
    assert averages.ema_names(0.999) == {"ema": 0.999}
    text = averages.ema_decays("0.999,0.99960,1e-5")
    assert averages.ema_names(text) == {"ema": 0.999, "ema_0.9996": 0.9996, "ema_1e-05": 1e-5}
    assert averages.ema_decays(text) == text  # in an older run's args.json
    assert averages.posthoc_names(averages.relative_lengths("0.05,0.10")) == {"posthoc_0.05": 0.05, "posthoc_0.1": 0.1}
    assert averages.posthoc_names(averages.relative_lengths("none")) == {}
    for given, name in {
        "ema": "ema",
        "model": "model",
        "ema_0.99960": "ema_0.9996",
        "posthoc_.10": "posthoc_0.1",
    }.items():
        assert averages.weights_name(given) == name
    assert averages.statistics_of("ema") == "statistics_ema" and averages.statistics_of("model") is None


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (averages.ema_decays, "0.9,0.90"), (averages.ema_decays, "0.9,0"), (averages.ema_decays, "0.9,1"),
        (averages.ema_decays, "1"), (averages.ema_decays, "-0.1"), (averages.ema_decays, "0.9,"),
        (averages.relative_lengths, "0"), (averages.relative_lengths, "0.3"), (averages.relative_lengths, "0.1,0.10"),
        (averages.weights_name, "ema_1"), (averages.weights_name, "posthoc_0"), (averages.weights_name, "EMA"),
        (averages.weights_name, "ema_x"), (averages.weights_name, "../ema"),
    ],
)  # fmt: skip
def test_wrong_names_and_numbers(kind, text):
    with pytest.raises(argparse.ArgumentTypeError):
        kind(text)
