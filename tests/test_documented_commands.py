"""README.md and docs/: every command is one that its script accepts, every flag, file and link is there.

Also: every wrapper's flags are its script's.
"""

import fnmatch
import functools
import io
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from contextlib import redirect_stdout
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
import save_vae_weights
import train_ldm
import train_repae
import train_sendvae
from benchmarks import gpu
from runtime import experiment
from runtime.repae_flags import REPAE_FLAGS

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    f"{module.__name__}.py": module
    for module in (
        *(cache_latents, evaluate, export_ldm, export_vae, generate, preprocessing, probe, report),
        *(save_vae_weights, train_ldm, train_repae, train_sendvae),
    )
} | {"train_ldm_only.py": train_ldm, "benchmarks/gpu.py": gpu}
WRAPPERS = sorted(
    path.name
    for path in ROOT.glob("*.sh")
    if re.search(r"^(NUM_PROCESSES=1 )?exec .* \w+\.py", path.read_text(), re.MULTILINE)
)
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
EXPERIMENT, OTHERS = "run_experiment.sh", ("quickstart.sh", "test.sh")
LAUNCHERS = {"python", "sbatch", "slurm.sbatch"}
SYSTEM = {"python3", "source", "pip"}  # commands that are not ours
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
EXAMPLES = {"--x", "--mse-weight", "--mean-coeff", "--conv-width"}  # of a message, and of docs/extending.md's classes
HIDDEN = {flag for flags in REPAE_FLAGS.values() for flag in flags} | {"--ckpt"}  # old ones, not listed by --help


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


def spans(page: Path) -> list[str]:
    """Code in running text and in tables."""
    return [code.replace(r"\|", "|") for code in CODE.findall(FENCE.sub("", page.read_text()))]


def indented(page: Path) -> list[str]:
    """Code set off by four spaces, line by line."""
    return re.findall(r"(?<=\n)    (\S.*)", FENCE.sub("", page.read_text()))


def script_of(word: str) -> str:
    return word.removeprefix("./")


def is_ours(word: str) -> bool:
    return script_of(word) in {*SCRIPTS, *WRAPPERS, EXPERIMENT, *OTHERS}


def without_variables(words: list[str]) -> list[str]:
    """Without NAME=value in front."""
    return words[1:] if words and re.fullmatch(r"[A-Z_]+=\S*", words[0]) else words


def documented_commands() -> list[str]:
    """In blocks of bash, in indented lines that are commands, and whole commands in tables."""
    commands = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            commands += block.replace("\\\n", " ").splitlines()
        commands += [line for line in indented(page) if line.startswith(("python ", "./", "sbatch "))]
        commands += [code for code in spans(page) if re.match(r"([A-Z_]+=\S+ )?\./\S+ ", code)]
    return [command for command in map(str.strip, commands) if command and not command.startswith("#")]


def check(script: str, argv: list[str]) -> None:
    """Parse a command line as its script does."""
    parse_of(script)(argv)


def parse_of(script: str) -> Callable[[list[str]], object]:
    """What reads its flags, and refuses wrong ones."""
    module = SCRIPTS[script]
    return module.parse_args if module is preprocessing else module.parse_arguments


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


def check_experiment(words: list[str]) -> None:
    """Every preset that is meant takes what is given to it."""
    preset, *overrides = words
    is_dry = "--dry-run" in overrides
    overrides = [word for word in overrides if word != "--dry-run"]
    names = fnmatch.filter(experiment.preset_names(), preset)
    assert names, f"no preset {preset}"
    assert is_dry or "*" not in preset
    for name in names:
        assert experiment.resolve_all(name, "exps", overrides)[0]


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
    """MIG slices are listed below their GPU and are not GPUs of their own."""
    gpus = "".join(f"echo 'GPU {i}: H200 (UUID: GPU-{i})'\n" for i in range(8))
    write_command(tmp_path / "nvidia-smi", f"#!/bin/sh\n{gpus}echo '  MIG 1g.18gb  Device 0: (UUID: MIG-1)'\n")
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    words = started("launch.sh", ["x.py"], tmp_path, **variables)
    assert processes == (int(words[words.index("--num_processes") + 1]) if "--multi_gpu" in words else 1)
    assert words[-1] == "x.py"


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_gives_flags_that_its_script_has(name, tmp_path):
    check(*through_wrapper(name, [], tmp_path))


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("train_ldm.sh", ["--align", "vae"]),
        ("train_ldm.sh", ["--align", "none"]),
        ("train_ldm.sh", ["--align", "irepa"]),
        ("train_sendvae.sh", ["--align-loss", "vf"]),
    ],
)
def test_an_appended_method_takes_the_place_of_a_wrapper_s(name, argv, tmp_path):
    """The wrapper gives no flag that belongs to its own method alone."""
    check(*through_wrapper(name, argv, tmp_path))


@pytest.mark.parametrize("command", documented_commands())
def test_a_documented_command_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)
    while without_variables(words) != words:
        words = without_variables(words)
    place = next((i for i, word in enumerate(words) if is_ours(word)), None)
    if place is None:
        assert words[0] in SYSTEM or words[:2] == ["python", "-c"], "not a command of ours"
        assert not any(word.endswith((".py", ".sh")) for word in words), "an unknown script"
        return
    name, argv = script_of(words[place]), words[place + 1 :]
    assert all(word in LAUNCHERS or word.startswith("--") for word in words[:place])
    assert (words[place] == f"./{name}") == name.endswith(".sh"), "./ starts shell scripts, python the others"
    if name == EXPERIMENT:
        check_experiment(argv)
    elif name in WRAPPERS:
        check(*through_wrapper(name, argv, tmp_path))
    elif name in SCRIPTS:
        check(name, argv)
    else:
        assert all(f"{word})" in (ROOT / name).read_text() for word in argv), "no such flag"


@functools.cache
def flags_of(name: str) -> set[str]:
    """Those that ``--help`` of a script lists; of a wrapper, its script's."""
    if name in WRAPPERS:
        return flags_of(re.search(r"\w+\.py", re.sub(r"(?m)^#.*", "", (ROOT / name).read_text()))[0])
    parse = experiment.main if name == EXPERIMENT else parse_of(name)
    listed = set()
    for command in evaluate.COMMANDS if name == "evaluate.py" else ("",):
        out = io.StringIO()
        with redirect_stdout(out), pytest.raises(SystemExit):
            parse([command, "--help"] if command else ["--help"])
        listed |= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", out.getvalue()))
    return listed


@functools.cache
def all_flags() -> set[str]:
    quickstart = set(re.findall(r"--[a-z][\w-]*", (ROOT / "quickstart.sh").read_text()))
    variables = {f"--{key.replace('_', '-')}" for name in experiment.preset_names() for key in variables_of(name)}
    flags = HIDDEN.union(*(flags_of(name) for name in (*SCRIPTS, EXPERIMENT)))
    return flags | {flag.replace("--", "--no-", 1) for flag in flags} | quickstart | variables | EXAMPLES


def variables_of(name: str) -> dict:
    return experiment.load_preset(name).get("variables", {})


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_in_the_text_exists(name):
    """After a script's name it is that script's; alone it is some script's."""
    for code in spans(ROOT / name):
        words = code.split()
        flags = re.findall(r"(?<![\w-])--(?:\[no-\])?[a-z][\w-]*", code)
        script = next((script_of(word) for word in words if is_ours(word)), None)
        for flag in (flag.replace("[no-]", "") for flag in flags):
            known = all_flags() if script in (None, EXPERIMENT, *OTHERS) else flags_of(script) | EXAMPLES | HIDDEN
            assert flag in known, f"`{code}`: {flag} is not a flag of {script or 'any script'}"


@pytest.mark.parametrize("name", NAMES)
def test_every_file_in_the_text_exists(name):
    """``FILE``, or ``FILE:NAME`` with NAME somewhere in the file."""
    for code in spans(ROOT / name):
        found = re.fullmatch(r"(?:\./)?([\w/.-]+\.(?:py|sh|yaml|sbatch))(?::(\S+))?(?: .*)?", code)
        if found is None or found[1].endswith("/NAME.py"):  # one that a reader adds
            continue
        path = ROOT / found[1]
        if "/" not in found[1] and not path.is_file():  # a table of files in one folder
            assert list(ROOT.glob(f"*/{found[1]}")), f"`{code}` is not there"
            continue
        assert path.is_file(), f"`{code}` is not there"
        assert found[2] is None or found[2] in path.read_text(), f"{found[1]} has no {found[2]}"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.is_file(), f"{target} is not there"
        assert not anchor or anchor in anchors(linked), f"{target}: no such heading"


def test_every_page_is_linked_from_the_readme():
    text = PAGES[0].read_text()
    assert all(f"]({name})" in text for name in NAMES[1:])


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_of_a_kind_that_is_tested(name):
    page = ROOT / name
    assert {language for language, _ in FENCE.findall(page.read_text())} <= {"bash", "python", "text"}
    assert page.read_text().count("```") == 2 * len(FENCE.findall(page.read_text()))
    for text in blocks(page, "python"):
        compile(text, name, "exec")
