"""A procedural set of images whose every attribute is known: one coloured shape on a flat background.

``python -m dataset.toy --output DIR`` writes class folders (the class is the shape) and attributes.csv. Image ``i``
depends on the seed, ``i`` and the resolution alone. Attributes are drawn independently of each other and uniformly.
"""

import csv
import io
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from errors import UserError
from runtime.cli import ArgumentParser, add_debug_argument, non_negative_int, positive_int, run

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 89, 220),
    "yellow": (240, 214, 30),
    "purple": (148, 60, 200),
    "orange": (255, 127, 14),
}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (128, 128, 128), "black": (16, 16, 16), "cyan": (150, 225, 225)}
SIZES = {"small": 0.3, "medium": 0.4, "large": 0.52}  # diameter of the shape's circle, as a share of the side
TEXTURES = ("solid", "striped")
POSITIONS = {  # centre of the shape; the largest one still fits
    "top-left": (0.3, 0.3),
    "top-right": (0.7, 0.3),
    "centre": (0.5, 0.5),
    "bottom-left": (0.3, 0.7),
    "bottom-right": (0.7, 0.7),
}
ATTRIBUTES_NAME = "attributes.csv"
_SUPERSAMPLING = 4
_STRIPES = 3.5  # in a radius
_MIN_RESOLUTION = 16


class Attributes(NamedTuple):
    """What is seen in an image, in the columns of attributes.csv."""

    shape: str
    colour: str
    size: str
    texture: str
    position: str
    background: str


def _regular_polygon(corners: int, radii: Sequence[float], turn: float) -> Callable[[float], list[tuple[float, float]]]:
    """Corner points on the unit circle, scaled by ``radii`` in turn, as a function of the rotation."""

    def points(rotation: float) -> list[tuple[float, float]]:
        angles = [2 * math.pi * k / corners + turn + rotation for k in range(corners)]
        return [
            (radii[k % len(radii)] * math.sin(a), -radii[k % len(radii)] * math.cos(a)) for k, a in enumerate(angles)
        ]

    return points


def _cross(rotation: float) -> list[tuple[float, float]]:
    arm, width = 0.94, 0.34
    quarter = [(-width, -width), (-width, -arm), (width, -arm)]
    corners = []
    for turn in range(4):
        for x, y in quarter:
            for _ in range(turn):
                x, y = -y, x
            corners.append((x, y))
    cos, sin = math.cos(rotation), math.sin(rotation)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in corners]


SHAPES: dict[str, Callable[[float], list[tuple[float, float]]]] = {
    "circle": _regular_polygon(90, (1.0,), 0.0),
    "cross": _cross,
    "hexagon": _regular_polygon(6, (1.0,), 0.0),
    "square": _regular_polygon(4, (1.0,), math.pi / 4),
    "star": _regular_polygon(10, (1.0, 0.42), 0.0),
    "triangle": _regular_polygon(3, (1.0,), 0.0),
}
_CHOICES = (tuple(SHAPES), tuple(COLOURS), tuple(SIZES), TEXTURES, tuple(POSITIONS), tuple(BACKGROUNDS))


def draw_image(seed: int, index: int, resolution: int) -> tuple[Image.Image, Attributes]:
    """Draw image ``index`` of a set.

    Args:
        seed: of the set.
        index: of the image, from 0.
        resolution: side in pixels.

    Returns:
        RGB image and what is in it.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
    attributes = Attributes(*(names[generator.integers(len(names))] for names in _CHOICES))
    rotation = generator.uniform(-0.2, 0.2)
    jitter = generator.uniform(-0.03, 0.03, size=2)
    side = resolution * _SUPERSAMPLING
    centre = [(place + shift) * side for place, shift in zip(POSITIONS[attributes.position], jitter, strict=True)]
    radius = SIZES[attributes.size] * side / 2

    mask = Image.new("L", (side, side))
    corners = [(centre[0] + radius * x, centre[1] + radius * y) for x, y in SHAPES[attributes.shape](rotation)]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    image = Image.new("RGB", (resolution, resolution), BACKGROUNDS[attributes.background])
    image.paste(COLOURS[attributes.colour], mask=mask.resize(image.size, Image.Resampling.BOX))
    if attributes.texture == "striped":
        # Stripes of a darker shade, about as many on a small shape as on a large one.
        stripe = (np.arange(side) // (radius / _STRIPES) % 2).astype(np.uint8)
        mask = Image.fromarray(np.asarray(mask) * stripe[:, None])
        shade = tuple(value * 2 // 5 for value in COLOURS[attributes.colour])
        image.paste(shade, mask=mask.resize(image.size, Image.Resampling.BOX))
    return image, attributes


def write_toy_dataset(output: Path, num_images: int, resolution: int, seed: int, num_workers: int = 2) -> None:
    """Write a set: ``SHAPE/000000.png`` and attributes.csv (file, shape, colour, size, texture, position, background).

    A set that is there already is replaced; attributes.csv is written last, so a folder with it is complete.

    Raises:
        UserError: the folder holds something else.
    """
    _clear(output)
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(num_workers, context) as pool:
        made = pool.map(partial(_write_image, output, seed, resolution), range(num_images), chunksize=64)
        rows = list(tqdm(made, total=num_images, unit="img", desc="drawing"))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", *Attributes._fields))
    writer.writerows(rows)
    (output / ATTRIBUTES_NAME).write_text(text.getvalue())


def estimate(output: Path, num_images: int, resolution: int, seed: int, num_workers: int) -> str:
    """What a set would take, from its first images; writes nothing.

    Raises:
        UserError: the folder holds something else.
    """
    _refuse_strangers(output)
    count, size, begin = min(num_images, 64), 0, time.perf_counter()
    for index in range(count):
        png = io.BytesIO()
        _encode(draw_image(seed, index, resolution)[0], png)
        size += png.tell()
    seconds = (time.perf_counter() - begin) / count * num_images / num_workers
    return (
        f"{output}: {num_images} images of {len(SHAPES)} shapes, {resolution} px, about "
        f"{size / count * num_images / 1e6:.1f} MB and {seconds:.0f} s with {num_workers} processes; "
        "nothing was written"
    )


def _write_image(output: Path, seed: int, resolution: int, index: int) -> tuple[str, ...]:
    image, attributes = draw_image(seed, index, resolution)
    name = f"{attributes.shape}/{index:06d}.png"
    (output / name).parent.mkdir(parents=True, exist_ok=True)  # of a shape that occurs: an empty class would be none
    _encode(image, output / name)
    return name, *attributes


def _encode(image: Image.Image, target: Path | io.BytesIO) -> None:
    image.save(target, format="PNG", compress_level=1)


def _clear(output: Path) -> None:
    """Remove an earlier set, and nothing else."""
    _refuse_strangers(output)
    (output / ATTRIBUTES_NAME).unlink(missing_ok=True)
    for shape in SHAPES:
        shutil.rmtree(output / shape, ignore_errors=True)


def _refuse_strangers(output: Path) -> None:
    """A folder that holds something else than a set is not replaced."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder")
    strangers = [entry.name for entry in output.iterdir() if entry.name not in (*SHAPES, ATTRIBUTES_NAME)]
    if strangers:
        raise UserError(f"--output {output} holds other files ({sorted(strangers)[0]}); give an empty or new folder")


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m dataset.toy", description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the set; an earlier set there is replaced")
    add("--num-images", type=positive_int, default=2000, help="number of images")
    add("--resolution", type=positive_int, default=64, help=f"side in pixels, at least {_MIN_RESOLUTION}")
    add("--seed", type=non_negative_int, default=0, help="another seed gives other images")
    add("--num-workers", type=positive_int, default=2, help="processes; the result does not depend on it")
    add("--dry-run", action="store_true", help="draw a few images; print seconds and bytes; write nothing")
    add_debug_argument(parser)
    args = parser.parse_args(argv)
    if args.resolution < _MIN_RESOLUTION:
        parser.error(f"argument --resolution: must be at least {_MIN_RESOLUTION}, got {args.resolution}")
    if args.dry_run:
        print(estimate(args.output, args.num_images, args.resolution, args.seed, args.num_workers))
        return 0
    write_toy_dataset(args.output, args.num_images, args.resolution, args.seed, args.num_workers)
    print(f"{args.output}: {args.num_images} images of {len(SHAPES)} shapes, {ATTRIBUTES_NAME}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
