"""The tables of ``tests/bad_inputs``: what a user can get wrong on a command line, each one line and exit code 2."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from runtime.cli import EXIT_USER_ERROR, run
from tests.bad_inputs.case import Case, errors_in
from tests.faults.bench import Bench, Trial
from tests.faults.forked import run_forked
from tests.test_bad_inputs import CASES


def trials(bench: Bench, quick: bool) -> Iterator[Trial]:
    """All of a script's cases in one fork, because they share what is slow to make; pytest makes them in ./test.sh."""
    tables: dict[str, list[tuple[Callable, Case]]] = {}
    for parameters in () if quick else CASES:
        main, case = parameters.values
        tables.setdefault(main.__module__, []).append((main, case))
    for script, cases in tables.items():
        place, answers = bench.folder / "invocations" / script, bench.folder / f"{script}-answers.json"
        place.mkdir(parents=True)
        work = lambda cases=cases, place=place, answers=answers: _answer(cases, place, answers)  # noqa: E731
        run_forked(work, Path(__file__).resolve().parents[2], bench.folder / f"{script}-invocations.txt")
        for name, problems in json.loads(answers.read_text()):
            yield Trial("wrong invocation", script, name, lambda problems=problems: problems)


def _answer(cases: list[tuple[Callable, Case]], place: Path, answers: Path) -> None:
    found = []
    for main, case in cases:
        with pytest.MonkeyPatch.context() as patch:
            try:
                problems = _problems(main, case, Path(tempfile.mkdtemp(dir=place)), patch)
            except Exception as error:
                problems = [repr(error)]
        AcceleratorState._reset_state(reset_partial_state=True)
        if problems is not None:
            found.append((case.name, problems))
    answers.write_text(json.dumps(found))


def _problems(main: Callable, case: Case, folder: Path, patch: pytest.MonkeyPatch) -> list[str] | None:
    """None: the case cannot be made here."""
    text = StringIO()
    with redirect_stderr(text):
        try:
            argv = case.prepare(folder, patch)
        except pytest.skip.Exception:
            return None
        text.truncate(text.seek(0))
        try:
            code = run(main, argv)
        except SystemExit as exit_:
            code = exit_.code
    lines = errors_in(text.getvalue())
    if code != EXIT_USER_ERROR or len(lines) != 1:
        return [f"exit code {code}, {len(lines)} lines: {lines}"]
    return [f"{part!r} is not in: {lines[0]}" for part in case.expect if part not in lines[0]]
