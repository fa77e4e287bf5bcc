"""From noise to data along a velocity: Euler, Heun and Euler–Maruyama (SiT, arXiv 2401.08740).

Every sampler takes any ``velocity(x, t, y)``: ``x`` ``[B, ...]`` in the type of the noise that was given, ``t`` a
Python float (so that what depends on the time is decided without asking the device), ``y`` int64 ``[B]``. That of a
flow map also takes the time where a step ends, ``velocity(x, t, y, r)``, and is the mean one between both. The state
and the times are float64. Nothing here synchronises with the device.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from torch import nn

from diffusion.flow import score_from_velocity, shift_times

Velocity = Callable[..., torch.Tensor]  # (x, t, y), of a flow map (x, t, y, r)

LAST_SDE_TIME = 0.04  # the SDE ends here, as its score is infinite at 0; one deterministic step does the rest


def ode_times(num_steps: int, shift: float = 1.0, path_type: str = "linear") -> list[float]:
    """The grid from 1 to 0, ``num_steps + 1`` times: uniform, then shifted (``diffusion.flow.shift_times``)."""
    return shift_times(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift, path_type).tolist()


def sde_times(num_steps: int, shift: float = 1.0, path_type: str = "linear") -> list[float]:
    """``num_steps`` times from 1 to 0.04, uniform before they are shifted, then 0: all steps but the last are
    stochastic."""
    last = shift_times(torch.tensor(LAST_SDE_TIME, dtype=torch.float64), 1 / shift, path_type).item()
    uniform = torch.linspace(1, last, num_steps, dtype=torch.float64)
    return [*shift_times(uniform, shift, path_type).tolist(), 0.0]


GRIDS = {"ode": ode_times, "sde": sde_times, "map": ode_times}  # by mode


def evaluation_times(
    mode: str, num_steps: int, heun: bool = False, shift: float = 1.0, path_type: str = "linear"
) -> list[float]:
    """At which times a sampler evaluates the velocity, in order; ``mode`` is a name of :data:`GRIDS`."""
    times = GRIDS[mode](num_steps, shift, path_type)[:-1]
    return [times[0], *(time for time in times[1:] for _ in range(2))] if heun else times


@torch.no_grad()
def sample_ode(
    velocity: Velocity,
    noise: torch.Tensor,
    labels: torch.Tensor,
    num_steps: int,
    heun: bool = False,
    shift: float = 1.0,
    path_type: str = "linear",
) -> torch.Tensor:
    """Follow ``dx = v dt`` from 1 to 0.

    Args:
        velocity: see the module.
        noise: the state at t = 1, ``[B, ...]``.
        labels: classes, int64 ``[B]``.
        num_steps: of equal size, unless they are shifted.
        heun: correct each step but the last by the slope at its end, where the velocity is evaluated at that end's own
            time (REPA-E's guidance interval looks at the time of the step's beginning for both evaluations).
        shift, path_type: of the times, see :func:`ode_times`.

    Returns:
        the state at t = 0, in the noise's type.
    """
    times = ode_times(num_steps, shift, path_type)
    x = noise.double()
    for step, (now, then) in enumerate(pairwise(times)):
        slope = velocity(x.to(noise.dtype), now, labels).double()
        ahead = x + (then - now) * slope
        if heun and step < num_steps - 1:
            slope = (slope + velocity(ahead.to(noise.dtype), then, labels).double()) / 2
            ahead = x + (then - now) * slope
        x = ahead
    return x.to(noise.dtype)


@torch.no_grad()
def sample_map(
    velocity: Velocity,
    noise: torch.Tensor,
    labels: torch.Tensor,
    num_steps: int,
    shift: float = 1.0,
    path_type: str = "linear",
) -> torch.Tensor:
    """Jump from 1 to 0 along a flow map (MeanFlow, arXiv 2505.13447): exact for any number of steps if the map is.

    Args:
        velocity: of a flow map, see the module.
        noise, labels, num_steps, shift, path_type: as in :func:`sample_ode`.

    Returns:
        the state at t = 0, in the noise's type.
    """
    x = noise.double()
    for now, then in pairwise(ode_times(num_steps, shift, path_type)):
        x = x + (then - now) * velocity(x.to(noise.dtype), now, labels, then).double()
    return x.to(noise.dtype)


@torch.no_grad()
def sample_sde(
    velocity: Velocity,
    noise: torch.Tensor,
    labels: torch.Tensor,
    num_steps: int,
    step_noise: Callable[[int], torch.Tensor],
    path_type: str = "linear",
    shift: float = 1.0,
) -> torch.Tensor:
    """Euler–Maruyama on ``dx = (v − ½·w_t·s) dt + √w_t dW`` backwards in time, ``w_t = 2t`` and s the score.

    Score and drift are affine in the velocity with coefficients that sum to one under guidance: guiding the velocity
    is guiding both.

    Args:
        velocity: see the module.
        noise: the state at t = 1, ``[B, ...]``.
        labels: classes, int64 ``[B]``.
        num_steps: evaluations of the velocity (:func:`sde_times`).
        step_noise: number of the stochastic step, from 0 → standard normal noise in the shape of the state.
        path_type: of the interpolant that the velocity belongs to.
        shift: of the times, see :func:`sde_times`.

    Returns:
        the state at t = 0, in the noise's type.
    """
    times = sde_times(num_steps, shift, path_type)
    x = noise.double()
    for step, (now, then) in enumerate(pairwise(times)):
        v = velocity(x.to(noise.dtype), now, labels).double()
        score = score_from_velocity(v, x, torch.full((1,), now, dtype=x.dtype, device=x.device), path_type)
        diffusion = 2 * now
        x = x + (then - now) * (v - diffusion / 2 * score)
        if step < num_steps - 1:
            x = x + (diffusion * (now - then)) ** 0.5 * step_noise(step)
    return x.to(noise.dtype)


def model_velocity(
    model: nn.Module, autocast: Callable[[], AbstractContextManager] = nullcontext, damped: bool = False
) -> Velocity:
    """The velocity of a network ``model(x, t, y) → (velocity, …)`` with one time a sample, under ``autocast()``.

    Of a denoiser that predicts data, without what its training damps (``Denoiser.undamped``), unless ``damped``.
    """
    undamped = None if damped else getattr(model, "undamped", None)

    def velocity(x: torch.Tensor, t: float, y: torch.Tensor, arrival: float | None = None) -> torch.Tensor:
        def times(t: float) -> torch.Tensor:
            return torch.full((len(x),), t, dtype=x.dtype, device=x.device)

        of_map = {} if arrival is None else {"arrival": times(arrival)}
        with autocast():
            prediction = model(x, times(t), y, **of_map)[0].to(x.dtype)
        return prediction if undamped is None else undamped(prediction, t)

    return velocity


def velocities_with_guide(
    model: nn.Module, autocast: Callable[[], AbstractContextManager] = nullcontext, damped: bool = False
) -> Callable[[torch.Tensor, float, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(x, t, y) → the velocity of a network and that of its guide, of one pass; arguments as :func:`model_velocity`."""

    def velocities(x: torch.Tensor, t: float, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast():
            both = model.with_guide(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), y)
        own, guide = (each.to(x.dtype) if damped else model.undamped(each.to(x.dtype), t) for each in both)
        return own, guide

    return velocities
