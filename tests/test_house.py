"""Dependencies run one way: scripts → what runs → what is read and compared → networks and mathematics → errors."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEVELS = {
    **dict.fromkeys(("training", "inference", "metrics", "reporting"), 3),
    **dict.fromkeys(("loss", "dataset", "formats"), 2),
    **dict.fromkeys(("models", "diffusion"), 1),
    "errors": 0,
    "files": 0,
    "schema": 0,
}
BESIDE = "runtime"  # for everything from scripts to loss, dataset and formats; knows none of them
# Within a level, and no other way: what is measured was sampled or encoded, what is reported was measured, a foreign
# checkpoint becomes a run with its projectors.
NEIGHBOURS = {("metrics", "inference"), ("reporting", "metrics"), ("formats", "loss")}


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names


def is_allowed(importer: str, imported: str) -> bool:
    if imported == importer or imported not in (*LEVELS, BESIDE):
        return True
    if importer == BESIDE:
        return LEVELS.get(imported) == 0
    if imported == BESIDE:
        return LEVELS[importer] >= 2
    return LEVELS[imported] < LEVELS[importer] or (importer, imported) in NEIGHBOURS


def test_packages_import_only_what_lies_below():
    seen = 0
    for package in (*LEVELS, BESIDE):
        for path in (ROOT / package).rglob("*.py"):
            wrong = sorted(name for name in imports(path) if not is_allowed(package, name))
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"
            seen += 1
    assert seen > 90


def test_packages_import_no_script_and_no_test():
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"errors", "files", "schema"} | {"tests", "benchmarks"}
    for package in (*LEVELS, BESIDE):
        for path in (ROOT / package).rglob("*.py"):
            assert not imports(path) & scripts, path


def test_a_wrong_way_is_noticed():
    assert not is_allowed("models", "loss")
    assert not is_allowed("dataset", "training")
    assert not is_allowed("training", "inference")
    assert not is_allowed("models", "runtime")
    assert not is_allowed("runtime", "dataset")
    assert is_allowed("metrics", "inference")
