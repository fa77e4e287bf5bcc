"""What a user can get wrong with report.py, and what the one line must say."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bad_inputs.case import Case
from tests.report_runs import UNGUIDED, write_preset, write_probe, write_run, write_samples


def with_flags(*words: str, change: Callable[[Path], object] = lambda folder: None):
    """A measured run ``mine`` that ``change`` spoils, and these words after it; ``@`` stands for the case's folder."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        run = write_run(tmp_path / "mine")
        write_samples(run, UNGUIDED)
        change(run)
        given = [word.replace("@", str(tmp_path)) for word in words]
        return [str(run), *given, *([] if "--html" in given else ["--html", str(tmp_path / "report.html")])]

    return prepare


def replaced(path: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_text(text)


def runs(*words: str):
    """These words alone."""
    return lambda tmp_path, monkeypatch: [word.replace("@", str(tmp_path)) for word in words] + ["--no-html"]


def of_a_folder(write: Callable[[Path], object]):
    """A folder ``it`` that ``write`` made."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        (tmp_path / "it").mkdir()
        write(tmp_path / "it")
        return [str(tmp_path / "it"), "--no-html"]

    return prepare


def two_vaes_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for number in (0, 1):
        run = write_run(tmp_path / f"ldm{number}", vae_checksum=f"vae{number}")
        write_probe(run, 0.5 + number / 10, vae=f"vae{number}")
        write_samples(run, UNGUIDED)
    return [str(tmp_path / "ldm*"), "--no-html", "--figure1", str(tmp_path / "f.png")]


def experiment_without_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return [str(write_preset(tmp_path, "quickstart", ["quickstart-vae"])), "--no-html"]


def a_measured_word(folder: Path) -> None:
    path = folder / "generated" / "metrics" / "generation.json"
    path.write_text(path.read_text().replace('"FID": 8.0', '"FID": "low"'))


def locked_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("reporting.page.write_atomically", refuse)
    return with_flags()(tmp_path, monkeypatch)


CASES = [
    Case("not a run", runs(), ("RUN",)),
    Case("no such folder", runs("@/nothing"), ("nothing: no such run", "exps/NAME")),
    Case("pattern without match", runs("@/table9-*"), ("table9-*: no such run",)),
    Case("empty name", runs(""), ("not a run", "args.json")),
    Case("folder of something else", of_a_folder(lambda f: (f / "thesis.tex").touch()), ("not a run", "args.json")),
    Case("a SiT", of_a_folder(lambda f: (f / "config.json").write_text('{"_class_name": "SiT"}')), ("not a run",)),
    Case("packed photographs", of_a_folder(lambda f: (f / "index.json").write_text('{"kind": "images", "source": {}}')),
         ("not a run",)),
    Case("experiment that has not begun", experiment_without_runs, ("no such run",)),
    Case("preset damaged", of_a_folder(lambda f: (f / "preset.json").write_text("{}")), ("preset.json is damaged",)),
    Case("args.json damaged", with_flags(change=replaced("args.json", "{")), ("args.json is damaged", "leave")),
    Case("args.json without args", with_flags(change=replaced("args.json", "{}")), ("args.json is damaged", "no args")),
    Case("status damaged", with_flags(change=replaced("status.json", "[]")), ("status.json is damaged",)),
    Case("curves damaged", with_flags(change=replaced("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n')),
         ("metrics.jsonl: line 2 is damaged", "delete that line")),
    Case("measurement damaged", with_flags(change=replaced("generated/metrics/generation.json", "{}")),
         ("generation.json is not a measurement",)),
    Case("measurement of words", with_flags(change=a_measured_word), ("mine", "generation", "FID is 'low'")),
    Case("index of samples damaged", with_flags(change=replaced("generated/index.json", "{")),
         ("index.json is damaged",)),
    Case("unknown row", with_flags("--published", "mine=table2/depth3"),
         ("no published row table2/depth3", "table2/depth2")),
    Case("row of another run", with_flags("--published", "yours=table2/depth1"), ("no run yours", "mine")),
    Case("row without run", with_flags("--published", "table2/depth1"), ("RUN=ROW", "mine=")),
    Case("page is a folder", with_flags("--html", "@"), ("--html", "is a folder")),
    Case("page in no folder", with_flags("--html", "@/none/report.html"), ("--html", "no folder", "none")),
    Case("page not writable", locked_page, ("no permission", "report.html")),
    Case("figure of another kind", with_flags("--figure1", "@/f.bmp"), ("--figure1", ".png, .svg, .pdf")),
    Case("figure in no folder", with_flags("--figure1", "@/none/f.png"), ("--figure1", "no folder")),
    Case("figure without probes", with_flags("--figure1", "@/f.png"), ("3 VAEs", "there are 0")),
    Case("figure of two VAEs", two_vaes_probed, ("3 VAEs", "probe.py attributes", "there are 2")),
    Case("unknown format", with_flags("--format", "latex"), ("--format", "markdown")),
]  # fmt: skip
