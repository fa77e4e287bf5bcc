"""What aligning a denoiser costs on top of training it alone: parameters and floating-point operations."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from loss.alignment import DenoiserAlignment
from models.denoisers import Denoiser, DenoiserConfig
from models.denoisers.sprint import Route
from models.encoders import Encoder
from runtime.measure import count_parameters
from training.networks import aligned

PUBLISHED = {"VAE-REPA": "the paper says 4 %"}  # of FLOPs, without naming the model


@dataclass(frozen=True)
class Cost:
    """Of a network.

    Attributes:
        parameters: their number.
        flops: of a forward pass of one image; a multiplication and an addition are two.
    """

    parameters: int
    flops: int


def denoiser_cost(denoiser: Denoiser, route: Route | None = None) -> Cost:
    """Of a denoiser on the meta device: nothing is allocated; ``route`` is of :func:`training_route`."""
    routed = () if route is None else ((), route)
    return Cost(count_parameters(denoiser)[0], _flops(denoiser.forward, *_one_input(denoiser), *routed))


def training_route(denoiser: Denoiser, token_drop: float) -> Route | None:
    """Through a network with SPRINT, on the meta device; None where no token is dropped."""
    if not token_drop:
        return None
    kept = round(denoiser.grid**2 * (1 - token_drop))
    return Route(torch.empty(1, kept, dtype=torch.int64, device="meta"))


def alignment_cost(alignment: DenoiserAlignment, denoiser: Denoiser, route: Route | None = None) -> Cost:
    """Of an alignment's projectors, both on the meta device."""
    states = [torch.empty(1, *denoiser.state_size(tap, route), device="meta") for tap in alignment.taps]
    return Cost(count_parameters(alignment)[0], _flops(alignment.predict, states))


def teacher_cost(denoiser: Denoiser, taps: Sequence[int]) -> Cost:
    """Of the averaged network, which is kept anyway, up to the last of the ``taps``; on the meta device."""
    return Cost(0, _flops(denoiser.hidden_states, *_one_input(denoiser), taps))


def encoder_cost(encoder: Encoder, resolution: int) -> Cost:
    """A VFM that images of ``resolution`` pixels are run through."""
    device = next(encoder.parameters()).device
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes only; its weights are where they are
        images = torch.empty(1, 3, resolution, resolution, dtype=torch.uint8, device=device)
        return Cost(count_parameters(encoder)[0], _flops(encoder.forward, images))  # not the compiled call


def alignment_cost_lines(
    args: argparse.Namespace, config: DenoiserConfig, names: Sequence[str], encoders: Sequence[Encoder]
) -> list[str]:
    """Measured costs in words: of the denoiser, and of everything that only its alignment needs.

    Percentages of FLOPs are those of a training step, which costs a trained network three forward passes and a frozen
    one a single pass.

    Args:
        args: flags of the alignments, settled, and the images' ``resolution``.
        config: of the denoiser.
        names: of the alignments.
        encoders: VFMs that images are run through, under the caller's autocast.
    """
    with torch.device("meta"):
        denoiser = config.build()
        parts: Mapping[str, DenoiserAlignment] = aligned(args, names, denoiser)
    route = training_route(denoiser, args.token_drop) if config.sparse_blocks else None
    alone = denoiser_cost(denoiser, route)
    lines = [f"{config.model} alone: {alone.parameters:,} parameters, {alone.flops / 1e9:.2f} GFLOPs a forward pass"]
    if route is not None:
        whole = denoiser_cost(denoiser).flops
        lines[0] += f" of training, {alone.flops / whole:.0%} of the {whole / 1e9:.2f} with all tokens"
    for part in parts.values():
        cost = alignment_cost(part, denoiser, route)
        published = f"; {PUBLISHED[part.called()]}" if part.called() in PUBLISHED else ""
        lines.append(_line(part.called(), cost, alone, cost.flops / alone.flops) + published)
        if part.teacher_taps:
            cost = teacher_cost(denoiser, part.teacher_taps)
            lines.append(_line(f"{part.called()}'s averaged network", cost, alone, cost.flops / (3 * alone.flops)))
    for encoder in encoders:
        cost = encoder_cost(encoder, args.resolution)
        lines.append(_line(f"VFM {encoder.name} (frozen)", cost, alone, cost.flops / (3 * alone.flops)))
    return lines


def _line(name: str, cost: Cost, alone: Cost, share: float) -> str:
    return (
        f"{name} adds {cost.parameters:,} parameters ({cost.parameters / alone.parameters:.1%}) and "
        f"{cost.flops / 1e9:.2f} GFLOPs a forward pass ({share:+.1%} of a training step)"
    )


def _one_input(denoiser: Denoiser) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.empty(1, *denoiser.state_shape, device="meta")
    return x, torch.empty(1, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")


def _flops(call: Callable[..., object], *inputs: object) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*inputs)
    return counter.get_total_flops()
