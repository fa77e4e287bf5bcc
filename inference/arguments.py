"""Flags of generate.py that say what is sampled, how and where to; needs no torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dataset.images import DEFAULT_RESOLUTION
from diffusion import PATH_TYPES
from errors import UserError
from formats.averages import MAIN, weights_name
from formats.run_folders import refuse_foreign
from inference import INTERNAL, LABEL_SAMPLINGS, MODES, OWN_GUIDES, PATH_DROP, ROUNDINGS
from inference.sweep import DEFAULT_SAMPLES
from runtime import DEFAULT_VAE
from runtime.cli import (
    add_debug_argument,
    flag_of,
    fraction,
    non_negative_float,
    non_negative_int,
    or_auto,
    positive_float,
    positive_int,
)

OUTPUT_FLAG = "--sample-dir"
COMPILED_FROM = 1000  # fewer images take less time than compiling for them
SAMPLES = 50_000
STEPS, JUMPS = 250, 4
# What only --model says, and what export_ldm.py says of other people's checkpoints; a run says it itself.
UNTRAINED_FLAGS, FOREIGN_FLAGS = ("vae", "path_type", "resolution"), ("vae_ckpt", "vae_latents_stats")


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


def add_decoder_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--decoder",
        metavar="VAE",
        help="decode by this VAE, which has the encoder of the run's and another decoder, such as "
        "train_sendvae.py --freeze-encoder makes; the run's latents, and their statistics, stay",
    )


def add_untrained_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", metavar="NAME", help="instead of --exp-path: the denoiser, e.g. SiT-XL/1")
    group.add_argument("--vae", metavar="NAME", help=f"architecture, or a VAE (default: {DEFAULT_VAE})")
    group.add_argument("--path-type", choices=PATH_TYPES, help=f"interpolant, a run's own (default: {PATH_TYPES[0]})")
    group.add_argument(
        "--resolution", type=positive_int, metavar="PX", help=f"side of the images (default: {DEFAULT_RESOLUTION})"
    )


def add_sampler_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--mode",
        choices=MODES,
        default="sde",
        help="sde: Euler–Maruyama; ode: Euler or Heun; map: 1 to 4 jumps, of a run with --flow-map-blocks",
    )
    group.add_argument(
        "--num-steps",
        type=positive_int,
        metavar="N",
        help=f"steps of the sampler (default: {STEPS}; of map: {JUMPS})",
    )
    group.add_argument("--heun", action="store_true", help="for the ODE: second order, almost twice the evaluations")
    group.add_argument(
        "--damped",
        action="store_true",
        help="for the ODE, of a run with --prediction x: divide by times of at least 0.05, as in training and in JiT's "
        "own sampler, which leaves some noise in the images",
    )
    group.add_argument(
        "--cfg-scale",
        type=non_negative_float,
        default=1.0,
        metavar="X",
        help="guidance: how many times as far from the null class's velocity (classifier-free), or --guide's; 1: none, "
        "or what a flow map has learned",
    )
    group.add_argument(
        "--guide",
        type=run_and_step,
        metavar="RUN[@STEP]",
        help="autoguidance (arXiv 2406.02507): in the place of the null class a weaker denoiser on the same latents "
        f"guides, smaller or of an earlier step; @STEP alone: of --exp-path. {PATH_DROP}, of a run with --sprint: its "
        "own first and last blocks without a class guide, of a SiT-XL a seventh of a pass, of a B a third; a wide head "
        f"comes on top. {INTERNAL}, of a run with --guide-depth: its own output on the way guides, in the same pass",
    )
    group.add_argument(
        "--guide-scale",
        type=non_negative_float,
        metavar="X",
        help="with --guide: guide by it X times as far, and by the null class too, --cfg-scale times as far, on top "
        "(default: the guide has the null class's place, and --cfg-scale is its scale)",
    )
    for end, name in (("low", "from"), ("high", "to")):
        group.add_argument(
            f"--guide-{end}",
            type=fraction,
            metavar="T",
            help=f"with --guide-scale: the guide acts {name} this time (default: {'0' if end == 'low' else '1'}; the "
            "null class's interval is its own)",
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
    group.add_argument(
        "--num-fid-samples",
        type=positive_int,
        metavar="N",
        help=f"images (default: {SAMPLES}; at each point of a sweep {DEFAULT_SAMPLES})",
    )
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
        help="folder of these images, or of a sweep (default: in --exp-path, named by step, sampler, guidance, number "
        "and seed)",
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


def run_and_step(text: str) -> tuple[Path | None, int | None] | str:
    """An argparse type: ``RUN``, ``RUN@STEP`` or ``@STEP``, no folder: the run that is sampled; or one of its own."""
    if text in OWN_GUIDES:
        return text
    folder, at, step = text.rpartition("@")
    if folder in OWN_GUIDES:
        raise argparse.ArgumentTypeError(f"{text!r}: {folder} is of the network itself and has no step")
    if not at or Path(text).is_dir():
        return Path(text), None
    try:
        return Path(folder) if folder else None, positive_int(step)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give RUN, RUN@STEP or @STEP, STEP an integer of at least 1"
        ) from error


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
    if args.guide not in (None, *OWN_GUIDES) and args.guide[0] is not None:
        refuse_foreign(args.guide[0], "--guide", "--guide")
    if args.ckpt is not None:
        raise UserError(f"--ckpt {args.ckpt} is not a file: give a run's folder with --exp-path")
    for names, whose in ((("vae", "resolution"), "--model"), (FOREIGN_FLAGS, "export_ldm.py --format run")):
        for flag, _ in given_flags(args, names):
            raise UserError(f"{flag} is for {whose}; {args.exp_path} says it itself: leave the flag out")


def check_untrained(args: argparse.Namespace) -> None:
    """Random networks have no checkpoint, and their images are worth nothing."""
    if not args.dry_run:
        raise UserError("--model builds networks of random weights, for --dry-run only; give --exp-path")
    for flag, _ in given_flags(args, ("exp_path", "ckpt", "train_steps", "guide", "decoder", *FOREIGN_FLAGS)):
        raise UserError(f"{flag} and --model exclude each other: --model has random weights")


def given_flags(args: argparse.Namespace, names: Sequence[str]) -> list[tuple[str, str]]:
    """Those that were given, with their values."""
    values = ((flag_of(name), getattr(args, name)) for name in names)
    return [(flag, str(value)) for flag, value in values if value is not None]
