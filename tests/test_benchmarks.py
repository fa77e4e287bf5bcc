"""Every benchmark runs from end to end, small: speeds are positive, and what is compared is what the scripts do.

benchmarks/gpu.py has a file of its own, test_gpu_benchmark.py.
"""

import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.image_sets import random_images, write_folder

ROOT = Path(__file__).resolve().parents[1]
ONCE = ("--repeats", "1")
FLAGS = {
    "caching": ("--vae", "f4d4-tiny", "--resolution", "32", "--num-images", "8", "--shard-size", "4", *ONCE),
    "latent_reading": ("--num-images", "16", "--channels", "4", "--side", "2", "--batch-size", "4", "--batches", "2"),
    "ldm_step": ("--model", "SiT-Ti/2", "--latent-channels", "4", "--latent-size", "4", "--batch-size", "2", *ONCE),
    "metrics": ("--samples", "60", "--reference", "60", "--dim", "8", "--parts", "FID", "precision, recall"),
    "preprocessing": ("--images", "IMAGES", "--resolution", "32", "--num-workers", "1", "--copies", "1", *ONCE),
    "reading": ("--images", "IMAGES", "--resolution", "32", "--batch-size", "2", "--batches", "1", *ONCE),
}
ROWS = {  # each has figures
    "caching": ("bare encoder", "cache_latents"),
    "latent_reading": ("one file a latent", "ours, from files", "ours, in memory"),
    "ldm_step": ("bare forward + backward", "our whole step", "plain update", "our whole step, SPRINT"),
    "metrics": ("FID", "precision, recall"),
    "preprocessing": ("baseline", "ours", "ratio"),
    "reading": ("baseline", "ours, raw", "ours, png"),
}


def test_all_are_tested():
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"gpu"} == FLAGS.keys() == ROWS.keys()


@pytest.mark.parametrize("name", FLAGS)
def test_it_runs(name, tmp_path, capfd):
    folder = write_folder(tmp_path / "images", random_images(12, seed=0))
    flags = [str(folder) if flag == "IMAGES" else flag for flag in FLAGS[name]]
    assert import_module(f"benchmarks.{name}").main(flags) == 0
    shown = capfd.readouterr().out
    for row in ROWS[name]:
        line = re.search(rf"^{re.escape(row)} .*", shown, re.MULTILINE)
        assert line, shown
        figures = [float(figure) for figure in re.findall(r"\d+(?:\.\d+)?", line[0].removeprefix(row))]
        assert figures, shown
        assert max(figures) > 0, shown
