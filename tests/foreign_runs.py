"""Other people's diffusion transformers, made runs of by export_ldm.py."""

from pathlib import Path

import torch

import export_ldm
from runtime.cli import run
from tests.command_line import argv_of


def export(source: Path, out: Path, **flags: object) -> int:
    """Its exit code."""
    return run(export_ldm.main, [str(source), str(out), "--format", "run", *argv_of(flags)])


def assert_refused(contents: object, said: str, tmp_path: Path, capsys) -> None:
    """A file with these contents is refused in one line that says so, and nothing is written."""
    torch.save(contents, tmp_path / "file.pt")
    assert export(tmp_path / "file.pt", tmp_path / "out", vae_ckpt=tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()
