"""Whatever a user gets wrong ends in exit code 2 and one line that says what, where and what to do."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

import cache_latents
import evaluate
import export_ldm
import export_vae
import generate
import preprocessing
import probe
import report
import train_ldm
import train_repae
import train_sendvae
from runtime.cli import run
from tests.bad_inputs import (
    cache_latents_cases,
    evaluate_cases,
    evaluate_reconstruction_cases,
    export_ldm_cases,
    export_vae_cases,
    generate_cases,
    preprocessing_cases,
    probe_cases,
    report_cases,
    train_ldm_cases,
    train_repae_cases,
    train_sendvae_cases,
)
from tests.bad_inputs.case import Case, errors_in

SCRIPTS = {
    cache_latents: cache_latents_cases,
    evaluate: evaluate_cases,
    export_ldm: export_ldm_cases,
    export_vae: export_vae_cases,
    generate: generate_cases,
    preprocessing: preprocessing_cases,
    probe: probe_cases,
    report: report_cases,
    train_ldm: train_ldm_cases,
    train_repae: train_repae_cases,
    train_sendvae: train_sendvae_cases,
}
CASES = [
    pytest.param(script.main, case, id=f"{script.__name__}-{case.name}")
    for script, table in (*SCRIPTS.items(), (evaluate, evaluate_reconstruction_cases))  # a table for each command
    for case in table.CASES
]


@pytest.mark.parametrize(("main", "case"), CASES)
def test_one_line_and_exit_code_2(
    main: Callable, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    argv = case.prepare(tmp_path, monkeypatch)
    capsys.readouterr()
    before = set(tmp_path.rglob("*"))
    try:
        code = run(main, argv)
    except SystemExit as exit_:  # argparse
        code = exit_.code
    lines = errors_in(capsys.readouterr().err)
    assert code == 2
    assert len(lines) == 1, lines
    for part in case.expect:
        assert part in lines[0]
    assert not list(tmp_path.rglob(export_vae_cases.MARK)), "code in a file was run"
    left = sorted(str(path.relative_to(tmp_path)) for path in set(tmp_path.rglob("*")) - before)
    assert not left or case.keeps_work, "a refused command leaves nothing behind"


def test_the_pickles_of_the_table_would_run_their_code(tmp_path: Path):
    """Or the table proved nothing: unpickled as they are, they leave their mark."""
    export_vae_cases.pickled_code(tmp_path / "vae.pt")
    pickle.loads((tmp_path / "vae.pt").read_bytes())  # noqa: S301
    assert (tmp_path / export_vae_cases.MARK).read_text() == "ran"
