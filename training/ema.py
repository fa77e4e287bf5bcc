"""Exponential moving average of a module's parameters and float buffers."""

import copy

import torch
from torch import nn


class EMA:
    """Keeps an averaged copy of a module, which starts as an exact copy.

    Build it before the module is wrapped or compiled; update it once an optimizer step.

    Args:
        module: the module to follow.
        decay: weight of the old average, e.g. 0.9999.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.source = module
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        averaged, followed = self.module.state_dict(keep_vars=True), module.state_dict(keep_vars=True)
        assert averaged.keys() == followed.keys()
        floats = [name for name, tensor in followed.items() if tensor.is_floating_point()]
        self._averaged, self._followed = [averaged[n] for n in floats], [followed[n] for n in floats]
        self._counters = [(averaged[n], followed[n]) for n in followed if n not in set(floats)]

    @torch.no_grad()
    def update(self) -> None:
        """``average ← decay·average + (1 − decay)·current``; integer buffers are copied."""
        torch._foreach_lerp_(self._averaged, [tensor.detach() for tensor in self._followed], 1 - self.decay)
        for average, current in self._counters:
            average.copy_(current)
