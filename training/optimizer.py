"""AdamW or Muon, learning-rate schedules, and a step that skips non-finite gradients without synchronising."""

import argparse
import math
from collections.abc import Iterable

import torch
from torch import nn

from training.muon import Muon, matrices


def build_adamw(
    parameters: Iterable[tuple[str, nn.Parameter]], betas: tuple[float, float], weight_decay: float, eps: float
) -> torch.optim.AdamW:
    """Fused AdamW over those of ``named_parameters()`` that are trained; the learning rate is set at every step.

    Its state dict knows their names, by which a run of other parts takes the moments over.
    """
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
    optimizer.register_load_state_dict_post_hook(_lay_out_as_parameters)
    return optimizer


def _lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Fused AdamW goes through memory, where moments saved in NHWC order (--channels-last) are in another order.

    What else was loaded is copied too, so that no file stays mapped.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            is_moment = value.shape == parameter.shape
            state[name] = torch.empty_like(parameter).copy_(value) if is_moment else value.clone()


def build_muon(module: nn.Module, betas: tuple[float, float], weight_decay: float, eps: float) -> Muon:
    """As :func:`build_adamw`, but a module's trained matrices are moved by Muon."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    moved = {name: trained.pop(name) for name in matrices(module) if name in trained}
    optimizer = Muon(moved.items(), trained.items(), betas=betas, weight_decay=weight_decay, eps=eps)
    optimizer.register_load_state_dict_post_hook(_lay_out_as_parameters)
    return optimizer


# By ``--optimizer``: (module, betas, weight decay, epsilon) → the optimizer of its trained parameters.
BUILDERS = {
    "adamw": lambda module, *options: build_adamw(module.named_parameters(), *options),
    "muon": build_muon,
}


def build_optimizer(args: argparse.Namespace, module: nn.Module, kind: str = "adamw") -> torch.optim.Optimizer:
    """The optimizer ``kind`` of a module's trained parameters, by the flags of ``training.arguments``.

    Raises:
        ValueError: one that would take non-finite gradients (it ignores ``found_inf``), or that does not know the names
            of its parameters, by which a run that continues another one takes the moments over.
    """
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = BUILDERS[kind](module, betas, args.adam_weight_decay, args.adam_epsilon)
    if not getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's own word for it
        raise ValueError(f"--optimizer {kind} does not skip a step by found_inf, as fused optimizers do")
    if not all("param_names" in group for group in optimizer.param_groups):
        raise ValueError(f"--optimizer {kind} has to be given named parameters")
    return optimizer


def scheduled_rate(args: argparse.Namespace, base: float, step: int) -> float:
    """The rate of a step, by the flags of ``training.arguments``."""
    until = args.max_train_steps if args.lr_decay_until is None else args.lr_decay_until
    shape = (args.lr_schedule, args.warmup_steps, args.lr_hold_steps, args.lr_floor)
    return learning_rate(base, step, until, *shape)


def learning_rate(
    base: float,
    step: int,
    until: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
    hold_steps: int = 0,
    floor: float = 0.0,
) -> float:
    """The rate of a step: linear warm-up to ``base``, then constant, or held for a while and then falling.

    Args:
        base: highest rate.
        step: counted from 0.
        until: step at which it has fallen; it stays so.
        schedule: ``constant``, a ``linear`` fall or half a ``cosine``.
        warmup_steps, hold_steps: before it falls, one after the other.
        floor: what is left of ``base`` in the end, as a share.
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if schedule == "constant":
        return base
    first = warmup_steps + hold_steps
    progress = min(1.0, max(0, step - first) / max(1, until - first))
    left = 1.0 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return base * (floor + (1.0 - floor) * left)


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    rate: float,
    max_grad_norm: float,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip, step, clear the gradients. A non-finite gradient leaves weights and moments as they are.

    The decision is taken on the device: fused optimizers skip where their ``found_inf`` is 1. With fp16 the caller
    updates the scaler once all optimizers have stepped.

    Args:
        optimizer: of :func:`build_optimizer`, with gradients.
        rate: learning rate of this step.
        max_grad_norm: gradients are scaled down to this 2-norm; 0: they are left as they are.
        scaler: fp16's gradient scaler.

    Returns:
        the gradient norm before clipping and 1.0 where the step was skipped, as scalars on the device.
    """
    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    skipped = (~norm.isfinite()).float()
    optimizer.grad_scale, optimizer.found_inf = None, skipped
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    # Of several processes gradients stay where they are reduced: micro-batches would else be summed in a second copy.
    optimizer.zero_grad(set_to_none=not torch.distributed.is_initialized())
    return norm, skipped
