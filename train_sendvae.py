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

import torch
from accelerate import Accelerator
from torch import nn

from dataset.images import ImageDataset, open_images
from dataset.loader import stage_dataset
from diffusion.flow import PATH_TYPES
from errors import UserError
from loss.perceptual import build_lpips
from loss.vae_objective import VAELossConfig, VAEObjective, load_loss_config
from models.autoencoder import Autoencoder, architecture_names, build_autoencoder
from models.discriminator import PatchDiscriminator, load_discriminator
from models.encoders import ENCODERS, Encoder, build_encoder
from models.mapper import Mapper
from training import arguments, dry_run
from training.cli import (
    ArgumentParser,
    fraction,
    non_negative_float,
    non_negative_int,
    positive_int,
    run,
)
from training.ema import EMA
from training.loop import Schedule
from training.optimizer import build_adamw
from training.run import build_accelerator, logger, set_numerics
from training.sendvae import SendVAE, SendVAETrainer
from training.sendvae_task import SendVAETask, measure_latent_statistics
from training.session import Job, build_loader, micro_batch_size, train


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
    if not args.dry_run and not args.data_dir:
        raise UserError("--data-dir is needed: a packed dataset (preprocessing.py) or a tree of class folders")
    if args.freeze_vae and not args.align_coeff:
        raise UserError("--freeze-vae with --align-coeff 0 leaves nothing to train")
    return args


def add_vae_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("VAE and its losses")
    group.add_argument(
        "--vae",
        default="f16d32",
        metavar="NAME",
        help=f"architecture ({', '.join(architecture_names())}) or a diffusers folder",
    )
    group.add_argument(
        "--vae-ckpt",
        metavar="DIR",
        help="diffusers folder with its weights; none: from scratch (default: the --vae folder)",
    )
    group.add_argument(
        "--freeze-vae",
        action="store_true",
        help="train the mapper alone: how well can a VAE that stays as it is be read?",
    )
    group.add_argument(
        "--vae-learning-rate", type=non_negative_float, default=3e-4, metavar="X", help="of VAE and mapper"
    )
    group.add_argument(
        "--disc-learning-rate", type=non_negative_float, default=1e-4, metavar="X", help="of the discriminator"
    )
    group.add_argument(
        "--disc-pretrained-ckpt", metavar="FILE", help="PatchGAN weights, .pt or .safetensors (default: random)"
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
        help="replace lines of that file, e.g. perceptual_weight=0 discriminator_start=5000",
    )
    group.add_argument("--lpips-ckpt", metavar="FILE", help="torchvision's VGG16 weights (default: torch's cache, hub)")
    group.add_argument(
        "--ema-decay",
        type=fraction,
        default=0.0,
        metavar="X",
        help="average the VAE's weights, e.g. 0.9999; vae/ then holds the average; 0: no EMA",
    )


def add_alignment_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("alignment")
    group.add_argument("--enc-type", default="dinov2-vit-b", metavar="NAME", help=f"frozen VFM: {', '.join(ENCODERS)}")
    group.add_argument("--enc-ckpt", metavar="FILE", help="its weights (default: $VFM_DIR, timm's cache, the hub)")
    group.add_argument(
        "--align-coeff",
        type=non_negative_float,
        default=1.0,
        metavar="X",
        help="weight of the alignment loss; 0: plain VAE training, no VFM is loaded",
    )
    group.add_argument("--mapper-depth", type=non_negative_int, default=1, metavar="N", help="ViT blocks; 0: MLP only")
    group.add_argument(
        "--mapper-grid",
        type=positive_int,
        metavar="N",
        help="VFM tokens along a side; divides the latent's side (default: resolution / 16)",
    )
    group.add_argument(
        "--noise-injection",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the mapper sees latents with noise of a random time",
    )
    group.add_argument("--path-type", choices=PATH_TYPES, default="linear", help="how noise is mixed in")
    group.add_argument(
        "--bn-momentum", type=fraction, default=0.1, metavar="X", help="of the latent statistics, a step"
    )


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    folder = None if args.dry_run else arguments.run_folder(args)
    loss_config = load_loss_config(args.loss_cfg_path, args.loss_override)
    accelerator = build_accelerator(args.mixed_precision, args.report_to, folder)
    set_numerics(args.seed, args.allow_tf32, args.deterministic)
    images, held_out = open_data(args, accelerator)
    resolve(args, accelerator, images)
    if args.dry_run:
        trainer, _ = build_trainer(args, loss_config, accelerator)
        dry_run_step(trainer, args, images, accelerator)
        return 0
    job = build_job(args, loss_config, images, held_out, accelerator)
    return train(args, vars(args) | {"loss": asdict(loss_config)}, folder, job, accelerator)


def open_data(args: argparse.Namespace, accelerator: Accelerator) -> tuple[ImageDataset | None, ImageDataset | None]:
    """Training and held-out images; None where they are not given (a dry run needs none)."""
    path = args.data_dir
    if path and args.stage_dir and not args.dry_run:
        if accelerator.is_local_main_process:
            stage_dataset(path, args.stage_dir)
        accelerator.wait_for_everyone()
        path = stage_dataset(path, args.stage_dir)
    images = open_images(path, args.resolution, default=arguments.DEFAULT_RESOLUTION) if path else None
    resolution = images.resolution if images is not None else args.resolution
    held_out = (
        open_images(args.val_data_dir, resolution, default=arguments.DEFAULT_RESOLUTION) if args.val_data_dir else None
    )
    return images, held_out


def resolve(args: argparse.Namespace, accelerator: Accelerator, images: ImageDataset | None) -> None:
    """Replace every default that depends on the data, so that ``args.json`` says what was done."""
    args.mixed_precision = accelerator.mixed_precision
    if args.channels_last is None:
        args.channels_last = accelerator.device.type == "cpu"
    args.resolution = images.resolution if images is not None else args.resolution or arguments.DEFAULT_RESOLUTION
    args.mapper_grid = args.mapper_grid or max(1, args.resolution // 16)
    if images is not None:
        args.data_fingerprint = images.fingerprint()
        if not args.dry_run:
            args.max_train_steps = arguments.resolve_max_steps(args, len(images))


def build_trainer(
    args: argparse.Namespace, loss_config: VAELossConfig, accelerator: Accelerator
) -> tuple[SendVAETrainer, bool]:
    """Build every network and optimizer; also answers whether the VAE came with latent statistics."""
    device = accelerator.device
    autoencoder, has_statistics = build_autoencoder(args.vae, args.vae_ckpt)
    latent_shape = autoencoder.latent_shape(args.resolution)
    encoder, mapper = build_alignment(args, latent_shape, accelerator)
    model = SendVAE(autoencoder, mapper, args.noise_injection, args.path_type, args.freeze_vae).to(device).train()
    discriminator = build_discriminator(args, loss_config)
    objective = build_objective(args, loss_config, accelerator)
    if args.gradient_checkpointing:
        autoencoder.network.enable_gradient_checkpointing()
    networks = [autoencoder, mapper, encoder, discriminator, objective.perceptual]
    if args.channels_last:
        for network in networks:
            if network is not None:
                network.to(memory_format=torch.channels_last)
    ema = EMA(autoencoder, args.ema_decay) if args.ema_decay else None
    if args.compile:
        compile_networks(*networks)
    adamw = {
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if discriminator is not None:
        discriminator.to(device).train()
    trainer = SendVAETrainer(
        model,
        objective.to(device),
        discriminator,
        None if encoder is None else encoder.to(device),
        align_coeff=args.align_coeff,
        bn_momentum=0.0 if args.freeze_vae else args.bn_momentum,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        optimizer=build_adamw(model.parameters(), **adamw),
        disc_optimizer=None if discriminator is None else build_adamw(discriminator.parameters(), **adamw),
        ema=ema,
        accelerator=accelerator,
    )
    return trainer, has_statistics


def build_alignment(
    args: argparse.Namespace, latent_shape: tuple[int, int, int], accelerator: Accelerator
) -> tuple[Encoder | None, Mapper | None]:
    if not args.align_coeff:
        return None, None
    channels, side, _ = latent_shape
    if side % args.mapper_grid:
        divisors = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
        raise UserError(f"--mapper-grid {args.mapper_grid} does not divide the {side}×{side} latent; {divisors} do")
    with accelerator.local_main_process_first():  # who downloads; the others find the file in the cache
        encoder = build_encoder(args.enc_type, args.mapper_grid, args.enc_ckpt, args.random_weights)
    return encoder, Mapper(channels, side, args.mapper_grid, encoder.embed_dim, args.mapper_depth)


def build_discriminator(args: argparse.Namespace, loss_config: VAELossConfig) -> PatchDiscriminator | None:
    if args.freeze_vae or not loss_config.uses_gan:
        return None
    discriminator = PatchDiscriminator()
    if args.resolution < discriminator.min_resolution:
        raise UserError(
            f"the PatchGAN needs images of {discriminator.min_resolution} px or more, not {args.resolution}: "
            "raise --resolution, or --loss-override discriminator_weight=0"
        )
    if args.disc_pretrained_ckpt:
        load_discriminator(discriminator, args.disc_pretrained_ckpt)
    return discriminator


def build_objective(args: argparse.Namespace, loss_config: VAELossConfig, accelerator: Accelerator) -> VAEObjective:
    perceptual = None
    if loss_config.perceptual_weight and not args.freeze_vae:
        with accelerator.local_main_process_first():
            perceptual = build_lpips(args.lpips_ckpt, args.random_weights)
    elif args.freeze_vae:
        loss_config = VAELossConfig(perceptual_weight=0.0, discriminator_weight=0.0)
    return VAEObjective(loss_config, perceptual)


def compile_networks(autoencoder: Autoencoder, *others: nn.Module | None) -> None:
    """Compile in place, so that state-dict keys keep their names."""
    for module in (autoencoder.network.encoder, autoencoder.network.decoder, *others):
        if module is not None:
            module.compile()


def dry_run_step(
    trainer: SendVAETrainer, args: argparse.Namespace, images: ImageDataset | None, accelerator: Accelerator
) -> None:
    """Two steps at the real shapes: batch 2 on each process, of real images where there are some."""
    batch = torch.randint(0, 256, (2, 3, args.resolution, args.resolution), dtype=torch.uint8)
    if images is not None:
        images.read_into([0, len(images) - 1], batch.numpy())
    networks = {
        "VAE": trainer.model.autoencoder,
        "mapper": trainer.model.mapper,
        "discriminator": trainer.discriminator,
        f"VFM {args.enc_type}": trainer.encoder,
        "LPIPS": trainer.objective.perceptual,
    }
    start_step = trainer.objective.config.discriminator_start  # so that the discriminator takes part
    dry_run.report(
        networks,
        lambda number: trainer.step(start_step + number, [batch], args.vae_learning_rate, args.disc_learning_rate),
        len(batch) * accelerator.num_processes,
        accelerator.device,
        shown=accelerator.is_main_process,
    )


def build_job(
    args: argparse.Namespace,
    loss_config: VAELossConfig,
    images: ImageDataset,
    held_out: ImageDataset | None,
    accelerator: Accelerator,
) -> Job:
    has_statistics = False

    def build() -> SendVAETask:
        nonlocal has_statistics
        trainer, has_statistics = build_trainer(args, loss_config, accelerator)
        return build_task(args, trainer, images, held_out)

    def begin(task: SendVAETask) -> None:
        if not has_statistics:
            initialise_statistics(args, task.trainer, images, accelerator)

    return Job(
        project="sendvae",
        dataset=images,
        build=build,
        begin=begin,
        describe=lambda task: describe(args, task.trainer, images),
        products=("vae",),
    )


def initialise_statistics(
    args: argparse.Namespace, trainer: SendVAETrainer, images: ImageDataset, accelerator: Accelerator
) -> None:
    """Measure the latent statistics of a VAE that came without."""
    with build_loader(args, images, accelerator, 0) as first_batches:
        count = measure_latent_statistics(trainer, first_batches, args.batch_size, len(images))
    if trainer.ema is not None:
        trainer.ema.module.statistics.load_state_dict(trainer.statistics.state_dict())
    logger.info("the VAE has no latent statistics: measured over %d images", count)


def build_task(
    args: argparse.Namespace, trainer: SendVAETrainer, images: ImageDataset, held_out: ImageDataset | None
) -> SendVAETask:
    return SendVAETask(
        trainer,
        Schedule(args.lr_schedule, args.warmup_steps, args.max_train_steps),
        vae_rate=args.vae_learning_rate,
        disc_rate=args.disc_learning_rate,
        images=images,
        held_out=held_out,
        val_batch_size=micro_batch_size(args, trainer.accelerator),
        max_val_images=args.max_val_images,
        num_workers=args.num_workers,
    )


def describe(args: argparse.Namespace, trainer: SendVAETrainer, images: ImageDataset) -> list[str]:
    """The resolved sizes, for the log."""
    lines = [
        f"{len(images)} images at {args.resolution} px, {len(images.class_names)} classes",
        f"loss {trainer.objective.config}",
    ]
    if trainer.encoder is not None:
        latent = trainer.model.autoencoder.latent_shape(args.resolution)
        grid, pixels, width = trainer.encoder.grid, trainer.encoder.input_size, trainer.encoder.embed_dim
        lines.append(f"latent {latent} → mapper → {grid}×{grid} tokens of {width} ({args.enc_type} sees {pixels} px)")
    return lines


if __name__ == "__main__":
    sys.exit(run(main))
