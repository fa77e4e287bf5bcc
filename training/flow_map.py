"""A denoiser that learns to jump from noise to data, continued from one that was trained as usual (``loss.flow_map``).

Every image of a batch is seen twice: as ever, between equal times, and at the beginning of a jump.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from diffusion.draws import Draws
from diffusion.flow import add_noise, training_times, velocity
from diffusion.samplers import model_velocity, sample_map
from loss.denoising import denoising_error
from loss.flow_map import guidance_strength, log_error, mean_velocity_target
from loss.total import total
from models.denoisers import Denoiser
from models.denoisers.sprint import Route
from training.ema import twin
from training.ldm import LDM, drawn_times
from training.method import Metrics

GRID_STEPS = (1, 4)  # of the samples that a training shows


class Jumps(NamedTuple):
    """States ``[B, ...]`` at times ``t`` ``[B]``, the velocity of their path there, and where a jump ends, ``[B]``."""

    x: torch.Tensor
    t: torch.Tensor
    velocity: torch.Tensor
    arrival: torch.Tensor

    def joined(self, others: "Jumps") -> "Jumps":
        """One batch of both."""
        return Jumps(*map(torch.cat, zip(self, others, strict=True)))


class JumpingDenoiser(nn.Module):
    """The denoiser behind a forward of four arguments, for DDP; no alignment is beside it.

    Args:
        denoiser: with ``config.flow_map_blocks``.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, arrival: torch.Tensor) -> torch.Tensor:
        """The mean velocity from ``t`` to ``arrival``, in the shape of ``x``."""
        return self.denoiser(x, t, y, arrival=arrival)[0]


class FlowMap(LDM):
    """Trains a flow map; arguments as :class:`LDM`, the flags with ``flow_map_blocks``, the alignment a sum of none."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        # Forward derivatives do not go through compiled blocks, nor in torch 2.6 through what training recomputes.
        self.derived = twin(self.denoiser).eval()

    def wrapped(self) -> nn.Module:
        return JumpingDenoiser(self.denoiser)

    def backward(
        self,
        x: torch.Tensor,
        draws: Draws,
        labels: torch.Tensor,
        features: Sequence[torch.Tensor] | None,
        share: float,
        synchronise: bool,
        route: Route | None = None,
        factor: float = 1.0,
        class_token: torch.Tensor | None = None,
    ) -> Metrics:
        args, count = self.args, len(x)
        is_dropped = draws.dropout < args.cfg_prob
        labels = torch.where(is_dropped, self.denoiser.null_class, labels)
        state = self.denoiser.pack(x, class_token)
        flow, jumps = self.still(state, draws), self.jumps(state, draws.generator)
        both, labels = flow.joined(jumps), labels.repeat(2)
        with self.reducing(self.networks, synchronise):
            own = self.own(both, labels) if guidance_strength(args.flow_map_cfg_scale) else None
            v = self.guided(both, labels, is_dropped.repeat(2), own)
            tangent = v[count:]
            if args.flow_map_tangent == "network":
                tangent = self.own(jumps, labels[count:]) if own is None else own[count:]
            target = torch.cat([v[:count], self.jump_target(jumps, labels[count:], v[count:], tangent)])
            prediction = self.networks(both.x, both.t, labels, both.arrival)
            latent, token = self.errors(prediction, target)
            errors = latent if token is None else latent + args.reg_coeff * token
            terms = {"denoise": log_error(errors[:count]), "jump": log_error(errors[count:])}
            loss = total(terms, dict.fromkeys(terms, 0.5))
            self.accelerator.backward(loss * share)
        metrics = {"loss": loss, "denoise": latent[:count].mean(), "jump": latent[count:].mean()}
        if token is not None:
            metrics |= {"class_token": token[:count].mean(), "class_token_jump": token[count:].mean()}
        return {name: value.detach() for name, value in metrics.items()}

    def still(self, state: torch.Tensor, draws: Draws) -> Jumps:
        """States of the usual training, between equal times."""
        t = drawn_times(self.args, draws.times)
        return self.on_path(state, draws.noise, t, t)

    def jumps(self, state: torch.Tensor, generator: torch.Generator) -> Jumps:
        """Of other noise, between two times; drawn after all that :meth:`draws` draws."""
        options = {"generator": generator, "device": generator.device}
        noise = torch.randn(state.shape, **options)
        numbers = torch.randn(2, len(state), **options)
        numbers = torch.stack([each + mean for each, mean in zip(numbers, self.args.flow_map_times, strict=True)])
        times = training_times(numbers, "lognormal", self.args.path_type, self.args.time_shift)
        return self.on_path(state, noise, times.amax(0), times.amin(0))

    def on_path(self, state: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, arrival: torch.Tensor) -> Jumps:
        path_type = self.args.path_type
        return Jumps(add_noise(state, t, noise, path_type), t, velocity(state, t, noise, path_type), arrival)

    @torch.no_grad()
    def own(self, at: Jumps, labels: torch.Tensor) -> torch.Tensor:
        """The network's velocity, in the type of the path's."""
        with self.accelerator.autocast():
            return self.denoiser(at.x, at.t, labels)[0].to(at.velocity.dtype)

    @torch.no_grad()
    def guided(
        self, at: Jumps, labels: torch.Tensor, is_dropped: torch.Tensor, own: torch.Tensor | None
    ) -> torch.Tensor:
        """The path's velocity ``v``, or with guidance ``v + ω·(v_c − v_u)`` in its interval, where there is a class.

        ``own`` is v_c, which is asked for with guidance alone.
        """
        args = self.args
        strength = guidance_strength(args.flow_map_cfg_scale)
        if not strength:
            return at.velocity
        is_inside = (at.t >= args.flow_map_guidance_low) & (at.t <= args.flow_map_guidance_high) & ~is_dropped
        without = self.own(at, torch.full_like(labels, self.denoiser.null_class))
        weight = (strength * is_inside).reshape(-1, *[1] * (at.x.ndim - 1))
        return at.velocity + weight * (own - without)

    def jump_target(self, jumps: Jumps, labels: torch.Tensor, v: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        """The mean velocities that the network's own derivative asks for; arguments as :func:`mean_velocity_target`."""

        def mean_velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.derived(x, t, labels, arrival=jumps.arrival)[0]

        # fp16 ends at 65,504, and no scaler keeps derivatives below it
        autocast = nullcontext() if self.accelerator.mixed_precision == "fp16" else self.accelerator.autocast()
        with autocast:
            return mean_velocity_target(mean_velocity, jumps.x, jumps.t, jumps.arrival, v, tangent)

    def errors(self, prediction: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Squared errors of each sample ``[B]``: of the latent, and of the class token where there is one."""
        (latent, token), (true_latent, true_token) = map(self.denoiser.unpack, (prediction, target))
        error = denoising_error(latent, true_latent)
        return error, None if token is None else denoising_error(token, true_token)

    def grid_samplers(self, network: Denoiser) -> list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Samples of one jump, and of four."""
        jump, args = model_velocity(network, self.accelerator.autocast), self.args

        def sampler(steps: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
            return lambda noise, labels: sample_map(jump, noise, labels, steps, args.time_shift, args.path_type)

        return [sampler(steps) for steps in GRID_STEPS]
