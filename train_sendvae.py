"""Stage 1: fine-tune a VAE so that a small mapper predicts frozen VFM features from its noisy latents.

  python train_sendvae.py --exp-name sendvae --data-dir data/imagenet256 --vae f16d32 --vae-ckpt pretrained/vavae

Writes exps/NAME with checkpoints, metrics.jsonl, reconstruction grids and, at the end, vae/: a diffusers folder with
its latent statistics. The same command resumes exactly where the run stopped; SIGTERM and SIGUSR1 save and stop. Runs
under python, torchrun and accelerate launch. Exit codes: 0 finished, 1 training failed, 2 wrong input, 128 + n stopped
by signal n (a launcher of several processes makes 1 of it).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from diffusion import PATH_TYPES
from errors import UserError
from formats.arguments import add_encoder_arguments, add_vae_source_arguments
from loss.alignment import TOKENIZER_ALIGNMENTS, settle_arguments
from runtime.cli import ArgumentParser, answer_early, fraction, non_negative_float, positive_int, run
from training import arguments


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="train_sendvae.py", usage="%(prog)s --exp-name NAME --data-dir DIR [flags]", description=__doc__
    )
    arguments.add_run_arguments(parser)
    arguments.add_data_arguments(parser)
    add_vae_arguments(parser)
    add_alignment_arguments(parser)
    arguments.add_schedule_arguments(parser, batch_size=1024, epochs=80)
    arguments.add_speed_arguments(parser)
    arguments.add_interval_arguments(parser)
    args = parser.parse_args(argv)
    arguments.check_arguments(args)
    arguments.check_image_arguments(args)
    settle_arguments(args, [args.align_loss], TOKENIZER_ALIGNMENTS, "--align-loss")
    settle_compilation(args)
    args.weighting = args.noise_times or "uniform"  # what times are drawn of
    sees_features = args.align_coeff and TOKENIZER_ALIGNMENTS[args.align_loss].needs_features
    without = f"--align-loss {args.align_loss}" if args.align_coeff else "--align-coeff 0"
    arguments.check_feature_arguments(args, bool(sees_features), without, needs_vfm=starts_from_vfm(args))
    arguments.check_alignment_schedule(args, bool(args.align_coeff), "--align-coeff 0")
    check_decoder_arguments(args)
    if args.freeze_vae and not args.align_coeff:
        raise UserError("--freeze-vae with --align-coeff 0 leaves nothing to train")
    if args.freeze_vae and args.align_until is not None:
        raise UserError("--freeze-vae with --align-until leaves nothing to train from then on; leave one of them out")
    if args.freeze_vae and not TOKENIZER_ALIGNMENTS[args.align_loss].trains_alone:
        raise UserError(
            f"--freeze-vae with --align-loss {args.align_loss}: that alignment needs a VAE that trains; take "
            "--align-loss cosine"
        )
    return args


def check_decoder_arguments(args: argparse.Namespace) -> None:
    """Refuse what a decoder cannot be trained with."""
    for flag, is_given in (("--freeze-encoder", args.freeze_encoder), ("--latent-noise", args.latent_noise)):
        if is_given and args.freeze_vae:
            raise UserError(f"{flag} with --freeze-vae: nothing is decoded; leave one of them out")
    if args.freeze_encoder and args.align_coeff:
        raise UserError("--freeze-encoder keeps the latents, which an alignment would change: add --align-coeff 0")


def starts_from_vfm(args: argparse.Namespace) -> bool:
    """Whether a decoder is trained from scratch: for an encoder that comes with weights of its own."""
    return args.freeze_encoder and args.vae_ckpt == "none"


def settle_compilation(args: argparse.Namespace) -> None:
    """Compile nothing where images have another size in every step."""
    if TOKENIZER_ALIGNMENTS[args.align_loss].keeps_size:
        return
    if args.compile:
        raise UserError(
            f"--compile: --align-loss {args.align_loss} changes the size of images, and each would be compiled; leave "
            "it out"
        )
    args.compile = False


def add_vae_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("VAE and its losses")
    add_vae_source_arguments(group, default="f16d32")
    group.add_argument(
        "--freeze-vae",
        action="store_true",
        help="train the mapper alone, to see how well the features can be read from a VAE as it is",
    )
    group.add_argument(
        "--freeze-encoder",
        action="store_true",
        help="train the decoder alone: latents stay what they are, so that caches and diffusion transformers of this "
        "VAE stay valid (generate.py --decoder); with --align-coeff 0",
    )
    group.add_argument(
        "--latent-noise",
        type=non_negative_float,
        default=0.0,
        metavar="X",
        help="the decoder sees latents with noise, of a standard deviation drawn for each image as |N(0, X²)| in units "
        "of the normalised latent, as generated ones have faults (RAE: 0.8); 0: none",
    )
    group.add_argument(
        "--vae-learning-rate",
        type=non_negative_float,
        default=3e-4,
        metavar="X",
        help="learning rate of VAE and mapper",
    )
    arguments.add_vae_loss_arguments(group)
    group.add_argument(
        "--ema-decay",
        type=fraction,
        default=0.0,
        metavar="X",
        help="average the VAE's weights, e.g. 0.9999; vae/ then holds the average; 0: no EMA",
    )


def add_alignment_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("alignment")
    add_encoder_arguments(group, default="dinov2-vit-b")
    arguments.add_feature_arguments(group)
    arguments.add_alignment_schedule_arguments(group)
    group.add_argument(
        "--align-coeff",
        type=non_negative_float,
        default=1.0,
        metavar="X",
        help="weight of the alignment loss; 0: plain VAE training, no VFM is loaded",
    )
    group.add_argument(
        "--align-loss",
        choices=tuple(TOKENIZER_ALIGNMENTS),
        default="cosine",
        help="cosine: Send-VAE's, through the mapper; vf: VA-VAE's marginal cosine and distance matrix of the "
        "projected latent itself, without mapper and noise; equivariance: EQ-VAE's, latents that are scaled and turned "
        "must decode to images that are, without a VFM",
    )
    group.add_argument(
        "--mapper-grid",
        type=positive_int,
        metavar="N",
        help="VFM tokens along a side; divides the latent's side (default: resolution / 16; vf: the latent's side)",
    )
    group.add_argument("--path-type", choices=PATH_TYPES, default="linear", help="how noise is mixed in")
    group.add_argument(
        "--bn-momentum", type=fraction, default=0.1, metavar="X", help="momentum of the running latent statistics"
    )
    for alignment in TOKENIZER_ALIGNMENTS.values():
        alignment.add_arguments(group)


if __name__ == "__main__":
    answer_early(parse_arguments)

import torch
from accelerate import Accelerator

from dataset.images import DEFAULT_RESOLUTION, ImageDataset
from dataset.loader import LabelledImages
from formats.vae import load_tokenizer
from loss.alignment import TokenizerAlignment
from loss.vae_objective import VAELossConfig, load_loss_config
from models.encoders import Encoder
from models.tokenizers import Tokenizer
from runtime import NUM_CLASSES
from runtime.processes import goes_first
from training import dry_run
from training.alignment_schedule import settle_alignment_schedule
from training.data import measure_features, measure_statistics, open_features, open_image_data
from training.loop import Loop
from training.micro_batch import Trial
from training.networks import build_objective, build_sendvae, build_vfms, compile_networks, token_grids
from training.run import begin, open_run
from training.sendvae import SendVAE


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    folder = None if args.dry_run else arguments.run_folder(args)
    loss_config = load_loss_config(args.loss_cfg_path, args.loss_override)
    accelerator = begin(args, folder)
    images, held_out = open_image_data(args, accelerator)
    resolve(args, images)
    trial = Trial(
        build=lambda: build(args, loss_config, accelerator)[0],
        batch_of=lambda method, count: dry_run.image_batch(images, count, args.resolution, NUM_CLASSES),
        step=loss_config.discriminator_start,  # so that the discriminator takes part
        build_largest=lambda: build(untransformed(args), loss_config, accelerator)[0],
    )
    if args.dry_run:
        dry_run.dry_run(args, accelerator, trial)
        return 0
    with open_run(folder, accelerator, args, loss=asdict(loss_config)) as this_run:
        checkpoint = this_run.checkpoint(args.resume_step)
        start_step = 0 if checkpoint is None else checkpoint.step
        if this_run.is_finished(start_step):
            return 0
        trial.find_for_run(args, this_run, checkpoint)
        method, statistics = build(args, loss_config, accelerator, is_new=checkpoint is None)
        method.watch(images, held_out)
        source = LabelledImages(images) if args.cached_features is None else open_features(args, images, method)
        with Loop(method, this_run, source, args, start_step) as loop:
            if checkpoint is not None:
                loop.restore(checkpoint)
            else:
                if statistics is None:
                    measure_statistics(method, images)
                measure_features(method, source)
            this_run.start(start_step)
            this_run.start_trackers("sendvae")
            this_run.describe(args, describe(args, method, images), start_step)
            return loop.fit()


def resolve(args: argparse.Namespace, images: ImageDataset | None) -> None:
    """Replace every default that depends on the data, so that ``args.json`` says what was done."""
    args.resolution = images.resolution if images is not None else args.resolution or DEFAULT_RESOLUTION
    TOKENIZER_ALIGNMENTS[args.align_loss].resolve_arguments(args)
    if images is not None:
        args.data_fingerprint = images.fingerprint()
        if not args.dry_run:
            args.max_train_steps = arguments.resolve_max_steps(args, len(images))
    settle_alignment_schedule(args)


def untransformed(args: argparse.Namespace) -> argparse.Namespace:
    """The same training with whole images, which need most memory, where their size changes from step to step."""
    if TOKENIZER_ALIGNMENTS[args.align_loss].keeps_size:
        return args
    return argparse.Namespace(**vars(args) | {"align_coeff": 0.0})


def build(
    args: argparse.Namespace, loss_config: VAELossConfig, accelerator: Accelerator, is_new: bool = False
) -> tuple[SendVAE, str | None]:
    """Everything that is trained; also answers where the VAE's latent statistics come from, if it has any.

    ``is_new``: whether the training begins with it; else a checkpoint is loaded into it, or nothing.
    """
    if args.freeze_vae:  # nothing to reconstruct
        loss_config = VAELossConfig(perceptual_weight=0.0, discriminator_weight=0.0)
    tokenizer, statistics = load_tokenizer(args.vae, args.vae_ckpt, args.vae_latents_stats)
    if not args.freeze_vae:
        tokenizer.check_trainable(encoder=not args.freeze_encoder)
    if is_new and starts_from_vfm(args):
        with goes_first(accelerator.is_local_main_process):  # who downloads; the others find the file in the cache
            tokenizer.load_pretrained_encoder(args.enc_ckpt)
    alignment, encoders = build_alignment(args, tokenizer.latent_shape(args.resolution), accelerator)
    objective, discriminator = build_objective(args, loss_config, accelerator, smallest_images(args, tokenizer))
    networks = tokenizer, alignment, encoders, objective, discriminator
    method = build_sendvae(args, accelerator, *networks, ema_decay=args.ema_decay)
    if not TOKENIZER_ALIGNMENTS[args.align_loss].keeps_size:
        torch.backends.cudnn.benchmark = False  # it would try kernels for each size anew
    if args.compile:
        compile_networks(tokenizer, *encoders, objective.perceptual, discriminator)
    return method, statistics


def smallest_images(args: argparse.Namespace, tokenizer: Tokenizer) -> int:
    """The side of the smallest images that are reconstructed, pixels."""
    kind, side = TOKENIZER_ALIGNMENTS[args.align_loss], tokenizer.latent_shape(args.resolution)[1]
    if tokenizer.packing > 1 and not kind.keeps_size:
        raise UserError(
            f"--align-loss {args.align_loss} moves positions of the latent, and --vae {args.vae} holds some in its "
            "channels: take another VAE, or another --align-loss"
        )
    return args.resolution * kind.smallest_side(args, side) // side


def build_alignment(
    args: argparse.Namespace, latent_shape: tuple[int, int, int], accelerator: Accelerator
) -> tuple[TokenizerAlignment | None, list[Encoder]]:
    """The alignment of ``--align-loss`` and the VFMs that it compares with; neither with weight 0."""
    if not args.align_coeff:
        return None, []
    kind = TOKENIZER_ALIGNMENTS[args.align_loss]
    grid = kind.features_grid(args, latent_shape[1]) if kind.needs_features else None
    if args.mapper_grid not in (None, grid):
        compared = "compares with no features" if grid is None else f"compares on {grid}×{grid} tokens"
        raise UserError(
            f"--mapper-grid {args.mapper_grid}: --align-loss {args.align_loss} {compared}: leave the flag out"
        )
    encoders = [] if grid is None else build_vfms(args, grid, accelerator)
    return kind.from_arguments(args, latent_shape, token_grids(encoders)), encoders


def describe(args: argparse.Namespace, method: SendVAE, images: ImageDataset) -> list[str]:
    """The resolved sizes, for the log."""
    return [
        f"{len(images)} images at {args.resolution} px, {len(images.class_names)} classes",
        f"latents {method.tokenizer.latent_shape(args.resolution)}, loss {method.objective.config}",
        *(["the decoder is trained alone: latents and their statistics stay"] if args.freeze_encoder else []),
        *([f"noise on what is decoded: |N(0, {args.latent_noise:g}²)|"] if args.latent_noise else []),
        *([] if method.alignment is None else method.alignment.describe()),
    ]


if __name__ == "__main__":
    sys.exit(run(main))
