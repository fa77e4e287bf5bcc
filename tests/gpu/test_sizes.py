"""The published trainings at their real size fit on the GPU that is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import needs_gpu

pytestmark = needs_gpu
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "training",
    [
        "train_ldm.py --vae f16d32 --model SiT-XL/1 --batch-size 256",
        "train_sendvae.py --vae f16d32 --vae-ckpt none --batch-size 1024",
        "train_repae.py --vae f8d4 --vae-ckpt none --model SiT-XL/2 --batch-size 256",
    ],
)
def test_the_published_batch_fits(training):
    """--micro-batch-size auto finds what fits, and two compiled steps of it stay below the memory there is."""
    command = [sys.executable, *training.split(), "--micro-batch-size", "auto", "--dry-run", "--random-weights"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-4000:]
    print(answer.stdout[-400:])
    peak = float(re.search(r"peak memory: ([\d.]+) GiB", answer.stdout)[1])
    assert 0.3 < peak / (torch.cuda.get_device_properties(0).total_memory / 2**30) < 1
