"""Image grids as PNG files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def save_grid(rows: list[torch.Tensor], path: Path, gap: int = 2) -> None:
    """Write rows of images of one size as one picture, white between them.

    Args:
        rows: uint8 ``[n, 3, H, W]`` each, the same n.
        path: the PNG; its folder must exist.
        gap: pixels between images.
    """
    count, _, height, width = rows[0].shape
    canvas = np.full((len(rows) * (height + gap) - gap, count * (width + gap) - gap, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row.cpu().permute(0, 2, 3, 1).numpy()):
            top, left = r * (height + gap), c * (width + gap)
            canvas[top : top + height, left : left + width] = image
    Image.fromarray(canvas).save(path)
