"""--micro-batch-size: accumulation that follows from it, and the choice of the largest that fits."""

import argparse
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from errors import UserError
from training import micro_batch
from training.arguments import divisors, settle_micro_batch
from training.micro_batch import FOUND, Trial, find_elsewhere, most_that_fit

GIB = 2**30


def flags(batch: int, micro: int | str | None, accumulation: int = 1) -> argparse.Namespace:
    return argparse.Namespace(
        batch_size=batch, micro_batch_size=micro, gradient_accumulation_steps=accumulation, max_train_steps=None
    )


@pytest.mark.parametrize(("batch", "processes", "micro", "steps"), [(256, 1, 64, 4), (256, 8, 32, 1), (96, 2, 3, 16)])
def test_accumulation_follows(batch, processes, micro, steps):
    args = flags(batch, micro)
    settle_micro_batch(args, processes)
    assert args.gradient_accumulation_steps == steps


@pytest.mark.parametrize("micro", [None, "auto"])
def test_nothing_is_settled_before_a_trial(micro):
    args = flags(256, micro)
    settle_micro_batch(args, 8)
    assert args.gradient_accumulation_steps == 1


def test_what_does_not_divide_is_refused_with_what_does():
    with pytest.raises(UserError, match=r"64 images of each process .* take one of 1, 2, 4, 8, 16, 32, 64$"):
        settle_micro_batch(flags(256, 48), 4)


@pytest.mark.parametrize("micro", [1, "auto"])
@pytest.mark.parametrize(("batch", "processes"), [(256, 6), (4, 8)])
def test_a_batch_that_cannot_be_shared_is_refused(batch, processes, micro):
    with pytest.raises(UserError, match=f"--batch-size {batch} cannot be shared evenly by {processes} processes"):
        settle_micro_batch(flags(batch, micro), processes)


def test_both_flags_are_refused():
    with pytest.raises(UserError, match="give one of them"):
        settle_micro_batch(flags(256, 32, accumulation=2), 1)


def test_accumulation_that_is_given_leaves_nothing_to_find():
    """The wrappers say auto; a user appends accumulation."""
    args = flags(256, "auto", accumulation=2)
    settle_micro_batch(args, 1)
    assert (args.micro_batch_size, args.gradient_accumulation_steps) == (None, 2)


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]


# -- the choice


@pytest.mark.parametrize(
    ("share", "fixed", "each", "room", "fits", "tried"),
    [
        (256, 10, 1.0, 80, 64, [2, 8, 64]),
        (256, 10, 1.0, 73.9, 32, [2, 8, 32]),
        (256, 10, 0.01, 80, 256, [2, 8, 256]),
        (256, 10, 7, 32, 2, [2, 8, 4]),  # 8 do not fit, 4 do not
        (256, 70, 4, 75, 1, [2, 8, 4, 1]),
        (1, 10, 1, 80, 1, [1]),
        (7, 10, 1, 80, 7, [1, 7]),
        (7, 10, 20, 80, 1, [1, 7]),
        (6, 10, 1, 80, 6, [2, 6]),
    ],
)
def test_the_largest_divisor_that_fits(share, fixed, each, room, fits, tried):
    """Of a memory that grows linearly, GiB; what does not fit is infinite."""
    calls = []

    def peak(images: int) -> float:
        calls.append(images)
        needed = fixed + each * images
        return needed * GIB if needed <= 80 else math.inf

    assert most_that_fit(share, peak, room * GIB) == fits
    assert calls == tried


def test_a_prediction_that_was_too_high_is_corrected():
    """Small batches may need more than their share (work space): what is predicted is tried."""
    calls = []

    def peak(images: int) -> float:
        calls.append(images)
        return (10 + 0.1 * images if images <= 8 else 10 + images) * GIB

    assert most_that_fit(256, peak, 80 * GIB) == 64
    assert calls == [2, 8, 256, 128, 64]


@pytest.mark.parametrize("share", [2, 8, 64])
def test_exactly_one_image_is_found(share):
    """Where neither of the two small numbers fits, memory cannot be predicted."""
    assert most_that_fit(share, lambda images: 8 * GIB if images == 1 else math.inf, 16 * GIB) == 1


def test_less_than_one_image_is_refused():
    with pytest.raises(UserError, match=r"not even one image fits into 16\.0 GiB; add --gradient-checkpointing"):
        most_that_fit(8, lambda images: (20 + 4 * images) * GIB, 16 * GIB)


# -- the trial, on a GPU that is made up


class StubScaler:
    def __init__(self) -> None:
        self._per_optimizer_states, self.state = {}, {"scale": 8.0}

    def state_dict(self) -> dict:
        return dict(self.state)

    def load_state_dict(self, state: dict) -> None:
        self.state = state


class StubAccelerator(SimpleNamespace):
    """One process on "cuda", which counts how often it was told to forget."""

    def __init__(self, num_processes: int = 1) -> None:
        super().__init__(device=SimpleNamespace(type="cuda"), num_processes=num_processes, scaler=StubScaler(), freed=0)

    def free_memory(self) -> None:
        self.freed += 1


FAILURES = [
    torch.OutOfMemoryError("of the stub"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
]


@pytest.fixture
def gpu(monkeypatch):
    """50 GiB; steps take 10 + the images of a micro-batch, and 5 more where another one's gradients are there."""
    used = {}
    steps, builds = [], []

    def train_step(method, step, batches) -> None:
        images = batches[0]
        steps.append((step, images, len(batches)))
        used["peak"] = (10 + images + 5 * (len(batches) > 1)) * GIB
        method.accelerator.scaler.state["scale"] /= 2
        torch.rand(3)
        if used["peak"] > 50 * GIB:
            method.accelerator.scaler._per_optimizer_states["broken off"] = True
            raise FAILURES[len(steps) % len(FAILURES)]

    monkeypatch.setattr(micro_batch, "train_step", train_step)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (50 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: used["peak"])
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    return SimpleNamespace(steps=steps, builds=builds)


def trial(gpu, accelerator: StubAccelerator) -> Trial:
    def build():
        gpu.builds.append(torch.rand(1).item())
        return SimpleNamespace(accelerator=accelerator)

    return Trial(build, lambda method, images: images, step=7)


def test_a_trial_finds_and_leaves_no_trace(gpu):
    """46 GiB are to be used: 10 + 5 + 31 images. Random numbers, the scale and the flags are as before."""
    accelerator, args = StubAccelerator(), flags(256, "auto")
    before = torch.get_rng_state()
    trial(gpu, accelerator).find(args, accelerator)
    assert args.gradient_accumulation_steps == 256 // 16
    assert args.max_train_steps is None
    assert torch.equal(torch.get_rng_state(), before)
    assert accelerator.scaler.state == {"scale": 8.0}
    assert accelerator.scaler._per_optimizer_states == {}
    assert {step for step, _, _ in gpu.steps} == {7}
    assert [images for _, images, _ in gpu.steps] == [2, 2, 8, 8, 16, 16]
    assert {count for _, _, count in gpu.steps} == {2}
    assert len(gpu.builds) == 1


def test_a_trial_that_runs_out_of_memory_builds_anew(gpu):
    """80 images of 40 GiB each do not fit; what was broken off does not disturb the next try."""
    accelerator, args = StubAccelerator(), flags(40, "auto")
    trial(gpu, accelerator).find(args, accelerator)
    assert args.gradient_accumulation_steps == 2  # of 20; 40 in one micro-batch are 50 GiB, more than is to be used
    assert accelerator.scaler._per_optimizer_states == {}
    assert accelerator.freed >= 1


def test_a_cpu_takes_all_at_once(gpu):
    accelerator, args = StubAccelerator(), flags(256, "auto")
    accelerator.device = SimpleNamespace(type="cpu")
    trial(gpu, accelerator).find(args, accelerator)
    assert args.gradient_accumulation_steps == 1
    assert gpu.steps == []


@pytest.mark.parametrize(("recorded", "expected"), [({"num_processes": 1, "gradient_accumulation_steps": 4}, 4),
                                                    ({"num_processes": 2, "gradient_accumulation_steps": 4}, 16),
                                                    ({"num_processes": 1}, 1)])  # fmt: skip
def test_a_resumed_run_keeps_what_was_found(gpu, recorded, expected):
    accelerator, args = StubAccelerator(), flags(256, "auto")
    run = SimpleNamespace(accelerator=accelerator, arguments={"gradient_accumulation_steps": 1})
    checkpoint = SimpleNamespace(manifest=lambda: {"args": recorded})
    trial(gpu, accelerator).find_for_run(args, run, checkpoint)
    assert args.gradient_accumulation_steps == run.arguments["gradient_accumulation_steps"] == expected


def test_one_of_several_processes_asks_a_process_of_its_own(monkeypatch, tmp_path):
    """The same command as a dry run of its share, on its own GPU, and of no group."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\n"
        "assert 'RANK' not in os.environ and 'MASTER_PORT' not in os.environ\n"
        "assert sys.argv[1:] == ['--exp-name', 'x', '--dry-run', '--no-compile', '--batch-size', '32'], sys.argv\n"
        f"print({FOUND!r}.format(8 if os.environ['CUDA_VISIBLE_DEVICES'] == '5' else 0))\n"
    )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(sys, "argv", [str(script), "--exp-name", "x"])
    assert find_elsewhere(32) == 8
    script.write_text("import sys\nsys.exit('train.py: error: no weights')\n")
    with pytest.raises(UserError, match=r"auto found nothing \(train.py: error: no weights\); give a number"):
        find_elsewhere(32)
