"""PNG files as data URIs, scaled so that a page of many stays small."""

import base64
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

MOST_PIXELS = 1280  # along the longer side
MOST_BYTES = 400_000  # of a picture as PNG; a larger one becomes a JPEG
SMALL = 700  # pictures below are enlarged by a whole factor, so that their pixels can be seen
JPEG_QUALITY = 88


@dataclass(frozen=True)
class Picture:
    """An inlined picture, or why there is none.

    Attributes:
        uri: ``data:…``; empty where the file is damaged.
        width: in CSS pixels at which it is to be shown.
        is_enlarged: whether its pixels are to stay sharp.
        fault: what is wrong with the file, or empty.
    """

    uri: str
    width: int
    is_enlarged: bool = False
    fault: str = ""


def inline(path: Path, most_pixels: int = MOST_PIXELS, most_bytes: int = MOST_BYTES) -> Picture:
    """Read a picture, scale it down where it is larger than ``most_pixels``, encode it.

    PNG, unless that takes more than ``most_bytes``. A damaged file gives a picture with its fault.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return Picture("", 0, fault=f"{path.name} is not readable ({type(error).__name__})")
    if max(image.size) > most_pixels:
        image.thumbnail((most_pixels, most_pixels), Image.Resampling.LANCZOS)
    factor = max(1, SMALL // max(image.size))
    data, kind = _encoded(image, "PNG", optimize=True), "png"
    if len(data) > most_bytes:
        data, kind = _encoded(image, "JPEG", quality=JPEG_QUALITY), "jpeg"
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(uri, image.width * factor, is_enlarged=factor > 1)


def grids(folder: Path) -> list[Path]:
    """The pictures of a run's ``samples/``, the last step first."""
    return sorted((path for path in folder.glob("*.png")), reverse=True) if folder.is_dir() else []


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
