"""Whether neighbouring positions of a latent are alike and distant ones are not: iREPA's spatial structure.

LDS, CDS and SRSS are defined in iREPA (arXiv 2512.10794, section 4 and appendix B) on the patch tokens of vision
encoders. Distances are Manhattan distances on the grid; the constants are those of its public code for a 16×16 grid,
scaled to other grids. Its finding (over 27 encoders, |r| > 0.85 with FID) is about targets of REPA, not about latents.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FAR, FITTED, PUBLISHED_SIDE = 6, 8, 16
BLOCK_NUMBERS = 2**24  # similarities that are held at once


def grid_distances(height: int, width: int) -> Tensor:
    """Manhattan distances between the positions of a grid, int64 ``[h·w, h·w]``."""
    rows, columns = (
        part.flatten() for part in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    return (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs()


def far_distance(height: int, width: int) -> int:
    """From which distance on positions are distant: 6 on a side of 16."""
    return max(2, math.ceil(FAR * min(height, width) / PUBLISHED_SIDE))


def unit_tokens(latents: Tensor) -> Tensor:
    """Latents ``[N, C, h, w]`` → their positions as vectors of length 1 (0 stays 0), float64 ``[N, h·w, C]``."""
    return F.normalize(latents.double().flatten(2).transpose(1, 2), dim=-1)


def correlogram(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine similarity of two positions of an image, by their distance.

    Args:
        latents: ``[N, C, h, w]``.

    Returns:
        cosines: float64 ``[h + w − 1]``, of the pairs at distance 0, 1, …; 1 at distance 0.
        pairs: how many pairs of positions these are, int64.
    """
    height, width = latents.shape[2:]
    total = torch.zeros(height * width, height * width, dtype=torch.float64)
    for part in latents.split(max(1, BLOCK_NUMBERS // latents[0].numel())):
        tokens = unit_tokens(part).transpose(0, 1).flatten(1)  # [h·w, N·C]: one product sums over the images too
        total += tokens @ tokens.T
    distances = grid_distances(height, width).flatten()
    pairs = distances.bincount()
    return distances.bincount(total.flatten() / len(latents)) / pairs, pairs


def local_against_distant(latents: Tensor) -> float:
    """LDS: mean cosine of neighbouring positions minus that of distant ones; −2 to 2, 0 without spatial structure."""
    height, width = latents.shape[2:]
    cosines, pairs = correlogram(latents)
    far = far_distance(height, width)
    if len(cosines) <= far:
        return math.nan
    return float(cosines[1] - (cosines[far:] * pairs[far:]).sum() / pairs[far:].sum())


def correlation_decay(latents: Tensor) -> float:
    """CDS: minus the slope of a line through the mean cosines at distance 1 to 8 (on a side of 16); 0 without decay."""
    height, width = latents.shape[2:]
    most = max(2, FITTED * min(height, width) // PUBLISHED_SIDE)
    cosines = correlogram(latents)[0][1 : most + 1]
    if len(cosines) < 2:
        return math.nan
    steps = torch.arange(len(cosines), dtype=torch.float64)
    steps -= steps.mean()
    return float(-(steps @ cosines) / steps.square().sum())


def region_similarity(latents: Tensor, foreground: Tensor) -> float:
    """SRSS: LDS that respects an object's border; −2 to 2, NaN where no image has the pairs that it needs.

    From the mean cosine of a foreground position with its neighbours in the foreground, that with distant positions
    outside is subtracted; averaged over the positions that have both, then over images.

    Args:
        latents: ``[N, C, h, w]``.
        foreground: bool ``[N, h, w]``.
    """
    distances = grid_distances(*latents.shape[2:])
    neighbours, far = distances == 1, distances >= far_distance(*latents.shape[2:])
    scores = []
    block = max(1, BLOCK_NUMBERS // distances.numel())
    for part, mask in zip(latents.split(block), foreground.flatten(1).split(block), strict=True):
        tokens = unit_tokens(part)
        cosines = tokens @ tokens.transpose(1, 2)  # [n, h·w, h·w]
        inside, outside = (mask[:, None] & neighbours).double(), (~mask[:, None] & far).double()
        near, distant = inside.sum(2), outside.sum(2)
        score = (cosines * inside).sum(2) / near - (cosines * outside).sum(2) / distant
        valid = mask & (near > 0) & (distant > 0)
        found = torch.where(valid, score, 0.0).sum(1) / valid.sum(1)
        scores.append(found[valid.any(1)])
    return float(torch.cat(scores).mean())


def foreground_grid(images: Tensor, height: int, width: int) -> Tensor:
    """A stand-in for the masks of SAM 2 that iREPA uses: what differs from the colour of the image's border.

    Otsu's threshold on each pixel's largest difference of a channel to the border's median colour; a position of the
    grid is foreground where one of its pixels is. Right for an object on a flat ground, crude for photographs.

    Args:
        images: uint8 ``[N, 3, H, W]``; H and W are multiples of the grid's sides.

    Returns:
        float32 ``[N, 1, h, w]``, 0 or 1.
    """
    pixels = images.int()
    border = torch.cat([pixels[..., 0, :], pixels[..., -1, :], pixels[..., 1:-1, 0], pixels[..., 1:-1, -1]], -1)
    difference = (pixels - border.median(-1).values[..., None, None]).abs().amax(1)  # [N, H, W], 0…255
    outside = difference > otsu_threshold(difference)[:, None, None]
    size = images.shape[2] // height, images.shape[3] // width
    return F.max_pool2d(outside[:, None].float(), size)


def otsu_threshold(levels: Tensor) -> Tensor:
    """Otsu's threshold of integers 0…255 ``[N, …]``: the level up to which they are one class, int64 ``[N]``."""
    levels = levels.flatten(1).long()
    offsets = 256 * torch.arange(len(levels), device=levels.device)[:, None]
    counts = (levels + offsets).flatten().bincount(minlength=256 * len(levels)).view(-1, 256).double()
    below = counts.cumsum(1)
    total, weighted = below[:, -1:], (counts * torch.arange(256, device=levels.device)).cumsum(1)
    difference = weighted[:, -1:] * below - weighted * total  # of the two means, times both counts
    between = difference.square() / (below * (total - below)).clamp_min(1)
    return between.argmax(1)
