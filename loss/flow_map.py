"""Decoupled MeanFlow (arXiv 2510.24474): a network learns to jump, from noise to data in one to four steps.

A flow map ``u(x_t, t, r)`` is the mean velocity from ``t`` to an earlier time ``r``: ``x_r = x_t + (r − t)·u``. Between
equal times it is the velocity. Differentiated along the path, its definition says (MeanFlow, arXiv 2505.13447, eq. 6)

    u(x_t, t, r) = v(x_t, t) − (t − r)·d/dt u(x_t, t, r),    d/dt u = v·∂ₓu + ∂ₜu,

and the right side, without gradient, is what the left side is trained towards.
"""

import warnings
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

MeanVelocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)  # of torch.func.jvp's own
FLOOR = 0.01  # of errors, below which they count alike


@torch.no_grad()
def mean_velocity_target(
    mean_velocity: MeanVelocity,
    x: torch.Tensor,
    t: torch.Tensor,
    arrival: torch.Tensor,
    v: torch.Tensor,
    tangent: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the mean velocity from ``t`` to ``arrival`` should be, by the network's own derivative (exact, forwards).

    Args:
        mean_velocity: (x, t) → u towards ``arrival``, in the shape of ``x``; not compiled.
        x: states at ``t``, ``[B, ...]``.
        t, arrival: times ``[B]``.
        v: the velocity at ``x``, in its shape: the path's own, or a guided one.
        tangent: the velocity along which it is differentiated; None: ``v``. The path's own is that of one image of the
            many that may lie behind ``x``. The derivative is linear in it, so that the mean over these, the network's
            velocity at ``x``, asks for the same with less noise (improved MeanFlow, arXiv 2512.02012, eq. 12).

    Returns:
        ``v − (t − arrival)·d/dt u`` in the type of ``x``.
    """
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no derivative forwards
        _, rate = torch.func.jvp(mean_velocity, (x, t), (v if tangent is None else tangent, torch.ones_like(t)))
    return v + (arrival - t).reshape(-1, *[1] * (x.ndim - 1)) * rate.to(v.dtype)


def log_error(errors: torch.Tensor) -> torch.Tensor:
    """Mean of ``log(e + 0.01)`` over errors ``[B]``: large ones, as of long jumps, do not decide alone.

    Its gradient is that of ``e / (e + 0.01)``, the denominator without gradient: MeanFlow's weight with power 1. The
    method's Cauchy loss also learns a log-variance λ; it is ``log(e + 0.01·exp λ)``, which falls with λ, so that all
    it can learn is a smaller floor. Here the floor stays.
    """
    return (errors + FLOOR).log().mean()


def guidance_strength(scale: float) -> float:
    """ω of model guidance ``v + ω·(v_c − v_u)`` (arXiv 2502.12154) whose fixed point is guidance of ``scale``.

    A network that has learned it answers ``v_u + (v − v_u)/(1 − ω)``.
    """
    return 1 - 1 / scale
