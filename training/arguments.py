"""Flags that every training script has, and what follows from them before anything is built."""

import argparse
from pathlib import Path

from diffusion import PATH_TYPES, WEIGHTINGS
from errors import UserError
from formats import averages
from formats.arguments import add_verify_argument
from models.denoisers import DENOISERS, denoiser_kind
from models.denoisers.config import PREDICTIONS
from runtime.cli import (
    add_debug_argument,
    flag_of,
    fraction,
    fraction_below_one,
    non_negative_float,
    non_negative_int,
    or_auto,
    positive_float,
    positive_int,
)
from runtime.repae_flags import default_data_dir
from training.token_drop import add_token_drop_arguments, settle_token_drop

FEATURE_NORMS = ("none", "channel", "token", "spatial")
SCHEDULES = ("constant", "linear", "cosine")
ALIGN_SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "muon")

# What may differ when a run is resumed, with a word in the log on what changes: neither objective nor global batch.
DRAWN_OTHERWISE = (
    "noise is drawn otherwise (and a PatchGAN, or --noise-statistics batch, may see micro-batches of another size)"
)
ROUNDED_OTHERWISE = "results are rounded otherwise"
MENTIONED = {
    "num_processes": DRAWN_OTHERWISE,
    "gradient_accumulation_steps": DRAWN_OTHERWISE,
    "mixed_precision": ROUNDED_OTHERWISE,
    "allow_tf32": ROUNDED_OTHERWISE,
    "compile": ROUNDED_OTHERWISE,
    "channels_last": ROUNDED_OTHERWISE,
    "deterministic": ROUNDED_OTHERWISE,
}
# What other people's runs were trained with, which do not say it; and ours that are older than a flag whose default is
# something else.
UNSAID = {
    **{"optimizer": "adamw", "feature_norm": "none", "time_shift": 1.0, "velocity_cosine_coeff": 0.0},
    **{"align_schedule": "constant", "align_until": None, "mapper_head": "mlp", "reg_coeff": 0.0},
    **{"noise_times": "uniform", "noise_shift": 1.0, "noise_max": 1.0, "noise_statistics": "running"},
    **{"posthoc_ema": averages.NO_LENGTHS, "eq_image_probability": 0.0},
    **{"lr_hold_steps": 0, "lr_decay_until": None, "lr_floor": 0.0, "time_mean": 0.0, "time_std": 1.0},
    **{"flow_map_tangent": "path", "guide_coeff": 1.0},
}
# All that may differ. The data's path may, because its content is compared.
CHANGEABLE = frozenset(
    {
        *("max_train_steps", "epochs"),
        *("num_workers", "prefetch", "stage_dir", "verify", "data_dir", "vae_latents_name", "val_vae_latents_name"),
        *("val_data_dir", "max_val_images"),  # what is held out never touches the training
        *("log_steps", "val_steps", "sampling_steps", "checkpointing_steps", "keep_checkpoints", "milestone_steps"),
        "posthoc_steps",
        *("report_to", "output_dir", "exp_name", "continue_train_exp_dir", "resume_step", "dry_run", "debug"),
        *("gradient_checkpointing", "micro_batch_size", *MENTIONED),
        "disc_enc_ckpt",  # the discriminator knows its VFM by the weights
    }
)


def add_run_arguments(
    parser: argparse.ArgumentParser, continue_help: str = "resume the run in DIR (instead of --exp-name)"
) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", default="exps", metavar="DIR", help="folder of all runs")
    group.add_argument("--exp-name", metavar="NAME", help="this run's folder in --output-dir; same command = resume")
    group.add_argument("--continue-train-exp-dir", metavar="DIR", help=continue_help)
    group.add_argument(
        "--resume-step",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="resume from the checkpoint of step N, setting later ones aside; 0: the newest intact one",
    )
    group.add_argument("--seed", type=non_negative_int, default=0, help="seed of weights, data order and all noise")
    group.add_argument(
        "--deterministic", action="store_true", help="bit-for-bit reproducible on CUDA too, slower (a CPU always is)"
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, run two steps (of 2 images on a CPU), print sizes, memory and seconds, keep nothing",
    )
    group.add_argument(
        "--random-weights",
        action="store_true",
        help="only with --dry-run: build VFM and LPIPS without their pretrained weights",
    )
    add_debug_argument(group)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir", metavar="DIR", help="packed dataset (default: data, if it is one), or a class-folder tree"
    )
    group.add_argument(
        "--val-data-dir",
        metavar="DIR",
        help="held-out set (for train_ldm.py, with a latent cache); none: no validation",
    )
    group.add_argument(
        "--resolution",
        type=positive_int,
        metavar="PX",
        help="image size, pixels (default: the packed dataset's, or 256)",
    )
    group.add_argument(
        "--num-workers", type=non_negative_int, default=4, metavar="N", help="reading threads per process"
    )
    group.add_argument("--prefetch", type=positive_int, default=2, metavar="N", help="batches read ahead")
    group.add_argument(
        "--shuffle",
        choices=("full", "window"),
        default="full",
        help="full permutation, or windows of consecutive items (slow file systems)",
    )
    group.add_argument("--hflip", action="store_true", help="flip images at random (neither Send-VAE nor REPA-E does)")
    group.add_argument("--stage-dir", metavar="DIR", help="copy the packed dataset to this local folder first")
    add_verify_argument(group)


def add_vae_loss_arguments(group: argparse._ArgumentGroup) -> None:
    """Flags of the VAE's losses and of its discriminator."""
    group.add_argument(
        "--disc-learning-rate",
        type=non_negative_float,
        default=1e-4,
        metavar="X",
        help="learning rate of the discriminator",
    )
    group.add_argument(
        "--disc-pretrained-ckpt",
        metavar="PATH",
        help="PatchGAN weights: a bare file, a Lightning or REPA-E checkpoint, a run, or a name on the hub such as "
        "REPA-E/sdvae (default: random)",
    )
    group.add_argument(
        "--loss-cfg-path",
        default="configs/l1_lpips_kl_gan.yaml",
        metavar="FILE",
        help="weights and switches of the VAE's losses, YAML",
    )
    group.add_argument(
        "--loss-override",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override entries of that file, e.g. perceptual_weight=0 discriminator_start=5000",
    )
    group.add_argument(
        "--disc-enc-ckpt",
        metavar="FILE",
        help="weights of the VFM that the loss names as its discriminator (default: looked for, as --enc-ckpt)",
    )
    group.add_argument("--lpips-ckpt", metavar="FILE", help="torchvision's VGG16 weights (default: torch's cache, hub)")


def add_denoiser_arguments(parser: argparse.ArgumentParser, model: str) -> None:
    """Flags of the denoiser and its objective; ``model`` is the default network."""
    group = parser.add_argument_group("denoiser and its objective")
    group.add_argument(
        "--model",
        "--models",
        default=model,
        metavar="NAME",
        help="; ".join(kind.names for kind in DENOISERS.values()),
    )
    for add_arguments in dict.fromkeys(kind.add_arguments for kind in DENOISERS.values()):  # kinds may share them
        add_arguments(group)
    add_token_drop_arguments(group)
    add_objective_arguments(group)
    group.add_argument("--learning-rate", type=non_negative_float, default=1e-4, metavar="X", help="learning rate")
    add_average_arguments(group)


def add_objective_arguments(group: argparse._ArgumentGroup) -> None:
    """What the denoiser predicts, at which times, and what its errors weigh."""
    group.add_argument("--path-type", choices=PATH_TYPES, default="linear", help="interpolant")
    group.add_argument(
        "--prediction",
        choices=tuple(PREDICTIONS),
        help="what the network makes: v, the velocity, or x, the data, from which the velocity follows, for tokens of "
        "more numbers than the network is wide (default: v; JiT: x)",
    )
    group.add_argument(
        "--weighting",
        choices=WEIGHTINGS,
        default="uniform",
        help="how training times are drawn; lognormal: log of the noise-to-data ratio from N(0, 1), which is the logit "
        "of the time on the linear path",
    )
    group.add_argument(
        "--time-mean", type=float, default=0.0, metavar="X", help="with --weighting lognormal: mean of that log"
    )
    group.add_argument(
        "--time-std", type=positive_float, default=1.0, metavar="X", help="and its standard deviation; JiT: both 0.8"
    )
    group.add_argument(
        "--time-shift",
        type=or_auto(positive_float),
        default=1.0,
        metavar="X|auto",
        help="noise-to-data ratios of the training times, and of the sampler's, times X: above 1 for latents of many "
        "numbers; auto: √(numbers in a latent / 4096)",
    )
    group.add_argument(
        "--velocity-cosine-coeff",
        type=non_negative_float,
        default=0.0,
        metavar="X",
        help="weight of 1 − cos between predicted and true velocity, beside their squared distance; LightningDiT: 1",
    )
    group.add_argument(
        "--guide-coeff",
        type=positive_float,
        default=1.0,
        metavar="X",
        help="with --guide-depth: weight of the second output's error; IG (arXiv 2512.24176): 0.5, RAEv2: 1",
    )
    group.add_argument(
        "--cfg-prob", type=fraction, default=0.1, metavar="X", help="share of labels dropped, for guidance"
    )


def add_average_arguments(group: argparse._ArgumentGroup) -> None:
    """Averages of the denoiser's weights."""
    group.add_argument(
        "--ema-decay",
        type=averages.ema_decays,
        default=0.9999,
        metavar="X[,Y,…]",
        help="decay of the averaged weights; 0: no EMA; further ones are averages beside the main one, for generate.py "
        "--weights ema_Y",
    )
    group.add_argument(
        "--posthoc-ema",
        type=averages.relative_lengths,
        nargs="?",
        const=averages.DEFAULT_LENGTHS,
        default=averages.NO_LENGTHS,
        metavar="X,Y",
        help="also average by power functions of these relative lengths (the flag alone: "
        f"{averages.DEFAULT_LENGTHS}) and keep snapshots, out of which generate.py --weights posthoc_Z makes an "
        "average of any length Z; none: do not",
    )
    group.add_argument(
        "--posthoc-steps",
        type=positive_int,
        metavar="N",
        help="steps between those snapshots (default: --checkpointing-steps)",
    )


def add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sample grids")
    group.add_argument("--grid-steps", type=positive_int, default=50, metavar="N", help="Euler steps of a sample grid")
    group.add_argument(
        "--grid-cfg-scale",
        type=non_negative_float,
        default=4.0,
        metavar="X",
        help="guidance of a grid's lower half; 1: none (as always with --cfg-prob 0)",
    )


def add_schedule_arguments(parser: argparse.ArgumentParser, batch_size: int, epochs: int) -> None:
    group = parser.add_argument_group("schedule and optimizer")
    group.add_argument(
        "--batch-size",
        type=positive_int,
        default=batch_size,
        metavar="N",
        help="images per step, over all processes and micro-batches",
    )
    group.add_argument(
        "--gradient-accumulation-steps",
        type=positive_int,
        default=1,
        metavar="N",
        help="micro-batches per step; each has batch-size / (processes · N) images on a process",
    )
    group.add_argument(
        "--micro-batch-size",
        type=or_auto(positive_int),
        metavar="N|auto",
        help="images at once on a process, in place of --gradient-accumulation-steps; auto: the most that fits on the "
        "GPU, found by a few steps (a run resumed on as many processes keeps what was found)",
    )
    group.add_argument("--epochs", type=positive_int, default=epochs, metavar="N", help="passes over the data")
    group.add_argument(
        "--max-train-steps",
        type=positive_int,
        metavar="N",
        help="steps, instead of --epochs (default: epochs · images / batch-size)",
    )
    group.add_argument(
        "--lr-schedule",
        choices=SCHEDULES,
        default="constant",
        help="after the warm-up; linear, cosine: it falls until the last step",
    )
    group.add_argument("--warmup-steps", type=non_negative_int, default=0, metavar="N", help="linear warm-up, steps")
    group.add_argument(
        "--lr-hold-steps",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="steps after the warm-up before it falls",
    )
    group.add_argument(
        "--lr-decay-until",
        type=positive_int,
        metavar="N",
        help="step at which it has fallen, within the training or beyond (default: the last)",
    )
    group.add_argument(
        "--lr-floor", type=fraction, default=0.0, metavar="X", help="share of the rate that is left in the end"
    )
    group.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help="of all networks but the discriminator; muon: Muon for matrices and convolutions, AdamW for the rest, at "
        "one learning rate (a small VAE from scratch learns several times faster)",
    )
    group.add_argument("--adam-beta1", type=fraction_below_one, default=0.9, metavar="X", help="AdamW's first beta")
    group.add_argument("--adam-beta2", type=fraction_below_one, default=0.999, metavar="X", help="AdamW's second beta")
    group.add_argument("--adam-weight-decay", type=non_negative_float, default=0.0, metavar="X", help="AdamW's decay")
    group.add_argument("--adam-epsilon", type=non_negative_float, default=1e-8, metavar="X", help="AdamW's epsilon")
    group.add_argument(
        "--max-grad-norm",
        type=non_negative_float,
        default=1.0,
        metavar="X",
        help="2-norm to which gradients are clipped, for each optimizer; 0: they are not clipped",
    )


def add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("precision and speed")
    group.add_argument(
        "--mixed-precision",
        choices=("auto", "no", "bf16", "fp16"),
        default="auto",
        help="auto: bf16 on CUDA devices that have it, else no (float32)",
    )
    group.add_argument(
        "--allow-tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 on Ampere and up"
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile the networks; the first step takes longer (default: on CUDA)",
    )
    group.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="convolution weights in NHWC order (default: on a CPU, and with --compile, where it is faster)",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations in the backward pass: less memory, more time",
    )


def add_interval_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("logging, validation and checkpoints")
    group.add_argument(
        "--log-steps", type=positive_int, default=100, metavar="N", help="steps between lines of metrics.jsonl"
    )
    group.add_argument("--val-steps", type=positive_int, default=5000, metavar="N", help="steps between validations")
    group.add_argument(
        "--max-val-images", type=positive_int, default=1000, metavar="N", help="images used in a validation"
    )
    group.add_argument(
        "--sampling-steps", type=positive_int, default=10000, metavar="N", help="steps between image grids"
    )
    group.add_argument(
        "--checkpointing-steps", type=positive_int, default=10000, metavar="N", help="steps between checkpoints"
    )
    group.add_argument(
        "--keep-checkpoints", type=positive_int, default=2, metavar="N", help="newest checkpoints, kept whole"
    )
    group.add_argument(
        "--milestone-steps",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="keep the weights of every N steps for good; 0: never",
    )
    group.add_argument(
        "--report-to",
        choices=("wandb", "tensorboard", "none"),
        default="none",
        help="tracker in addition to metrics.jsonl; wandb without a key runs offline",
    )


def run_folder(args: argparse.Namespace) -> Path:
    """The folder that --exp-name or --continue-train-exp-dir means."""
    if args.continue_train_exp_dir:
        folder = Path(args.continue_train_exp_dir)
        if not (folder / "args.json").is_file():
            raise UserError(f"--continue-train-exp-dir {folder} is not a run: it has no args.json")
        return folder
    return named_folder(args)


def named_folder(args: argparse.Namespace) -> Path:
    """The folder that --exp-name means."""
    if not args.exp_name:
        raise UserError("--exp-name is needed: the name of the run's folder in --output-dir")
    if Path(args.exp_name).name != args.exp_name or args.exp_name in (".", ".."):
        raise UserError(f"--exp-name {args.exp_name} is a path; give a name, and the folder with --output-dir")
    folder = Path(args.output_dir) / args.exp_name
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --exp-name")
    return folder


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse combinations of the shared flags that cannot be meant."""
    check_rate_schedule(args, args.max_train_steps)
    if args.random_weights and not args.dry_run:
        raise UserError("--random-weights is for --dry-run: a random VFM or LPIPS teaches nothing")
    if getattr(args, "posthoc_steps", None) and args.posthoc_ema == averages.NO_LENGTHS:
        raise UserError("--posthoc-steps is for --posthoc-ema: add it, or leave the flag out")
    for name in ("milestone_steps", "posthoc_steps"):
        steps = getattr(args, name, None) or 0
        if steps % args.checkpointing_steps:
            raise UserError(
                f"{flag_of(name)} {steps} is not a multiple of --checkpointing-steps {args.checkpointing_steps}"
            )
    if getattr(args, "posthoc_ema", averages.NO_LENGTHS) != averages.NO_LENGTHS:
        args.posthoc_steps = args.posthoc_steps or args.checkpointing_steps
    if getattr(args, "guide_coeff", 1) != 1 and not args.guide_depth:
        raise UserError("--guide-coeff is for --guide-depth: add that, or leave it out")
    if getattr(args, "cfg_prob", None) == 0:  # without a null class there is nothing to guide with
        args.grid_cfg_scale = 1.0


def add_feature_arguments(group: argparse._ArgumentGroup) -> None:
    """Where VFM features come from, and how they are scaled."""
    group.add_argument(
        "--cached-features",
        metavar="NAME",
        help="read the VFM's features from this latent cache of --data-dir (cache_latents.py --cache-features, of any "
        "VAE) instead of computing them at every step: for small sets",
    )
    group.add_argument(
        "--feature-norm",
        choices=FEATURE_NORMS,
        default="none",
        help="align with standardised features: each channel, or each channel of each token, has zero mean and unit "
        "variance over the training's first images (for VFMs whose features are much alike for all images, see "
        "val/constant_cosine); spatial: each channel over the tokens of its image, as iREPA",
    )


def add_alignment_schedule_arguments(group: argparse._ArgumentGroup) -> None:
    """How the weight of what is aligned changes; see ``training.alignment_schedule``."""
    group.add_argument(
        "--align-schedule",
        choices=ALIGN_SCHEDULES,
        default="constant",
        help="the alignment's weight: constant, or to 0 on a straight line or half a cosine",
    )
    group.add_argument(
        "--align-until",
        type=positive_int,
        metavar="N",
        help="it is 0 from step N on (HASTE); of a denoiser, nothing is read or computed for it then (default: "
        "constant: never, else: the last step)",
    )


def check_rate_schedule(args: argparse.Namespace, max_steps: int | None = None) -> None:
    """Refuse a fall of what stays constant, and one that ends before it begins, as far as the steps are known."""
    if args.lr_schedule == "constant":
        for name in ("lr_hold_steps", "lr_decay_until", "lr_floor"):
            if getattr(args, name):
                raise UserError(
                    f"{flag_of(name)}: the learning rate stays constant; leave it out, or give --lr-schedule linear or "
                    "cosine"
                )
    first = args.warmup_steps + args.lr_hold_steps
    if args.lr_decay_until is not None and args.lr_decay_until <= first:
        raise UserError(f"--lr-decay-until {args.lr_decay_until}: the rate begins to fall at step {first}; give more")
    if args.lr_hold_steps and args.lr_decay_until is None and max_steps is not None and max_steps <= first:
        raise UserError(
            f"--lr-hold-steps {args.lr_hold_steps}: in {max_steps} steps the rate would not fall; give fewer"
        )


def check_denoiser_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags of another kind of denoiser than ``--model``'s, and of SPRINT without it; settle SPRINT's and
    what is predicted."""
    kind = denoiser_kind(args.model)
    own = kind.own_flags()
    for name in sorted({name for kind in DENOISERS.values() for name in kind.own_flags()} - own):
        if getattr(args, name) != parser.get_default(name):
            names = "; ".join(kind.names for kind in DENOISERS.values() if name in kind.own_flags())
            raise UserError(
                f"{flag_of(name)} belongs to --model {names}, not to {args.model}: leave it out, or choose such a model"
            )
    vars(args).update(kind.always)
    args.prediction = args.prediction or kind.prediction
    if args.prediction == "x" and args.path_type != "linear":
        raise UserError(
            f"--path-type {args.path_type}: with predicted data (--prediction x) the velocity is that of the linear "
            "path: leave it out, or give --prediction v"
        )
    if args.weighting != "lognormal" and (args.time_mean, args.time_std) != (0, 1):
        raise UserError(f"--time-mean and --time-std are of --weighting lognormal, not of {args.weighting}: give that")
    settle_token_drop(args)


def check_feature_arguments(
    args: argparse.Namespace, is_aligned: bool, without: str, needs_class_token: bool = False, needs_vfm: bool = False
) -> None:
    """Refuse the flags of features that nothing asks for; ``without`` is the flag that switched them off."""
    unused = {
        "--cached-features": args.cached_features is not None and not (is_aligned or needs_class_token),
        "--feature-norm": args.feature_norm != "none" and not is_aligned,
        "--enc-ckpt": args.enc_ckpt and not (is_aligned or needs_class_token or needs_vfm),
    }
    for flag, is_unused in unused.items():
        if is_unused:
            raise UserError(f"{flag} with {without}: nothing asks for features; leave {flag} out")


def check_alignment_schedule(args: argparse.Namespace, is_aligned: bool, without: str) -> None:
    """Refuse a schedule of nothing; ``without`` is the flag that switched the alignment off."""
    for flag, is_given in (
        ("--align-until", args.align_until is not None),
        ("--align-schedule", args.align_schedule != "constant"),
    ):
        if is_given and not is_aligned:
            raise UserError(f"{flag} with {without}: nothing is aligned; leave {flag} out")


def check_image_arguments(args: argparse.Namespace) -> None:
    """What trains on images needs some."""
    args.data_dir = args.data_dir or (None if args.dry_run else default_data_dir())
    if not args.dry_run and not args.data_dir:
        raise UserError("--data-dir is needed: a packed dataset (preprocessing.py) or a tree of class folders")


def settle_micro_batch(args: argparse.Namespace, processes: int) -> None:
    """Make ``--micro-batch-size N`` accumulation steps; ``auto`` is settled by trial (``training.micro_batch``).

    Raises:
        UserError: the batch has no whole number of such parts, or another accumulation is given too.
    """
    if args.micro_batch_size == "auto" and args.gradient_accumulation_steps != 1:
        args.micro_batch_size = None  # auto is a wrapper's, accumulation the user's: nothing is left to find
    if args.micro_batch_size is None:
        return
    if args.batch_size % processes:
        raise UserError(
            f"--batch-size {args.batch_size} cannot be shared evenly by {processes} processes: choose another one, or "
            "another number of processes"
        )
    share = args.batch_size // processes
    if args.micro_batch_size == "auto":
        return
    if args.gradient_accumulation_steps != 1:
        raise UserError(
            f"--gradient-accumulation-steps {args.gradient_accumulation_steps} follows from --micro-batch-size "
            f"{args.micro_batch_size}: give one of them"
        )
    if share % args.micro_batch_size:
        raise UserError(
            f"--micro-batch-size {args.micro_batch_size} does not divide the {share} images of each process "
            f"(--batch-size {args.batch_size} on {processes}); take one of {', '.join(map(str, divisors(share)))}"
        )
    args.gradient_accumulation_steps = share // args.micro_batch_size


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def resolve_max_steps(args: argparse.Namespace, images: int) -> int:
    """--max-train-steps, or the whole steps in --epochs."""
    steps = args.max_train_steps or args.epochs * images // args.batch_size
    if steps < 1:
        raise UserError(f"--epochs {args.epochs} of {images} images are less than one batch of {args.batch_size}")
    check_rate_schedule(args, steps)
    return steps
