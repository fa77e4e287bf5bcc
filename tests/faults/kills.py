"""SIGKILL anywhere; then the same command gives the same bytes as if nothing had been."""

import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.faults import points
from tests.faults.bench import Bench, Command, Trial
from tests.faults.compare import half_written

KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)
WITH_PROCESSES = ("train_sendvae", "cache_latents", "train_ldm", "train_repae", "generate", "evaluate reconstruction")
SLOW = ("train_sendvae", "train_ldm", "train_repae", "evaluate generation")
QUICK = ("preprocessing png", "generate", "export_vae repa-e")


def trials(bench: Bench, quick: bool) -> Iterator[Trial]:
    """At points of every kind, in the middle of libraries' writes, and at moments that nobody chose."""
    for name in QUICK if quick else bench.commands:
        command = bench.commands[name]
        few, most = (1, 2) if quick else (3, 10) if name in SLOW else (3, 16)
        yield from _at_points(bench, command, 1, most)
        yield from _in_writes(bench, command, few)
        yield from _at_moments(bench, command, 1, few)
        if name in WITH_PROCESSES and not quick:
            yield from _at_points(bench, command, 2, most // 2)
            yield from _at_moments(bench, command, 2, few // 2)
        if name.startswith("preprocessing"):
            yield from _of_workers(bench, command, few)


def _at_points(bench: Bench, command: Command, processes: int, most: int) -> Iterator[Trial]:
    reference = bench.reference(command, processes)
    found = [(rank, number) for rank, calls in enumerate(reference.points) for number in points.kinds_of(calls)]
    for rank, number in bench.sample(found, most):
        detail = f"process {rank} at {number}: {reference.points[rank][number - 1]}"
        attempt = partial(_killed, bench, command, processes, rank, lambda folder, n=number: points.die_at(folder, n))
        yield Trial("killed at a point", _subject(command, processes), detail, attempt)


def _in_writes(bench: Bench, command: Command, most: int) -> Iterator[Trial]:
    sizes = [size // 2 for size in bench.reference(command).sizes() if size > 1000]
    for size in bench.sample(sizes, most):
        attempt = partial(_killed, bench, command, 1, 0, lambda folder, n=size: points.die_beyond(n))
        yield Trial("killed inside a write", _subject(command, 1), f"beyond {size} bytes", attempt)


def _at_moments(bench: Bench, command: Command, processes: int, most: int) -> Iterator[Trial]:
    for _ in range(most):
        seconds = bench.random.uniform(0.05, bench.reference(command, processes).seconds)
        attempt = partial(_killed_after, bench, command, processes, seconds)
        yield Trial("killed at a moment", _subject(command, processes), f"after {seconds:.3f} s", attempt)


def _of_workers(bench: Bench, command: Command, most: int) -> Iterator[Trial]:
    """One process of several: the main one may not notice before it is done."""
    numbers = range(1, len(bench.reference(command).points[0]) + 1)
    for number in bench.sample(list(numbers), most):
        before = lambda folder, n=number: points.die_at(folder, n, alone=True)  # noqa: E731  a factory, as elsewhere
        attempt = partial(_killed, bench, command, 1, 0, before)
        yield Trial("killed alone at a point", _subject(command, 1), f"at {number}", attempt)


def _killed(bench: Bench, command: Command, processes: int, rank: int, fault) -> list[str] | None:
    folder = bench.fresh(command)
    job = bench.start(command, folder, processes, {rank: fault(folder)})
    codes = job.wait()
    if not any(codes):  # threads reach a point in another order, so that it may not come
        bench.remove(folder)
        return None
    return _continued(bench, command, processes, folder)


def _killed_after(bench: Bench, command: Command, processes: int, seconds: float) -> list[str] | None:
    folder = bench.fresh(command)
    job = bench.start(command, folder, processes)
    time.sleep(seconds)
    job.kill()
    if not set(job.wait()) & set(KILLED):
        bench.remove(folder)
        return None
    return _continued(bench, command, processes, folder)


def _continued(bench: Bench, command: Command, processes: int, folder: Path) -> list[str]:
    problems = half_written(bench.reference(command, processes).folder, folder)
    problems += bench.rerun(command, folder, processes)
    if not problems:
        bench.remove(folder)
    return problems


def _subject(command: Command, processes: int) -> str:
    return command.name if processes == 1 else f"{command.name}, {processes} processes"
