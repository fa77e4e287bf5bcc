"""What a user can get wrong with export_ldm.py, and what the one line must say."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bad_inputs.case import Case
from tests.bad_inputs.generate_cases import shared_run
from tests.public_sit import PublicSiT, public_args, write_experiment


def exporting(prepare_out: Callable[[Path], object] = lambda out: None, *flags: str, run: str | None = None):
    """A good run (or ``run``), a folder ``out`` that is prepared, flags."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        prepare_out(tmp_path / "out")
        return [run or str(shared_run(tmp_path)), str(tmp_path / "out"), *flags]

    return prepare


def thesis(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("")


def another_index(out: Path) -> None:
    out.mkdir()
    (out / "model_index.json").write_text("{}")


def earlier_export(out: Path) -> None:
    out.mkdir()
    (out / "model_index.json").write_text('{"exported_from": "ldm"}')


def below_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "thesis.txt").write_text("")
    return [str(shared_run(tmp_path)), str(tmp_path / "thesis.txt" / "out")]


def too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return [str(shared_run(tmp_path)), str(tmp_path / ("x" * 300))]


def repa_experiment(*flags: str):
    """An experiment of REPA that says its VAE nowhere."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        folder = write_experiment(tmp_path / "repa", PublicSiT(), PublicSiT(seed=1), public_args())
        return [str(folder), str(tmp_path / "out"), *flags]

    return prepare


CASES = [
    Case("no VAE", repa_experiment(), ("--vae-ckpt is needed", "RUN")),
    Case("another step", repa_experiment("--train-steps", "3"), ("RUN", "no checkpoint of step 3", "there are: 7")),
    Case("a VAE beside its own", exporting(lambda out: None, "--vae-ckpt", "vae.pt"), ("--vae-ckpt", "RUN", "leave")),
    Case("no run", lambda tmp_path, monkeypatch: [], ("RUN, OUT",)),
    Case("not a run", exporting(run="docs"), ("RUN docs is not a run",)),
    Case("no such step", exporting(lambda out: None, "--train-steps", "3"), ("--train-steps 3", "there are: 5, 10")),
    Case("a file", exporting(lambda out: out.write_text("")), ("out is a file",)),
    Case("below a file", below_a_file, ("thesis.txt", "file", "folder")),
    Case("too long a name", too_long, ("name is too long",)),
    Case("other files", exporting(thesis, "--overwrite"), ("holds other files", "new folder")),
    Case("another's folder", exporting(another_index, "--overwrite"), ("holds other files", "new folder")),
    Case("an earlier export", exporting(earlier_export), ("holds an export", "--overwrite")),
]
