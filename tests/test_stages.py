"""What a forked stage does is what a Python does that was started anew."""

import json
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import pytest

from tests.stages import ROOT, Stage, run_stage, server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Python itself is started")

# a Python that ends waits for threads, calls what asked to be called, and writes what it holds back
ENDING = """
import atexit, signal, sys, threading, time
print('begun', end=' ')
atexit.register(print, 'ended')
threading.Thread(target=lambda: (time.sleep(0.2), print('thread', end=' '))).start()
"""


def written(folder: Path, code: str) -> Path:
    (folder / "script.py").write_text(code)
    return folder / "script.py"


@pytest.mark.parametrize(
    "end",
    [
        "",
        "sys.exit()",
        "sys.exit(3)",
        "sys.exit('why')",
        "1 / 0",
        "signal.raise_signal(signal.SIGKILL)",
        "raise KeyboardInterrupt",
    ],
)
def test_it_ends_as_any_python(end, tmp_path):
    script = written(tmp_path, ENDING + end)
    anew = subprocess.run([sys.executable, script], capture_output=True, text=True)
    stage = Stage(script)
    assert stage.wait() == anew.returncode
    assert stage.stdout == anew.stdout
    assert stage.stderr.splitlines()[-1:] == anew.stderr.splitlines()[-1:]


def test_it_begins_as_any_python(tmp_path):
    """In the repository, with its own flags and nothing of the repository imported; and it draws its own numbers."""
    code = """
import json, os, random, sys
import numpy
files = {n: str(getattr(m, '__file__', '')) for n, m in sys.modules.items() if not n.startswith('__')}
places = os.getcwd() + os.sep, sys.prefix + os.sep  # test.sh makes its environment in the repository
ours = [n for n, file in files.items() if file.startswith(places[0]) and not file.startswith(places[1])]
print(json.dumps([os.getcwd(), sys.argv, sys.path[0], __name__, ours, os.listdir('/dev/fd')]))
print(random.random(), numpy.random.rand())
"""
    script = written(tmp_path, code)
    first, second = (run_stage(script, "--flag", 1).stdout.splitlines() for _ in range(2))
    folder, argv, path, name, ours, descriptors = json.loads(first[0])
    assert (folder, argv, path, name) == (str(ROOT), [str(script), "--flag", "1"], str(tmp_path), "__main__")
    assert ours == []
    assert len(descriptors) <= 4, "only its own streams, and the folder that it lists"
    assert not set(first[1].split()) & set(second[1].split())


def test_its_output_is_seen_while_it_runs_and_it_hears_signals(tmp_path):
    code = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *received: sys.exit(7))
print('waits', flush=True)
time.sleep(60)
"""
    for send, code_ in ((Stage.terminate, 7), (Stage.kill, -signal.SIGKILL)):
        stage = Stage(written(tmp_path, code))
        while stage.stdout != "waits\n":
            assert stage.poll() is None, stage.stderr
            time.sleep(0.01)
        with pytest.raises(subprocess.TimeoutExpired):
            stage.wait(timeout=0.05)
        send(stage)
        assert stage.wait(timeout=10) == code_


def test_loaders_of_a_killed_one_end(tmp_path):
    code = """
import os, torch
class Numbers(torch.utils.data.Dataset):
    def __len__(self): return 100
    def __getitem__(self, number): return os.getpid()
loader = iter(torch.utils.data.DataLoader(Numbers(), num_workers=2, batch_size=None))
print(next(loader), next(loader), flush=True)
import time; time.sleep(60)
"""
    stage = Stage(written(tmp_path, code))
    while not stage.stdout.endswith("\n"):
        assert stage.poll() is None, stage.stderr
        time.sleep(0.01)
    stage.kill()
    deadline = time.monotonic() + 30
    for worker in stage.stdout.split():
        while Path(f"/proc/{worker}").exists() and "zombie" not in Path(f"/proc/{worker}/status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_one_that_fails_ends_the_other(tmp_path):
    code = """
import os, sys, time
print(os.environ['RANK'], os.environ['LOCAL_RANK'], os.environ['WORLD_SIZE'])
if os.environ['RANK'] == '1': sys.exit('why')
time.sleep(60)
"""
    stage = run_stage(written(tmp_path, code), processes=2, check=False)
    assert stage.returncode == 1
    assert "1 1 2" in stage.stdout.splitlines()
    assert stage.stderr == "why\n"


def test_without_a_server_python_is_started_anew(tmp_path, monkeypatch):
    """Where it cannot fork it ends."""
    (tmp_path / "server.py").write_text("import sys; sys.exit('no')")
    monkeypatch.setattr("tests.stages.__file__", str(tmp_path / "server.py"))
    monkeypatch.setattr("tests.stages.server", lru_cache(server.__wrapped__))
    script = written(tmp_path, "import sys; print('torch' in sys.modules)")
    assert run_stage(script).stdout == "False\n"
