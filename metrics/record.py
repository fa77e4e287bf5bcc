"""What a measurement leaves behind: ``metrics/NAME.json`` next to what it measured."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

from errors import UserError
from files import remove_leftovers, write_atomically
from schema import MalformedError, read_json

FORMAT_VERSION = 1
FOLDER_NAME = "metrics"
PACKAGES = ("torch", "torchvision", "timm", "torch-fidelity", "torchmetrics", "scikit-learn", "lpips", "numpy", "scipy")


@dataclass(frozen=True)
class Measurement:
    """One run of one evaluation.

    Attributes:
        name: of the file, e.g. ``generation`` or ``probe-celeba``.
        kind: ``generation``, ``fdr``, ``reading``, ``reconstruction`` or ``probe``.
        values: figures by their names (``FID``, ``PSNR``, ``attributes/F1-macro``…); None for one that means nothing.
        count: images that were measured.
        subject: what was measured: ``path``, and what is known of it (step, weights' checksum…).
        reference: what it was compared with: ``path``, ``count``…; None where nothing was.
        extractor: ``name`` and ``weights_sha256`` of the network whose features were compared; None without one.
        settings: everything else that the values depend on.
        versions: of the packages; filled in by :func:`write_measurement`.
        created: UTC, ISO 8601; filled in by :func:`write_measurement`.
    """

    name: str
    kind: str
    values: Mapping[str, float | None]
    count: int
    subject: Mapping
    reference: Mapping | None = None
    extractor: Mapping | None = None
    settings: Mapping = field(default_factory=dict)
    versions: Mapping = field(default_factory=dict)
    created: str = ""


class MadeBy(TypedDict):
    """How images were made, as far as it is read again: settings of ``generate.py``."""

    train_steps: int | None
    weights: str | None
    vae: str | None
    mode: str | None
    num_steps: int | None
    heun: bool | None
    time_shift: float | None
    damped: bool | None
    decoder: str | None
    cfg_scale: float | None
    guidance_low: float | None
    guidance_high: float | None
    guidance_channels: int | None
    guide: str | None
    guide_scale: float | None
    guide_low: float | None
    guide_high: float | None
    learned_guidance: str | None


class _Place(TypedDict):
    """Of what was measured, or compared with."""

    made_by: MadeBy | None

    path: str | None
    fingerprint: str | None
    vae_checksum: str | None


class _Settings(TypedDict):
    data: str | None
    fingerprint: str | None


class _Record(TypedDict):
    """A file: a :class:`Measurement`, and the version of its format."""

    format: int
    name: str
    kind: str
    values: dict[str, float | None]
    count: int
    subject: _Place
    reference: _Place | None
    extractor: dict | None
    settings: _Settings | None
    versions: dict | None
    created: str | None


def metrics_folder(subject: Path) -> Path:
    """Where the measurements of a file or a folder lie; those of a run's ``vae/`` lie with the run."""
    subject = Path(subject)
    if subject.is_file():
        return subject.parent / FOLDER_NAME
    if subject.name == "vae" and (subject.parent / "args.json").is_file():
        return subject.parent / FOLDER_NAME
    return subject / FOLDER_NAME


def folder_beside(images: Path) -> Path:
    """Where the measurements of a plain folder of images lie: a folder inside would be one class more of a tree."""
    images = Path(images).resolve()
    return images.parent / f"{images.name}.{FOLDER_NAME}"


def check_name(name: str | None) -> None:
    """Refuse what ``--name`` may not be: a path, a hidden file, nothing."""
    if name is not None and (not name or "/" in name or name.startswith(".")):
        raise UserError(f"--name {name} is not a name of a file; give one without slashes")


def default_name(
    folder: Path,
    name: str,
    data: Path,
    fingerprint: Callable[[], str | None],
    subject: Mapping | None = None,
    taken: Sequence[str] = (),
) -> str:
    """The name of a measurement that nobody named: one that replaces no measurement of, or against, something else.

    Args:
        folder: where it will lie.
        name: the usual one; where a record of it is there, compared with other data, theirs are added: ``NAME-DATA``.
        data: what is compared with, or measured on.
        fingerprint: of the data; asked for where a record is there that names another path.
        subject: of the measurement, where the folder does not tell.
        taken: names of measurements with other data that the same command will write.

    Raises:
        UserError: a record of that name is there, of another subject, or with other data called alike.
    """
    for candidate in (name, f"{name}-{label_of(data)}"):
        if candidate in taken:
            continue
        path = folder / f"{candidate}.json"
        try:
            there = _read_measurement(path)
        except (FileNotFoundError, MalformedError):
            return candidate
        if subject is not None and not _is_same_subject(there.subject, subject):
            raise UserError(
                f"{path} is a measurement of {there.subject.get('path')}, not of {subject['path']}; give --name, or "
                "another --output-dir"
            )
        known = there.reference or {
            "path": there.settings.get("data"),
            "fingerprint": there.settings.get("fingerprint"),
        }
        if _is_same_path(known.get("path"), data) or (
            known.get("fingerprint") is not None and known["fingerprint"] == fingerprint()
        ):
            return candidate
    if candidate in taken:
        raise UserError(f"--data {data} is called like a set before it; measure it in a command of its own with --name")
    raise UserError(f"{path} is a measurement with {known.get('path')}, not with {data}; give --name")


def label_of(data: Path) -> str:
    """What data are called in the names of measurements."""
    return data.stem if data.suffix == ".npz" else data.resolve().name


def _is_same_subject(known: Mapping, subject: Mapping) -> bool:
    checksum = subject.get("vae_checksum")
    return _is_same_path(known.get("path"), subject["path"]) or (
        checksum is not None and known.get("vae_checksum") == checksum
    )


def _is_same_path(known: str | None, path: Path | str) -> bool:
    return known is not None and Path(known).resolve() == Path(path).resolve()


def write_measurement(measurement: Measurement, subject: Path) -> Path:
    """Write it into ``metrics_folder(subject)``, see :func:`write_record`."""
    return write_record(measurement, metrics_folder(subject))


def write_record(measurement: Measurement, folder: Path) -> Path:
    """Write ``NAME.json``, complete or not at all, replacing an earlier one of the same name."""
    path = folder / f"{measurement.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, f"{measurement.name}*")  # of its tables and pictures too
    record = {"format": FORMAT_VERSION} | asdict(measurement)
    record["versions"] = package_versions()
    record["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
    return path


def read_measurements(folder: Path) -> list[Measurement]:
    """All that lie in a ``metrics`` folder, by name; empty where there is none.

    Raises:
        UserError: a file that is not one of :func:`write_measurement`.
    """
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            found.append(_read_measurement(path))
        except MalformedError as error:
            raise UserError(f"{path} is not a measurement of this project ({error}); move it away") from error
    return found


def _read_measurement(path: Path) -> Measurement:
    record = read_json(path, _Record)
    if record["format"] != FORMAT_VERSION:
        raise MalformedError(f"it has format {record['format']}, this code reads {FORMAT_VERSION}")
    names = [each.name for each in fields(Measurement)]
    return Measurement(**{name: record[name] for name in names if record.get(name) is not None})


def package_versions() -> dict[str, str]:
    """Versions of what the figures depend on, where installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
