"""Averages of a module's parameters and float buffers: exponential, and by a power function of time."""

import argparse
import copy
from functools import cached_property

import torch
from torch import nn

from formats.averages import ema_names, posthoc_names
from formats.power_average import decay_at, gamma_of


def twin(module: nn.Module) -> nn.Module:
    """A second module of the same tensors, which follow each other; compiled, it leaves the first one uncompiled."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, tensors)


class Average:
    """Keeps an averaged copy of a module, which starts as an exact copy.

    Build it before the module is wrapped or compiled; update it once an optimizer step.

    Args:
        module: the module to follow.
    """

    def __init__(self, module: nn.Module):
        self.source = module
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """Weight of the old average after a step, counted from 0."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, step: int) -> None:
        """``average ← decay·average + (1 − decay)·current``; integer buffers are copied.

        Args:
            step: that was taken, counted from 0.
        """
        averaged, followed, others = self._tensors
        torch._foreach_lerp_(averaged, [tensor.detach() for tensor in followed], 1 - self.decay_at(step))
        for average, current in others:
            average.copy_(current)

    @cached_property
    def _tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Floats of the average, and of what it follows; pairs of all others.

        Looked up at the first step: wrapping for several processes on CPUs puts other buffers into the module.
        """
        averaged, followed = self.module.state_dict(keep_vars=True), self.source.state_dict(keep_vars=True)
        assert averaged.keys() == followed.keys()
        pairs = {id(averaged[name]): (averaged[name], followed[name]) for name in followed}  # a shared one once
        floats = [pair for pair in pairs.values() if pair[1].is_floating_point()]
        others = [pair for pair in pairs.values() if not pair[1].is_floating_point()]
        return [average for average, _ in floats], [current for _, current in floats], others


class EMA(Average):
    """Exponential moving average.

    Args:
        module: the module to follow.
        decay: weight of the old average, e.g. 0.9999.
    """

    def __init__(self, module: nn.Module, decay: float):
        super().__init__(module)
        self.decay = decay

    def decay_at(self, step: int) -> float:
        return self.decay


class PowerAverage(Average):
    """Average by a power function (EDM2, arXiv 2312.02696, equation 8): it looks back a constant share of the training.

    Args:
        module: the module to follow.
        length: standard deviation of its profile over the time trained, e.g. 0.1.
    """

    def __init__(self, module: nn.Module, length: float):
        super().__init__(module)
        self.gamma = gamma_of(length)

    def decay_at(self, step: int) -> float:
        return decay_at(step + 1, self.gamma)


def build_averages(args: argparse.Namespace, module: nn.Module) -> dict[str, Average]:
    """Those that ``--ema-decay`` and ``--posthoc-ema`` ask for, by the names that checkpoints give them."""
    averages: dict[str, Average] = {name: EMA(module, decay) for name, decay in ema_names(args.ema_decay).items()}
    return averages | {name: PowerAverage(module, length) for name, length in posthoc_names(args.posthoc_ema).items()}
