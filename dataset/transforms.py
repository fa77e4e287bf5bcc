"""From the bytes of an image file to the square uint8 array that the networks see. PIL and numpy only.

The crop is the one of ADM (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis"), which the
published ImageNet numbers of DiT, SiT, REPA and their successors were measured on: any other filter changes every FID.
"""

import io
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, features

from errors import one_line

DEFAULT_MAX_PIXELS = 178_956_970  # where Pillow itself refuses a file as a decompression bomb

# MPO, of some cameras, is found by the JPEG reader. Nothing that runs other programs (EPS starts Ghostscript), and what
# needs a library that Pillow may lack only where it is there.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_FORMATS += ("AVIF",) if "avif" in features.modules and features.check("avif") else ()
_FORMATS += ("JPEG2000",) if features.check("jpg_2000") else ()
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc"),
}
IMAGE_SUFFIXES = frozenset(suffix for name in _FORMATS for suffix in _SUFFIXES[name])
# Images, too, but of kinds that are not read here: who has some wants to know that they are missing.
OTHER_IMAGE_SUFFIXES = {suffix for suffixes in _SUFFIXES.values() for suffix in suffixes} - IMAGE_SUFFIXES | {
    *(".heic", ".heif", ".jxl", ".jxr", ".psd", ".xcf", ".svg", ".tga", ".ico", ".pcx", ".qoi", ".dds", ".dib", ".pfm"),
    *(".exr", ".hdr", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
}

# load_image checks the size against its own argument, which may be above Pillow's limit as well as below it.
Image.MAX_IMAGE_PIXELS = None


class BadImageError(Exception):
    """The file is not an image that can be used; the message is the reason, without the file's name."""


Result = TypeVar("Result")


def load_image(
    data: bytes, resolution: int, max_pixels: int = DEFAULT_MAX_PIXELS, exif_rotate: bool = False
) -> np.ndarray:
    """Decode an image, make it RGB and centre-crop it.

    Args:
        data: the encoded bytes.
        resolution: side of the crop in pixels.
        max_pixels: width × height above which a file is refused, before anything is decoded.
        exif_rotate: turn it upright, as the camera noted; ADM does not.

    Returns:
        uint8 ``[3, resolution, resolution]``, 0…255.

    Raises:
        BadImageError: unreadable, truncated, of an unknown format, or too large.
    """

    def crop(image: Image.Image) -> np.ndarray:
        _check_size(image.size, resolution, max_pixels)
        if exif_rotate:
            image.load()
            with suppress(Exception):  # damaged notes of a camera do not cost the picture
                ImageOps.exif_transpose(image, in_place=True)
        return center_crop(to_rgb(image), resolution)

    return _open(data, crop)


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height of an encoded image, without decoding it. Raises :class:`BadImageError`."""
    return _open(data, lambda image: image.size)


def _open(data: bytes, use: Callable[[Image.Image], Result]) -> Result:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return use(image)
    except (BadImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError("not an image of a known format") from None
    except Exception as error:  # Pillow's decoders raise whatever their parser stumbled over, even IndexError
        bare = _without_text(data)
        if len(bare) < len(data):
            return _open(bare, use)
        raise BadImageError(one_line(error)) from error


def _without_text(data: bytes) -> bytes:
    """A PNG without its comments and colour profile, which have no say in the pixels: Pillow refuses large ones."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    kept, place = [data[:8]], 8
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")  # length, type, content, CRC
        if data[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any of Pillow's modes to 8-bit RGB.

    Alpha is dropped, not composited, as in ADM (``convert("RGB")``). 16- and 32-bit greyscale is scaled to 8 bits,
    where Pillow's own conversion would clip it: 65535 is white where the format says so (PNG, PGM, JPEG 2000). A TIFF
    does not tell how many of its bits are used: white is that of the smallest usual depth (8, 12, 16, 31 bits) that
    holds the brightest pixel. CMYK comes from Pillow with Adobe's inversion already undone.
    """
    if image.mode == "RGB":
        image.load()  # convert() would copy the pixels
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):  # "I": 32-bit TIFFs, and 16-bit PNGs in older Pillow
        is_told = image.format in ("PNG", "PPM", "JPEG2000")
        return _scale_to_8_bit(image, (65535.0,) if is_told else (255.0, 4095.0, 65535.0, 2.0**31 - 1))
    if image.mode == "F":
        return _scale_to_8_bit(image, (1.0, 255.0, 65535.0))
    if image.mode == "PA" or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about transparency given as bytes
    return image.convert("RGB")


def center_crop(image: Image.Image, resolution: int) -> np.ndarray:
    """ADM's centre crop: halve with BOX while the short side is at least twice the resolution, then one BICUBIC resize.

    Args:
        image: mode RGB, any size.
        resolution: side of the crop in pixels.

    Returns:
        uint8 ``[3, resolution, resolution]``, 0…255, contiguous.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    size = _resized(image.size, resolution)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return to_planes(image.crop((left, top, left + resolution, top + resolution)))


def to_planes(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image as contiguous uint8 ``[3, H, W]``."""
    # "RGB;L" packs each row as its red, green and blue line: what is left to move are whole lines, not single bytes.
    lines = np.frombuffer(image.tobytes("raw", "RGB;L"), np.uint8).reshape(image.height, 3, image.width)
    return np.ascontiguousarray(lines.transpose(1, 0, 2))


def encode_png(pixels: np.ndarray) -> bytes:
    """Losslessly compress uint8 ``[3, H, W]``."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def decode_png(encoded: bytes, out: np.ndarray) -> None:
    """Write the pixels of a PNG from :func:`encode_png` into ``out``, uint8 ``[3, H, W]``."""
    with Image.open(io.BytesIO(encoded), formats=("PNG",)) as image:
        lines = np.frombuffer(image.tobytes("raw", "RGB;L"), np.uint8).reshape(image.height, 3, image.width)
    out[...] = lines.transpose(1, 0, 2)


def _check_size(size: tuple[int, int], resolution: int, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BadImageError(f"{width} x {height} pixels is over the limit of {max_pixels} pixels")
    resized = _resized(size, resolution)
    if min(size) < resolution and resized[0] * resized[1] > max_pixels:  # a 1 x 50000 strip passes the first check
        raise BadImageError(f"{width} x {height} pixels is too narrow: scaled up it is over {max_pixels} pixels")


def _resized(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    scale = resolution / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def _scale_to_8_bit(image: Image.Image, whites: tuple[float, ...]) -> Image.Image:
    """Map 0…white to 0…255, white being the smallest of ``whites`` that holds the brightest pixel (else that pixel)."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    brightest = float(values.max(initial=0.0))
    white = next((white for white in whites if brightest <= white), brightest)
    grey = np.clip(values * (255.0 / white) + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
