"""What the loop asks of a method of training, and one step of any of them: gradients accumulate here alone."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

Metrics = dict[str, torch.Tensor]  # scalars on the device


class Phase:
    """A part of a step: gradients of every micro-batch, then the optimizers that have gradients step."""

    def accumulate(
        self, step: int, micro_step: int, batch: Any, share: float, synchronise: bool
    ) -> tuple[Metrics, Any]:
        """Add the gradients of one micro-batch.

        Args:
            step: counted from 0.
            micro_step: of the step, counted from 0.
            batch: on the device; in a later phase what the one before it kept.
            share: weight of this micro-batch in the step.
            synchronise: reduce gradients over processes in this backward pass.

        Returns:
            scalars of this micro-batch, and what is kept of it for :meth:`update` and the next phase.
        """
        raise NotImplementedError

    def update(self, step: int, metrics: Metrics, kept: Sequence[Any]) -> Metrics:
        """Step the optimizers and averages of this phase; fp16's scaler is the caller's.

        Args:
            step: counted from 0.
            metrics: of the step so far, averaged over the micro-batches.
            kept: of each micro-batch.

        Returns:
            more scalars; ``skipped`` is 1 where a non-finite gradient left the weights as they were.
        """
        raise NotImplementedError


class Method(Phase):
    """What is trained, for ``training.loop``; a phase of its own unless :attr:`phases` says otherwise.

    Attributes:
        args: the flags of its script.
        accelerator: precision and processes.
        milestone: names of the modules in :meth:`modules` that milestones keep.
        snapshot: of averages that snapshots keep in float16, for other lengths of them after the training.
        beside_snapshot: of modules that snapshots keep with them, as they are.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    milestone: tuple[str, ...]
    snapshot: tuple[str, ...] = ()
    beside_snapshot: tuple[str, ...] = ()

    @property
    def phases(self) -> Sequence[Phase]:
        return (self,)

    def unread(self, step: int) -> Collection[str]:
        """Arrays of the data that a step does without, which are not read for it then."""
        return ()

    def rates(self, step: int) -> dict[str, float]:
        """Learning rates of a step."""
        raise NotImplementedError

    def modules(self) -> Mapping[str, nn.Module | None]:
        """What a checkpoint keeps as safetensors; None and what has no tensors is left out."""
        raise NotImplementedError

    def states(self) -> Mapping[str, Any]:
        """What else a checkpoint keeps: objects with ``state_dict`` and ``load_state_dict``; None is left out."""
        raise NotImplementedError

    def facts(self) -> dict[str, object]:
        """What a checkpoint's manifest says in addition to the run's arguments; only the main process asks."""
        return {}

    def networks_by_name(self) -> Mapping[str, nn.Module | None]:
        """All networks, for a dry run's table."""
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """Held-out metrics; empty where there is no held-out data."""
        return {}

    def sample(self, path: Path) -> None:
        """Write a picture."""

    def finish(self, folder: Path) -> None:
        """Write the finished networks into the run's folder."""

    def reducing(self, wrapped: nn.Module, synchronise: bool):
        """Context: whether backward passes through a wrapped module reduce over processes."""
        return nullcontext() if synchronise else self.accelerator.no_sync(wrapped)


def train_step(method: Method, step: int, micro_batches: Sequence[Any]) -> Metrics:
    """One step of everything that a method trains.

    Args:
        method: what is trained.
        step: counted from 0.
        micro_batches: this process's.

    Returns:
        scalars on the device: unweighted terms (averaged over micro-batches), weights that vary, gradient norms,
        skipped steps.
    """
    metrics: Metrics = {}
    batches, count = micro_batches, len(micro_batches)
    for phase in method.phases:
        collected, kept = [], []
        for micro_step, batch in enumerate(batches):
            batch = to_device(batch, method.accelerator.device)
            is_last = micro_step == count - 1
            values, rest = phase.accumulate(step, micro_step, batch, 1 / count, synchronise=is_last)
            collected.append(values)
            kept.append(rest)
        metrics = metrics | {name: torch.stack([m[name] for m in collected]).mean() for name in collected[0]}
        metrics |= phase.update(step, metrics, kept)
        batches = kept
    if method.accelerator.scaler is not None:
        method.accelerator.scaler.update()
    return metrics


def to_device(batch: Any, device: torch.device) -> Any:
    """Copy the tensors of a batch (a tensor, or tuples of them) to the device, without waiting."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, tuple):
        parts = [to_device(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    return [to_device(part, device) for part in batch] if isinstance(batch, list) else batch


def micro_batch_size(args: argparse.Namespace, accelerator: Accelerator) -> int:
    """Images at once on a process."""
    return args.batch_size // accelerator.num_processes // args.gradient_accumulation_steps


class frozen:
    """Context: parameters of modules take no gradient. ``None`` is allowed and does nothing."""

    def __init__(self, *modules: nn.Module | None):
        parameters = [p for module in modules if module is not None for p in module.parameters()]
        self.trained = [parameter for parameter in parameters if parameter.requires_grad]

    def __enter__(self) -> None:
        for parameter in self.trained:
            parameter.requires_grad_(False)

    def __exit__(self, *exception) -> None:
        for parameter in self.trained:
            parameter.requires_grad_(True)
