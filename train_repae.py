"""REPA-E (arXiv 2504.10483): train a VAE and a SiT together, both aligned with frozen VFM features.

  python train_repae.py --exp-name repae --data-dir data/imagenet256 --vae f8d4 --vae-ckpt pretrained/sdvae

The images are encoded anew at every step: no latent cache is needed. Of REPA, the SiT gets --proj-coeff, and through
the SiT's first blocks the VAE gets --vae-align-proj-coeff; the denoising loss never reaches the VAE. Writes exps/NAME
with checkpoints (SiT, its EMA, VAE, discriminator), metrics.jsonl, grids of samples and of reconstructions and, at the
end, vae/: the tuned VAE, a diffusers folder with its latent statistics. generate.py --exp-path exps/NAME samples the
SiT; cache_latents.py --vae exps/NAME/vae and train_ldm.py train another one on the tuned VAE. The same command resumes
exactly where the run stopped; SIGTERM and SIGUSR1 save and stop. Runs under python, torchrun and accelerate launch.
Exit codes: 0 finished, 1 training failed, 2 wrong input, 128 + n stopped by signal n (a launcher of several processes
makes 1 of it).
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from errors import UserError
from formats.arguments import add_encoder_arguments, add_vae_source_arguments
from loss.alignment import DENOISER_ALIGNMENTS, NONE, parse_sum, settle_arguments
from loss.alignment.flags import REPAFlags
from runtime.cli import ArgumentParser, answer_early, fraction, non_negative_float, run
from training import arguments


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="train_repae.py", usage="%(prog)s --exp-name NAME --data-dir DIR [flags]", description=__doc__
    )
    arguments.add_run_arguments(parser)
    arguments.add_data_arguments(parser)
    add_vae_arguments(parser)
    arguments.add_denoiser_arguments(parser, model="SiT-XL/2")
    add_alignment_arguments(parser)
    arguments.add_schedule_arguments(parser, batch_size=256, epochs=80)
    arguments.add_speed_arguments(parser)
    arguments.add_interval_arguments(parser)
    arguments.add_grid_arguments(parser)
    args = parser.parse_args(argv)
    args.freeze_vae = args.freeze_encoder = False
    args.latent_noise, args.align_schedule, args.align_until = 0.0, "constant", None
    arguments.check_arguments(args)
    arguments.check_denoiser_arguments(parser, args)
    arguments.check_image_arguments(args)
    settle_arguments(args, ["repa"], DENOISER_ALIGNMENTS, "--align")
    args.align = "repa" if args.proj_coeff or args.vae_align_proj_coeff else NONE
    arguments.check_feature_arguments(args, args.align != NONE, "--proj-coeff 0 --vae-align-proj-coeff 0")
    return args


def add_vae_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("VAE and its losses")
    add_vae_source_arguments(group, default="f8d4")
    group.add_argument(
        "--vae-learning-rate", type=non_negative_float, default=1e-4, metavar="X", help="learning rate of the VAE"
    )
    arguments.add_vae_loss_arguments(group)


def add_alignment_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("alignment (REPA) and latent statistics")
    group.add_argument(
        "--vae-align-proj-coeff",
        type=non_negative_float,
        default=1.5,
        metavar="X",
        help="weight of the alignment in the VAE's loss, through the frozen SiT; 0: the VAE trains by itself",
    )
    REPAFlags.add_arguments(group)
    add_encoder_arguments(group, default="dinov2-vit-b")
    arguments.add_feature_arguments(group)
    group.add_argument(
        "--bn-momentum", type=fraction, default=0.1, metavar="X", help="momentum of the running latent statistics"
    )


if __name__ == "__main__":
    answer_early(parse_arguments)

import torch
from accelerate import Accelerator

from dataset.images import DEFAULT_RESOLUTION, ImageDataset
from dataset.loader import LabelledImages
from diffusion.flow import settled_shift
from formats.vae import load_tokenizer
from loss.alignment.denoiser import ThroughDenoiser
from loss.vae_objective import VAELossConfig, load_loss_config
from models.denoisers import DenoiserConfig, denoiser_kind
from models.tokenizers import Tokenizer
from runtime import NUM_CLASSES
from training import dry_run
from training.data import measure_features, measure_statistics, open_features, open_image_data
from training.ldm import LDM, drawn_times
from training.loop import Loop
from training.micro_batch import Trial
from training.networks import (
    aligned,
    build_aligned_denoiser,
    build_objective,
    build_sendvae,
    build_vfms,
    compile_networks,
)
from training.repae import Repae
from training.run import begin, open_run
from training.token_drop import at_its_largest, check_token_drop, describe_token_drop


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    folder = None if args.dry_run else arguments.run_folder(args)
    loss_config = load_loss_config(args.loss_cfg_path, args.loss_override)
    accelerator = begin(args, folder)
    images, held_out = open_image_data(args, accelerator)
    tokenizer, statistics = load_tokenizer(args.vae, args.vae_ckpt, args.vae_latents_stats)
    tokenizer.check_trainable()
    config = resolve(args, images, held_out, tokenizer)
    trial = Trial(
        # a copy, because it is trained
        build=lambda: build(args, loss_config, config, copy.deepcopy(tokenizer), accelerator),
        batch_of=lambda method, count: dry_run.image_batch(images, count, args.resolution, config.num_classes),
        step=loss_config.discriminator_start,  # so that the discriminator takes part
        later=args.token_drop_until,
        build_largest=lambda: build(at_its_largest(args), loss_config, config, copy.deepcopy(tokenizer), accelerator),
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
        method = build(args, loss_config, config, tokenizer, accelerator)
        method.watch(images, held_out)
        source = LabelledImages(images) if args.cached_features is None else open_features(args, images, method.vae)
        with Loop(method, this_run, source, args, start_step) as loop:
            if checkpoint is not None:
                loop.restore(checkpoint)
            else:
                if statistics is None:
                    measure_statistics(method, images)
                measure_features(method.vae, source)
            this_run.start(start_step)
            this_run.start_trackers("sendvae-repae")
            this_run.describe(args, describe(args, method, images), start_step)
            return loop.fit()


def resolve(
    args: argparse.Namespace, images: ImageDataset | None, held_out: ImageDataset | None, tokenizer: Tokenizer
) -> DenoiserConfig:
    """Replace every default that depends on the data, so that ``args.json`` and checkpoints say what was done."""
    args.resolution = images.resolution if images is not None else args.resolution or DEFAULT_RESOLUTION
    channels, side, _ = tokenizer.latent_shape(args.resolution)
    config = denoiser_kind(args.model).from_arguments(
        args,
        model=args.model,
        latent_channels=channels,
        latent_size=side,
        num_classes=NUM_CLASSES if images is None else len(images.class_names),
    )
    args.denoiser, args.vae_config = config.to_dict(), tokenizer.architecture
    args.time_shift = settled_shift(args.time_shift, config.latent_shape)
    with torch.device("meta"):  # what does not fit the denoiser is refused
        denoiser = config.build()
        check_token_drop(args, denoiser.grid)
        vfms = aligned(args, parse_sum(args.align), denoiser).features
    args.feature_widths = [vfm.width for vfm in vfms]
    if images is not None:
        if held_out is not None and held_out.class_names != images.class_names:
            raise UserError(f"--val-data-dir {args.val_data_dir} has other classes than --data-dir; give the same ones")
        args.class_names = images.class_names
        args.data_fingerprint = images.fingerprint()
        if not args.dry_run:
            args.max_train_steps = arguments.resolve_max_steps(args, len(images))
    return config


def build(
    args: argparse.Namespace,
    loss_config: VAELossConfig,
    config: DenoiserConfig,
    tokenizer: Tokenizer,
    accelerator: Accelerator,
) -> Repae:
    """Everything that is trained: two halves on one tokenizer, aligned with the same VFMs."""
    objective, discriminator = build_objective(args, loss_config, accelerator, args.resolution)
    denoiser, alignment = build_aligned_denoiser(args, config, parse_sum(args.align), accelerator)
    encoders = build_vfms(args, denoiser.grid, accelerator) if alignment.needs_features else []
    through = None
    if args.vae_align_proj_coeff:
        weight = args.vae_align_proj_coeff
        through = ThroughDenoiser(denoiser, alignment["repa"], weight, partial(drawn_times, args), args.path_type)
    vae = build_sendvae(args, accelerator, tokenizer, through, encoders, objective, discriminator)
    method = Repae(vae, LDM(args, accelerator, denoiser, alignment, tokenizer, None))
    if args.compile:
        compile_networks(tokenizer, denoiser, *encoders, objective.perceptual, discriminator)
    return method


def describe(args: argparse.Namespace, method: Repae, images: ImageDataset) -> list[str]:
    """The resolved sizes, for the log."""
    denoiser, through = method.ldm.denoiser, method.vae.alignment
    return [
        f"{len(images)} images at {args.resolution} px, {denoiser.null_class} classes, latents {denoiser.latent_shape}",
        denoiser.describe(),
        *describe_token_drop(args, denoiser.config.sparse_blocks, denoiser.grid**2),
        f"loss of the VAE {method.vae.objective.config}",
        *method.ldm.alignment.describe(),
        *([] if through is None else through.describe()),
    ]


if __name__ == "__main__":
    sys.exit(run(main))
