"""Several averages of one training, as a user calls it: kept, resumed, continued, sampled, exported, of any length."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import export_ldm
import generate
import train_ldm
import train_repae
from formats.power_average import combination, gamma_of
from inference.trained_ldm import open_trained_ldm
from models.denoisers.sit import SiT
from runtime.checkpoint import CheckpointFolder
from runtime.cli import run
from tests import repae_runs
from tests.ldm_trainings import flags, write_data

SEVERAL = {"ema_decay": "0.9,0.5", "posthoc_ema": "0.05,0.10", "checkpointing_steps": 1, "keep_checkpoints": 9}
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def several(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("exps")
    assert train(data, output, "several", max_train_steps=STEPS, milestone_steps=3, **SEVERAL) == 0
    return output / "several"


def train(data: Path, output: Path, name: str, **changes: object) -> int:
    return run(train_ldm.main, flags(data, output, name, **changes))


def module(folder: Path, step: int, name: str, place: str = "checkpoints") -> dict[str, torch.Tensor]:
    return load_file(folder / place / f"{step:07d}" / f"{name}.safetensors")


def assert_same(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> None:
    assert x.keys() == y.keys()
    assert all(torch.equal(x[key], y[key]) for key in x)


def names_in(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.safetensors")}


def test_each_is_that_of_a_run_with_it_alone(data, several, tmp_path):
    for decay, name in ((0.9, "ema"), (0.5, "ema_0.5")):
        assert train(data, tmp_path, name, max_train_steps=STEPS, ema_decay=decay) == 0
        assert_same(module(several, STEPS, name), module(tmp_path / name, STEPS, "ema"))
        assert_same(module(several, STEPS, "model"), module(tmp_path / name, STEPS, "model"))
    assert (several / "metrics.jsonl").read_bytes() == (tmp_path / "ema" / "metrics.jsonl").read_bytes()
    assert json.loads((several / "args.json").read_text())["args"]["ema_decay"] == "0.9,0.5"
    assert json.loads((tmp_path / "ema" / "args.json").read_text())["args"]["ema_decay"] == 0.9  # as ever


def test_power_averages_are_those_of_the_weights_of_each_step(several):
    """Float64, from the checkpoints of all steps: the first step's weights replace the start."""
    for length in (0.05, 0.1):
        edges = (np.arange(STEPS + 1) / STEPS) ** (gamma_of(length) + 1)
        models = [module(several, step, "model") for step in range(1, STEPS + 1)]
        average = module(several, STEPS, f"posthoc_{length}")
        for key, tensor in average.items():
            wanted = sum(weight * model[key].double() for weight, model in zip(np.diff(edges), models, strict=True))
            torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-7)


def test_what_is_kept(several):
    assert names_in(several / "checkpoints" / "0000006") == {
        "model", "alignment", "ema", "ema_0.5", "posthoc_0.05", "posthoc_0.1",
    }  # fmt: skip
    assert [path.name for path in sorted((several / "milestones").iterdir())] == ["0000003", "0000006"]
    assert names_in(several / "milestones" / "0000003") == {"ema", "ema_0.5"}
    snapshots = sorted((several / "snapshots").iterdir())
    assert [int(path.name) for path in snapshots] == list(range(1, STEPS + 1))
    for name in ("posthoc_0.05", "posthoc_0.1"):
        half, whole = module(several, 2, name, "snapshots"), module(several, 2, name)
        assert_same(half, {key: tensor.half() for key, tensor in whole.items()})
    assert CheckpointFolder(several).newest_good().fault() is None


def test_generate_takes_any_and_names_what_there_is(several, capsys):
    argv = ["--exp-path", str(several), "--num-fid-samples", "2", "--num-steps", "2", "--mode", "ode"]
    images = {}
    for name in ("ema", "ema_0.5", "model", "posthoc_0.1", "posthoc_0.08"):
        assert run(generate.main, [*argv, "--weights", name]) == 0
        middle = "" if name == "ema" else f"-{name}"
        folder = several / f"samples-0000006-ode2{middle}-2-seed0"
        assert json.loads((folder / "index.json").read_text())["source"]["weights"] == name
        images[name] = np.load(folder / "samples.npz", allow_pickle=False)["arr_0"].tobytes()
        shutil.rmtree(folder)
    assert len(set(images.values())) == len(images)
    capsys.readouterr()
    assert run(generate.main, [*argv, "--weights", "ema_0.25"]) == 2
    error = capsys.readouterr().err
    assert "--weights ema_0.25" in error
    assert "take --weights ema or ema_0.5 or model or posthoc_X with any X" in error
    assert run(generate.main, [*argv, "--weights", "posthoc_0.08", "--train-steps", "9"]) == 2
    assert "there are: 1, 2, 3, 4, 5, 6" in capsys.readouterr().err
    assert run(generate.main, [*argv, "--weights", "posthoc_0.001", "--dry-run"]) == 0
    assert "posthoc_0.001 at step 6, out of" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ema_0.5", "posthoc_0.1"])
def test_export(several, tmp_path, name):
    argv = [str(several), str(tmp_path / "out"), "--weights", name]
    assert run(export_ldm.main, argv) == 0
    expected = open_trained_ldm(several, None, name).load_model().state_dict()
    assert_same(SiT.from_pretrained(tmp_path / "out" / "transformer").state_dict(), expected)
    if name == "posthoc_0.1":  # as it was stored
        assert_same(expected, {key: t.float() for key, t in module(several, STEPS, name, "snapshots").items()})
    argv[1] = str(tmp_path / "repa")
    assert run(export_ldm.main, [*argv, "--format", "repa"]) == 0
    path = tmp_path / "repa" / "checkpoints" / "0000006.pt"
    with torch.serialization.safe_globals([export_ldm.argparse.Namespace]):
        contents = torch.load(path, weights_only=True)
    assert all(torch.equal(contents["ema"][key], tensor) for key, tensor in expected.items())
    trained = module(several, STEPS, "model") if name == "ema_0.5" else expected  # a snapshot has no others
    assert all(torch.equal(contents["model"][key], tensor) for key, tensor in trained.items())


def test_resumed_it_is_the_same_and_makes_up_for_a_snapshot(data, several, tmp_path, capsys):
    assert train(data, tmp_path, "run", max_train_steps=3, **SEVERAL) == 0
    shutil.rmtree(tmp_path / "run" / "snapshots" / "0000003")
    assert train(data, tmp_path, "run", max_train_steps=STEPS, **SEVERAL) == 0
    for name in names_in(several / "checkpoints" / "0000006"):
        assert_same(module(tmp_path / "run", STEPS, name), module(several, STEPS, name))
    for step in range(1, STEPS + 1):
        for name in names_in(several / "snapshots" / "0000006"):
            assert_same(module(tmp_path / "run", step, name, "snapshots"), module(several, step, name, "snapshots"))
    capsys.readouterr()
    for changes, said in (
        ({"ema_decay": 0.9}, "was started with --ema-decay 0.9,0.5, not 0.9: give the old value"),
        ({"ema_decay": "0.9,0.25"}, "was started with --ema-decay 0.9,0.5, not 0.9,0.25"),
        ({"posthoc_ema": "none"}, "was started with --posthoc-ema 0.05,0.1, not none"),
    ):
        assert train(data, tmp_path, "run", **(SEVERAL | {"max_train_steps": 9} | changes)) == 2
        assert said in capsys.readouterr().err
    again = SEVERAL | {"checkpointing_steps": 4, "posthoc_steps": 4, "max_train_steps": 9, "resume_step": 4}
    assert train(data, tmp_path, "run", **again) == 0  # intervals may change; later snapshots are set aside
    there = sorted(int(path.name) for path in (tmp_path / "run" / "snapshots").glob("[0-9]*"))
    assert there == [1, 2, 3, 4, 8, 9]


def test_another_run_goes_on_with_averages_that_the_first_lacks(data, several, tmp_path):
    changes = {"continue_train_exp_dir": several, "max_train_steps": STEPS + 1}
    assert train(data, tmp_path, "next", ema_decay="0.9,0.5,0.25", posthoc_ema="0.2", **changes) == 0
    after = {name: module(tmp_path / "next", STEPS + 1, name) for name in ("model", "ema", "ema_0.5", "ema_0.25")}
    for name, begun, decay in (("ema", "ema", 0.9), ("ema_0.5", "ema_0.5", 0.5), ("ema_0.25", "ema", 0.25)):
        before = module(several, STEPS, begun)
        for key, tensor in after[name].items():
            torch.testing.assert_close(tensor, decay * before[key] + (1 - decay) * after["model"][key])


def test_repae_averages_its_statistics_with_each(data, tmp_path):
    """As with each decay alone; a snapshot holds the VAE of its step, and statistics of the same length."""
    common = {"max_train_steps": 2, "loss_cfg_path": "configs/l1_kl.yaml", "vae_learning_rate": 1e-2}
    kept = {"checkpointing_steps": 1, "keep_checkpoints": 9, "milestone_steps": 1, "posthoc_ema": True}
    for name, changes in (("several", {"ema_decay": "0.9,0.5", **kept}), ("alone", {"ema_decay": 0.5})):
        assert run(train_repae.main, repae_runs.flags(data, tmp_path, name, **common, **changes)) == 0
    several, alone = tmp_path / "several", tmp_path / "alone"
    for further, main in (("ema_0.5", "ema"), ("statistics_ema_0.5", "statistics_ema"), ("vae", "vae")):
        assert_same(module(several, 2, further), module(alone, 2, main))
    vae = {"vae", "statistics_ema", "statistics_ema_0.5"}
    assert names_in(several / "milestones" / "0000001") == {"ema", "ema_0.5"} | vae
    halves = {"posthoc_0.05", "posthoc_0.1"}
    assert names_in(several / "snapshots" / "0000001") == halves | {"vae"} | {f"statistics_{name}" for name in halves}
    for step, name in ((1, "ema_0.5"), (2, "ema_0.5"), (1, "posthoc_0.1"), (2, "posthoc_0.1")):
        tokenizer = open_trained_ldm(several, step, name).load_autoencoder()
        assert torch.equal(tokenizer.statistics.mean, module(several, step, f"statistics_{name}")["mean"])
        expected = module(several, step, "vae")["network.decoder.conv_out.weight"]
        assert torch.equal(tokenizer.decoder_last_layer, expected)
    first, second = (module(several, step, "vae")["statistics.mean"].double() for step in (1, 2))
    for length in (0.05, 0.1):  # β(1) = 0, β(2) = (1/2)^(γ+1)
        decay, name = 0.5 ** (gamma_of(length) + 1), f"statistics_posthoc_{length}"
        for step, expected in ((1, first), (2, decay * first + (1 - decay) * second)):
            torch.testing.assert_close(module(several, step, name)["mean"].double(), expected, rtol=1e-5, atol=1e-6)
    between = open_trained_ldm(several, 2, "posthoc_0.07").load_autoencoder().statistics.mean
    stored = [module(several, step, f"statistics_posthoc_{x}")["mean"] for step in (1, 2) for x in (0.05, 0.1)]
    shares, _ = combination([1, 1, 2, 2], [gamma_of(x) for x in (0.05, 0.1, 0.05, 0.1)], 2, gamma_of(0.07))
    expected = sum(share * mean.double() for share, mean in zip(shares, stored, strict=True))
    torch.testing.assert_close(between.double(), expected, rtol=1e-5, atol=1e-6)
