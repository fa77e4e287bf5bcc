"""Noise that is counted, not carried: every number is a function of the seed and of where it is used.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in int64 tensor operations: 128
counter bits and 64 key bits give 128 random bits, for all images and elements at once and with the same bits on every
device. The key is the seed; the counter is (block of four elements, item, step, purpose). So what image ``i`` is made
from does not depend on its batch, its process or what was drawn before.
"""

import math
from enum import IntEnum

import torch
from torch import nn

from diffusion import MAX_SEED

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Purpose(IntEnum):
    """What the numbers are for; no two uses share any."""

    NOISE = 0
    LABEL = 1
    POSTERIOR = 2
    CLASS_TOKEN = 3


def philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10.

    Args:
        counter: four int64 tensors that broadcast together, 0…2³² − 1.
        key: two integers in the same range.

    Returns:
        four int64 tensors, uniform in 0…2³² − 1.
    """
    a, b, c, d = counter
    for number in range(_ROUNDS):
        first, second = ((word + number * step) & _MASK for word, step in zip(key, _KEY_STEPS, strict=True))
        # The products have 64 bits and wrap into the sign, which masking after the shift undoes.
        product_a, product_c = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (product_c >> 32 & _MASK) ^ b ^ first,
            product_c & _MASK,
            (product_a >> 32 & _MASK) ^ d ^ second,
            product_a & _MASK,
        )
    return a, b, c, d


def counted_normal(
    seed: int,
    items: torch.Tensor,
    step: int,
    shape: tuple[int, ...],
    purpose: Purpose = Purpose.NOISE,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard normal numbers, the same for an item whatever else is in the batch.

    Box–Muller in float64, so up to 6.7 standard deviations; devices may differ in the last bit of float64.

    Args:
        seed: 0…2⁶⁴ − 1.
        items: numbers of the images, 0…2³² − 1, int64 ``[B]``; the result is on their device.
        step: what of the item's numbers; in sampling 0 for the initial noise, k + 1 for the SDE's step k.
        shape: of one item.
        purpose: what for.
        dtype: of the result.

    Returns:
        ``[B, *shape]``.
    """
    size = math.prod(shape)
    blocks = torch.arange((size + 3) // 4, device=items.device)
    radius_a, angle_a, radius_b, angle_b = _words(seed, items[:, None], blocks, step, purpose)
    pairs = [_box_muller(radius_a, angle_a), _box_muller(radius_b, angle_b)]
    normal = torch.stack([number for pair in pairs for number in pair], dim=-1)  # [B, blocks, 4]
    return normal.flatten(1)[:, :size].unflatten(1, shape).to(dtype)


def counted_state(denoiser: nn.Module, seed: int, items: torch.Tensor, step: int) -> torch.Tensor:
    """Noise ``[B, *state_shape]`` for a denoiser: of the latent and, where it has one, of the class token.

    Args:
        denoiser: a ``models.denoisers.Denoiser``.
        seed, items, step: as of :func:`counted_normal`.
    """
    latent, width = counted_normal(seed, items, step, denoiser.latent_shape), denoiser.class_token_width
    token = counted_normal(seed, items, step, (width,), Purpose.CLASS_TOKEN) if width else None
    return denoiser.pack(latent, token)


def counted_integers(
    seed: int, items: torch.Tensor, bound: int, step: int = 0, purpose: Purpose = Purpose.LABEL
) -> torch.Tensor:
    """Integers in 0…bound − 1, all exactly equally likely, one an item; arguments as :func:`counted_normal`.

    Words beyond the largest multiple of ``bound`` are passed over, as they would favour small numbers.

    Returns:
        int64 ``[B]``.
    """
    limit = 2**32 // bound * bound
    result = torch.full_like(items, -1)
    attempt = 0
    while bool((result < 0).any()):  # more than once with probability B·(bound / 2³²)⁴
        for word in _words(seed, items, torch.full_like(items, attempt), step, purpose):
            result = torch.where((result < 0) & (word < limit), word % bound, result)
        attempt += 1
    return result


def _words(
    seed: int, items: torch.Tensor, blocks: torch.Tensor, step: int, purpose: Purpose
) -> tuple[torch.Tensor, ...]:
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed {seed} is not in 0…2⁶⁴ − 1")
    step_word, purpose_word = (torch.full((), value, device=items.device) for value in (step, int(purpose)))
    return philox((blocks, items, step_word, purpose_word), (seed & _MASK, seed >> 32))


def _box_muller(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two words in 0…2³² − 1 → two independent standard normal numbers, float64."""
    radius = (-2 * ((first.double() + 0.5) / 2**32).log()).sqrt()
    angle = (second.double() + 0.5) * (2 * math.pi / 2**32)
    return radius * angle.cos(), radius * angle.sin()
