"""generate.py --sweep: a sample and a figure for each point, then the table and the best one's command."""

import argparse
import shlex
import shutil
from collections.abc import Mapping, Sequence

from dataset.packing import check_space, lock_if_free
from dataset.shards import is_unfinished, read_index
from errors import UserError
from inference.arguments import OUTPUT_FLAG
from inference.sample_folder import Job, at_point, count_shards, make_samples, packing_job
from inference.sweep import AXES, Point
from metrics.evaluate_generation import EVALUATION_LOCK_NAME, GenerationEvaluation
from metrics.sources import open_image_set
from metrics.sweep import TABLE_NAME, PointRecords, figures_of, rank, remarks, table, write_table
from runtime.cli import flag_of

# What the last word, the command for the full sample, says anew or leaves out; the last where no guide acts.
SWEEP_FLAGS = ("--sweep", "--keep-images", "--no-keep-images", "--num-fid-samples", OUTPUT_FLAG)
POINT_FLAGS = tuple(map(flag_of, AXES.values()))
GUIDE_FLAGS = ("--guide", "--guide-low", "--guide-high")


def sweep(args: argparse.Namespace, job: Job, evaluation: GenerationEvaluation, argv: Sequence[str]) -> None:
    """A sample and a figure for each point that has none; who writes the last figure writes the table."""
    if args.sample_dir.joinpath("args.json").is_file() or is_unfinished(args.sample_dir) or read_index(args.sample_dir):
        raise UserError(f"{OUTPUT_FLAG} {args.sample_dir} is a run or a sample; give an empty or new folder to a sweep")
    if job.process.world_size > 1 and not args.keep_images:
        raise UserError("--no-keep-images is for one process: others may still read what it deletes; leave it out")
    runs, points = {}, {}
    for point in args.points:
        own = at_point(args, point, job.trained)
        runs[own.sample_dir.name], points[own.sample_dir.name] = own, point
    records = PointRecords(args.sample_dir, evaluation)
    if not plan_sweep(args, job, records, runs) and job.process.is_main:
        conclude_sweep(args, records, points, argv)
    for name, own in runs.items():
        is_new = name not in records.found() and make_point(own, job, records)
        if is_new and runs.keys() <= records.found().keys():
            conclude_sweep(args, records, points, argv)
        if not args.keep_images and name in records.found():
            shutil.rmtree(own.sample_dir, ignore_errors=True)


def make_point(args: argparse.Namespace, job: Job, records: PointRecords) -> bool:
    """Sample and measure a point of a sweep; whether this process measured it, and not another one."""
    if not make_samples(args, job):
        return False
    with lock_if_free(args.sample_dir / EVALUATION_LOCK_NAME) as is_ours:
        if not is_ours or args.sample_dir.name in records.found():
            return False
        records.measure(args.sample_dir.name, open_image_set(args.sample_dir, OUTPUT_FLAG), job.process)
    return True


def plan_sweep(
    args: argparse.Namespace, job: Job, records: PointRecords, runs: Mapping[str, argparse.Namespace]
) -> list[str]:
    """The points without a figure, once those with one are known to be of the same settings; whether there is room."""
    found, missing, images = records.found(), [], 0
    for name, own in runs.items():
        packing = packing_job(own, job)
        if name in found:
            packing.check_settings(found[name].subject["made_by"])
        else:
            missing.append(name)
            images += min(len(packing.missing(range(count_shards(own)))) * own.shard_size, own.num_fid_samples)
    if job.process.is_main:
        print(
            f"sweep of {len(runs)} points, {args.num_fid_samples} images each; {len(missing)} are still to be measured"
        )
        if images and args.keep_images:
            there = next(folder for folder in (args.sample_dir, *args.sample_dir.parents) if folder.exists())
            advice = "take fewer points or --num-fid-samples, or --no-keep-images"
            check_space(there, images * packing.spec.item_bytes, advice)
    return missing


def conclude_sweep(
    args: argparse.Namespace, records: PointRecords, points: Mapping[str, Point], argv: Sequence[str]
) -> None:
    """Table, picture, and the command for the full sample at the best point."""
    from metrics.sweep_picture import save_sweep  # matplotlib takes a second to import

    rows, best = rank(points, figures_of(records.found(), records.title))
    command = full_command(argv, best.point)
    facts = {"count": args.num_fid_samples, "reference": str(args.evaluate), "features": args.features}
    write_table(args.sample_dir, rows, best, records.title, {**facts, "command": command})
    picture = args.sample_dir / f"{TABLE_NAME}.png"
    save_sweep(picture, rows, best, records.title, args.num_fid_samples)
    print(f"{args.num_fid_samples} images at each point against {args.evaluate}:")
    print("\n".join([table(rows, best, records.title), *remarks(rows, best, args.num_fid_samples)]))
    print(f"written to {args.sample_dir / TABLE_NAME}.json, .csv and .png")
    print(f"the full sample at the best:\n{command}")


def full_command(argv: Sequence[str], point: Point) -> str:
    """The sweep's command line, turned into that of the usual number of samples at one of its points."""
    replaced = {*SWEEP_FLAGS, *POINT_FLAGS, *(() if point.has_guide else GUIDE_FLAGS)}
    replaced |= set() if point.is_guided else {"--guidance-channels"}
    kept, is_kept = [], True
    for word in argv:
        if word.startswith("--"):
            is_kept = word.partition("=")[0] not in replaced
        if is_kept:
            kept.append(word)
    return shlex.join(["python", "generate.py", *kept, *point.flags()])
