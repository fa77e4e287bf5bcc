"""Differentiable augmentation of what a discriminator sees (DiffAugment, arXiv 2006.10738): colour and translation.

Real and made images go through alike, also when the generator is judged, so that a discriminator on few images, or
with a strong network before it, cannot learn them by heart, and the generator does not learn the augmentation.
"""

import torch

SHARE = 0.125  # of the side, the farthest translation


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by up to an eighth of its side, then its brightness, saturation and contrast changed.

    Args:
        images: ``[B, 3, H, W]`` in [-1, 1]; what is moved in from outside is 0.
        generator: of the draws, on the images' device.

    Returns:
        float32 images of the same shape, not clamped.
    """
    images = images.float()
    drawn = torch.rand(5, len(images), generator=generator, device=images.device)
    down, right = (
        (share * (2 * (reach := round(SHARE * side)) + 1)).floor().long() - reach
        for share, side in zip(drawn[:2], images.shape[-2:], strict=True)
    )
    images = _Moved.apply(images, down, right)
    brightness, saturation, contrast = drawn[2:, :, None, None, None]
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + 2 * saturation * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (contrast + 0.5) * (images - mean)


class _Moved(torch.autograd.Function):
    """The gradient is moved back: without the sums of gathering's own, whose order is not fixed on CUDA."""

    @staticmethod
    def forward(ctx, images: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(down, right)
        return moved(images, down, right)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        down, right = ctx.saved_tensors
        return moved(upstream, -down, -right), None, None


def moved(images: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Each image ``[B, C, H, W]`` by its own whole numbers of pixels, int64 ``[B]``; 0 comes in."""
    for dim, step in ((2, down), (3, right)):
        side = images.shape[dim]
        source = torch.arange(side, device=images.device) - step[:, None]
        shape = [len(images), 1, 1, 1]
        shape[dim] = side
        is_inside = ((source >= 0) & (source < side)).view(shape)
        source = source.clamp(0, side - 1).view(shape).expand_as(images)
        images = images.gather(dim, source) * is_inside
    return images
