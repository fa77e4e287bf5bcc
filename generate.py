"""Stage 4: images from a diffusion transformer, as packed shards and one .npz for the evaluators.

  python generate.py --exp-path exps/ldm --cfg-scale 2.5 --guidance-high 0.75
  python generate.py --exp-path exps/ldm --cfg-scale 2 --guide exps/ldm-small@20000             # autoguidance
  python generate.py --exp-path exps/ldm --evaluate REF.npz --sweep scale=1,1.5,2,2.5 high=0.75,1
  python generate.py --dry-run --model SiT-XL/1 --vae f16d32    # what it would take, before anything is trained

What the model is, its path, its classes, its VAE and its resolution come from the run. Other people's checkpoints
become a run with export_ldm.py --format run. Image i, its label and its noise depend on --seed and i alone (last bits
apart: another batch size, GPU or --compile may move a pixel by a level). Any number of processes work on it, under
python, torchrun or accelerate launch; none waits for another. Stopped at any moment, the same command makes the missing
shards. With --evaluate REF the last process then measures FID and its relatives, as evaluate.py generation does. In the
folder then are

  index.json, labels.npy, images-*.npy    a packed dataset, as preprocessing.py makes them
  samples.npz                             arr_0: uint8 [N, H, W, 3]
  preview.png
  metrics/generation.json                 with --evaluate

--sweep makes a small sample at each scale and interval of guidance, all with the same labels and noise, measures them
against REF, and prints the command for the full sample at the best. In its folder are sweep.json, sweep.csv, sweep.png,
the figures in metrics/, and a folder of samples for each point. The same command continues, also with further points.
"""

import argparse
import functools
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from errors import UserError
from formats.averages import MAIN
from inference import arguments
from inference.arguments import COMPILED_FROM, OUTPUT_FLAG, SAMPLES
from inference.sweep import DEFAULT_SAMPLES, Point, axis, points_of
from metrics.arguments import INCEPTION, SWEEP_METRICS, add_metric_arguments
from runtime.cli import ArgumentParser, answer_early, run

EVALUATION_LOCK_NAME = ".evaluation.lock"
# Which flag a setting comes from; of the model those of MODEL_SETTINGS.
FLAGS = {"precision": "--mixed-precision", "guide_sha256": "--guide"}
UNSAID = {"time_shift": 1.0}  # of settings that older samples were made without
MODEL_SETTINGS = ("weights_sha256", "vae", "latent_statistics", "path_type")
SWEPT = {"scale": "cfg_scale", "low": "guidance_low", "high": "guidance_high"}  # axes of a sweep
# What a sweep's last word, the command for the full sample, says anew or leaves out; the last where nothing guides.
SWEEP_FLAGS = ("--sweep", "--keep-images", "--no-keep-images", "--num-fid-samples", OUTPUT_FLAG)
POINT_FLAGS, GUIDE_FLAGS = ("--cfg-scale", "--guidance-low", "--guidance-high"), ("--guide", "--guidance-channels")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="generate.py",
        usage="%(prog)s (--exp-path DIR | --model NAME --dry-run) [flags]",
        description=__doc__,
    )
    arguments.add_run_arguments(parser.add_argument_group("what is sampled"))
    arguments.add_untrained_arguments(parser.add_argument_group("networks of random weights, for --dry-run"))
    arguments.add_sampler_arguments(parser.add_argument_group("sampler"))
    arguments.add_label_arguments(parser.add_argument_group("labels and noise"))
    arguments.add_output_arguments(parser.add_argument_group("output"))
    arguments.add_speed_arguments(parser.add_argument_group("precision and speed"))
    add_evaluation_arguments(parser.add_argument_group("evaluation"))
    add_sweep_arguments(parser.add_argument_group("sweep of the guidance"))
    args = parser.parse_args(argv)
    check_arguments(args)
    args.npz = args.evaluate is None if args.npz is None else args.npz
    return args


def add_evaluation_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--evaluate",
        type=Path,
        metavar="REF",
        help="then measure against REF, as evaluate.py generation does, on one process; no .npz is written",
    )
    add_metric_arguments(group)


def add_sweep_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--sweep",
        type=axis,
        nargs="+",
        metavar="NAME=A,B,…",
        help="small samples at every combination of scale=A,B,… (in the place of --cfg-scale), low=A,B,… and "
        "high=A,B,… (of --guidance-low and --guidance-high; only low up to high); each one's FID (with --features: "
        "FD-NAME), or MIND by --metrics mind, against --evaluate REF; the best one's command",
    )
    group.add_argument(
        "--keep-images",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep each point's images once they are measured (default: yes); the figures stay in any case",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is read."""
    arguments.check_source(args)
    if args.heun and args.mode != "ode":
        raise UserError("--heun is for --mode ode; the SDE is solved by Euler–Maruyama")
    if args.guidance_low > args.guidance_high:
        raise UserError(f"--guidance-low {args.guidance_low} lies above --guidance-high {args.guidance_high}")
    check_guidance(args)
    args.num_fid_samples = args.num_fid_samples or (SAMPLES if args.sweep is None else DEFAULT_SAMPLES)
    if args.evaluate is None and (args.metrics or args.ref_cache or args.features != INCEPTION):
        raise UserError("--metrics, --features and --ref-cache belong to --evaluate REF; add it, or leave them out")
    if args.sample_dir is not None and args.sample_dir.exists() and not args.sample_dir.is_dir():
        raise UserError(f"{OUTPUT_FLAG} {args.sample_dir} is a file; give a folder")


def check_guidance(args: argparse.Namespace) -> None:
    """Settle ``args.points``: those of the sweep, or one alone."""
    if args.sweep is None:
        if args.keep_images is not None:
            raise UserError("--keep-images belongs to --sweep; leave it out")
        args.points = [Point(args.cfg_scale, args.guidance_low, args.guidance_high)]
    else:
        check_sweep(args)
    if args.guide is not None and not any(point.is_guided for point in args.points):
        raise UserError("--guide: at scale 1 nothing is guided; add --cfg-scale, e.g. 2, or leave the guide out")
    if args.cfg_scale == 1 and args.sweep is None:  # nothing is guided, at any time
        args.guidance_low, args.guidance_high, args.guidance_channels = 0.0, 1.0, None


def check_sweep(args: argparse.Namespace) -> None:
    if args.evaluate is None:
        raise UserError("--sweep compares by a figure: add --evaluate with a reference")
    names = [name for name, _ in args.sweep]
    if len(set(names)) < len(names):
        raise UserError(f"--sweep gives {max(names, key=names.count)}= twice; give all its values at once, with commas")
    others = {name: getattr(args, flag) for name, flag in SWEPT.items()}
    args.points = points_of(args.sweep, others)
    if len(args.points) < 2:
        raise UserError(
            f"--sweep: {len(args.points)} point{'' if len(args.points) == 1 else 's'}, as low may not lie above high "
            "and without guidance (scale=1) there is no interval; give more values"
        )
    args.metrics = args.metrics or SWEEP_METRICS[0]
    if args.metrics not in SWEEP_METRICS:
        raise UserError(f"--metrics {args.metrics}: a sweep compares by one of {', '.join(SWEEP_METRICS)}")
    args.keep_images = args.keep_images is not False


if __name__ == "__main__":
    answer_early(parse_arguments)

import numpy as np
import torch

from dataset.images import ImageDataset, open_images
from dataset.npz import npz_bytes
from dataset.packing import PackingJob, check_space, given_back_if_refused, lock_if_free, sigterm_as_interrupt
from dataset.shards import ShardSpec, is_unfinished, read_index
from diffusion.flow import settled_shift
from diffusion.samplers import model_velocity
from inference.latent_cache import autocast_for, chunk_size
from inference.sampling import (
    NPZ_NAME,
    ImageSampler,
    SamplerSettings,
    ShardMaker,
    choose_labels,
    complete,
    default_shard_size,
)
from inference.trained_ldm import TrainedLDM, open_guide, open_trained_ldm
from inference.untrained_ldm import UntrainedLDM, open_untrained_ldm
from metrics.evaluate_generation import GenerationEvaluation, plan, settings_of
from metrics.generation import check_count
from metrics.sources import open_image_set
from metrics.sweep import TABLE_NAME, PointRecords, figures_of, rank, remarks, table, write_table
from models.denoisers import Denoiser
from models.tokenizers import Tokenizer
from runtime.log import progress_bar
from runtime.measure import count_parameters, peak_memory
from runtime.processes import Process, set_inference_numerics, this_process


class Networks(NamedTuple):
    """On the device, compiled where that is wanted."""

    model: Denoiser
    guide: Denoiser | None
    tokenizer: Tokenizer


class Job(NamedTuple):
    """What a sample, or every point of a sweep, is made from.

    Attributes:
        trained: the checkpoint, its guide with it.
        tokenizer: the VAE.
        classes: that are sampled.
        process: who this is.
        networks: loads them, once.
        beside: real images for the preview.
    """

    trained: TrainedLDM
    tokenizer: Tokenizer
    classes: Sequence[int]
    process: Process
    networks: Callable[[], Networks]
    beside: ImageDataset | None


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    process = this_process()
    set_inference_numerics(process, args.mixed_precision, args.allow_tf32)
    if args.compile is None:
        pays = args.num_fid_samples >= COMPILED_FROM and not args.dry_run
        args.compile = process.device.type == "cuda" and pays
    report = warn if process.is_main else lambda message: None
    trained = open_model(args, report)
    classes = parse_classes(args.classes, trained.class_names)
    args.shard_size = args.shard_size or default_shard_size(args.num_fid_samples)
    args.sample_dir = args.sample_dir or default_folder(args, trained)
    evaluation = plan_evaluation(args, trained.resolution, process)
    beside = None if args.preview_beside is None else open_beside(args.preview_beside, trained.resolution)
    tokenizer = trained.load_autoencoder()
    networks = functools.cache(functools.partial(load_networks, args, trained, tokenizer, process))
    job = Job(trained, tokenizer, classes, process, networks, beside)
    try:
        if args.dry_run:
            dry_run(args, job)
        else:
            with sigterm_as_interrupt():
                if args.sweep is not None:
                    sweep(args, job, evaluation, argv)
                elif generate(args, job) and evaluation is not None:
                    evaluate_complete(args.sample_dir, evaluation, process)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory ({str(error).splitlines()[0]}): lower --pproc-batch-size, or add --mixed-precision bf16; "
            "what is complete is kept"
        ) from error
    return 0


def plan_evaluation(args: argparse.Namespace, resolution: int, process: Process) -> GenerationEvaluation | None:
    """What ``--evaluate`` asks for, checked before hours of sampling."""
    if args.evaluate is None:
        return None
    settings = settings_of(args, batch_size=args.pproc_batch_size)
    check_count("--num-fid-samples", args.num_fid_samples, settings)
    return plan(args, args.evaluate, "--evaluate", resolution, settings, process)


def open_beside(path: Path, resolution: int) -> ImageDataset:
    """The real images of ``--preview-beside``."""
    try:
        return open_images(path, resolution)
    except UserError as error:
        raise UserError(f"--preview-beside {error}") from error


def evaluate_complete(folder: Path, evaluation: GenerationEvaluation, process: Process) -> None:
    """Measure a complete folder, on one of the processes that find it complete; the others need not wait."""
    with lock_if_free(folder / EVALUATION_LOCK_NAME) as is_ours:
        if is_ours:
            evaluation.measure(open_image_set(folder, OUTPUT_FLAG), Process(0, 1, process.device))


def open_model(args: argparse.Namespace, report: Callable[[str], object]) -> TrainedLDM | UntrainedLDM:
    """A run, or random networks."""
    if args.model is not None:
        return open_untrained_ldm(args.model, args.vae, args.resolution, args.path_type)
    trained = open_trained_ldm(args.exp_path, args.train_steps, args.weights, report)
    if args.path_type not in (None, trained.path_type):
        raise UserError(
            f"--path-type {args.path_type}: {args.exp_path} was trained on {trained.path_type}; leave it out"
        )
    if args.guide is not None:
        return replace(trained, guide=open_guide(trained, *args.guide, report))
    scale = next((point.scale for point in args.points if point.is_guided), None)
    if trained.cfg_prob == 0 and scale is not None:
        flag = f"--cfg-scale {scale:g}" if args.sweep is None else f"--sweep scale={scale:g}"
        raise UserError(
            f"{flag}: {args.exp_path} was trained with --cfg-prob 0, without the null class that guidance needs; leave "
            "the flag out, or give a --guide"
        )
    if trained.config.class_token_width and args.guidance_channels is not None:
        raise UserError(
            f"--guidance-channels {args.guidance_channels}: {args.exp_path} was trained with --reg-coeff, and a class "
            "token has no such channels; leave the flag out"
        )
    return trained


def warn(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr)


def parse_classes(text: str | None, class_names: Sequence[str]) -> list[int]:
    """The classes of ``--classes``, by number or name; all where it is not given."""
    if text is None:
        return list(range(len(class_names)))
    names = {name: number for number, name in enumerate(class_names)}
    classes = []
    for part in (part.strip() for part in text.split(",")):
        number = int(part) if part.isdecimal() and int(part) < len(class_names) else None
        if number is not None and names.get(part, number) != number:
            raise UserError(
                f"--classes {part} is the number of class {class_names[number]} and the name of class {names[part]}; "
                "give classes by name where no number is a name, or rename them"
            )
        number = names.get(part) if number is None else number
        if number is None:
            raise UserError(
                f"--classes {part}: no such class; give numbers from 0 to {len(class_names) - 1} or names such as "
                f"{class_names[0]}, separated by commas"
            )
        if number in classes:
            raise UserError(f"--classes names class {part} twice")
        classes.append(number)
    return classes


def default_folder(args: argparse.Namespace, trained: TrainedLDM | UntrainedLDM) -> Path:
    """A folder in the run, named by what is most often varied; of a sweep, whose points have the rest in theirs."""
    parts = [
        "samples" if args.sweep is None else "sweep",
        trained.label,
        f"{args.mode}{'-heun' if args.heun else ''}{args.num_steps}",
    ]
    if args.time_shift is not None:
        parts.append(f"shift{args.time_shift if args.time_shift == 'auto' else format(args.time_shift, 'g')}")
    if args.sweep is None and args.cfg_scale != 1:
        parts.append(guidance_name(args, trained))
    if args.weights != MAIN:
        parts.append(args.weights)
    if args.label_sampling != "random":
        parts.append(args.label_sampling)
    return trained.folder / "-".join([*parts, f"{args.num_fid_samples}", f"seed{args.seed}"])


def guidance_name(args: argparse.Namespace, trained: TrainedLDM | UntrainedLDM) -> str:
    """Scale, interval, channels and guide, for the names of folders."""
    if args.cfg_scale == 1:
        return "unguided"
    kind, guide = "cfg" if trained.guide is None else "auto", trained.guide
    parts = [f"{kind}{args.cfg_scale:g}", f"{args.guidance_low:g}", f"{args.guidance_high:g}"]
    if args.guidance_channels is not None:
        parts.append(f"{args.guidance_channels}ch")
    if guide is not None:
        is_own = guide.folder.resolve() == trained.folder.resolve()
        parts += [*([] if is_own else [guide.folder.resolve().name]), guide.label]
    return "-".join(parts)


def at_point(args: argparse.Namespace, point: Point, trained: TrainedLDM | UntrainedLDM) -> argparse.Namespace:
    """The flags of a point of a sweep, as if they had been given for it alone."""
    own = argparse.Namespace(**vars(args))
    own.cfg_scale, own.guidance_low, own.guidance_high = point.scale, point.low, point.high
    own.guidance_channels = args.guidance_channels if point.is_guided else None
    own.sample_dir = args.sample_dir / guidance_name(own, trained)
    return own


def sampler_settings(args: argparse.Namespace, trained: TrainedLDM | UntrainedLDM) -> SamplerSettings:
    return SamplerSettings(
        mode=args.mode,
        num_steps=args.num_steps,
        heun=args.heun,
        cfg_scale=args.cfg_scale,
        guidance_low=args.guidance_low,
        guidance_high=args.guidance_high,
        path_type=trained.path_type,
        time_shift=time_shift(args, trained),
        seed=args.seed,
        guidance_channels=args.guidance_channels,
    )


def time_shift(args: argparse.Namespace, trained: TrainedLDM | UntrainedLDM) -> float:
    """That of the flag, or of the training."""
    if args.time_shift is None:
        return trained.time_shift
    return settled_shift(args.time_shift, trained.config.latent_shape)


def describe(args: argparse.Namespace, job: Job) -> dict:
    """All that the images depend on; goes into the index, and a rerun in the same folder must agree with it."""
    trained, tf32 = job.trained, job.process.device.type == "cuda" and args.allow_tf32
    guide = None if args.cfg_scale == 1 else trained.guide
    return {
        "train_steps": trained.step,
        "weights": trained.weights,
        "weights_sha256": trained.checksum,
        "vae": trained.vae_checksum,
        "latent_statistics": job.tokenizer.statistics.checksum(),
        **vars(sampler_settings(args, trained)),
        "guide": None if guide is None else f"{guide.config.model} of step {guide.step}",
        "guide_sha256": None if guide is None else guide.checksum,
        "num_fid_samples": args.num_fid_samples,
        "label_sampling": args.label_sampling,
        "classes": None if len(job.classes) == len(trained.class_names) else list(job.classes),
        "precision": "bf16" if args.mixed_precision == "bf16" else "tf32" if tf32 else "float32",
        "rounding": args.rounding,
        "shard_size": args.shard_size,
    }


def load_networks(
    args: argparse.Namespace, trained: TrainedLDM | UntrainedLDM, tokenizer: Tokenizer, process: Process
) -> Networks:
    """The denoiser, its guide and the VAE on the device."""
    device = process.device
    model = trained.load_model().to(device)
    guide = None if trained.guide is None else trained.guide.load_model().to(device)
    tokenizer.to(device)
    if device.type == "cpu":
        tokenizer.to(memory_format=torch.channels_last)
    networks = Networks(model, guide, tokenizer)
    for network in networks if args.compile else ():
        if network is not None:
            network.compile(dynamic=False)  # the denoiser for two sizes: with and without the null class
    return networks


def build_sampler(
    args: argparse.Namespace, trained: TrainedLDM | UntrainedLDM, networks: Networks, process: Process
) -> ImageSampler:
    return ImageSampler(
        networks.model,
        networks.tokenizer,
        sampler_settings(args, trained),
        truncate=args.rounding == "truncate",
        decode_batch=chunk_size(trained.resolution, process.device),
        autocast=autocast_for(process.device, args.mixed_precision),
        guide=networks.guide,
    )


def packing_job(args: argparse.Namespace, job: Job) -> PackingJob:
    """The folder of a sample."""
    spec = ShardSpec("images", (3, job.trained.resolution, job.trained.resolution), "uint8")
    flags = FLAGS | dict.fromkeys(MODEL_SETTINGS, "--exp-path")
    return PackingJob(args.sample_dir, spec, describe(args, job), OUTPUT_FLAG, flags, UNSAID)


def count_shards(args: argparse.Namespace) -> int:
    return -(-args.num_fid_samples // args.shard_size)


def generate(args: argparse.Namespace, job: Job) -> bool:
    """Make what is missing of this process's shards, complete what is complete, say what came out.

    Returns:
        whether all images are there.
    """
    packing, process, shards = packing_job(args, job), job.process, count_shards(args)
    show = print if process.is_main else lambda text: None
    with given_back_if_refused(packing, alone=process.world_size == 1):
        packing.begin()
        labels = choose_labels(args.num_fid_samples, job.classes, args.label_sampling, args.seed)
        todo = packing.missing(process.share(shards))
        if process.is_main:
            show_plan(args, packing, labels, len(job.classes), shards)
        if todo:
            sampler = build_sampler(args, job.trained, job.networks(), process)
            make_shards(args, packing, sampler, labels, todo, process)
        if not packing.finish(shards, job.trained.class_names):
            show(f"{args.sample_dir}: this process's shards are complete; whoever comes last completes the folder")
            return False
        complete(packing, args.npz, args.preview, job.beside)
        show(f"{args.sample_dir} is complete: {len(labels)} images" + (f", {NPZ_NAME}" if args.npz else ""))
    return True


def show_plan(args: argparse.Namespace, packing: PackingJob, labels: np.ndarray, num_classes: int, shards: int) -> None:
    """What will be made, and whether there is room."""
    missing, extra = packing.missing(range(shards)), len(labels) % num_classes
    if args.label_sampling == "equal" and extra:
        print(
            f"note: {len(labels)} images of {num_classes} classes: the first {extra} classes get one more than the rest"
        )
    count = min(len(missing) * args.shard_size, len(labels))
    npz = npz_bytes(len(labels), packing.spec.shape[-1]) if args.npz and not (packing.folder / NPZ_NAME).exists() else 0
    if count or npz:
        check_space(packing.folder, count * packing.spec.item_bytes + npz, "take fewer --num-fid-samples or --no-npz")


def make_shards(
    args: argparse.Namespace,
    packing: PackingJob,
    sampler: ImageSampler,
    labels: np.ndarray,
    todo: Sequence[int],
    process: Process,
) -> None:
    maker = ShardMaker(
        packing,
        sampler,
        labels,
        shard_size=args.shard_size,
        batch_size=args.pproc_batch_size,
        only_whole_batches=args.compile,
        device=process.device,
    )
    count, begin = sum(len(maker.items(number)) for number in todo), time.perf_counter()
    with progress_bar(count, 0, "sampling", "img", process.is_main) as progress:
        for number in todo:
            maker.make(number, progress)
    seconds = time.perf_counter() - begin
    rate = f"{count} images in {seconds:.1f} s, {count / seconds:.2f} images/s"
    print(f"process {process.rank} of {process.world_size}: {rate}")


def sweep(args: argparse.Namespace, job: Job, evaluation: GenerationEvaluation, argv: Sequence[str]) -> None:
    """A sample and a figure for each point that has none; who writes the last figure writes the table."""
    if args.sample_dir.joinpath("args.json").is_file() or is_unfinished(args.sample_dir) or read_index(args.sample_dir):
        raise UserError(f"{OUTPUT_FLAG} {args.sample_dir} is a run or a sample; give an empty or new folder to a sweep")
    if job.process.world_size > 1 and not args.keep_images:
        raise UserError("--no-keep-images is for one process: others may still read what it deletes; leave it out")
    runs = {own.sample_dir.name: own for own in (at_point(args, point, job.trained) for point in args.points)}
    records = PointRecords(args.sample_dir, evaluation)
    if not plan_sweep(args, job, records, runs) and job.process.is_main:
        conclude_sweep(args, records, runs, argv)
    for name, own in runs.items():
        is_new = name not in records.found() and make_point(own, job, records)
        if is_new and runs.keys() <= records.found().keys():
            conclude_sweep(args, records, runs, argv)
        if not args.keep_images and name in records.found():
            shutil.rmtree(own.sample_dir, ignore_errors=True)


def make_point(args: argparse.Namespace, job: Job, records: PointRecords) -> bool:
    """Sample and measure a point of a sweep; whether this process measured it, and not another one."""
    if not generate(args, job):
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
    args: argparse.Namespace, records: PointRecords, runs: Mapping[str, argparse.Namespace], argv: Sequence[str]
) -> None:
    """Table, picture, and the command for the full sample at the best point."""
    from metrics.sweep_picture import save_sweep  # matplotlib takes a second to import

    points = {name: Point(own.cfg_scale, own.guidance_low, own.guidance_high) for name, own in runs.items()}
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
    replaced = {*SWEEP_FLAGS, *POINT_FLAGS, *(() if point.is_guided else GUIDE_FLAGS)}
    kept, is_kept = [], True
    for word in argv:
        if word.startswith("--"):
            is_kept = word.partition("=")[0] not in replaced
        if is_kept:
            kept.append(word)
    return shlex.join(["python", "generate.py", *kept, *point.flags()])


def dry_run(args: argparse.Namespace, job: Job) -> None:
    """Two images in two steps, and what all of them would take at the rate of a forward pass."""
    trained, process, steps, points = job.trained, job.process, args.num_steps, args.points
    settings = [sampler_settings(at_point(args, point, trained), trained) for point in points]
    passes, guided = (sum(numbers) for numbers in zip(*(each.forwards() for each in settings), strict=True))
    args.num_steps = min(2, steps)
    networks = job.networks()
    sampler = build_sampler(at_point(args, points[-1], trained), trained, networks, process)
    items = torch.arange(2, device=process.device)
    labels = items % len(trained.class_names)
    with torch.inference_mode():
        sampler(items, labels)[0].cpu()  # warms up, or compiles
        z = sampler.noise(items, 0)
        own_seconds = pass_seconds(networks.model, sampler, z, labels)
        guide_seconds = own_seconds if networks.guide is None else pass_seconds(networks.guide, sampler, z, labels)
        begin = time.perf_counter()
        sampler.decode(z).cpu()
        decode_seconds = time.perf_counter() - begin
    if not process.is_main:
        return
    count, share = args.num_fid_samples * len(points), args.num_fid_samples / process.world_size
    seconds = (passes * own_seconds + guided * guide_seconds + len(points) * decode_seconds) / 2 * share
    size = len(points) * npz_bytes(args.num_fid_samples, trained.resolution)
    print(
        f"{trained.config.model}, checkpoint {trained.label} ({trained.weights}): "
        f"{count_parameters(networks.model)[0]:,} parameters"
    )
    if networks.guide is not None:
        print(
            f"guide: {trained.guide.config.model}, checkpoint {trained.guide.label}: "
            f"{count_parameters(networks.guide)[0]:,} parameters, {guide_seconds:.3f} s a forward pass"
        )
    print(f"VAE: {count_parameters(networks.tokenizer)[0]:,} parameters")
    print(f"batch of 2: {own_seconds:.3f} s a forward pass, {decode_seconds:.3f} s to decode")
    own, of_guide = (passes + guided, "") if networks.guide is None else (passes, f" and {guided} of the guide")
    of_sweep = "" if args.sweep is None else f" over the {len(points)} points of the sweep"
    print(
        f"{own} forward passes{of_guide} an image{of_sweep} ({args.mode}, {steps} steps): about {seconds / 3600:.2f} "
        f"hours for {count} images with {process.world_size} processes at this rate; larger batches are faster"
    )
    print(f"{size} bytes of shards" + (f", {size} of {NPZ_NAME}" if args.npz else ""))
    print(f"peak memory: {peak_memory(process.device)}; nothing was written")


def pass_seconds(network: Denoiser, sampler: ImageSampler, x: torch.Tensor, labels: torch.Tensor) -> float:
    """Of one forward pass; a first one is not counted."""
    velocity = model_velocity(network, sampler.autocast)
    velocity(x, 1.0, labels).cpu()
    begin = time.perf_counter()
    velocity(x, 1.0, labels).cpu()
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(run(main))
