"""From the bytes of an image file to the square uint8 array that the networks see. PIL and numpy only.

The crop is the one of ADM (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis"), which the
published ImageNet numbers of DiT, SiT, REPA and their successors were measured on: any other filter changes every FID.
"""

import io

import numpy as np
from PIL import Image

DEFAULT_MAX_PIXELS = 178_956_970  # where Pillow itself refuses a file as a decompression bomb

# MPO, of some cameras, is found by the JPEG reader. Nothing that runs other programs (EPS starts Ghostscript) or needs
# libraries that Pillow may lack.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))

# load_image checks the size against its own argument, which may be above Pillow's limit as well as below it.
Image.MAX_IMAGE_PIXELS = None


class BadImageError(Exception):
    """The file is not an image that can be used; the message is the reason, without the file's name."""


def load_image(file: bytes | io.BufferedIOBase, resolution: int, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """Decode an image, make it RGB and centre-crop it.

    Args:
        file: the encoded bytes, or a seekable binary file.
        resolution: side of the crop in pixels.
        max_pixels: width × height above which a file is refused, before anything is decoded.

    Returns:
        uint8 ``[3, resolution, resolution]``, 0…255.

    Raises:
        BadImageError: unreadable, truncated, of an unknown format, or too large.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS) as image:
            _check_size(image.size, resolution, max_pixels)
            return center_crop(to_rgb(image), resolution)
    except (BadImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError("not an image of a known format") from None
    except Exception as error:  # Pillow's decoders raise whatever their parser stumbled over, even IndexError
        raise BadImageError(" ".join(str(error).split()) or type(error).__name__) from error


def image_size(file: bytes) -> tuple[int, int]:
    """Width and height of an encoded image, without decoding it. Raises :class:`BadImageError`."""
    try:
        with Image.open(io.BytesIO(file), formats=_FORMATS) as image:
            return image.size
    except Image.UnidentifiedImageError:
        raise BadImageError("not an image of a known format") from None
    except Exception as error:  # as in load_image
        raise BadImageError(" ".join(str(error).split()) or type(error).__name__) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any of Pillow's modes to 8-bit RGB.

    Alpha is dropped, not composited, as in ADM (``convert("RGB")``). 16- and 32-bit greyscale is scaled to 8 bits,
    where Pillow's own conversion would clip it. CMYK comes from Pillow with Adobe's inversion already undone.
    """
    if image.mode == "RGB":
        image.load()  # convert() would copy the pixels
        return image
    if image.mode.startswith("I;16"):
        return _scale_to_8_bit(image, (65535.0,))
    if image.mode == "I":  # 16-bit PNGs in older Pillow, 32-bit TIFFs
        return _scale_to_8_bit(image, (65535.0, 2.0**31 - 1))
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
