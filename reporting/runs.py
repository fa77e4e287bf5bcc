"""What a run's folder holds, read from its files alone: no weights are loaded, no network is built.

A subject of a report is the folder of a training (``args.json``), a VAE's diffusers folder, a folder of generated
images, a single ``.npz``, or a folder of measurements (``metrics/``, or ``NAME.metrics/`` next to plain images) of
something else, such as raw pixels. The folder of an experiment (``preset.json``) stands for its runs, and for itself
where it is one or the experiment measured into it.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from dataset.shards import INDEX_NAME, read_index
from errors import UserError
from files import is_out_of_reach
from formats.run_folders import Record, Status
from metrics.record import FOLDER_NAME, MadeBy, Measurement, folder_beside, metrics_folder, read_measurements
from models.tokenizers import TOKENIZERS
from runtime.experiment import PRESET_NAME, PresetRecord
from schema import MalformedError, check, read_json

PREVIEW_NAME = "preview.png"
VAE_AND_SIT = "VAE and SiT"
SORTS = {"train_sendvae.py": "VAE", "train_ldm.py": "SiT", "train_repae.py": VAE_AND_SIT}
VAE_FOLDER, SAMPLES, MEASURED = "VAE folder", "samples", "measurements"


class _Config(TypedDict):
    _class_name: str | None  # of a network; other programs have a config.json too


@dataclass(frozen=True)
class Preset:
    """Which preset made a run."""

    name: str  # e.g. ``table2/depth1``
    published: str | None  # the row that it reproduces
    runs: tuple[str, ...]  # names of the folders that it made
    changes: tuple[str, ...] = ()  # flags given in addition that change what is done


@dataclass(frozen=True)
class Samples:
    """A folder (or ``.npz``) of generated images."""

    path: Path
    settings: Mapping[str, Any]  # how they were made, as ``generate.py`` wrote it; empty if unknown
    count: int | None  # of images; None if unknown
    measurements: list[Measurement]

    @property
    def preview(self) -> Path | None:
        path = self.path / PREVIEW_NAME
        return path if path.is_file() else None

    def said(self, but: Collection[str] = ()) -> dict[str, str]:
        """Settings to compare, in words; without those that are off, of which older samples say nothing."""
        is_on = {key: value for key, value in self.settings.items() if value is not None and value is not False}
        return {key: repr(value) for key, value in is_on.items() if key not in but}


@dataclass(frozen=True)
class Run:
    """A subject of a report."""

    folder: Path
    name: str  # unique in a report
    sort: str  # one of ``SORTS``' values, ``VAE_FOLDER``, ``SAMPLES`` or ``MEASURED``
    arguments: Mapping[str, Any] = field(default_factory=dict)  # all resolved flags of a training
    command: tuple[str, ...] = ()
    versions: Mapping[str, Any] = field(default_factory=dict)
    commit: str | None = None
    status: Mapping[str, Any] = field(default_factory=dict)  # content of ``status.json``
    measurements: list[Measurement] = field(default_factory=list)  # without those of its samples
    samples: list[Samples] = field(default_factory=list)  # inside the folder
    preset: Preset | None = None


def find_runs(paths: Iterable[str]) -> list[Run]:
    """Read every subject once, in the order given.

    A path is a folder or, if no folder has that name, a pattern such as ``exps/table2-*``; matches with nothing to
    report are skipped. Raises UserError if there is no such folder, it is not one of ours, or a file in it is damaged.
    """
    found: dict[Path, Run] = {}
    for text in paths:
        path = Path(text)
        if path.exists():
            subjects = _subjects(path)
        else:
            subjects = [subject for match in _matches(text) if _is_subject(match) for subject in _subjects(match)]
        if not subjects:
            raise UserError(f"{text}: no such run; give folders of trainings, VAEs or samples, e.g. exps/NAME")
        for folder in subjects:
            found.setdefault(folder.resolve(), read_run(folder))
    return _with_unique_names(list(found.values()))


def read_run(folder: Path) -> Run:
    """Read one subject; see :class:`Run`."""
    if folder.is_file() or not (folder / "args.json").is_file():
        return _read_untrained(folder)
    record = _read(folder / "args.json", Record)
    arguments, command = record["args"], record.get("command") or []
    script = Path(command[0]).name if command else ""
    return Run(
        folder=folder,
        name=_name(folder),
        sort=SORTS.get(script, "SiT" if "denoiser" in arguments else "VAE"),
        arguments=arguments,
        command=tuple(command),
        versions=record.get("versions") or {},
        commit=record.get("git_commit"),
        status=_read(folder / "status.json", Status) if (folder / "status.json").exists() else {},
        measurements=read_measurements(folder / FOLDER_NAME),
        samples=[read_samples(path) for path in sorted(folder.iterdir()) if _is_samples(path)],
        preset=_preset_of(folder),
    )


def read_samples(path: Path) -> Samples:
    """A folder of generated images with its measurements."""
    index = (read_index(path) if path.is_dir() else None) or {}
    settings = index.get("source") or {}
    try:
        check(settings, MadeBy, "source")
    except MalformedError as error:
        raise UserError(f"{path / INDEX_NAME} is damaged ({error}); restore it, or leave {path} out") from error
    return Samples(path, settings, index.get("count"), read_measurements(metrics_folder(path)))


def _read(path: Path, kind: Any) -> Any:
    try:
        return read_json(path, kind)
    except (MalformedError, OSError) as error:
        if is_out_of_reach(error):
            raise
        raise UserError(f"{path} is damaged ({error}); restore it, or leave {path.parent} out") from error


def _read_untrained(path: Path) -> Run:
    """A VAE's folder or samples on their own."""
    if path.is_file() or (path / INDEX_NAME).is_file():
        return Run(path, _name(path), SAMPLES, samples=[read_samples(path)])
    sort = VAE_FOLDER if (path / "config.json").is_file() else MEASURED
    return Run(path, _name(path), sort, measurements=_measured_of(path), preset=_preset_of(path))


def _measured_of(folder: Path) -> list[Measurement]:
    return [found for place in (folder / FOLDER_NAME, folder_beside(folder)) for found in read_measurements(place)]


def _subjects(path: Path) -> list[Path]:
    """The folders that a path stands for."""
    if (path / PRESET_NAME).is_file():
        names = _read_preset(path / PRESET_NAME).runs
        runs = [path.parent / name for name in names if (path.parent / name / "args.json").is_file()]
        is_one = (path / "args.json").is_file() or _is_measured(path)
        return [*([path] if is_one else []), *runs]
    if path.name == "vae" and (path.parent / "args.json").is_file():
        return [path.parent]  # measurements of a run's vae/ lie with the run
    if not _is_subject(path):
        raise UserError(
            f"{path} is not a run (args.json), experiment ({PRESET_NAME}), VAE (config.json) or folder of samples"
            f" ({INDEX_NAME}), and nothing was measured of it ({FOLDER_NAME}/*.json); give one, e.g. exps/NAME"
        )
    return [path]


def _is_subject(path: Path) -> bool:
    return (
        any((path / name).is_file() for name in ("args.json", PRESET_NAME))
        or _is_vae(path)
        or _is_samples(path)
        or (path.is_file() and path.suffix == ".npz")
        or _is_measured(path)
    )


def _is_measured(path: Path) -> bool:
    return any(any(place.glob("*.json")) for place in (path / FOLDER_NAME, folder_beside(path)))


def _is_vae(path: Path) -> bool:
    file = path / "config.json"
    return file.is_file() and _read(file, _Config).get("_class_name") in TOKENIZERS


def _is_samples(path: Path) -> bool:
    """Whether it is a packed folder of images that ``generate.py`` made, or that was measured."""
    if not (path / INDEX_NAME).is_file():
        return False
    index = read_index(path)
    return (
        index is not None
        and index["kind"] == "images"
        and ("cfg_scale" in index["source"] or (path / FOLDER_NAME).is_dir())
    )


def _matches(pattern: str) -> list[Path]:
    anchor = Path(Path(pattern).anchor)
    return sorted(anchor.glob(str(Path(pattern).relative_to(anchor)))) if pattern else []


def _name(path: Path) -> str:
    """The folder's name; that of a folder called ``vae`` or the like would say nothing."""
    name = path.resolve().name
    return f"{path.resolve().parent.name}/{name}" if name in ("vae", "generated", "samples.npz") else name


def _with_unique_names(runs: list[Run]) -> list[Run]:
    names = [run.name for run in runs]
    return [replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]


def _read_preset(path: Path) -> Preset:
    try:
        content = read_json(path, PresetRecord)
    except MalformedError as error:
        raise UserError(f"{path} is damaged ({error}); run the experiment's command again") from error
    return Preset(
        content["preset"], content.get("published"), tuple(content["runs"]), tuple(content.get("changes") or ())
    )


def _preset_of(folder: Path) -> Preset | None:
    """The preset that a folder is the experiment of, or the one among its neighbours that made it."""
    folder = folder.resolve()
    if (folder / PRESET_NAME).is_file():
        return _read_preset(folder / PRESET_NAME)
    for path in sorted(folder.parent.glob(f"*/{PRESET_NAME}")):
        preset = _read_preset(path)
        if folder.name in preset.runs:
            return preset
    return None
