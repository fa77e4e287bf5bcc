"""What all trials share: inputs, results of undisturbed runs, folders for the next trial."""

import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import points
from tests.faults.compare import differences
from tests.faults.forked import Job, Script


@dataclass(frozen=True)
class Command:
    """A script that writes into the folder it runs in.

    Attributes:
        name: of the script, and what of it is done.
        script: with its flags.
        copies: inputs that it writes beside, put into its folder first: name there → path.
    """

    name: str
    script: Script
    copies: Mapping[str, Path] = field(default_factory=dict)

    def prepare(self, folder: Path) -> Path:
        """Make its folder."""
        folder.mkdir(parents=True)
        for name, path in self.copies.items():
            shutil.copy(path, folder / name)
        return folder


@dataclass(frozen=True)
class Trial:
    """One fault, and whether it is survived.

    Attributes:
        kind: of fault, a section of the table.
        subject: whom it befalls, a row.
        detail: which it is, so that it can be found again.
        attempt: makes it; returns what was not as it should be. None: it did not come to it, e.g. a process that
            ended before it was to be killed.
    """

    kind: str
    subject: str
    detail: str
    attempt: Callable[[], list[str] | None]


@dataclass(frozen=True)
class Reference:
    """An undisturbed run.

    Attributes:
        folder: what it made.
        seconds: that it took.
        points: of each process: see :func:`tests.faults.points.watch`.
    """

    folder: Path
    seconds: float
    points: list[list[str]]

    def sizes(self) -> list[int]:
        """Of its files, each once."""
        return sorted({path.stat().st_size for path in self.folder.rglob("*") if path.is_file()})


@dataclass
class Bench:
    """A folder in which trials are made.

    Attributes:
        folder: what is left in its ``trials`` at the end are those that failed.
        random: of everything that is chosen.
        inputs: a folder of what the commands read.
        commands: by their names.
    """

    folder: Path
    random: random.Random
    inputs: Path
    commands: Mapping[str, Command]
    _references: dict[tuple[str, int], Reference] = field(default_factory=dict)
    count: int = 0

    def reference(self, command: Command, processes: int = 1) -> Reference:
        """The result that every other run of the command must equal; made when it is first asked for."""
        key = command.name, processes
        if key not in self._references:
            label = f"{command.name} {processes}"
            folder = command.prepare(self.folder / "references" / label)
            files = [self.folder / "points" / label / str(rank) for rank in range(processes)]
            files[0].parent.mkdir(parents=True)
            recorders = {rank: points.record(folder, file) for rank, file in enumerate(files)}
            begin = time.monotonic()
            self.run(command, folder, processes, recorders)
            seconds = time.monotonic() - begin
            self._references[key] = Reference(folder, seconds, [file.read_text().splitlines() for file in files])
        return self._references[key]

    def start(
        self, command: Command, folder: Path, processes: int = 1, before: dict[int, points.Install] | None = None
    ) -> Job:
        """Begin to run a command in its folder."""
        return Job(command.script, folder, self._logs(folder), processes, before)

    def run(
        self, command: Command, folder: Path, processes: int = 1, before: dict[int, points.Install] | None = None
    ) -> None:
        """Run a command that must succeed."""
        job = self.start(command, folder, processes, before)
        codes = job.wait()
        if any(codes):
            raise AssertionError(f"exit codes {codes}: {' | '.join(error[-2000:] for error in job.errors)}")

    def rerun(self, command: Command, folder: Path, processes: int = 1) -> list[str]:
        """Run the same command where a job was disturbed, and compare with the undisturbed result."""
        try:
            self.run(command, folder, processes)
        except AssertionError as error:
            return [f"the rerun failed: {error}"]
        return differences(self.reference(command, processes).folder, folder)

    def fresh(self, command: Command) -> Path:
        """A folder for a trial."""
        self.count += 1
        return command.prepare(self.folder / "trials" / f"{self.count:04d}")

    def remove(self, folder: Path) -> None:
        """What is left of a trial that was survived."""
        shutil.rmtree(folder)
        shutil.rmtree(self._logs(folder), ignore_errors=True)

    def _logs(self, folder: Path) -> Path:
        return self.folder / "logs" / "-".join(folder.relative_to(self.folder).parts)

    def sample(self, values: list, most: int) -> list:
        """So many of them, in their order."""
        places = sorted(self.random.sample(range(len(values)), min(most, len(values))))
        return [values[place] for place in places]
