import io

import numpy as np
import pytest
from PIL import Image

from dataset.transforms import BadImageError, center_crop, decode_png, encode_png, load_image, to_planes, to_rgb
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
