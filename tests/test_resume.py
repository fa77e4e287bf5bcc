"""Real processes, really killed: the same command continues bit for bit; and a signal in the middle of a save."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runtime.checkpoint import CheckpointFolder
from tests.photographs import write_class_folders
from tests.sendvae_runs import flags
from tests.stages import TORCHRUN, Stage

# 24 images in batches of 4: the epoch ends within the resumed part; log lines straddle checkpoints
RUN = {
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "ema_decay": 0.9,
    "num_workers": 2,
    "max_train_steps": 40,
    "checkpointing_steps": 20,
    "log_steps": 3,
    "sampling_steps": 23,
    "val_steps": 20,
    "mapper_grid": 2,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("photographs") / "images", per_class=8)


@pytest.fixture(scope="module")
def straight(data) -> Path:
    start(data, "straight").wait()
    return run_folder(data, "straight")


def run_folder(data: Path, name: str) -> Path:
    return data.parent / "exps" / name


def start(data: Path, name: str, anew: bool = False, **changes) -> Stage:
    argv = flags(data, data.parent / "exps", name, **(RUN | {"val_data_dir": data} | changes))
    return Stage("train_sendvae.py", *argv, anew=anew)


def kill_when(process: Stage, path: Path, number: int) -> int:
    """Send a signal as soon as a file appears; returns the exit code."""
    wait_for(path, process)
    os.kill(process.pid, number)
    return process.wait(timeout=60)


def wait_for(path: Path, process: Stage) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    for name in ("model", "alignment", "discriminator", "ema"):
        x, y = (load_file(run / "checkpoints" / "0000040" / f"{name}.safetensors") for run in (a, b))
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key], y[key]) for key in x), name
    for name in ("optimizer", "disc_optimizer"):
        x, y = (torch.load(run / "checkpoints" / "0000040" / f"{name}.pt", weights_only=True) for run in (a, b))
        assert x["param_groups"] == y["param_groups"]
        for index in x["state"]:
            assert all(torch.equal(x["state"][index][key], y["state"][index][key]) for key in x["state"][index]), name
    for file in ("diffusion_pytorch_model.safetensors", "latents_stats.safetensors"):
        assert (a / "vae" / file).read_bytes() == (b / "vae" / file).read_bytes()


@pytest.mark.slow
def test_sigkill_after_step_23_and_the_same_command_give_the_same_run(data, straight):
    process = start(data, "killed", anew=True)
    code = kill_when(process, run_folder(data, "killed") / "samples" / "0000023.png", signal.SIGKILL)
    assert code == -signal.SIGKILL
    folder = run_folder(data, "killed")
    assert [path.name for path in sorted((folder / "checkpoints").glob("[0-9]*"))] == ["0000020"]
    assert json.loads((folder / "status.json").read_text())["state"] == "running"
    assert start(data, "killed", anew=True).wait() == 0  # with another seed of Python's hashes, too
    assert_same_run(straight, folder)
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_sigterm_saves_stops_and_resumes_exactly(data, straight):
    process = start(data, "stopped", num_workers=0)
    folder = run_folder(data, "stopped")
    code = kill_when(process, folder / "samples" / "0000023.png", signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "stopped"
    assert 23 <= status["step"] < 40
    assert (folder / "checkpoints" / f"{status['step']:07d}").is_dir()
    assert not (folder / "vae").exists()
    assert f"signal {int(signal.SIGTERM)}: saving, which took " in (folder / "log.txt").read_text()
    assert start(data, "stopped").wait() == 0
    assert_same_run(straight, folder)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_during_a_save_ends_the_run_after_it(data, tmp_path, processes):
    argv = flags(data, tmp_path, "run", batch_size=4, max_train_steps=40, checkpointing_steps=2)
    launcher = TORCHRUN if processes == 2 else ()
    process = Stage(*launcher, "tests/paused_save.py", tmp_path, *argv)
    try:
        wait_for(tmp_path / "saving", process)
        os.kill(int((tmp_path / "saving").read_text()), signal.SIGTERM)
        (tmp_path / "go-on").touch()
        assert process.wait(timeout=120) == (1 if launcher else 128 + signal.SIGTERM)
    finally:
        process.kill()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", 2)
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()  # nothing half-written beside it
    assert folder.name == "0000002"
    assert CheckpointFolder(tmp_path / "run").newest_good().step == 2


@pytest.mark.slow
def test_killed_between_a_checkpoint_and_its_milestone(data, tmp_path):
    """What was due at the saved step is made up for, and what the kill left lying about is gone."""
    due = {"batch_size": 4, "max_train_steps": 4, "checkpointing_steps": 2, "milestone_steps": 2}
    argv = flags(data, tmp_path, "run", **due, align_coeff=0, loss_cfg_path="configs/l1_kl.yaml")
    script, folder = tmp_path / "killed.py", tmp_path / "run"
    script.write_text(
        "import os, signal, sys, train_sendvae; from runtime.checkpoint import CheckpointFolder\n"
        "def die(self, checkpoint, *rest):\n"
        "    if checkpoint.step == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    keep(self, checkpoint, *rest)\n"
        "keep, CheckpointFolder.keep_milestone = CheckpointFolder.keep_milestone, die\n"
        "train_sendvae.main(sys.argv[2:])\n"
    )
    for step in (2, 4):  # the last one too: nothing is left to train then
        assert Stage(script, step, *argv).wait() == -signal.SIGKILL
        assert (folder / "checkpoints" / f"{step:07d}").is_dir()
        assert not (folder / "milestones" / f"{step:07d}").exists()
    for leftover in ("checkpoints/.0000001.old", "milestones/.0000004.tmp", ".vae.tmp"):
        (folder / leftover).mkdir()
    (folder / "status.json.0a1b2c3d.tmp").touch()
    assert Stage("train_sendvae.py", *argv).wait() == 0
    for step in (2, 4):
        kept = load_file(folder / "milestones" / f"{step:07d}" / "model.safetensors")
        whole = load_file(folder / "checkpoints" / f"{step:07d}" / "model.safetensors")
        assert all(torch.equal(kept[name], whole[name]) for name in whole)
    assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".old"))]
    assert (folder / "vae" / "config.json").is_file()
