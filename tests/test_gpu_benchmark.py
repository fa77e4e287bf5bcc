"""benchmarks/gpu.py runs from end to end with tiny networks; what it prints of a GPU is measured there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from models.denoisers import denoiser_kind

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_GPU = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def test_a_rehearsal_measures_every_part(tmp_path):
    """All variants that need no compiler; figures are positive, and what is exact differs by nothing."""
    flags = ["--rehearse", "--no-compile", "--repeats", "1", "--kernels", "2", "--output", str(tmp_path / "gpu.json")]
    command = [sys.executable, "benchmarks/gpu.py", *flags]
    answer = subprocess.run(command, cwd=ROOT, env=WITHOUT_GPU, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["device"] == "CPU"
    assert content["ceilings"]["matrix_flops"] > 0
    rows = {(row["part"], row["what"], row["images"]): row for row in content["rows"]}
    assert {part for part, _, _ in rows} == {"ldm", "sendvae", "caching", "sampling"}
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["ldm", "plain", 2]["mfu"] > 0
    eager = rows["ldm", "eager", 2]
    assert eager["launch_ms"] > 0
    for what in ("plain", "eager, checkpointing"):  # the same trainings, step by step
        assert rows["ldm", what, 2]["loss"] == pytest.approx(eager["loss"], rel=1e-3)
    assert "launch_ms" not in rows["ldm", "plain", 2]
    assert rows["ldm", "eager", 4]["loss"] != eager["loss"]
    assert {what for part, what, _ in rows if part == "sendvae"} == {
        *("plain, VAE in float32", "eager", "eager, channels_last"),
    }
    assert rows["caching", "TF32", 16]["difference"] == rows["sampling", "TF32", 2]["difference"] == 0  # of a CPU
    assert 0 < rows["sampling", "bf16", 2]["difference"] < 0.1
    assert 0 < rows["caching", "bf16", 16]["difference"] < 0.1


def test_cuda_graphs_may_fail_and_nothing_else_may(capsys):
    """A table with a line that failed is worth more than none; what a script offers has to work."""

    def step():
        raise RuntimeError("these tensors were overwritten\nby a later run")

    report = gpu.Report(1, torch.device("cpu"))
    assert not gpu.time_training(report, "ldm", "compiled, CUDA graphs", step, 2, 1.0)
    assert report.rows[0]["failed"] == "RuntimeError: these tensors were overwritten"
    assert "overwritten" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="overwritten"):
        gpu.time_training(report, "ldm", "compiled", step, 2, 1.0)


@pytest.mark.parametrize(("what", "may_fail"), [("bf16, compiled, GELU in product", True), ("bf16", False)])
def test_an_experiment_in_sampling_may_fail(what, may_fail, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no such epilogue")

    report = gpu.Report(1, torch.device("cpu"))
    monkeypatch.setattr(gpu, "build_sampler", refuse)
    if not may_fail:
        with pytest.raises(RuntimeError, match="epilogue"):
            gpu.measure_sampling(report, gpu.TINY, [what])
        return
    gpu.measure_sampling(report, gpu.TINY, [what])
    assert report.rows[0]["failed"] == "RuntimeError: no such epilogue"


def test_a_gelu_in_the_product_is_the_same_mlp():
    """On a CPU that product takes the exact GELU, which differs from SiT's by 5e-4 at most."""
    torch.manual_seed(0)
    config = denoiser_kind("SiT-Ti/2")("SiT-Ti/2", 4, 8, num_classes=10)
    model = config.build().requires_grad_(False)
    x = torch.randn(2, 16, model.width)
    wanted = [block.mlp(x) for block in model.blocks]
    gpu.gelu_in_product(model)
    for block, values in zip(model.blocks, wanted, strict=True):
        torch.testing.assert_close(block.mlp(x), values, atol=5e-3, rtol=0)
        assert not torch.equal(block.mlp(x), values)


def test_what_is_measured_can_be_chosen(capsys):
    args = gpu.parse_arguments(["--parts", "sampling", "--only", "TF32; bf16"])
    _, variants = gpu.PARTS["sampling"]
    assert [what for what in variants if gpu.is_wanted(what, args)] == ["TF32", "bf16"]
    for wrong in (["--parts", "vae"], ["--only", "TF23"]):
        with pytest.raises(SystemExit) as ended:
            gpu.parse_arguments(wrong)
        assert ended.value.code == 2
        assert "there are" in capsys.readouterr().err


def test_without_a_gpu_it_says_what_there_is(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--rehearse" in capsys.readouterr().err
