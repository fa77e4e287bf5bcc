"""Grids of images: what is enlarged, and what stands beside it."""

import numpy as np
import torch
from PIL import Image

from inference.sampling import save_preview
from runtime.pictures import TEXT_SIZE, save_grid


class TaggedImages:
    """Images whose every pixel is their number, of ``len(labels)``."""

    def __init__(self, labels, class_names, resolution=32):
        self.labels, self.class_names, self.resolution = np.array(labels), class_names, resolution

    def read_into(self, items, out):
        out[...] = np.array(items).reshape(-1, 1, 1, 1)


def pixels(path):
    return np.asarray(Image.open(path))


def test_small_images_are_enlarged_without_new_colours(tmp_path):
    image = torch.arange(3 * 40 * 40).reshape(1, 3, 40, 40).remainder(251).to(torch.uint8)
    save_grid([image, image], tmp_path / "grid.png", gap=3)
    found = pixels(tmp_path / "grid.png")
    assert found.shape == (2 * 80 + 3, 80, 3)  # 96 // 40 = 2
    assert np.array_equal(found[:80:2, ::2], image[0].permute(1, 2, 0).numpy())
    assert np.array_equal(found[1:80:2, 1::2], image[0].permute(1, 2, 0).numpy())
    assert (found[80:83] == 255).all()


def test_large_images_stay_as_they_are(tmp_path):
    save_grid([torch.zeros(2, 3, 100, 100, dtype=torch.uint8)], tmp_path / "grid.png")
    assert pixels(tmp_path / "grid.png").shape == (100, 202, 3)


def test_a_preview_has_a_row_for_each_class_and_real_images_of_the_same_classes_beside(tmp_path):
    generated = TaggedImages([0, 1, 0, 1], ["cat", "dog"])
    real = TaggedImages([0, 0, 1, 1, 1], ["dog", "cat"])  # other numbers for the classes, as another set may have
    save_preview(tmp_path / "both.png", [[0, 2], [1, 3]], generated, real)
    save_preview(tmp_path / "alone.png", [[0, 2], [1, 3]], generated)
    both, alone = pixels(tmp_path / "both.png"), pixels(tmp_path / "alone.png")
    names = alone.shape[1] - (2 * 96 + 2)
    assert (alone[:, :names] < 255).any()  # letters
    assert both.shape == (alone.shape[0] + TEXT_SIZE + 16, alone.shape[1] + 2 * (96 + 2) + TEXT_SIZE, 3)
    shown = both[-96 - 2 - 48 :: 98, names + 48 :, 0]  # through the middle of both rows
    for row, expected in zip(shown, ([0, 2, 2, 3], [1, 3, 0, 1]), strict=True):
        starts = [0, 98, 2 * 98 + TEXT_SIZE, 3 * 98 + TEXT_SIZE]
        assert [int(row[x]) for x in starts] == expected


def test_a_preview_of_a_set_that_lacks_a_class_is_left_alone(tmp_path):
    generated = TaggedImages([0, 1], ["cat", "dog"])
    save_preview(tmp_path / "a.png", [[0], [1]], generated, TaggedImages([0], ["cat"]))
    save_preview(tmp_path / "b.png", [[0], [1]], generated)
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_rows_of_several_classes_have_no_name(tmp_path):
    save_preview(
        tmp_path / "a.png", [[0, 1]], TaggedImages([0, 1], ["cat", "dog"]), TaggedImages([0, 1], ["cat", "dog"])
    )
    assert pixels(tmp_path / "a.png").shape == (96, 2 * 96 + 2, 3)
