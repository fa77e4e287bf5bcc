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
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch
from accelerate import Accelerator

from dataset.images import DEFAULT_RESOLUTION, ImageDataset
from dataset.loader import ImageBatch, LabelledImages
from errors import UserError
from formats.arguments import add_encoder_arguments, add_vae_source_arguments
from formats.vae import build_autoencoder
from loss.vae_objective import VAELossConfig, load_loss_config
from models.denoisers.sit import SiT, SiTConfig
from models.encoders import encoder_names, encoder_spec
from models.tokenizers.kl import Autoencoder
from runtime.cli import ArgumentParser, fraction, non_negative_float, positive_int, run
from training import arguments, dry_run
from training.data import open_image_data
from training.ema import EMA
from training.ldm import LDMTrainer
from training.networks import (
    build_discriminator,
    build_objective,
    build_optimizer,
    build_token_encoders,
    compile_networks,
)
from training.repae import RepaeTrainer
from training.repae_task import RepaeTask
from training.run import build_accelerator, set_numerics
from training.sendvae import SendVAE, SendVAETrainer
from training.sendvae_task import build_sendvae_task, initialise_statistics
from training.session import Job, dry_run_batch_size, train


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="train_repae.py", usage="%(prog)s --exp-name NAME --data-dir DIR [flags]", description=__doc__
    )
    arguments.add_run_arguments(parser)
    arguments.add_data_arguments(parser)
    add_vae_arguments(parser)
    arguments.add_sit_arguments(parser, model="SiT-XL/2")
    add_alignment_arguments(parser)
    arguments.add_schedule_arguments(parser, batch_size=256, epochs=80)
    arguments.add_speed_arguments(parser)
    arguments.add_interval_arguments(parser)
    arguments.add_grid_arguments(parser)
    args = parser.parse_args(argv)
    arguments.check_arguments(args)
    if not args.dry_run and not args.data_dir:
        raise UserError("--data-dir is needed: a packed dataset (preprocessing.py) or a tree of class folders")
    return args


def add_vae_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("VAE and its losses")
    add_vae_source_arguments(group, default="f8d4")
    group.add_argument("--vae-learning-rate", type=non_negative_float, default=1e-4, metavar="X", help="of the VAE")
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
    group.add_argument(
        "--proj-coeff", type=non_negative_float, default=0.5, metavar="X", help="weight of REPA in the SiT's loss"
    )
    group.add_argument(
        "--encoder-depth", type=positive_int, default=8, metavar="N", help="block whose output is aligned, from 1"
    )
    add_encoder_arguments(group, default="dinov2-vit-b")
    group.add_argument(
        "--projector-width", type=positive_int, default=2048, metavar="N", help="hidden width of the projectors"
    )
    group.add_argument(
        "--bn-momentum", type=fraction, default=0.1, metavar="X", help="of the latent statistics, a step"
    )


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    folder = None if args.dry_run else arguments.run_folder(args)
    loss_config = load_loss_config(args.loss_cfg_path, args.loss_override)
    accelerator = build_accelerator(args.mixed_precision, args.report_to, folder)
    set_numerics(args.seed, args.allow_tf32, args.deterministic)
    images, held_out = open_image_data(args, accelerator)
    autoencoder, statistics = build_autoencoder(args.vae, args.vae_ckpt, args.vae_latents_stats)
    config = resolve(args, accelerator, images, held_out, autoencoder)
    if args.dry_run:
        dry_run_step(args, build_trainer(args, loss_config, config, autoencoder, accelerator), images)
        return 0

    def build() -> RepaeTask:
        trainer = build_trainer(args, loss_config, config, autoencoder, accelerator)
        return build_task(args, trainer, images, held_out)

    def begin(task: RepaeTask) -> None:
        if statistics is None:
            initialise_statistics(args, task.trainer.vae, images)
            task.trainer.start_averages()

    job = Job(
        project="sendvae-repae",
        dataset=LabelledImages(images),
        build=build,
        begin=begin,
        describe=lambda task: describe(args, config, task.trainer, images),
        products=("vae",),
    )
    return train(args, vars(args) | {"loss": asdict(loss_config)}, folder, job, accelerator)


def resolve(
    args: argparse.Namespace,
    accelerator: Accelerator,
    images: ImageDataset | None,
    held_out: ImageDataset | None,
    autoencoder: Autoencoder,
) -> SiTConfig:
    """Replace every default that depends on the data, so that ``args.json`` and checkpoints say what was done."""
    args.mixed_precision = accelerator.mixed_precision
    if args.channels_last is None:
        args.channels_last = accelerator.device.type == "cpu"
    args.resolution = images.resolution if images is not None else args.resolution or DEFAULT_RESOLUTION
    channels, side, _ = autoencoder.latent_shape(args.resolution)
    aligned_with = encoder_names(args.enc_type) if args.proj_coeff or args.vae_align_proj_coeff else ()
    config = SiTConfig(
        model=args.model,
        latent_channels=channels,
        latent_size=side,
        num_classes=dry_run.NUM_CLASSES if images is None else len(images.class_names),
        qk_norm=args.qk_norm,
        encoder_depth=args.encoder_depth,
        feature_dims=tuple(encoder_spec(name).embed_dim for name in aligned_with),
        projector_width=args.projector_width,
    )
    config.check()
    args.sit = config.to_dict()
    args.vae_config = autoencoder.architecture
    if images is not None:
        if held_out is not None and held_out.class_names != images.class_names:
            raise UserError(f"--val-data-dir {args.val_data_dir} has other classes than --data-dir; give the same ones")
        args.class_names = images.class_names
        args.data_fingerprint = images.fingerprint()
        if not args.dry_run:
            args.max_train_steps = arguments.resolve_max_steps(args, len(images))
    return config


def build_trainer(
    args: argparse.Namespace,
    loss_config: VAELossConfig,
    config: SiTConfig,
    autoencoder: Autoencoder,
    accelerator: Accelerator,
) -> RepaeTrainer:
    """Build every network and optimizer, in two halves that share the latent statistics."""
    vae = build_vae_trainer(args, loss_config, autoencoder, accelerator)
    sit = build_sit_trainer(args, config, vae, accelerator)
    if args.compile:
        networks = (vae.discriminator, vae.objective.perceptual, sit.model, *(sit.encoders or ()))
        compile_networks(autoencoder, *networks)
    return RepaeTrainer(vae, sit, EMA(vae.statistics, args.ema_decay) if args.ema_decay else None)


def build_vae_trainer(
    args: argparse.Namespace, loss_config: VAELossConfig, autoencoder: Autoencoder, accelerator: Accelerator
) -> SendVAETrainer:
    """The VAE's half: its own losses, to which the alignment through the SiT is added at every step."""
    device = accelerator.device
    model = SendVAE(autoencoder, mapper=None).to(device).train()
    discriminator = build_discriminator(args, loss_config)
    if discriminator is not None:
        discriminator.to(device).train()
    objective = build_objective(args, loss_config, accelerator).to(device)
    if args.gradient_checkpointing:
        autoencoder.network.enable_gradient_checkpointing()
    if args.channels_last:
        for network in (autoencoder, discriminator, objective.perceptual):
            if network is not None:
                network.to(memory_format=torch.channels_last)
    return SendVAETrainer(
        model,
        objective,
        discriminator,
        encoders=(),
        align_coeff=args.vae_align_proj_coeff,
        bn_momentum=args.bn_momentum,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        optimizer=build_optimizer(args, model),
        disc_optimizer=None if discriminator is None else build_optimizer(args, discriminator),
        ema=None,
        accelerator=accelerator,
    )


def build_sit_trainer(
    args: argparse.Namespace, config: SiTConfig, vae: SendVAETrainer, accelerator: Accelerator
) -> LDMTrainer:
    """The SiT's half, with the VFMs."""
    torch.manual_seed(args.seed)
    model = SiT(config).to(accelerator.device).train()
    model.gradient_checkpointing = args.gradient_checkpointing
    encoders = build_token_encoders(args, config.grid, accelerator) if config.feature_dims else None
    return LDMTrainer(
        model,
        vae.statistics,
        encoders,
        encoder_names=[encoder.name for encoder in encoders or ()],
        proj_coeff=args.proj_coeff,
        cfg_prob=args.cfg_prob,
        path_type=args.path_type,
        weighting=args.weighting,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        optimizer=build_optimizer(args, model),
        ema=EMA(model, args.ema_decay) if args.ema_decay else None,
        accelerator=accelerator,
    )


def build_task(
    args: argparse.Namespace, trainer: RepaeTrainer, images: ImageDataset, held_out: ImageDataset | None
) -> RepaeTask:
    vae_task = build_sendvae_task(args, trainer.vae, images, held_out)
    return RepaeTask(
        trainer,
        vae_task,
        rate=args.learning_rate,
        grid_steps=args.grid_steps,
        grid_cfg_scale=args.grid_cfg_scale,
    )


def describe(args: argparse.Namespace, config: SiTConfig, trainer: RepaeTrainer, images: ImageDataset) -> list[str]:
    """The resolved sizes, for the log."""
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    lines = [
        f"{len(images)} images at {args.resolution} px, {config.num_classes} classes, latents {shape}",
        f"{config.model}: {config.size.depth} blocks of {config.size.width}, {config.grid}×{config.grid} tokens",
        f"loss of the VAE {trainer.vae.objective.config}",
    ]
    if config.feature_dims:
        lines.append(
            f"aligned after block {config.encoder_depth} with {args.enc_type}: the SiT with weight {args.proj_coeff}, "
            f"the VAE with {args.vae_align_proj_coeff}"
        )
    return lines


def dry_run_step(args: argparse.Namespace, trainer: RepaeTrainer, images: ImageDataset | None) -> None:
    """Two steps at the real shapes: a small batch on each process, of real images where there are some."""
    accelerator = trainer.accelerator
    count = dry_run_batch_size(args, accelerator)
    pixels = torch.randint(0, 256, (count, 3, args.resolution, args.resolution), dtype=torch.uint8)
    labels = torch.tensor([0, args.sit["num_classes"] - 1][:count])
    if images is not None:
        items = [0, len(images) - 1][:count]
        images.read_into(items, pixels.numpy())
        labels = torch.from_numpy(images.labels[items])
    networks = {
        "VAE": trainer.vae.model.autoencoder,
        "discriminator": trainer.vae.discriminator,
        args.model: trainer.sit.model,
        **{f"VFM {encoder.name}": encoder for encoder in trainer.sit.encoders or ()},
        "LPIPS": trainer.vae.objective.perceptual,
    }
    rates = {"lr": args.learning_rate, "vae_lr": args.vae_learning_rate, "disc_lr": args.disc_learning_rate}
    start_step = trainer.vae.objective.config.discriminator_start  # so that the discriminator takes part
    dry_run.report(
        networks,
        lambda number: trainer.step(start_step + number, [ImageBatch(pixels, labels)], rates),
        count * accelerator.num_processes,
        accelerator.device,
        shown=accelerator.is_main_process,
    )


if __name__ == "__main__":
    sys.exit(run(main))
