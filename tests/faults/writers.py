"""Two runs of one command in one folder at once: one is refused in one line, or both end; the bytes are the same."""

import time
from collections.abc import Iterator
from functools import partial

from tests.faults.bench import Bench, Command, Trial
from tests.faults.compare import differences
from tests.faults.refusals import not_refused

QUICK = ("export_vae ldm",)


def trials(bench: Bench, quick: bool) -> Iterator[Trial]:
    """Begun together, and one somewhat later."""
    for name in QUICK if quick else bench.commands:
        command = bench.commands[name]
        later = bench.random.uniform(0.1, 0.7) * bench.reference(command).seconds
        for seconds in (0.0,) if quick else (0.0, later):
            attempt = partial(_two, bench, command, seconds)
            yield Trial("two writers", command.name, f"{seconds:.2f} s apart", attempt)


def _two(bench: Bench, command: Command, seconds: float) -> list[str]:
    folder = bench.fresh(command)
    jobs = [bench.start(command, folder)]
    time.sleep(seconds)
    jobs.append(bench.start(command, folder))
    codes = [job.wait() for job in jobs]
    problems = [text for job, code in zip(jobs, codes, strict=True) if any(code) for text in not_refused(job, code)]
    if all(map(any, codes)):
        problems.append("both were refused")
    problems += differences(bench.reference(command).folder, folder)
    if not problems:
        bench.remove(folder)
    return problems
