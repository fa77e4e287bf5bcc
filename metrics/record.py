"""What a measurement leaves behind: ``metrics/NAME.json`` beside what it measured."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dataset.shards import write_atomically
from errors import UserError

FORMAT_VERSION = 1
FOLDER_NAME = "metrics"
PACKAGES = ("torch", "torchvision", "timm", "torch-fidelity", "torchmetrics", "scikit-learn", "lpips", "numpy", "scipy")


@dataclass(frozen=True)
class Measurement:
    """One run of one evaluation.

    Attributes:
        name: of the file, e.g. ``generation`` or ``probe-celeba``.
        kind: ``generation``, ``reconstruction`` or ``probe``.
        values: figures by their names (``FID``, ``PSNR``, ``attributes/F1-macro``…).
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
    values: Mapping[str, float]
    count: int
    subject: Mapping
    reference: Mapping | None = None
    extractor: Mapping | None = None
    settings: Mapping = field(default_factory=dict)
    versions: Mapping = field(default_factory=dict)
    created: str = ""


def metrics_folder(subject: Path) -> Path:
    """Where the measurements of a file or a folder lie; those of a run's ``vae/`` lie with the run."""
    subject = Path(subject)
    if subject.is_file():
        return subject.parent / FOLDER_NAME
    if subject.name == "vae" and (subject.parent / "args.json").is_file():
        return subject.parent / FOLDER_NAME
    return subject / FOLDER_NAME


def write_measurement(measurement: Measurement, subject: Path) -> Path:
    """Write it beside ``subject``, complete or not at all, replacing an earlier one of the same name."""
    path = metrics_folder(subject) / f"{measurement.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
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
            record = json.loads(path.read_text())
            if record.pop("format") != FORMAT_VERSION:
                raise ValueError("another format version")
            found.append(Measurement(**record))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a measurement of this project ({error}); move it away") from error
    return found


def package_versions() -> dict[str, str]:
    """Versions of what the figures depend on, where installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
