"""What aligning a SiT costs beside training it alone: parameters and floating-point operations."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models.denoisers.sit import SiT, SiTConfig
from models.encoders import Encoder
from runtime.measure import count_parameters

PUBLISHED_VAE_REPA = "the paper says 4 %"  # of FLOPs, without naming the model


@dataclass(frozen=True)
class Cost:
    """Of a network.

    Attributes:
        parameters: their number.
        flops: of a forward pass of one image; a multiplication and an addition are two.
    """

    parameters: int
    flops: int


def sit_cost(config: SiTConfig) -> tuple[Cost, dict[str, Cost]]:
    """A SiT without projectors, and what the projectors of ``REPA`` and ``VAE-REPA`` add; nothing is allocated."""
    with torch.device("meta"):
        model = SiT(config)
        x = torch.empty(1, config.latent_channels, config.latent_size, config.latent_size)
        tokens = torch.empty(1, config.grid**2, config.size.width)
        t, y = torch.empty(1), torch.empty(1, dtype=torch.int64)
    projectors = {"REPA": list(model.projectors), "VAE-REPA": [model.latent_projector] if config.latent_depth else []}
    added = {
        name: Cost(sum(count_parameters(module)[0] for module in modules), _flops(modules, tokens))
        for name, modules in projectors.items()
        if modules
    }
    whole = count_parameters(model)[0] - sum(cost.parameters for cost in added.values())
    return Cost(whole, _flops([model], x, t, y)), added


def encoder_cost(encoder: Encoder, resolution: int) -> Cost:
    """A VFM that images of ``resolution`` pixels are run through."""
    device = next(encoder.parameters()).device
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes only; its weights are where they are
        images = torch.empty(1, 3, resolution, resolution, dtype=torch.uint8, device=device)
        return Cost(count_parameters(encoder)[0], _flops([encoder], images))


def alignment_cost_lines(config: SiTConfig, encoders: Sequence[Encoder], resolution: int) -> list[str]:
    """Measured costs in words: of the SiT, and of everything that only its alignment needs.

    Percentages of FLOPs are those of a training step, which costs a trained network three forward passes and a frozen
    one a single pass.
    """
    sit, added = sit_cost(config)
    lines = [f"{config.model} alone: {sit.parameters:,} parameters, {sit.flops / 1e9:.2f} GFLOPs a forward pass"]
    for name, cost in added.items():
        published = f"; {PUBLISHED_VAE_REPA}" if name == "VAE-REPA" else ""
        lines.append(_line(name, cost, sit, cost.flops / sit.flops) + published)
    for encoder in encoders:
        cost = encoder_cost(encoder, resolution)
        lines.append(_line(f"VFM {encoder.name} (frozen)", cost, sit, cost.flops / (3 * sit.flops)))
    return lines


def _line(name: str, cost: Cost, sit: Cost, share: float) -> str:
    return (
        f"{name} adds {cost.parameters:,} parameters ({cost.parameters / sit.parameters:.1%}) and "
        f"{cost.flops / 1e9:.2f} GFLOPs a forward pass ({share:+.1%} of a training step)"
    )


def _flops(modules: Sequence[nn.Module], *inputs: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for module in modules:
            module.forward(*inputs)  # not the compiled call
    return counter.get_total_flops()
