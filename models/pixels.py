"""Images between uint8 and what networks compute with."""

import torch


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 0…255 → float32 in [-1, 1]: x/127.5 − 1."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`to_signed`: clamped and rounded."""
    return ((images.float() + 1.0) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
