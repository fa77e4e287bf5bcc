"""Samplers on Gaussian data: the map from noise to data is affine, so its moments are found without sampling."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from diffusion.counted_noise import counted_normal
from diffusion.flow import shift_times
from diffusion.guidance import autoguided, guided
from diffusion.samplers import (
    LAST_SDE_TIME,
    evaluation_times,
    model_velocity,
    ode_times,
    sample_ode,
    sample_sde,
    sde_times,
)
from models.denoisers.config import SiTConfig
from models.denoisers.sit import SiT
from tests.gaussian_flow import GaussianFlow, gaussian_flow

STEPS = (32, 64, 128, 256)
PATHS = pytest.mark.parametrize("path_type", ["linear", "cosine"])


def pushed_by_ode(
    flow: GaussianFlow, num_steps: int, heun: bool, shift: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact mean and covariance of the sampler's result: push 0 and the basis vectors through it."""
    size = len(flow.mean)
    inputs = torch.cat([torch.zeros(1, size), torch.eye(size)]).double()
    labels = torch.zeros(len(inputs), dtype=torch.int64)
    outputs = sample_ode(flow.velocity, inputs, labels, num_steps, heun, shift, flow.path_type)
    matrix = (outputs[1:] - outputs[0]).T
    return outputs[0], matrix @ matrix.T


def pushed_by_sde(flow: GaussianFlow, num_steps: int, shift: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for the SDE, whose result is affine in the initial noise and in each step's: a basis vector for each."""
    size, sources = len(flow.mean), num_steps  # the initial noise and num_steps − 1 steps
    labels = torch.zeros(1 + sources * size, dtype=torch.int64)
    inputs = torch.zeros(sources, 1 + sources * size, size, dtype=torch.float64)
    for source in range(sources):
        inputs[source, 1 + source * size : 1 + (source + 1) * size] = torch.eye(size)
    outputs = sample_sde(
        flow.velocity, inputs[0], labels, num_steps, lambda step: inputs[step + 1], flow.path_type, shift
    )
    matrix = (outputs[1:] - outputs[0]).T
    return outputs[0], matrix @ matrix.T


def check_order(order: int, found: Callable[[int], tuple[torch.Tensor, ...]], exact: tuple[torch.Tensor, ...]) -> None:
    """Mean and covariance: log₂ of how much the error shrinks at the last doubling of the steps is ``order`` ± 0.1.

    Except where nothing is left to shrink: on the linear path the mean moves on a straight line.
    """
    results = [found(n) for n in STEPS]
    for name, number in (("mean", 0), ("covariance", 1)):
        errors = [float((result[number] - exact[number]).norm()) for result in results]
        measured = [math.log2(before / after) for before, after in pairwise(errors)]
        print(f"{name}: errors", *(f"{e:.2e}" for e in errors), "orders", *(f"{o:.3f}" for o in measured))
        assert abs(measured[-1] - order) < 0.1 or max(errors) < 1e-12


@PATHS
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_ode_order(path_type, diagonal, heun, order):
    flow = gaussian_flow(path_type, diagonal)
    check_order(order, lambda n: pushed_by_ode(flow, n, heun), (flow.mean, flow.covariance))


@PATHS
@pytest.mark.parametrize("diagonal", [True, False])
def test_sde_weak_order(path_type, diagonal):
    """Order 1 towards the exact marginal at 0.04 moved on by the last step, whose size is not a matter of n."""
    flow = gaussian_flow(path_type, diagonal)
    mean, covariance = flow.marginal(LAST_SDE_TIME)

    def last_step(x: torch.Tensor) -> torch.Tensor:
        return x - LAST_SDE_TIME * (flow.velocity(x, LAST_SDE_TIME) - LAST_SDE_TIME * flow.score(x, LAST_SDE_TIME))

    offset = last_step(torch.zeros(1, 3).double())[0]
    matrix = (last_step(torch.eye(3).double()) - offset).T
    exact = (matrix @ mean + offset, matrix @ covariance @ matrix.T)
    check_order(1, lambda n: pushed_by_sde(flow, n), exact)
    bias = [float((a - b).norm() / b.norm()) for a, b in zip(exact, (flow.mean, flow.covariance), strict=True)]
    print("relative error that the last step leaves: mean {:.1e}, covariance {:.1e}".format(*bias))
    assert max(bias) < 0.02


@PATHS
def test_sde_with_counted_noise(path_type):
    """20,000 samples of 64 steps have the mean and covariance of the affine map within 5 standard errors."""
    flow, items = gaussian_flow(path_type), torch.arange(20_000)
    samples = sample_sde(
        flow.velocity,
        counted_normal(0, items, 0, (3,), dtype=torch.float64),
        torch.zeros_like(items),
        64,
        lambda step: counted_normal(0, items, step + 1, (3,)),
        path_type,
    )
    mean, covariance = pushed_by_sde(flow, 64)
    variances = covariance.diagonal()
    assert bool(((samples.mean(0) - mean).abs() < 5 * (variances / len(items)).sqrt()).all())
    spread = ((covariance.square() + variances[:, None] * variances) / len(items)).sqrt()
    assert bool(((samples.T.cov() - covariance).abs() < 5 * spread).all())


@PATHS
@pytest.mark.parametrize("shift", [0.4, 3.0])
def test_shifted_steps_have_the_same_orders(path_type, shift):
    flow = gaussian_flow(path_type)
    exact = flow.marginal(0.0)
    check_order(1, lambda n: pushed_by_ode(flow, n, False, shift), exact)
    check_order(2, lambda n: pushed_by_ode(flow, n, True, shift), exact)


@PATHS
def test_shifted_times(path_type):
    """Uniform in the time before the shift; the SDE ends at 0.04 whatever the shift."""
    shift = 4.0
    for times, last in ((ode_times(10, shift, path_type), 0.0), (sde_times(10, shift, path_type)[:-1], LAST_SDE_TIME)):
        assert times[0] == 1 and times[-1] == pytest.approx(last, abs=1e-15)
        before = shift_times(torch.tensor(times, dtype=torch.float64), 1 / shift, path_type)
        steps = before.diff()
        torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=1e-10, atol=0)
        assert sum(time > 0.5 for time in times) > 7  # 5 of a uniform grid
    assert evaluation_times("ode", 10, shift=shift, path_type=path_type) == ode_times(10, shift, path_type)[:-1]


def test_times():
    assert ode_times(4) == [1, 0.75, 0.5, 0.25, 0]
    assert ode_times(4, shift=3) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    # the other way round, as LightningDiT counts, it is the inverse shift
    assert ode_times(7, shift=4) == pytest.approx([1 - t for t in reversed(ode_times(7, shift=0.25))])
    assert sde_times(250)[0] == 1
    assert sde_times(250)[-2:] == [LAST_SDE_TIME, 0]
    assert len(sde_times(250)) == 251
    assert sde_times(1) == [1, 0]


@pytest.mark.parametrize(
    ("mode", "heun", "shift"), [("ode", False, 1), ("ode", True, 1), ("ode", True, 3), ("sde", False, 1)]
)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_evaluations(mode, heun, shift, num_steps):
    """The velocity is asked at the times that evaluation_times names, in the noise's type, and never at 0."""
    seen = []

    def velocity(x, t, y):
        assert x.dtype == torch.float32
        assert type(t) is float
        seen.append(t)
        return torch.zeros_like(x)

    noise, labels = torch.randn(2, 3, 4, 4), torch.tensor([0, 1])
    if mode == "ode":
        result = sample_ode(velocity, noise, labels, num_steps, heun, shift)
        assert torch.equal(result, noise)
    else:
        result = sample_sde(velocity, noise, labels, num_steps, lambda step: torch.randn(2, 3, 4, 4))
        assert torch.isfinite(result).all()
    assert seen == evaluation_times(mode, num_steps, heun, shift)
    assert result.dtype == torch.float32
    assert min(seen) > 0


def counting(seen: list[tuple[float, int]]):
    """A velocity that depends on all its arguments and notes time and batch size."""

    def velocity(x, t, y):
        seen.append((t, len(x)))
        return x.sin() * (1 + y[:, None]) + t

    return velocity


def test_guidance_inside_and_outside_its_interval():
    x, y, null = torch.randn(3, 5), torch.tensor([0, 1, 2]), 7
    seen = []
    velocity = counting(seen)
    guide = guided(velocity, 2.5, null, low=0.2, high=0.75)
    for t in (0.0, 0.19, 0.76, 1.0):
        assert torch.equal(guide(x, t, y), velocity(x, t, y))
    assert {count for _, count in seen} == {3}
    seen.clear()
    for t in (0.2, 0.5, 0.75):
        result = guide(x, t, y)
        assert seen.pop() == (t, 6)
        assert not seen
        conditional, unconditional = velocity(x, t, y), velocity(x, t, torch.full_like(y, null))
        seen.clear()
        assert torch.equal(result, unconditional + 2.5 * (conditional - unconditional))
    assert guided(velocity, 1.0, null) is velocity
    some = guided(velocity, 2.5, null, channels=2)(x, 0.5, y)
    everywhere = guided(velocity, 2.5, null)(x, 0.5, y)
    assert torch.equal(some, torch.cat([everywhere[:, :2], velocity(x, 0.5, y)[:, 2:]], dim=1))


@pytest.mark.parametrize(("mode", "heun"), [("ode", False), ("ode", True), ("sde", False)])
def test_guidance_doubles_the_batch_only_inside(mode, heun):
    """Each evaluation, Heun's second too, is judged by its own time."""
    seen = []
    velocity = guided(counting(seen), 2.0, 9, low=0.25, high=0.7)
    noise, labels = torch.randn(2, 3), torch.tensor([0, 1])
    if mode == "ode":
        sample_ode(velocity, noise, labels, 8, heun)
    else:
        sample_sde(velocity, noise, labels, 8, lambda step: torch.zeros(2, 3))
    assert seen == [(t, 4 if 0.25 <= t <= 0.7 else 2) for t in evaluation_times(mode, 8, heun)]


def test_guidance_of_a_network():
    """The doubled batch gives what two forwards give, and float64 noise stays float64 around a float32 network."""
    torch.manual_seed(0)
    model = SiT(SiTConfig("SiT-Ti/2", 4, 8, num_classes=3)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    velocity = model_velocity(model)
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([0, 2])
    with torch.no_grad():
        conditional = velocity(x, 0.5, y)
        unconditional = velocity(x, 0.5, torch.full_like(y, model.null_class))
        together = guided(velocity, 3.0, model.null_class)(x, 0.5, y)
    assert (conditional - unconditional).abs().max() > 1e-3
    torch.testing.assert_close(together, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-5)


@PATHS
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.25, 0.75)])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.5])
def test_autoguidance_in_closed_form(path_type, low, high, scale):
    """Of N(0, c) the velocity is x·d/dt log r for r² = α²c + σ²: noise is multiplied by r(0)/r(1), and while the guide
    of another c acts by the ratio of both r over that time, to the power of scale − 1."""

    def deviation(variance: float, t: float) -> float:
        alpha, sigma = (1 - t, t) if path_type == "linear" else (math.cos(math.pi * t / 2), math.sin(math.pi * t / 2))
        return math.sqrt(alpha**2 * variance + sigma**2)

    def flow(variance: float) -> GaussianFlow:
        return GaussianFlow(torch.zeros(1).double(), torch.tensor([[variance]]).double(), path_type)

    data, worse = 0.3, 0.9
    ratio = [deviation(data, t) / deviation(worse, t) for t in (low, high)]
    expected = deviation(data, 0) / deviation(data, 1) * (ratio[0] / ratio[1]) ** (scale - 1)
    velocity = autoguided(flow(data).velocity, flow(worse).velocity, scale, low, high)
    noise, labels = torch.tensor([[1.0], [-2.0]]).double(), torch.tensor([0, 1])
    found = [sample_ode(velocity, noise, labels, steps, True, 1.0, path_type) / noise for steps in (256, 512)]
    errors = [float((each - expected).abs().max()) for each in found]
    print(f"expected {expected:.5f}, errors {errors[0]:.1e} {errors[1]:.1e}")
    assert errors[1] < 1e-3 and errors[1] < 0.7 * errors[0]
    assert scale == 1 or abs(expected - math.sqrt(data)) > 0.05  # that of no guidance


def test_autoguidance_inside_and_outside_its_interval():
    """The guide is asked for the same class, and only inside."""
    x, y = torch.randn(3, 5).double(), torch.tensor([0, 1, 2])
    seen, asked = [], []
    velocity = counting(seen)

    def guide(x, t, y):
        asked.append((t, y))
        return x.cos() * (2 - y[:, None]) - t

    both = autoguided(velocity, guide, 2.5, low=0.2, high=0.75)
    for t in (0.0, 0.19, 0.76, 1.0):
        assert torch.equal(both(x, t, y), x.sin() * (1 + y[:, None]) + t)
    assert not asked and {count for _, count in seen} == {3}
    for t in (0.2, 0.5, 0.75):
        own, other = x.sin() * (1 + y[:, None]) + t, x.cos() * (2 - y[:, None]) - t
        torch.testing.assert_close(both(x, t, y), 2.5 * own - 1.5 * other, rtol=1e-12, atol=1e-12)
        assert asked.pop() == (t, y) and not asked
    own, some = velocity(x, 0.5, y), autoguided(velocity, guide, 2.5, channels=2)(x, 0.5, y)
    assert torch.equal(some, torch.cat([both(x, 0.5, y)[:, :2], own[:, 2:]], dim=1))
    assert autoguided(velocity, guide, 1.0) is velocity


@pytest.mark.parametrize("scale", [0.0, 0.7, 3.0, 10.0])
@pytest.mark.parametrize("mode", ["ode", "heun", "sde"])
def test_guided_by_itself_nothing_changes(mode, scale):
    flow, labels = gaussian_flow("linear"), torch.zeros(5, dtype=torch.int64)
    noise = counted_normal(0, torch.arange(5), 0, (3,), dtype=torch.float64)

    def sample(velocity):
        if mode == "sde":
            return sample_sde(velocity, noise, labels, 16, lambda step: noise / (1 + step))
        return sample_ode(velocity, noise, labels, 16, mode == "heun")

    guided_by_itself = sample(autoguided(flow.velocity, flow.velocity, scale, 0.1, 0.8))
    torch.testing.assert_close(guided_by_itself, sample(flow.velocity), rtol=1e-12, atol=1e-12)
