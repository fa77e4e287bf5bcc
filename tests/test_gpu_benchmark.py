"""benchmarks/gpu.py runs from end to end with tiny networks; what it prints of a GPU is measured there."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_GPU = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def benchmark(*flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu.py", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, env=WITHOUT_GPU, capture_output=True, text=True)


def test_a_rehearsal_measures_every_part(tmp_path):
    """All variants that need no compiler; figures are positive, and what is exact differs by nothing."""
    answer = benchmark("--rehearse", "--no-compile", "--repeats", 1, "--output", tmp_path / "gpu.json", "--kernels", 2)
    assert answer.returncode == 0, answer.stderr[-2000:]
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["device"] == "CPU"
    assert content["ceilings"]["matrix_flops"] > 0
    rows = {(row["part"], row["what"], row["images"]): row for row in content["rows"]}
    assert {part for part, _, _ in rows} == {"ldm", "sendvae", "caching", "sampling"}
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["ldm", "plain", 2]["mfu"] > 0
    assert {what for part, what, _ in rows if part == "sendvae"} == {
        *("plain, VAE in float32", "eager", "eager, channels_last"),
    }
    assert rows["caching", "TF32", 16]["difference"] == rows["sampling", "TF32", 2]["difference"] == 0  # of a CPU
    assert 0 < rows["sampling", "bf16", 2]["difference"] < 0.1
    assert 0 < rows["caching", "bf16", 16]["difference"] < 0.1


def test_some_of_it(tmp_path):
    answer = benchmark("--rehearse", "--parts", "sampling", "--only", "TF32; bf16", "--repeats", 1)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert [line.split("  ")[0] for line in answer.stdout.splitlines()[2:]] == ["sampling", "sampling"]


def test_without_a_gpu_it_says_what_there_is():
    answer = benchmark()
    assert answer.returncode == 2
    assert "--rehearse" in answer.stderr
