"""One line a stage: what goes to the log, what a failure shows, what is expected of the rest."""

import os
import pty
import re
import signal
import subprocess
import sys

import pytest
import yaml

from runtime import experiment
from runtime.experiment import ROOT
from runtime.stage_process import Expectation, tail

NOISY = "import sys; print('a thousand words'); print('step 1\\rstep 2', file=sys.stderr)"


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """Write a preset of stages, each a Python program, and give its command line."""

    def write(**programs: dict) -> list[str]:
        stages = {}
        for name, spec in programs.items():
            script = tmp_path / f"{name}.py"
            product = tmp_path / f"{name}.done"
            script.write_text(f"{spec.pop('code')}\nopen({str(product)!r}, 'w').close()\n")
            stages[name] = {"script": str(script), "single_process": True, "product": str(product)} | spec
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"stages": stages}))
        monkeypatch.setattr(experiment, "PRESETS", tmp_path)
        return ["mine", "--brief", "--output-dir", str(tmp_path / "exps")]

    return write


def test_a_line_for_each_stage_and_the_rest_in_its_log(preset, tmp_path, capfd):
    argv = preset(
        first={"code": NOISY, "what": "says a lot", "minutes": 1},
        second={"code": NOISY + "; print('1.75')", "what": "the figures", "minutes": 2.5, "show": True},
        third={"code": "pass"},
    )
    assert experiment.main(argv) == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert re.fullmatch(r"\[1/3\] says a lot \(60 s\): \d+ s", lines[0])  # the third was never measured: no total
    assert re.fullmatch(r"\[2/3\] the figures \(2.5 min\): \d+ s", lines[1])
    assert lines[2:4] == ["a thousand words", "1.75"]  # without the progress bar
    assert re.fullmatch(r"\[3/3\] third: \d+ s", lines[-2])
    log = (tmp_path / "exps" / "mine" / "logs" / "first.log").read_bytes()
    assert sorted(log.split(b"\n")) == [b"", b"a thousand words", b"step 1\rstep 2"]
    assert experiment.main(argv) == 0
    assert capfd.readouterr().out.count("finished already") == 3


def test_a_failure_shows_the_end_of_its_log_and_where_the_rest_is(preset, tmp_path, capfd):
    argv = preset(first={"code": "import sys; print('\\n'.join(map(str, range(100)))); sys.exit('no room')"})
    assert experiment.main(argv) == 1
    err = capfd.readouterr().err
    assert "no room" in err
    assert "99" in err.splitlines()
    assert "50" not in err.splitlines()
    assert str(tmp_path / "exps" / "mine" / "logs" / "first.log") in err
    assert "the same command continues" in err


def test_the_rest_is_expected_at_the_pace_of_what_is_done(monkeypatch):
    clock = iter((0.0, 0.0, 6.0, 6.0, 126.0, 126.0))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    expectation = Expectation([0.5, 1.0, 3.0])
    assert expectation.left(range(3)) == pytest.approx(4.5)
    expectation.begin()
    assert expectation.end(0) == 6.0  # five times as fast, but too short to tell
    assert expectation.left([1, 2]) == pytest.approx(4.0)
    expectation.begin()
    assert expectation.end(1) == 120.0
    assert expectation.left([2]) == pytest.approx(3.0 * 2.1 / 1.5)
    assert Expectation([1.0, None]).left([0, 1]) is None


def test_the_end_of_a_log_has_a_progress_bar_s_last_state(tmp_path):
    (tmp_path / "a.log").write_text("begin\n\nstep 1\rstep 2\rstep 3\nerror: no\n")
    assert tail(tmp_path / "a.log") == "begin\nstep 3\nerror: no"


def test_on_a_terminal_the_line_shows_the_last_output_in_place(tmp_path):
    """And a signal still reaches the stage."""
    mark, log = tmp_path / "mark", tmp_path / "a.log"
    program = (
        "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *a: sys.exit(143))\n"
        f"print('step 1', flush=True); time.sleep(0.3); pathlib.Path({str(mark)!r}).touch(); time.sleep(60)"
    )
    code = (
        "import pathlib, sys; from runtime.stage_process import call; "
        f"sys.exit(call([sys.executable, '-c', {program!r}], pathlib.Path({str(log)!r}), 'trains'))"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    while not mark.exists():
        seen += os.read(ours, 4096)
        if b"step 1" in seen:
            break
    while not mark.exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    os.close(ours)
    assert b"\r\x1b[Ktrains step 1" in seen
    assert log.read_text() == "step 1\n"
