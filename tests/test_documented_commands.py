"""Every command of README.md and docs/ is one that its script accepts, and every wrapper's flags are its script's."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from types import ModuleType

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
from runtime import experiment

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    f"{module.__name__}.py": module
    for module in (
        *(cache_latents, evaluate, export_ldm, export_vae, generate, preprocessing, probe, report),
        *(train_ldm, train_repae, train_sendvae),
    )
}
WRAPPERS = sorted(
    path.name
    for path in ROOT.glob("*.sh")
    if re.search(r"^(NUM_PROCESSES=1 )?exec .* \w+\.py", path.read_text(), re.MULTILINE)
)


def documented_commands() -> list[str]:
    commands = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            commands += block.replace("\\\n", " ").splitlines()
    return [command for command in map(str.strip, commands) if command and not command.startswith("#")]


def check(script: str, argv: list[str]) -> None:
    """Parse a command line as its script does."""
    module: ModuleType = SCRIPTS[script]
    if module is evaluate:
        with pytest.MonkeyPatch.context() as patch:
            for command in evaluate.COMMANDS.values():
                patch.setattr(command, "run", lambda args: 0)
            assert evaluate.main(argv) == 0
    else:
        (module.parse_args if module is preprocessing else module.parse_arguments)(argv)


def write_command(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def started(name: str, argv: list[str], tmp_path: Path, **variables: str) -> list[str]:
    """What a wrapper gives to python."""
    fake = write_command(
        tmp_path / "python", "#!/usr/bin/env python3\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(tmp_path), "PYTHON": str(fake), **variables}
    done = subprocess.run([ROOT / name, *argv], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def through_wrapper(name: str, argv: list[str], tmp_path: Path) -> tuple[str, list[str]]:
    """The script and its flags."""
    script, *words = started(name, argv, tmp_path, NUM_PROCESSES="1")
    return script, words


@pytest.mark.parametrize(
    ("visible", "processes"),
    [
        (None, 8),
        (",".join(map(str, range(16))), 8),
        ("0,1,5", 3),
        ("3", 1),
        ("GPU-1f,GPU-2e", 2),
        ("0,-1,2", 1),
        ("", 1),
        ("-1", 1),
    ],
)
def test_as_many_processes_as_visible_gpus(visible, processes, tmp_path):
    """MIG slices are listed below their GPU and are no GPUs of their own."""
    gpus = "".join(f"echo 'GPU {i}: H200 (UUID: GPU-{i})'\n" for i in range(8))
    write_command(tmp_path / "nvidia-smi", f"#!/bin/sh\n{gpus}echo '  MIG 1g.18gb  Device 0: (UUID: MIG-1)'\n")
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    words = started("launch.sh", ["x.py"], tmp_path, **variables)
    assert processes == (int(words[words.index("--num_processes") + 1]) if "--multi_gpu" in words else 1)
    assert words[-1] == "x.py"


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_gives_flags_that_its_script_has(name, tmp_path):
    check(*through_wrapper(name, [], tmp_path))


@pytest.mark.parametrize("command", documented_commands())
def test_a_documented_command_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"\w+=\S*", words[0]):  # variables of the environment
        words.pop(0)
    script = next((i for i, word in enumerate(words) if word in SCRIPTS), None)
    if words[0] == "./run_experiment.sh":
        preset, *overrides = [word for word in words[1:] if word != "--dry-run"]
        names = [preset] if "*" not in preset else ["table2/depth1"]
        assert experiment.resolve_all(names[0], "exps", overrides)[0]
    elif words[0][2:] in WRAPPERS:
        check(*through_wrapper(words[0][2:], words[1:], tmp_path))
    elif script is not None:
        check(words[script], words[script + 1 :])
    else:
        assert not words[0].endswith(".py") and not any(word.endswith(".py") for word in words), "an unknown script"
