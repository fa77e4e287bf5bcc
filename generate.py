"""Stage 4: images from a diffusion transformer, as packed shards and one .npz for the evaluators.

  python generate.py --exp-path exps/ldm --cfg-scale 2.5 --guidance-high 0.75
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
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dataset.images import DEFAULT_RESOLUTION
from diffusion import PATH_TYPES
from errors import UserError
from formats.averages import MAIN, weights_name
from formats.run_folders import refuse_foreign
from inference import LABEL_SAMPLINGS, MODES, ROUNDINGS
from metrics.arguments import INCEPTION, add_metric_arguments
from runtime import DEFAULT_VAE
from runtime.cli import (
    ArgumentParser,
    add_debug_argument,
    answer_early,
    flag_of,
    fraction,
    non_negative_float,
    non_negative_int,
    or_auto,
    positive_float,
    positive_int,
    run,
)

OUTPUT_FLAG = "--sample-dir"
EVALUATION_LOCK_NAME = ".evaluation.lock"
COMPILED_FROM = 1000  # fewer images take less time than compiling for them
FLAGS = {"precision": "--mixed-precision"}  # which flag a setting comes from; of the model those of MODEL_SETTINGS
UNSAID = {"time_shift": 1.0}  # of settings that older samples were made without
MODEL_SETTINGS = ("weights_sha256", "vae", "latent_statistics", "path_type")
# What only --model says, and what export_ldm.py says of other people's checkpoints; a run says it itself.
UNTRAINED_FLAGS, FOREIGN_FLAGS = ("vae", "path_type", "resolution"), ("vae_ckpt", "vae_latents_stats")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="generate.py",
        usage="%(prog)s (--exp-path DIR | --model NAME --dry-run) [flags]",
        description=__doc__,
    )
    add_run_arguments(parser.add_argument_group("what is sampled"))
    add_untrained_arguments(parser.add_argument_group("networks of random weights, for --dry-run"))
    add_sampler_arguments(parser.add_argument_group("sampler"))
    add_label_arguments(parser.add_argument_group("labels and noise"))
    add_output_arguments(parser.add_argument_group("output"))
    add_speed_arguments(parser.add_argument_group("precision and speed"))
    add_evaluation_arguments(parser.add_argument_group("evaluation"))
    args = parser.parse_args(argv)
    check_arguments(args)
    args.npz = args.evaluate is None if args.npz is None else args.npz
    return args


def add_run_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--exp-path", type=Path, metavar="DIR", help="run of train_ldm.py or train_repae.py, exps/NAME")
    for flag in ("--ckpt", "--vae-ckpt", "--vae-latents-stats"):  # are answered with export_ldm.py's command
        group.add_argument(flag, help=argparse.SUPPRESS)
    group.add_argument(
        "--train-steps",
        type=positive_int,
        metavar="N",
        help="checkpoint, milestone or snapshot of step N, of an unfinished run too (default: a finished run's newest)",
    )
    group.add_argument(
        "--weights",
        type=weights_name,
        default=MAIN,
        metavar="NAME",
        help="ema: their moving average; model: as trained; ema_X: the average of a further --ema-decay X; posthoc_X: "
        "an average of any relative length X, of a run with --posthoc-ema",
    )


def add_untrained_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", metavar="NAME", help="instead of --exp-path: the denoiser, e.g. SiT-XL/1")
    group.add_argument("--vae", metavar="NAME", help=f"architecture, or a VAE (default: {DEFAULT_VAE})")
    group.add_argument("--path-type", choices=PATH_TYPES, help=f"interpolant, a run's own (default: {PATH_TYPES[0]})")
    group.add_argument(
        "--resolution", type=positive_int, metavar="PX", help=f"side of the images (default: {DEFAULT_RESOLUTION})"
    )


def add_sampler_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--mode", choices=MODES, default="sde", help="sde: Euler–Maruyama; ode: Euler or Heun")
    group.add_argument("--num-steps", type=positive_int, default=250, metavar="N", help="steps of the sampler")
    group.add_argument("--heun", action="store_true", help="for the ODE: second order, almost twice the evaluations")
    group.add_argument(
        "--cfg-scale", type=non_negative_float, default=1.0, metavar="X", help="classifier-free guidance; 1: none"
    )
    group.add_argument(
        "--guidance-low", type=fraction, default=0.0, metavar="T", help="guide from this time on (data: 0)"
    )
    group.add_argument(
        "--time-shift",
        type=or_auto(positive_float),
        metavar="X|auto",
        help="noise-to-data ratios of the sampler's times, times X (default: as in the run's training); above 1, more "
        "of the steps are near the noise; auto: √(numbers in a latent / 4096)",
    )
    group.add_argument("--guidance-high", type=fraction, default=1.0, metavar="T", help="guide to this time (noise: 1)")
    group.add_argument(
        "--guidance-channels",
        type=positive_int,
        metavar="N",
        help="guide only the first N channels of the latent; LightningDiT's published numbers: 3 (default: all)",
    )


def add_label_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num-fid-samples", type=positive_int, default=50_000, metavar="N", help="images")
    group.add_argument(
        "--label-sampling",
        choices=LABEL_SAMPLINGS,
        default="random",
        help="random: drawn uniformly; equal: in turn, so that each class comes equally often",
    )
    group.add_argument("--classes", metavar="A,B,…", help="only these, by number or name (default: all)")
    group.add_argument(
        "--seed", "--global-seed", type=non_negative_int, default=0, metavar="N", help="seed of labels and noise"
    )


def add_output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        OUTPUT_FLAG,
        type=Path,
        metavar="DIR",
        help="folder of these images (default: in --exp-path, named by step, sampler, guidance, number and seed)",
    )
    group.add_argument(
        "--npz",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="write samples.npz next to the shards (default: yes, without --evaluate)",
    )
    group.add_argument(
        "--preview", type=non_negative_int, default=64, metavar="N", help="images in preview.png; 0: none"
    )
    group.add_argument(
        "--preview-beside",
        type=Path,
        metavar="DIR",
        help="real images, packed or in class folders, to be shown in preview.png beside those of the same classes",
    )
    group.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default="round",
        help="how pixel values become integers; REPA-E and its numbers: truncate",
    )
    group.add_argument(
        "--shard-size",
        type=positive_int,
        metavar="N",
        help="images in a shard, the unit of work of a process (default: about a 64th, from 64 to 1024)",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="two images in two steps; print sizes, seconds, bytes; write nothing"
    )
    add_debug_argument(group)


def add_speed_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pproc-batch-size", type=positive_int, default=64, metavar="N", help="images at once on a process"
    )
    group.add_argument(
        "--mixed-precision",
        choices=("no", "bf16"),
        default="no",
        help="precision of the networks; published numbers: no (TF32)",
    )
    group.add_argument(
        "--allow-tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 on Ampere and up"
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"torch.compile denoiser and decoder (default: on CUDA, for {COMPILED_FROM:,} images and more)",
    )


def add_evaluation_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--evaluate",
        type=Path,
        metavar="REF",
        help="then measure against REF, as evaluate.py generation does, on one process; no .npz is written",
    )
    add_metric_arguments(group)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is read."""
    check_source(args)
    if args.heun and args.mode != "ode":
        raise UserError("--heun is for --mode ode; the SDE is solved by Euler–Maruyama")
    if args.guidance_low > args.guidance_high:
        raise UserError(f"--guidance-low {args.guidance_low} lies above --guidance-high {args.guidance_high}")
    if args.cfg_scale == 1:  # nothing is guided, at any time
        args.guidance_low, args.guidance_high, args.guidance_channels = 0.0, 1.0, None
    if args.evaluate is None and (args.metrics or args.ref_cache or args.features != INCEPTION):
        raise UserError("--metrics, --features and --ref-cache belong to --evaluate REF; add it, or leave them out")
    if args.sample_dir is not None and args.sample_dir.exists() and not args.sample_dir.is_dir():
        raise UserError(f"{OUTPUT_FLAG} {args.sample_dir} is a file; give a folder")


def check_source(args: argparse.Namespace) -> None:
    """A run, or networks of random weights; of other people's checkpoints the way to a run is named."""
    if args.model is not None:
        check_untrained(args)
        return
    if args.exp_path is None and args.ckpt is None:
        raise UserError("give --exp-path with a run's folder")
    words = [word for pair in given_flags(args, ("train_steps", *UNTRAINED_FLAGS, *FOREIGN_FLAGS)) for word in pair]
    for flag, path in given_flags(args, ("ckpt", "exp_path")):
        refuse_foreign(Path(path), flag, "--exp-path", *words)
    if args.ckpt is not None:
        raise UserError(f"--ckpt {args.ckpt} is not a file: give a run's folder with --exp-path")
    for names, whose in ((("vae", "resolution"), "--model"), (FOREIGN_FLAGS, "export_ldm.py --format run")):
        for flag, _ in given_flags(args, names):
            raise UserError(f"{flag} is for {whose}; {args.exp_path} says it itself: leave the flag out")


def check_untrained(args: argparse.Namespace) -> None:
    """Random networks have no checkpoint, and their images are worth nothing."""
    if not args.dry_run:
        raise UserError("--model builds networks of random weights, for --dry-run only; give --exp-path")
    for flag, _ in given_flags(args, ("exp_path", "ckpt", "train_steps", *FOREIGN_FLAGS)):
        raise UserError(f"{flag} and --model exclude each other: --model has random weights")


def given_flags(args: argparse.Namespace, names: Sequence[str]) -> list[tuple[str, str]]:
    """Those that were given, with their values."""
    values = ((flag_of(name), getattr(args, name)) for name in names)
    return [(flag, str(value)) for flag, value in values if value is not None]


if __name__ == "__main__":
    answer_early(parse_arguments)

import numpy as np
import torch

from dataset.images import ImageDataset, open_images
from dataset.npz import npz_bytes
from dataset.packing import PackingJob, check_space, given_back_if_refused, lock_if_free, sigterm_as_interrupt
from dataset.shards import ShardSpec
from diffusion.flow import settled_shift
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
from inference.trained_ldm import TrainedLDM, open_trained_ldm
from inference.untrained_ldm import UntrainedLDM, open_untrained_ldm
from metrics.evaluate_generation import GenerationEvaluation, plan, settings_of
from metrics.generation import check_count
from metrics.sources import open_image_set
from models.denoisers import Denoiser
from models.tokenizers import Tokenizer
from runtime.log import progress_bar
from runtime.measure import count_parameters, peak_memory
from runtime.processes import Process, set_inference_numerics, this_process


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
    try:
        if args.dry_run:
            dry_run(args, trained, tokenizer, process)
        else:
            with sigterm_as_interrupt():
                is_complete = generate(args, trained, tokenizer, classes, process, beside)
                if evaluation is not None and is_complete:
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
    if trained.cfg_prob == 0 and args.cfg_scale != 1:
        raise UserError(
            f"--cfg-scale {args.cfg_scale:g}: {args.exp_path} was trained with --cfg-prob 0, without the null class "
            "that guidance needs; leave the flag out"
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
    """A folder in the run, named by what is most often varied."""
    parts = ["samples", trained.label, f"{args.mode}{'-heun' if args.heun else ''}{args.num_steps}"]
    if args.time_shift is not None:
        parts.append(f"shift{args.time_shift if args.time_shift == 'auto' else format(args.time_shift, 'g')}")
    if args.cfg_scale != 1:
        channels = "" if args.guidance_channels is None else f"-{args.guidance_channels}ch"
        parts.append(f"cfg{args.cfg_scale:g}-{args.guidance_low:g}-{args.guidance_high:g}{channels}")
    if args.weights != MAIN:
        parts.append(args.weights)
    if args.label_sampling != "random":
        parts.append(args.label_sampling)
    return trained.folder / "-".join([*parts, f"{args.num_fid_samples}", f"seed{args.seed}"])


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


def describe(
    args: argparse.Namespace,
    trained: TrainedLDM,
    tokenizer: Tokenizer,
    classes: Sequence[int],
    process: Process,
) -> dict:
    """All that the images depend on; goes into the index, and a rerun in the same folder must agree with it."""
    tf32 = process.device.type == "cuda" and args.allow_tf32
    return {
        "train_steps": trained.step,
        "weights": trained.weights,
        "weights_sha256": trained.checksum,
        "vae": trained.vae_checksum,
        "latent_statistics": tokenizer.statistics.checksum(),
        **vars(sampler_settings(args, trained)),
        "num_fid_samples": args.num_fid_samples,
        "label_sampling": args.label_sampling,
        "classes": None if len(classes) == len(trained.class_names) else list(classes),
        "precision": "bf16" if args.mixed_precision == "bf16" else "tf32" if tf32 else "float32",
        "rounding": args.rounding,
        "shard_size": args.shard_size,
    }


def build_sampler(
    args: argparse.Namespace, trained: TrainedLDM | UntrainedLDM, tokenizer: Tokenizer, process: Process
) -> tuple[ImageSampler, Denoiser]:
    """The networks on the device."""
    device = process.device
    model = trained.load_model().to(device)
    tokenizer.to(device)
    if device.type == "cpu":
        tokenizer.to(memory_format=torch.channels_last)
    if args.compile:
        model.compile(dynamic=False)  # two sizes: with and without guidance
        tokenizer.compile(dynamic=False)
    sampler = ImageSampler(
        model,
        tokenizer,
        sampler_settings(args, trained),
        truncate=args.rounding == "truncate",
        decode_batch=chunk_size(trained.resolution, device),
        autocast=autocast_for(device, args.mixed_precision),
    )
    return sampler, model


def generate(
    args: argparse.Namespace,
    trained: TrainedLDM,
    tokenizer: Tokenizer,
    classes: Sequence[int],
    process: Process,
    beside: ImageDataset | None = None,
) -> bool:
    """Make what is missing of this process's shards, complete what is complete, say what came out.

    Returns:
        whether all images are there.
    """
    spec = ShardSpec("images", (3, trained.resolution, trained.resolution), "uint8")
    settings = describe(args, trained, tokenizer, classes, process)
    flags = FLAGS | dict.fromkeys(MODEL_SETTINGS, "--exp-path")
    packing = PackingJob(args.sample_dir, spec, settings, OUTPUT_FLAG, flags, UNSAID)
    show = print if process.is_main else lambda text: None
    with given_back_if_refused(packing, alone=process.world_size == 1):
        packing.begin()
        labels = choose_labels(args.num_fid_samples, classes, args.label_sampling, args.seed)
        shards = -(-len(labels) // args.shard_size)
        todo = packing.missing(process.share(shards))
        if process.is_main:
            show_plan(args, packing, labels, len(classes), shards)
        if todo:
            sampler, _ = build_sampler(args, trained, tokenizer, process)
            make_shards(args, packing, sampler, labels, todo, process)
        if not packing.finish(shards, trained.class_names):
            show(f"{args.sample_dir}: this process's shards are complete; whoever comes last completes the folder")
            return False
        complete(packing, args.npz, args.preview, beside)
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


def dry_run(
    args: argparse.Namespace, trained: TrainedLDM | UntrainedLDM, tokenizer: Tokenizer, process: Process
) -> None:
    """Two images in two steps, and what all of them would take at that rate."""
    forwards, steps = sampler_settings(args, trained).forwards(), args.num_steps
    args.num_steps = min(2, steps)
    sampler, model = build_sampler(args, trained, tokenizer, process)
    items = torch.arange(2, device=process.device)
    labels = items % len(trained.class_names)
    sampler(items, labels)[0].cpu()  # warms up, or compiles
    begin = time.perf_counter()
    z = sampler.latents(items, labels).cpu()
    step_seconds = (time.perf_counter() - begin) / sampler.settings.forwards()
    begin = time.perf_counter()
    with torch.inference_mode():
        sampler.decode(z.to(process.device)).cpu()
    decode_seconds = time.perf_counter() - begin
    if not process.is_main:
        return
    seconds = (forwards * step_seconds + decode_seconds) / 2 * args.num_fid_samples / process.world_size
    size = npz_bytes(args.num_fid_samples, trained.resolution)
    print(
        f"{trained.config.model}, checkpoint {trained.label} ({trained.weights}): "
        f"{count_parameters(model)[0]:,} parameters"
    )
    print(f"VAE: {count_parameters(tokenizer)[0]:,} parameters")
    print(f"batch of 2: {step_seconds:.3f} s a forward pass, {decode_seconds:.3f} s to decode")
    print(
        f"{forwards} forward passes an image ({args.mode}, {steps} steps): about {seconds / 3600:.2f} hours for "
        f"{args.num_fid_samples} images with {process.world_size} processes at this rate; larger batches are faster"
    )
    print(f"{size} bytes of shards" + (f", {size} of {NPZ_NAME}" if args.npz else ""))
    print(f"peak memory: {peak_memory(process.device)}; nothing was written")


if __name__ == "__main__":
    sys.exit(run(main))
