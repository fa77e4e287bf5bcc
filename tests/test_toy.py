import csv
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from dataset.images import open_images
from dataset.toy import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, TEXTURES, draw_image, main
from runtime.cli import run


def rows(folder):
    with (folder / "attributes.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "set"
    assert main(["--output", str(folder), "--num-images", "600", "--resolution", "32"]) == 0
    return folder


def test_reads_as_class_folders(toy):
    images = open_images(toy, 32)
    assert len(images) == len(rows(toy)) == 600
    assert images.class_names == sorted(SHAPES)
    shapes = {row["file"]: row["shape"] for row in rows(toy)}
    assert all(shapes[images.name(item)] == images.class_names[images.labels[item]] for item in range(600))


def test_images_depend_on_seed_index_and_resolution_alone(toy, tmp_path):
    main(["--output", str(tmp_path / "more"), "--num-images", "70", "--resolution", "32", "--num-workers", "3"])
    for row in rows(tmp_path / "more"):
        assert (tmp_path / "more" / row["file"]).read_bytes() == (toy / row["file"]).read_bytes()
    assert rows(tmp_path / "more") == rows(toy)[:70]
    assert draw_image(1, 0, 32)[0].tobytes() != draw_image(0, 0, 32)[0].tobytes()
    assert draw_image(0, 5, 32)[1] == draw_image(0, 5, 128)[1]


def test_attributes_are_balanced_and_independent():
    values = [draw_image(0, index, 16)[1] for index in range(3000)]
    names = (SHAPES, COLOURS, SIZES, TEXTURES, POSITIONS, BACKGROUNDS)
    for column, choices in enumerate(names):
        counts = Counter(value[column] for value in values)
        assert set(counts) == set(choices)
        assert max(counts.values()) < 1.25 * 3000 / len(choices)
    for first, second in combinations(range(6), 2):
        pairs = Counter((value[first], value[second]) for value in values)
        expected = 3000 / (len(names[first]) * len(names[second]))
        assert max(pairs.values()) < expected + 5 * expected**0.5


def test_pixels_show_the_attributes():
    """Background in a corner, colour where the shape is, and more of it for larger shapes."""
    areas = {size: [] for size in SIZES}
    for index in range(300):
        image, attributes = draw_image(0, index, 64)
        pixels = np.asarray(image).astype(int)
        background = np.array(BACKGROUNDS[attributes.background])
        assert (pixels[0, 0] == background).all()
        drawn = (pixels != background).any(axis=2)
        y, x = (axis.mean() / 64 for axis in np.nonzero(drawn))
        assert np.hypot(x - POSITIONS[attributes.position][0], y - POSITIONS[attributes.position][1]) < 0.1
        assert (pixels == COLOURS[attributes.colour]).all(axis=2).any()
        if attributes.shape == "square":
            areas[attributes.size].append(drawn.mean())
    assert max(areas["small"]) < min(areas["medium"]) < max(areas["medium"]) < min(areas["large"])


def test_edges_are_smooth():
    colours = Image.Image.getcolors(draw_image(0, 0, 64)[0])
    assert len(colours) > 10


def test_replaces_its_own_and_nothing_else(tmp_path, capsys):
    for _ in range(2):
        assert run(main, ["--output", str(tmp_path), "--num-images", "3", "--resolution", "16"]) == 0
    assert len(list(tmp_path.glob("*/*.png"))) == 3
    (tmp_path / "thesis.tex").write_text("")
    assert run(main, ["--output", str(tmp_path), "--num-images", "3"]) == 2
    assert "thesis.tex" in capsys.readouterr().err


def test_dry_run_foretells_size_and_writes_nothing(toy, tmp_path, capsys):
    assert main(["--output", str(tmp_path / "set"), "--num-images", "600", "--resolution", "32", "--dry-run"]) == 0
    said = float(capsys.readouterr().out.split("about ")[1].split(" MB")[0])
    assert said == pytest.approx(sum(path.stat().st_size for path in toy.rglob("*.png")) / 1e6, rel=0.2, abs=0.05)
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine.txt").touch()
    assert run(main, ["--output", str(tmp_path), "--dry-run"]) == 2


def test_few_images_leave_no_class_without_any(tmp_path):
    assert main(["--output", str(tmp_path / "set"), "--num-images", "3", "--resolution", "32"]) == 0
    images = open_images(tmp_path / "set", 32)
    assert images.class_names == sorted({row["shape"] for row in rows(tmp_path / "set")})
