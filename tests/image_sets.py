"""Small sets of images in every layout that evaluate.py reads."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.latent_caches import pack
from tests.photographs import random_image

SIDE = 32


def random_images(count: int, seed: int, side: int = SIDE) -> np.ndarray:
    """uint8 ``[count, side, side, 3]``."""
    generator = np.random.default_rng(seed)
    return np.stack([np.asarray(random_image(generator, side, side)) for _ in range(count)])


def write_npz(path: Path, images: np.ndarray, compressed: bool = False, **others: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.savez_compressed if compressed else np.savez)(path, arr_0=images, **others)
    return path


def write_folder(path: Path, images: np.ndarray) -> Path:
    """PNGs in two sub-folders, in the order of the images."""
    for number, image in enumerate(images):
        file = path / str(2 * number // len(images)) / f"{number:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return path


def write_packed(path: Path, images: np.ndarray, source: dict | None = None) -> Path:
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    pack(path, "images", planes, [0] * len(images), source or {"resolution": images.shape[1]})
    return path
