"""What every script does with an error that ends it, and how soon it answers for its flags."""

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from errors import UserError
from runtime.cli import EXIT_USER_ERROR, out_of_memory_means, run

ROOT = Path(__file__).resolve().parents[1]


def cpu_allocation_that_fails(argv):
    torch.empty(1 << 62, dtype=torch.uint8)


def raising(error):
    def main(*args):
        raise error

    return main


MORE = {"generate": ("--model", "SiT-Ti/2"), "cache_latents": ("--vae-ckpt", "none")}


@pytest.mark.parametrize(
    ("main", "expected"),
    [
        (raising(UserError("give another")), "error: give another"),
        (raising(OSError(errno.ENOSPC, "full", "a.npy")), "error: no space left on the device while writing a.npy"),
        (
            raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")),
            "Tried to allocate 2 GiB.)",
        ),
        (raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")), "error: out of memory"),
        (raising(RuntimeError("GET was unable to find an engine to execute this computation")), "error: out of memory"),
        (cpu_allocation_that_fails, "error: out of memory: take a smaller batch"),
        (raising(MemoryError()), "error: out of memory: take a smaller batch"),
    ],
    ids=["user", "disk", "cuda", "cublas", "cudnn", "cpu", "python"],
)
def test_one_line_and_exit_code(main, expected, capsys):
    assert run(main, []) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.parametrize("remedy", ["take less", lambda: "take less"])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no room\nfor it"), RuntimeError("no room: CUBLAS_STATUS_ALLOC_FAILED"), MemoryError()],
)
def test_a_script_says_what_to_do_without_memory(error, remedy):
    said = r"^out of memory \((no room.*|MemoryError)\): take less$"
    with pytest.raises(UserError, match=said), out_of_memory_means(remedy):
        raise error
    with pytest.raises(RuntimeError, match="mat1"), out_of_memory_means(remedy):
        raise RuntimeError("mat1 and mat2 cannot be multiplied")


@pytest.mark.parametrize(
    ("script", "works", "words"),
    [("generate", "dry_run", "--pproc-batch-size"), ("cache_latents", "dry_run", "--mixed-precision bf16")],
)
def test_images_that_do_not_fit_have_a_remedy(script, works, words, monkeypatch, capsys):
    """Of cuBLAS, which has no error class of its own."""
    module = importlib.import_module(script)
    monkeypatch.setattr(module, works, raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")))
    assert run(module.main, ["--dry-run", "--vae", "f4d4-tiny", "--resolution", "32", *MORE[script]]) == EXIT_USER_ERROR
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="mat1"):
        run(raising(RuntimeError("mat1 and mat2 cannot be multiplied")), [])


SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "answer_early(" in path.read_text())
# Those that import nothing that takes seconds, or only once the flags are read.
LIGHT_SCRIPTS = ("preprocessing.py", "report.py", "save_vae_weights.py", "train_ldm_only.py")
LIGHT = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    heavy = sorted({"torch", "timm", "diffusers", "accelerate", "torchvision", "matplotlib"} & sys.modules.keys())
    print("imported:", heavy, file=sys.stderr)
"""


def light(*words: str) -> subprocess.CompletedProcess:
    """Run a script; the last line of its stderr says what it imported."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LIGHT, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_script_is_looked_at():
    others = {"errors.py", "files.py", "schema.py", *LIGHT_SCRIPTS}
    assert {*SCRIPTS} | others == {path.name for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("script", [*SCRIPTS, *LIGHT_SCRIPTS, "runtime/experiment.py"])
@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--no-such-flag", 2)])
def test_flags_are_answered_before_anything_heavy_is_imported(script, flag, code):
    answer = light(script, flag)
    assert answer.returncode == code, answer.stderr
    assert answer.stderr.endswith("imported: []\n")
    if code:
        assert answer.stderr.count("\n") == 2 and "--help lists the flags" in answer.stderr


def test_a_wrong_value_is_answered_early_too():
    """Checks that go beyond a single flag, as well."""
    answer = light("train_ldm.py", "--align", "vae", "--proj-coeff", "0.3", "--dry-run")
    assert answer.returncode == 2 and answer.stderr.endswith("imported: []\n")
    assert "--proj-coeff belongs to --align repa" in answer.stderr
