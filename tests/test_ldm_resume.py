"""train_ldm.py in real processes, really killed: the same command continues bit for bit; and on two processes."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ldm_trainings import flags, write_data
from tests.stages import Stage, run_stage
from tests.test_resume import kill_when

# 24 items in batches of 4: the epoch ends within the resumed part; log lines straddle checkpoints
RUN = {
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_workers": 2,
    "max_train_steps": 40,
    "checkpointing_steps": 20,
    "log_steps": 3,
    "sampling_steps": 23,
    "val_steps": 20,
    "cfg_prob": 0.2,
    "weighting": "lognormal",
    "ema_decay": "0.9,0.5",
    "posthoc_ema": "0.05,0.1",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), hflip=True)


@pytest.fixture(scope="module")
def straight(data) -> Path:
    assert start(data, "straight").wait() == 0
    return run_folder(data, "straight")


def run_folder(data: Path, name: str) -> Path:
    return data.parent / "exps" / name


def start(data: Path, name: str, anew: bool = False, **changes) -> Stage:
    argv = flags(data, data.parent / "exps", name, **(RUN | {"val_data_dir": data, "hflip": True} | changes))
    return Stage("train_ldm.py", *argv, anew=anew)


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    last = [run / "checkpoints" / "0000040" for run in (a, b)]
    for name in ("model", "ema", "ema_0.5", "posthoc_0.05", "posthoc_0.1", "alignment"):
        x, y = (load_file(folder / f"{name}.safetensors") for folder in last)
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key], y[key]) for key in x), name
    for step in ("0000020", "0000040"):
        for name in ("posthoc_0.05.safetensors", "posthoc_0.1.safetensors"):
            kept = [(run / "snapshots" / step / name).read_bytes() for run in (a, b)]
            assert kept[0] == kept[1]
    x, y = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in last)
    assert x["param_groups"] == y["param_groups"]
    for index in x["state"]:
        assert all(torch.equal(x["state"][index][key], y["state"][index][key]) for key in x["state"][index])
    assert (a / "samples" / "0000040.png").read_bytes() == (b / "samples" / "0000040.png").read_bytes()


@pytest.mark.slow
def test_sigkill_after_step_23_and_the_same_command_give_the_same_run(data, straight):
    process = start(data, "killed")
    folder = run_folder(data, "killed")
    assert kill_when(process, folder / "samples" / "0000023.png", signal.SIGKILL) == -signal.SIGKILL
    assert [path.name for path in sorted((folder / "checkpoints").glob("[0-9]*"))] == ["0000020"]
    assert start(data, "killed", anew=True).wait() == 0  # with another seed of Python's hashes, too
    assert_same_run(straight, folder)


@pytest.mark.slow
def test_sigterm_saves_stops_and_resumes_exactly(data, straight):
    process = start(data, "stopped", num_workers=0)
    folder = run_folder(data, "stopped")
    assert kill_when(process, folder / "samples" / "0000023.png", signal.SIGTERM) == 128 + signal.SIGTERM
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "stopped"
    assert (folder / "checkpoints" / f"{status['step']:07d}").is_dir()
    assert start(data, "stopped").wait() == 0
    assert_same_run(straight, folder)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["SiT-Ti/2", "LightningDiT-Ti/2"])
def test_training_on_two_processes_resumes_exactly(data, tmp_path, model):
    argv = flags(
        data, tmp_path, "two", batch_size=4, log_steps=2, val_data_dir=data, checkpointing_steps=2, model=model
    )
    run_stage("train_ldm.py", *argv, "--max-train-steps", "2", processes=2)
    run_stage("train_ldm.py", *argv, "--max-train-steps", "4", processes=2)
    run_stage("train_ldm.py", *[a if a != "two" else "straight" for a in argv], "--max-train-steps", "4", processes=2)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("two", "straight")]
    assert logs[0][-1] == logs[1][-1]
    weights = [
        load_file(tmp_path / name / "checkpoints" / "0000004" / "ema.safetensors") for name in ("two", "straight")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
