"""Files that are there whole or not at all, and what tells whether they are still what was written."""

import hashlib
import json
import os
import uuid
from contextlib import suppress
from pathlib import Path

_READ_BYTES = 1 << 22


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that, whenever the machine stops, it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")  # of this process alone, on any machine
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot flush a directory
            os.fsync(directory)
    finally:
        os.close(directory)


def checksum(path: Path) -> dict:
    """{"bytes": size, "sha256": hexadecimal digest} of a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_json(path: Path, content: dict) -> None:
    """Replace a JSON file in one move."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
