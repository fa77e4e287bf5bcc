"""Stage 4: images from a diffusion transformer, as packed shards and one .npz for the evaluators.

  python generate.py --exp-path exps/ldm --cfg-scale 2.5 --guidance-high 0.75
  python generate.py --exp-path exps/ldm --cfg-scale 2 --guide exps/ldm-small@20000             # autoguidance
  python generate.py --exp-path exps/ldm-sprint --cfg-scale 2 --guide path-drop                 # SPRINT's
  python generate.py --exp-path exps/ldm-guided --cfg-scale 1.8 --guide internal                # RAEv2's, in one pass
  python generate.py --exp-path exps/ldm-map --mode map --num-steps 2      # of a run with --flow-map-blocks
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
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from errors import UserError
from inference import INTERNAL, PATH_DROP, arguments
from inference.arguments import COMPILED_FROM, JUMPS, OUTPUT_FLAG, SAMPLES, STEPS
from inference.sweep import AXES, DEFAULT_SAMPLES, axis, point_of, points_of, settle
from metrics.arguments import INCEPTION, SWEEP_METRICS, add_metric_arguments
from runtime.cli import ArgumentParser, answer_early, flag_of, out_of_memory_means, run


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="generate.py",
        usage="%(prog)s (--exp-path DIR | --model NAME --dry-run) [flags]",
        description=__doc__,
    )
    sampled = parser.add_argument_group("what is sampled")
    arguments.add_run_arguments(sampled)
    arguments.add_decoder_argument(sampled)
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
        "high=A,B,… (of --guidance-low and --guidance-high; only low up to high), and guide=A,B,… (of --guide-scale); "
        "each one's FID (with --features: FD-NAME), or MIND by --metrics mind, against --evaluate REF; the best one's "
        "command",
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
    if args.damped and args.mode != "ode":
        raise UserError(f"--damped is for --mode ode, not for --mode {args.mode}: leave it out, or give --mode ode")
    if args.heun and args.mode != "ode":
        raise UserError(f"--heun is for --mode ode, not for --mode {args.mode}: leave it out, or give --mode ode")
    args.num_steps = args.num_steps or (JUMPS if args.mode == "map" else STEPS)
    check_guidance(args)
    args.num_fid_samples = args.num_fid_samples or (SAMPLES if args.sweep is None else DEFAULT_SAMPLES)
    if args.evaluate is None and (args.metrics or args.ref_cache or args.features != INCEPTION):
        raise UserError("--metrics, --features and --ref-cache belong to --evaluate REF; add it, or leave them out")
    if args.sample_dir is not None and args.sample_dir.exists() and not args.sample_dir.is_dir():
        raise UserError(f"{OUTPUT_FLAG} {args.sample_dir} is a file; give a folder")


def check_guidance(args: argparse.Namespace) -> None:
    """Settle ``args.points``: those of the sweep, or one alone."""
    check_guide_scale(args)
    for low, high in (("guidance_low", "guidance_high"), ("guide_low", "guide_high")):
        if getattr(args, low) > getattr(args, high):
            ends = [f"{flag_of(name)} {getattr(args, name)}" for name in (low, high)]
            raise UserError(" lies above ".join(ends))
    if args.sweep is None:
        if args.keep_images is not None:
            raise UserError("--keep-images belongs to --sweep; leave it out")
        args.points = [point_of(args)]
    else:
        check_sweep(args)
    if args.guide is not None and not any(point.has_guide for point in args.points):
        flag = "--cfg-scale" if args.guide_scale is None else "--guide-scale"
        raise UserError(f"--guide: at scale 1 it does not guide; add {flag}, e.g. 2, or leave the guide out")
    args.unused = unused_interval(args)
    if args.sweep is None:
        settle(args, *args.points)
        args.points = [point_of(args)]  # the same in fewer flags


def unused_interval(args: argparse.Namespace) -> str | None:
    """What to say where a guide acts alone, and times are given that are the null class's; None: nothing.

    Raises:
        UserError: a sweep would go through such times.
    """
    if args.guide is None or any(point.guide is None or point.scale != 1 for point in args.points):
        return None
    for name in ("low", "high"):
        if name in dict(args.sweep or ()):
            raise UserError(
                f"--sweep {name}=… is the null class's, whose scale is 1 at every point: add scale=A,B,…, or leave it "
                f"out; the guide's own is --guide-{name}"
            )
    given = {"guidance_low": args.guidance_low != 0, "guidance_high": args.guidance_high != 1}
    said = " and ".join(flag_of(name) for name, is_given in given.items() if is_given)
    says = "of the null class, whose --cfg-scale is 1; the guide has --guide-low and --guide-high"
    return f"{said}: {says}" if said else None


def check_guide_scale(args: argparse.Namespace) -> None:
    """The scale of a guide beside the null class needs a guide, and its interval needs the scale."""
    is_swept = "guide" in dict(args.sweep or ())
    if args.guide is None and (is_swept or args.guide_scale is not None):
        flag = "--sweep guide=…" if is_swept else f"--guide-scale {args.guide_scale:g}"
        raise UserError(f"{flag} is a guide's: add --guide, e.g. --guide internal, or leave it out")
    both = {"guide_low": 0.0, "guide_high": 1.0}
    for name, value in both.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        elif args.guide_scale is None and not is_swept:
            raise UserError(
                f"{flag_of(name)} belongs to --guide-scale; add that, or give "
                f"{flag_of(name.replace('guide', 'guidance'))}"
            )


def check_sweep(args: argparse.Namespace) -> None:
    if args.evaluate is None:
        raise UserError("--sweep compares by a figure: add --evaluate with a reference")
    names = [name for name, _ in args.sweep]
    if len(set(names)) < len(names):
        raise UserError(f"--sweep gives {max(names, key=names.count)}= twice; give all its values at once, with commas")
    others = {name: getattr(args, flag) for name, flag in AXES.items()}
    args.points = points_of(args.sweep, others)
    if len(args.points) < 2:
        raise UserError(
            f"--sweep: {len(args.points)} point{'' if len(args.points) == 1 else 's'}, as low may not lie above high "
            "and without guidance (scale=1, unless --cfg-scale says otherwise) there is no interval; give more values, "
            "e.g. scale=1,2"
        )
    args.metrics = args.metrics or SWEEP_METRICS[0]
    if args.metrics not in SWEEP_METRICS:
        raise UserError(f"--metrics {args.metrics}: a sweep compares by one of {', '.join(SWEEP_METRICS)}")
    args.keep_images = args.keep_images is not False


if __name__ == "__main__":
    answer_early(parse_arguments)


from dataset.images import ImageDataset, open_images
from dataset.packing import lock_if_free, sigterm_as_interrupt
from inference.decoder import with_decoder
from inference.sample_folder import Job, default_folder, load_networks, make_samples
from inference.sampling import default_shard_size
from inference.sampling_dry_run import dry_run
from inference.trained_ldm import (
    InternalGuide,
    PathDrop,
    TrainedLDM,
    open_guide,
    open_internal_guide,
    open_path_drop,
    open_trained_ldm,
)
from inference.untrained_ldm import UntrainedLDM, open_untrained_ldm
from metrics.evaluate_generation import EVALUATION_LOCK_NAME, GenerationEvaluation, plan, settings_of
from metrics.generation import check_count
from metrics.guidance_sweep import sweep
from metrics.sources import open_image_set
from runtime.processes import Process, set_inference_numerics, this_process


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    process = this_process()
    set_inference_numerics(process, args.mixed_precision, args.allow_tf32)
    if args.compile is None:
        pays = args.num_fid_samples >= COMPILED_FROM and not args.dry_run
        args.compile = process.device.type == "cuda" and pays
    report = warn if process.is_main else lambda message: None
    if args.unused is not None:
        report(args.unused)
    trained = open_model(args, report)
    classes = parse_classes(args.classes, trained.class_names)
    args.shard_size = args.shard_size or default_shard_size(args.num_fid_samples)
    args.sample_dir = args.sample_dir or default_folder(args, trained)
    evaluation = plan_evaluation(args, trained.resolution, process)
    beside = None if args.preview_beside is None else open_beside(args.preview_beside, trained.resolution)
    tokenizer = trained.load_autoencoder()
    if args.decoder is not None:
        tokenizer = with_decoder(tokenizer, args.decoder, trained)
    networks = functools.cache(functools.partial(load_networks, args, trained, tokenizer, process))
    job = Job(trained, tokenizer, classes, process, networks, beside)
    with out_of_memory_means("lower --pproc-batch-size, or add --mixed-precision bf16; what is complete is kept"):
        if args.dry_run:
            dry_run(args, job)
        else:
            with sigterm_as_interrupt():
                if args.sweep is not None:
                    sweep(args, job, evaluation, argv)
                elif make_samples(args, job) and evaluation is not None:
                    evaluate_complete(args.sample_dir, evaluation, process)
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
        untrained = open_untrained_ldm(args.model, args.vae, args.resolution, args.path_type)
        return replace(untrained, config=untrained.config.with_flow_map(1)) if args.mode == "map" else untrained
    trained = open_trained_ldm(args.exp_path, args.train_steps, args.weights, report)
    if args.path_type not in (None, trained.path_type):
        raise UserError(
            f"--path-type {args.path_type}: {args.exp_path} was trained on {trained.path_type}; leave it out"
        )
    check_channels(args, trained)
    check_flow_map(args, trained)
    check_damped(args, trained)
    if trained.learned_guidance and any(point.is_guided for point in args.points):
        report(f"{args.exp_path} has learned guidance ({trained.learned_guidance}); this is added to it")
    check_null_class(args, trained)
    return replace(trained, guide=guide_of(args, trained, report))


def guide_of(
    args: argparse.Namespace, trained: TrainedLDM, report: Callable[[str], object]
) -> TrainedLDM | PathDrop | InternalGuide | None:
    """What ``--guide`` names."""
    if args.guide is None:
        return None
    if args.guide == PATH_DROP:
        return open_path_drop(trained)
    if args.guide == INTERNAL:
        return open_internal_guide(trained)
    guide = open_guide(trained, *args.guide, report)
    check_damped(args, guide)
    if guide.cfg_prob == 0 and any(point.has_both for point in args.points):
        raise UserError(
            f"--guide {guide.as_guide} was trained with --cfg-prob 0, without the null class that it would guide too: "
            "leave --guide-scale out, so that it guides alone, or give another guide"
        )
    return guide


def check_null_class(args: argparse.Namespace, trained: TrainedLDM) -> None:
    """Refuse guidance by a null class that was never trained."""
    by_class = [point for point in args.points if args.guide is None or point.guide is not None]
    scale = next((point.scale for point in by_class if point.scale != 1), None)
    if trained.cfg_prob == 0 and scale is not None:
        flag = f"--sweep scale={scale:g}" if "scale" in dict(args.sweep or ()) else f"--cfg-scale {scale:g}"
        remedy = ", or give a --guide" if args.guide is None else ""
        raise UserError(
            f"{flag}: {args.exp_path} was trained with --cfg-prob 0, without the null class that guidance needs; leave "
            f"the flag out{remedy}"
        )


def check_channels(args: argparse.Namespace, trained: TrainedLDM) -> None:
    """Refuse ``--guidance-channels`` that the latent does not have."""
    if args.guidance_channels is None:
        return
    channels, *_ = trained.config.latent_shape
    if trained.config.class_token_width:
        raise UserError(
            f"--guidance-channels {args.guidance_channels}: {args.exp_path} was trained with --reg-coeff, and a class "
            "token has no such channels; leave the flag out"
        )
    if args.guidance_channels > channels:
        raise UserError(
            f"--guidance-channels {args.guidance_channels}: the latent has {channels}; leave the flag out to guide all"
        )


def check_flow_map(args: argparse.Namespace, trained: TrainedLDM) -> None:
    """Refuse ``--mode map`` of networks that cannot jump."""
    if args.mode != "map":
        return
    if not trained.config.flow_map_blocks:
        raise UserError(
            f"--mode map: {args.exp_path} was trained without --flow-map-blocks; give --mode sde or ode, or continue "
            "it with that flag of train_ldm.py"
        )
    if args.guide is not None:
        raise UserError("--guide with --mode map: a guide makes no jumps; leave it out")


def check_damped(args: argparse.Namespace, trained: TrainedLDM) -> None:
    """Refuse ``--damped`` of networks whose velocity is not; a guide's is compared with the other's."""
    if args.damped and trained.config.prediction != "x":
        raise UserError(
            f"--damped is for networks that predict the data (--prediction x), and {trained.folder} predicts the "
            "velocity: leave it out"
        )


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


if __name__ == "__main__":
    sys.exit(run(main))
