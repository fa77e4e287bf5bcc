"""``python -m tests.faults``: try everything, and print what was tried and survived."""

import argparse
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process with a CUDA context cannot be forked
os.environ["OMP_NUM_THREADS"] = "1"  # nor one with threads

from tests.faults import damage, full_disks, invocations, kills, malformed, writers
from tests.faults.bench import Bench, Trial
from tests.faults.commands import commands, write_inputs

KINDS: dict[str, Callable[[Bench, bool], Iterator[Trial]]] = {
    "kills": kills.trials,
    "disks": full_disks.trials,
    "damage": damage.trials,
    "malformed": malformed.trials,
    "writers": writers.trials,
    "invocations": invocations.trials,
}


@dataclass
class Row:
    """A line of the table."""

    kind: str
    subject: str
    tried: int = 0
    survived: int = 0
    failures: list[str] = field(default_factory=list)


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    begin = time.monotonic()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="faults-"))
    shutil.rmtree(folder, ignore_errors=True)
    inputs = write_inputs(folder / "inputs")
    bench = Bench(folder, random.Random(args.seed), inputs, commands(inputs))
    rows: dict[tuple[str, str], Row] = {}
    for name in args.only or KINDS:
        for trial in KINDS[name](bench, args.quick):
            row = rows.setdefault((trial.kind, trial.subject), Row(trial.kind, trial.subject))
            attempt(trial, row)
    show(list(rows.values()))
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in used)
    print(f"{time.monotonic() - begin:.0f} s, {cpu:.0f} s of processor time, seed {args.seed}")
    failed = any(row.failures for row in rows.values())
    if failed:
        print(f"folders of what failed lie in {folder / 'trials'}")
    elif args.folder is None:
        shutil.rmtree(folder)
    return int(failed)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of points, moments and bytes (default: 0)")
    parser.add_argument("--only", nargs="+", choices=KINDS, help="kinds of faults (default: all)")
    parser.add_argument("--quick", action="store_true", help="the few that ./test.sh makes")
    parser.add_argument("--folder", help="where to work; is deleted first (default: a temporary one)")
    return parser.parse_args(argv)


def attempt(trial: Trial, row: Row) -> None:
    """Make a trial and count it."""
    problems = trial.attempt()
    if problems is None:
        return
    row.tried += 1
    row.survived += not problems
    if problems:
        row.failures.append(f"{trial.kind}, {trial.subject}, {trial.detail}: {'; '.join(problems)}")
        print(f"FAILED: {row.failures[-1]}", flush=True)


def show(rows: Sequence[Row]) -> None:
    """The table, a section for each kind of fault."""
    width = max(len(row.subject) for row in rows)
    print(f"\n{'':{width + 2}}  tried  survived")
    for kind in dict.fromkeys(row.kind for row in rows):
        lines = [row for row in rows if row.kind == kind and row.tried]
        total = sum(row.tried for row in lines), sum(row.survived for row in lines)
        print(f"{kind:{width + 2}}  {total[0]:5}  {total[1]:8}")
        for row in lines:
            print(f"  {row.subject:{width}}  {row.tried:5}  {row.survived:8}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
