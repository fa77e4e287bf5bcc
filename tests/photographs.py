"""Small stand-ins for photographs, and where the real ones lie."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PHOTOGRAPHS = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "imagenet_samples"

needs_photographs = [
    pytest.mark.photographs,
    pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"{PHOTOGRAPHS} is not there"),
]


def random_image(generator: np.random.Generator, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth colour with some noise, so that JPEG and filters have something to do."""
    coarse = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + generator.integers(-20, 20, smooth.shape, dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def write_class_folders(root: Path, per_class: int = 12, classes: tuple[str, ...] = ("n01", "n02", "n10")) -> Path:
    """Class folders of images of several sizes, modes and file types."""
    generator = np.random.default_rng(0)
    kinds = (("jpg", "RGB"), ("JPEG", "L"), ("png", "RGB"), ("png", "P"), ("JPEG", "CMYK"), ("png", "RGBA"))
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            suffix, mode = kinds[number % len(kinds)]
            width, height = (int(side) for side in generator.integers(24, 160, 2))
            random_image(generator, width, height, mode).save(root / name / f"{number:03d}.{suffix}")
    return root
