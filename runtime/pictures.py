"""Image grids as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from files import as_os_error, whole_file

LEAST_SIDE = 96  # pixels of an image in a picture: smaller ones are enlarged, each pixel as a square
TEXT_SIZE, TEXT_MARGIN = 16, 8
MAX_NAME = 24  # characters


def enlargement(side: int) -> int:
    """How many pixels of a picture an image's pixel becomes."""
    return max(1, LEAST_SIDE // side)


def save_grid(
    rows: Sequence[torch.Tensor],
    path: Path,
    gap: int = 2,
    names: Sequence[str] | None = None,
    titles: Sequence[tuple[int, str]] = (),
) -> None:
    """Write rows of images of one size as one picture, white between them; small images are enlarged.

    Args:
        rows: uint8 ``[n, 3, H, W]`` each, the same n.
        path: the PNG; its folder must exist.
        gap: pixels between images.
        names: of the rows, written at their left.
        titles: of columns, written above: the first column of each, and its title. A title other than the first has
            a wider gap before its column.
    """
    scale = enlargement(rows[0].shape[-1])
    count, _, height, width = rows[0].shape
    height, width = height * scale, width * scale
    left = _text_width(_shortened(names)) + 2 * TEXT_MARGIN if names else 0
    top = TEXT_SIZE + 2 * TEXT_MARGIN if titles else 0
    breaks = [column for column, _ in titles if column]
    places = [left + c * (width + gap) + TEXT_SIZE * sum(c >= column for column in breaks) for c in range(count)]
    canvas = np.full((top + len(rows) * (height + gap) - gap, places[-1] + width, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for image, x in zip(row.cpu().permute(0, 2, 3, 1).numpy(), places, strict=True):
            y = top + r * (height + gap)
            canvas[y : y + height, x : x + width] = image.repeat(scale, 0).repeat(scale, 1)
    picture = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT_SIZE)
    for r, name in enumerate(_shortened(names)):
        draw.text((TEXT_MARGIN, top + r * (height + gap) + height // 2), name, "black", font, anchor="lm")
    for column, title in titles:
        draw.text((places[column], TEXT_MARGIN), title, "black", font)
    with whole_file(path) as temporary, as_os_error(temporary):
        picture.save(temporary, format="PNG")


def _shortened(names: Sequence[str] | None) -> list[str]:
    """In the letters that the font has."""
    short = [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 3]}..." for name in names or ()]
    return [name.encode("latin-1", "replace").decode("latin-1") for name in short]


def _text_width(names: Sequence[str]) -> int:
    font = ImageFont.load_default(TEXT_SIZE)
    return int(max(font.getlength(name) for name in names)) + 1
