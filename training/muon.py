"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, fused AdamW for the rest.

A matrix moves by its momentum made orthogonal: every direction of it learns at the same rate. torch's own Muon refuses
convolutions, cannot skip a step on the device, and multiplies in bfloat16, which a CPU does slowly.
"""

from collections.abc import Iterable

import torch
from torch import nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic's coefficients, from the same post
NEWTON_SCHULZ_STEPS = 5
RMS_OF_ADAMW = 0.2  # an update's root mean square, about that of AdamW: one learning rate serves both (2502.16982, 2.2)
STACKED = 1 << 26  # numbers of the matrices that move at once, of which there are about five copies meanwhile
LEAST_SIDE = 8  # a matrix that is narrower (into pixels, out of them) is AdamW's


class Muon(torch.optim.AdamW):
    """Nesterov momentum, made orthogonal, for matrices; fused AdamW for what is none.

    ``found_inf`` (a tensor, 1.0) leaves weights and moments as they are, without synchronising, as in fused optimizers.

    Args:
        matrices: named parameters of two or more dimensions; a convolution's kernel ``[O, I, h, w]`` counts as
            ``[O, I·h·w]``.
        rest: named parameters that AdamW updates.
        momentum: of the matrices.
        betas, eps: of AdamW.
        weight_decay: decoupled, of all.
    """

    def __init__(
        self,
        matrices: Iterable[tuple[str, nn.Parameter]],
        rest: Iterable[tuple[str, nn.Parameter]],
        betas: tuple[float, float],
        weight_decay: float,
        eps: float,
        momentum: float = 0.95,
    ):
        groups = [{"params": list(matrices), "momentum": momentum}, {"params": list(rest)}]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        groups = self.param_groups
        for group in groups:
            if "momentum" in group:
                self._move_matrices(group)
        self.param_groups = [group for group in groups if "momentum" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _move_matrices(self, group: dict) -> None:
        by_shape: dict[tuple, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                key = (parameter.flatten(1).shape, parameter.dtype, parameter.device)
                by_shape.setdefault(key, []).append(parameter)
        for parameters in by_shape.values():
            at_once = max(1, STACKED // parameters[0].numel())
            for first in range(0, len(parameters), at_once):
                self._move_equals(parameters[first : first + at_once], group)

    def _move_equals(self, parameters: list[nn.Parameter], group: dict) -> None:
        """Matrices of one shape at once."""
        momentum, keep = group["momentum"], None
        if self.found_inf is not None:
            keep = self.found_inf > 0  # stays on the device
        gradients = torch.stack([parameter.grad.flatten(1) for parameter in parameters])
        buffers = [self._momentum_of(parameter) for parameter in parameters]
        moved = torch.stack([buffer.flatten(1) for buffer in buffers]).lerp_(gradients, 1 - momentum)
        updates = orthogonalised(gradients.lerp(moved, momentum))
        rate = group["lr"] * RMS_OF_ADAMW * max(updates.shape[-2:]) ** 0.5
        for parameter, buffer, new, update in zip(parameters, buffers, moved, updates, strict=True):
            value = parameter.flatten(1) * (1 - group["lr"] * group["weight_decay"]) - rate * update
            for target, wanted in ((buffer, new), (parameter, value)):
                wanted = wanted.view(target.shape)
                target.copy_(wanted if keep is None else torch.where(keep, target, wanted))

    def _momentum_of(self, parameter: nn.Parameter) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros(())  # which AdamW's loading looks for, and nothing here uses
        return state["momentum_buffer"]

    # torch.optim.Optimizer has them only where a fused step was asked to skip
    found_inf: torch.Tensor | None = None
    grad_scale: torch.Tensor | None = None


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """UVᵀ of each matrix UΣVᵀ, roughly: five Newton-Schulz steps bring singular values to about 0.7 to 1.2.

    Off CUDA the steps are taken on the Gram matrix, of which all of them are polynomials: the long side is multiplied
    twice and not ten times. That takes float32, so on CUDA the matrices themselves are multiplied, in bfloat16.

    Args:
        matrices: ``[N, rows, columns]``.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    x = _by_matrix(x.bfloat16()).to(matrices.dtype) if x.is_cuda else _by_gram(x)
    return x.mT if is_tall else x


def _by_matrix(x: torch.Tensor) -> torch.Tensor:
    """x ← a·x + (b·xxᵀ + c·(xxᵀ)²)·x, five times; ``[N, short, long]``."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _by_gram(x: torch.Tensor) -> torch.Tensor:
    """The same, as p(xxᵀ)·x with a polynomial p that is gathered step by step."""
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.mT
    product = None
    for step in range(NEWTON_SCHULZ_STEPS):
        factor = b * gram + c * gram @ gram
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step + 1 < NEWTON_SCHULZ_STEPS:
            gram = factor @ gram @ factor
    return product @ x


def matrices(module: nn.Module) -> list[str]:
    """Names of what Muon moves: weights of linear maps and convolutions, unless a side is as narrow as pixels.

    Tables of vectors, such as embeddings and learned tokens, are no maps; a map's matrix is called a weight.
    """
    return [
        name
        for prefix, owner in module.named_modules()
        for name, parameter in owner.named_parameters(prefix, recurse=False)
        if parameter.ndim >= 2 and not isinstance(owner, nn.Embedding) and name.endswith("weight")
        if min(parameter.flatten(1).shape) >= LEAST_SIDE
    ]
