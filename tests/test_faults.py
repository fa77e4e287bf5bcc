"""The quick part of ``python -m tests.faults``; and that its trials notice who is careless."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from errors import UserError
from files import remove_leftovers, write_atomically
from tests.faults import damage, full_disks, kills, points, writers
from tests.faults.bench import Bench, Command
from tests.faults.compare import differences, half_written, is_equal, leftovers
from tests.faults.forked import Child, Job, Script
from tests.faults.refusals import not_refused

ROOT = Path(__file__).resolve().parents[1]
PARTS = 2


def careful(argv: Sequence[str]) -> None:
    """Writes parts of a checked input, each whole or not at all; goes on where it was."""
    source, digest = Path(argv[0]), argv[1]
    data = source.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(f"{source} is damaged")
    Path("out").mkdir(exist_ok=True)
    remove_leftovers(Path("out"), "*.bin")
    for number in range(PARTS):
        path = Path("out") / f"{number}.bin"
        if not path.exists():
            write_atomically(path, data * (number + 1))


def careless(argv: Sequence[str]) -> None:
    """As :func:`careful`, without any of its cares."""
    data = Path(argv[0]).read_bytes()
    Path("out").mkdir(exist_ok=True)
    for number in range(PARTS):
        path = Path("out") / f"{number}.bin"
        if not path.exists():
            with open(path, "wb", buffering=0) as file:
                for _ in range(number + 1):
                    file.write(data)
                    os.fsync(file.fileno())


@pytest.fixture
def bench(tmp_path) -> Bench:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    data = random.Random(0).randbytes(50_000)
    (inputs / "data").write_bytes(data)
    argv = str(inputs / "data"), hashlib.sha256(data).hexdigest()
    commands = {main.__name__: Command(main.__name__, Script(main, argv)) for main in (careful, careless)}
    return Bench(tmp_path, random.Random(0), inputs, commands)


@pytest.mark.parametrize("faults", [kills, full_disks, damage])
def test_a_careless_script_does_not_survive(bench, faults):
    answers = {"careful": [], "careless": []}
    for trial in faults.trials(bench, quick=False):
        # points have a test of their own
        if trial.kind != "killed at a point" and (problems := trial.attempt()) is not None:
            answers[trial.subject].append(problems)
    assert answers["careful"]  # how many, moments decide
    assert not [problem for problems in answers["careful"] for problem in problems]
    assert any(answers["careless"])


def test_every_point_of_a_careful_script_is_survived(bench):
    """And there are no others: make, write, give rights, flush, rename, flush the folder."""
    command = bench.commands["careful"]
    (calls,) = bench.reference(command).points
    each = ["open", "open", "os.chmod", "fsync", "os.rename", "fsync"]
    assert [call.split()[0] for call in calls] == ["os.mkdir", *PARTS * each]
    for number in range(1, len(calls) + 1):
        folder = bench.fresh(command)
        codes = bench.start(command, folder, before={0: points.die_at(folder, number)}).wait()
        assert codes == [-signal.SIGKILL]
        assert bench.rerun(command, folder) == []


def test_two_careful_writers(bench):
    for trial in writers.trials(bench, quick=False):
        if trial.subject == "careful":
            assert trial.attempt() == []


def test_what_counts_as_the_same(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "log.txt").write_text(f"of {name}")
        (tmp_path / name / "x.json").write_text(f'{{"value": 1, "created": "{name}"}}')
        torch.save({"step": 3, "moments": [torch.arange(3.0)]}, tmp_path / name / "x.pt")
    a, b = tmp_path / "a", tmp_path / "b"
    assert differences(a, b) == half_written(a, b) == []
    (b / "x.json").write_text('{"value": 2}')
    torch.save({"step": 3, "moments": [torch.tensor([0.0, 1.0, 2.0000002])]}, b / "x.pt")
    assert differences(a, b) == ["x.json differs", "x.pt differs"]
    assert len(half_written(a, b)) == 2
    (b / "y.tmp").touch()
    (b / "log.txt").unlink()
    (b / "checkpoints" / "0000002").mkdir()
    assert differences(a, b)[:3] == ["log.txt is missing", "checkpoints/0000002 is left over", "y.tmp is left over"]
    assert leftovers(b) == ["y.tmp is left over"]
    assert "manifest.json is not readable" in half_written(a, b)[-1]
    assert not is_equal(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert not is_equal([1], [1, 2]) and not is_equal({"a": 1}, {"b": 1}) and not is_equal(1, 1.0)


def test_what_counts_as_a_refusal(tmp_path):
    def problems(work, *parts: str) -> list[str]:
        job = Job(work, tmp_path, tmp_path / "logs")
        return not_refused(job, job.wait(), *parts)

    def says(text: str, code: int):
        return lambda: print(text, file=sys.stderr) or code

    assert problems(says("x.py: error: a.json is damaged", 2), "a.json") == []
    assert "names none of b.json" in problems(says("x.py: error: a.json is damaged", 2), "b.json")[0]
    assert "exit code 0" in problems(says("x.py: error: no", 0))[0]
    assert "2 lines" in problems(says("x.py: error: no\nx.py: error: nor that", 2))[0]
    assert "a traceback: ZeroDivisionError" in problems(lambda: 1 / 0)[0]


def test_a_launcher_ends_what_is_left_of_a_job(tmp_path):
    def work() -> int:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        return 0

    assert Job(work, tmp_path, tmp_path / "logs", processes=2).wait() == [-signal.SIGTERM, -signal.SIGKILL]


def test_a_kill_takes_the_workers_along(tmp_path):
    """Or, alone, the process whose call it was."""

    def work() -> None:
        worker = os.fork()
        if not worker:
            Path("x").write_text("of the worker")
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        Path("code").write_text(str(code))

    assert Child(work, tmp_path, tmp_path / "log", points.die_at(tmp_path, 1)).wait() == -signal.SIGKILL
    assert not (tmp_path / "code").exists()
    assert Child(work, tmp_path, tmp_path / "log", points.die_at(tmp_path, 1, alone=True)).wait() == 0
    assert (tmp_path / "code").read_text() == str(-signal.SIGKILL)


@pytest.mark.slow
def test_the_quick_part_is_survived(tmp_path):
    """In a process of its own, which has computed nothing and may be forked."""
    command = [sys.executable, "-m", "tests.faults", "--quick", "--folder", str(tmp_path / "faults")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed inside a write" in done.stdout and "damaged input" in done.stdout
