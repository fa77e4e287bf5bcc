"""Files with a flipped byte, cut, emptied, or with a folder in their place: named in one line, or of no consequence.

Every file that a command opens is tried: of its inputs, and of its own work that was interrupted.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.faults import points
from tests.faults.bench import Bench, Command, Trial
from tests.faults.compare import TIMED, differences
from tests.faults.kills import SLOW
from tests.faults.refusals import not_refused

SET_ASIDE = "abandoned-at-"  # where damaged checkpoints go
IMAGES = "data/images/"
INTERRUPTED = 0.7  # of all points: after a checkpoint, some shards, before the end
QUICK = ("generate", "preprocessing png")


def flipped(path: Path, place: float) -> None:
    """One byte, at this share of the file."""
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0xFF
    _replace(path, bytes(data))


def cut(path: Path, place: float) -> None:
    data = path.read_bytes()
    _replace(path, data[: int(place * len(data))])


def emptied(path: Path, place: float) -> None:
    _replace(path, b"")


def made_a_folder(path: Path, place: float) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (flipped, cut, emptied, made_a_folder)


def trials(bench: Bench, quick: bool) -> Iterator[Trial]:
    """Every file with every damage, or a few of them."""
    for name in QUICK if quick else bench.commands:
        command = bench.commands[name]
        bench.reference(command)  # before anything is damaged
        most = 2 if quick else 12 if name in SLOW else 24
        yield from _of_inputs(bench, command, most)
        yield from _of_own_work(bench, command, most)


def _of_inputs(bench: Bench, command: Command, most: int) -> Iterator[Trial]:
    folder = bench.fresh(command)
    files = _opened(bench, command, folder, bench.inputs)
    bench.remove(folder)
    images = [name for name in files if name.startswith(IMAGES)]  # one photograph is as good as another
    for file, damage, place in _chosen(bench, [name for name in files if name not in images[1:]], most):
        attempt = partial(_damaged_input, bench, command, bench.inputs / file, damage, place)
        yield Trial("damaged input", command.name, f"{file} {damage.__name__} at {place:.3f}", attempt)


def _of_own_work(bench: Bench, command: Command, most: int) -> Iterator[Trial]:
    work = bench.folder / "interrupted" / command.name
    number = int(INTERRUPTED * len(bench.reference(command).points[0]))
    command.prepare(work)
    bench.start(command, work, before={0: points.die_at(work, number)}).wait()
    copy = _copy(bench, work)
    files = _opened(bench, command, copy, copy)
    bench.remove(copy)
    for file, damage, place in _chosen(bench, files, most):
        attempt = partial(_damaged_work, bench, command, work, file, damage, place)
        yield Trial("damaged own work", command.name, f"{file} {damage.__name__} at {place:.3f}", attempt)


def _chosen(bench: Bench, files: list[str], most: int) -> list[tuple[str, Callable, float]]:
    every = [
        (file, damage, bench.random.random())
        for file in files
        for damage in DAMAGES
        if damage is not made_a_folder or not file.startswith(IMAGES)  # photographs with a folder more are others
    ]
    return bench.sample(every, most)


def _opened(bench: Bench, command: Command, folder: Path, root: Path) -> list[str]:
    """The files below ``root`` that a command reads, but for those that are empty anyway."""
    file = bench.folder / "opened.txt"
    there = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and path.stat().st_size}
    bench.run(command, folder, before={0: points.record_reads(root, file)})
    return sorted(name for name in there & set(file.read_text().splitlines()) if Path(name).name not in TIMED)


def _damaged_input(bench: Bench, command: Command, file: Path, damage: Callable, place: float) -> list[str]:
    folder = bench.fresh(command)
    with _spoiled(file, damage, place):
        return _answered(bench, command, folder, file)


def _damaged_work(bench: Bench, command: Command, work: Path, file: str, damage: Callable, place: float) -> list[str]:
    folder = _copy(bench, work)
    damage(folder / file, place)
    return _answered(bench, command, folder, folder / file)


def _answered(bench: Bench, command: Command, folder: Path, file: Path) -> list[str]:
    """A line that names the file; or the very result that there would be without the damage, or a warning of it."""
    job = bench.start(command, folder)
    codes = job.wait()
    if any(codes):
        rejected = folder / "out" / "rejected.csv"  # where preprocessing names what it cannot use
        is_listed = rejected.is_file() and file.name in rejected.read_text()
        is_of_vae = file.parent.name == "vae"  # whose folder is named: no file of it is known to be the wrong one
        name = "rejected.csv" if is_listed else str(file.parent) if is_of_vae else file.name
        problems = not_refused(job, codes, name, file.name)
    else:
        found = [text for text in differences(bench.reference(command).folder, folder) if SET_ASIDE not in text]
        page = folder / "report.html"
        is_told = file.name in job.errors[0] or (page.is_file() and f"{file.name} is not readable" in page.read_text())
        problems = [] if is_told else [f"silent: {text}" for text in found]
    if not problems:
        bench.remove(folder)
    return problems


@contextmanager
def _spoiled(file: Path, damage: Callable, place: float) -> Iterator[None]:
    """Damage an input for one trial: its path must stay, because results name it."""
    good = file.with_name(f"{file.name}.good")
    shutil.copy2(file, good)
    try:
        damage(file, place)
        yield
    finally:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        good.rename(file)


def _copy(bench: Bench, work: Path) -> Path:
    bench.count += 1
    return shutil.copytree(work, bench.folder / "trials" / f"{bench.count:04d}")


def _replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)
