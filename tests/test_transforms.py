import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from dataset.transforms import (
    IMAGE_SUFFIXES,
    BadImageError,
    center_crop,
    decode_png,
    encode_png,
    image_size,
    load_image,
    to_planes,
    to_rgb,
)
from tests.photographs import random_image


def plain_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The definition, in the words of the paper's code: numpy crop of the resized image, [H, W, 3]."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC)
    pixels = np.array(image)
    y, x = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[y : y + size, x : x + size]


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


SIZES = [
    (64, 64),
    (63, 64),
    (65, 64),
    (128, 128),
    (127, 128),
    (129, 131),
    (256, 255),
    (257, 513),
    (500, 375),
    (31, 200),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("resolution", [32, 64, 96])
def test_crop_equals_the_definition_on_every_pixel(size, resolution):
    image = random_image(np.random.default_rng(1), *size)
    ours = center_crop(image, resolution)
    assert ours.shape == (3, resolution, resolution) and ours.dtype == np.uint8 and ours.flags.c_contiguous
    np.testing.assert_array_equal(ours.transpose(1, 2, 0), plain_center_crop(image, resolution))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_become_what_pillow_makes_of_them(mode):
    image = random_image(np.random.default_rng(2), 40, 50).convert(mode)
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(rgb), np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_and_not_composited():
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert to_rgb(image).getpixel((0, 0)) == (200, 100, 50)


def test_palette_with_transparency():
    image = random_image(np.random.default_rng(3), 40, 40).quantize(16)
    image.info["transparency"] = bytes([0, 128] + [255] * 14)
    palette = image.convert("RGBA").convert("RGB")
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(palette))


def test_cmyk_jpeg_is_not_inverted():
    red = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    pixels = load_image(encoded(red, "JPEG", quality=95), 64)
    assert pixels[0].min() > 240 and pixels[1:].max() < 15


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    pixels = load_image(encoded(Image.fromarray(ramp), kind), 64)
    expected = np.floor(ramp / 257 + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(pixels, np.stack([expected] * 3))


@pytest.mark.parametrize(
    ("white", "type_"), [(1.0, np.float32), (255.0, np.float32), (65535, np.int32), (2**31 - 1, np.int32)]
)
def test_wide_greys_are_scaled_by_their_range(white, type_):
    values = np.array([[0, white / 2, white, -5]]).astype(type_)
    grey = np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0]
    assert grey.tolist() in ([0, 128, 255, 0], [0, 127, 255, 0])


@pytest.mark.parametrize(
    ("white", "type_"), [(255, np.int32), (255, np.uint16), (4095, np.uint16), (65535, np.int32), (2**31 - 1, np.int32)]
)
def test_the_depth_of_a_tiff_is_told_from_its_values(white, type_):
    """8 and 12 bits in wider integers are not nearly black."""
    ramp = np.linspace(0, white, 64 * 64).reshape(64, 64).astype(type_)
    pixels = load_image(encoded(Image.fromarray(ramp), "TIFF"), 64)
    np.testing.assert_array_equal(pixels[0], np.floor(ramp * (255 / white) + 0.5))


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_a_dark_picture_stays_dark_where_the_format_tells_its_depth(kind):
    pixels = load_image(encoded(Image.fromarray(np.full((64, 64), 200, np.uint16)), kind), 64)
    assert pixels.max() == 1  # 200 / 257


def png_with(chunk: bytes, content: bytes, last: bool) -> bytes:
    """A PNG with a chunk more, right before the pixels or after them."""
    png = encoded(random_image(np.random.default_rng(7), 64, 64))
    added = struct.pack(">I", len(content)) + chunk + content + struct.pack(">I", zlib.crc32(chunk + content))
    place = png.index(b"IEND" if last else b"IDAT") - 4
    return png[:place] + added + png[place:]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("chunk", [b"zTXt", b"iCCP", b"iTXt"])
def test_large_comments_and_profiles_do_not_cost_a_png(chunk, last):
    flags = b"\1\0\0\0" if chunk == b"iTXt" else b"\0"
    large = png_with(chunk, b"a\0" + flags + zlib.compress(bytes(2 << 20)), last)
    plain = load_image(encoded(random_image(np.random.default_rng(7), 64, 64)), 64)
    np.testing.assert_array_equal(load_image(large, 64), plain)
    assert image_size(large) == (64, 64)


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES - {".mpo"}))
def test_every_known_suffix_is_of_a_format_that_is_read(suffix):
    Image.init()
    image = random_image(np.random.default_rng(8), 64, 64)
    assert load_image(encoded(image, Image.EXTENSION[suffix]), 64).shape == (3, 64, 64)


def test_avif_is_read_where_pillow_can():
    assert (".avif" in IMAGE_SUFFIXES) == ("avif" in features.modules and features.check("avif"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_ignored_unless_asked_for(orientation):
    """As the camera saw it: stored turned or mirrored, with a note of it, and upright again."""
    upright = random_image(np.random.default_rng(9), 64, 64)
    turns = Image.Transpose
    undo = (None, None, turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM, turns.TRANSPOSE,
            turns.ROTATE_90, turns.TRANSVERSE, turns.ROTATE_270)[orientation]  # fmt: skip
    stored = upright.transpose(undo) if undo is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, exif=exif)
    np.testing.assert_array_equal(load_image(data, 64), to_planes(stored))
    np.testing.assert_array_equal(load_image(data, 64, exif_rotate=True), to_planes(upright))


def test_damaged_exif_does_not_cost_the_picture():
    image = random_image(np.random.default_rng(9), 64, 64)
    data = encoded(image, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff")
    np.testing.assert_array_equal(load_image(data, 64, exif_rotate=True), load_image(data, 64))


def test_png_is_lossless():
    pixels = np.random.default_rng(4).integers(0, 256, (3, 32, 64), dtype=np.uint8)
    out = np.empty_like(pixels)
    decode_png(encode_png(pixels), out)
    np.testing.assert_array_equal(out, pixels)


def test_planes():
    pixels = np.random.default_rng(5).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_planes(Image.fromarray(pixels)), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_files_are_bad_images(kind):
    data = encoded(random_image(np.random.default_rng(6), 100, 80), kind)
    load_image(data, 64)
    with pytest.raises(BadImageError):
        load_image(data[: len(data) // 2], 64)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(50), b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_other_files_are_bad_images(data):
    with pytest.raises(BadImageError, match=r"\w"):
        load_image(data, 64)


def test_size_is_checked_before_decoding():
    header = encoded(Image.new("1", (30000, 30000)))[:200]  # decoding so short a file would say truncated
    with pytest.raises(BadImageError, match="30000 x 30000 pixels is over the limit"):
        load_image(header, 64)
    small = encoded(Image.new("RGB", (100, 100)))
    with pytest.raises(BadImageError, match="over the limit of 9999 pixels"):
        load_image(small, 64, max_pixels=9999)
    assert load_image(small, 64, max_pixels=10000).shape == (3, 64, 64)


def test_a_strip_that_scaling_would_blow_up_is_refused():
    with pytest.raises(BadImageError, match="too narrow"):
        load_image(encoded(Image.new("L", (20000, 1))), 256)
