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

from dataset.images import DEFAULT_RESOLUTION, ImageDataset
from diffusion.flow import PATH_TYPES
from errors import UserError
from formats.arguments import add_encoder_arguments, add_vae_source_arguments
from formats.vae import build_autoencoder
from loss.vae_objective import VAELossConfig, load_loss_config
from loss.vf_alignment import VFLoss
from models.encoders import Encoder, build_encoders, encoder_names
from models.mapper import LinearMapper, Mapper
from runtime.cli import (
    ArgumentParser,
    fraction,
    non_negative_float,
    non_negative_int,
    positive_int,
    run,
)
from training import arguments, dry_run
from training.data import open_image_data
from training.ema import EMA
from training.networks import build_discriminator, build_objective, build_optimizer, compile_networks
from training.run import build_accelerator, set_numerics
from training.sendvae import SendVAE, SendVAETrainer
from training.sendvae_task import SendVAETask, build_sendvae_task, initialise_statistics
from training.session import Job, dry_run_batch_size, train

ALIGN_LOSSES = ("cosine", "vf")


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
    if args.freeze_vae and args.align_loss == "vf":
        raise UserError(
            "--freeze-vae with --align-loss vf: that loss is weighed against the reconstruction's gradient in the "
            "encoder, which a frozen VAE has not; take --align-loss cosine"
        )
    resolve_mapper(args)
    return args


def resolve_mapper(args: argparse.Namespace) -> None:
    """Defaults of the mapper, which VA-VAE's loss has not."""
    if args.align_loss == "cosine":
        args.mapper_depth = 1 if args.mapper_depth is None else args.mapper_depth
        args.noise_injection = args.noise_injection is not False
        return
    given = {"--mapper-depth": args.mapper_depth is not None, "--noise-injection": args.noise_injection}
    for flag in (flag for flag, is_given in given.items() if is_given):
        raise UserError(f"{flag} belongs to --align-loss cosine: vf has neither mapper nor noise; leave it away")
    args.noise_injection = False


def add_vae_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("VAE and its losses")
    add_vae_source_arguments(group, default="f16d32")
    group.add_argument(
        "--freeze-vae",
        action="store_true",
        help="train the mapper alone: how well can a VAE that stays as it is be read?",
    )
    group.add_argument(
        "--vae-learning-rate", type=non_negative_float, default=3e-4, metavar="X", help="of VAE and mapper"
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
    group.add_argument(
        "--align-coeff",
        type=non_negative_float,
        default=1.0,
        metavar="X",
        help="weight of the alignment loss; 0: plain VAE training, no VFM is loaded",
    )
    group.add_argument(
        "--align-loss",
        choices=ALIGN_LOSSES,
        default="cosine",
        help="cosine: Send-VAE's, through the mapper; vf: VA-VAE's marginal cosine and distance matrix of the "
        "projected latent itself, without mapper and noise",
    )
    group.add_argument(
        "--mapper-depth", type=non_negative_int, metavar="N", help="cosine only: ViT blocks; 0: MLP only (default: 1)"
    )
    group.add_argument(
        "--mapper-grid",
        type=positive_int,
        metavar="N",
        help="VFM tokens along a side; divides the latent's side (default: resolution / 16; vf: the latent's side)",
    )
    group.add_argument(
        "--noise-injection",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="cosine only: the mapper sees latents with noise of a random time (default: yes)",
    )
    group.add_argument("--path-type", choices=PATH_TYPES, default="linear", help="how noise is mixed in")
    group.add_argument(
        "--bn-momentum", type=fraction, default=0.1, metavar="X", help="of the latent statistics, a step"
    )
    group.add_argument(
        "--vf-weight",
        type=non_negative_float,
        default=0.1,
        metavar="X",
        help="vf only: its gradient in the encoder's last layer, in units of that of L1 + LPIPS; --align-coeff "
        "multiplies it",
    )
    group.add_argument(
        "--vf-cosine-margin", type=fraction, default=0.5, metavar="X", help="vf only: cosines above 1 - X are free"
    )
    group.add_argument(
        "--vf-distance-margin",
        type=fraction,
        default=0.25,
        metavar="X",
        help="vf only: differences of cosines up to X are free",
    )


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    folder = None if args.dry_run else arguments.run_folder(args)
    loss_config = load_loss_config(args.loss_cfg_path, args.loss_override)
    accelerator = build_accelerator(args.mixed_precision, args.report_to, folder)
    set_numerics(args.seed, args.allow_tf32, args.deterministic)
    images, held_out = open_image_data(args, accelerator)
    resolve(args, accelerator, images)
    if args.dry_run:
        trainer, _ = build_trainer(args, loss_config, accelerator)
        dry_run_step(trainer, args, images, accelerator)
        return 0
    job = build_job(args, loss_config, images, held_out, accelerator)
    return train(args, vars(args) | {"loss": asdict(loss_config)}, folder, job, accelerator)


def resolve(args: argparse.Namespace, accelerator: Accelerator, images: ImageDataset | None) -> None:
    """Replace every default that depends on the data, so that ``args.json`` says what was done."""
    args.mixed_precision = accelerator.mixed_precision
    if args.channels_last is None:
        args.channels_last = accelerator.device.type == "cpu"
    args.resolution = images.resolution if images is not None else args.resolution or DEFAULT_RESOLUTION
    if args.align_loss == "cosine":
        args.mapper_grid = args.mapper_grid or max(1, args.resolution // 16)
    if images is not None:
        args.data_fingerprint = images.fingerprint()
        if not args.dry_run:
            args.max_train_steps = arguments.resolve_max_steps(args, len(images))


def build_trainer(
    args: argparse.Namespace, loss_config: VAELossConfig, accelerator: Accelerator
) -> tuple[SendVAETrainer, str | None]:
    """Build every network and optimizer; also answers where the VAE's latent statistics come from, if it has any."""
    device = accelerator.device
    if args.freeze_vae:  # nothing to reconstruct
        loss_config = VAELossConfig(perceptual_weight=0.0, discriminator_weight=0.0)
    autoencoder, statistics = build_autoencoder(args.vae, args.vae_ckpt, args.vae_latents_stats)
    latent_shape = autoencoder.latent_shape(args.resolution)
    encoders, mappers = build_alignment(args, latent_shape, accelerator)
    mapper, *more_mappers = mappers or [None]
    vf_loss = VFLoss(args.vf_cosine_margin, args.vf_distance_margin) if args.align_loss == "vf" else None
    model = SendVAE(
        autoencoder,
        mapper,
        args.noise_injection,
        args.path_type,
        args.freeze_vae,
        more_mappers,
        raw_latent=vf_loss is not None,
    )
    model.to(device).train()
    discriminator = build_discriminator(args, loss_config)
    objective = build_objective(args, loss_config, accelerator)
    if args.gradient_checkpointing:
        autoencoder.network.enable_gradient_checkpointing()
    networks = [autoencoder, *mappers, *encoders, discriminator, objective.perceptual]
    if args.channels_last:
        for network in networks:
            if network is not None:
                network.to(memory_format=torch.channels_last)
    ema = EMA(autoencoder, args.ema_decay) if args.ema_decay else None
    if args.compile:
        compile_networks(*networks)
    if discriminator is not None:
        discriminator.to(device).train()
    trainer = SendVAETrainer(
        model,
        objective.to(device),
        discriminator,
        [encoder.to(device) for encoder in encoders],
        align_coeff=alignment_weight(args),
        bn_momentum=0.0 if args.freeze_vae else args.bn_momentum,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        optimizer=build_optimizer(args, model),
        disc_optimizer=None if discriminator is None else build_optimizer(args, discriminator),
        ema=ema,
        accelerator=accelerator,
        vf_loss=vf_loss,
    )
    return trainer, statistics


def alignment_weight(args: argparse.Namespace) -> float:
    """Of the alignment loss; of VA-VAE's in proportion to L1 + LPIPS."""
    return args.align_coeff * (args.vf_weight if args.align_loss == "vf" else 1.0)


def build_alignment(
    args: argparse.Namespace, latent_shape: tuple[int, int, int], accelerator: Accelerator
) -> tuple[list[Encoder], list[Mapper | LinearMapper]]:
    """The VFMs and a mapper for each; none without alignment."""
    if not alignment_weight(args):
        return [], []
    channels, side, _ = latent_shape
    grid = args.mapper_grid or side
    if args.align_loss == "vf" and grid != side:
        raise UserError(
            f"--mapper-grid {grid}: --align-loss vf compares every position of the {side}×{side} latent with its "
            "feature: leave the flag away"
        )
    if side % grid:
        divisors = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
        raise UserError(f"--mapper-grid {grid} does not divide the {side}×{side} latent; {divisors} do")
    with accelerator.local_main_process_first():  # who downloads; the others find the file in the cache
        encoders = build_encoders(encoder_names(args.enc_type), grid, args.enc_ckpt, args.random_weights)
    if args.align_loss == "vf":
        return encoders, [LinearMapper(channels, encoder.embed_dim) for encoder in encoders]
    return encoders, [Mapper(channels, side, grid, encoder.embed_dim, args.mapper_depth) for encoder in encoders]


def dry_run_step(
    trainer: SendVAETrainer, args: argparse.Namespace, images: ImageDataset | None, accelerator: Accelerator
) -> None:
    """Two steps at the real shapes: a small batch on each process, of real images where there are some."""
    count = dry_run_batch_size(args, accelerator)
    batch = torch.randint(0, 256, (count, 3, args.resolution, args.resolution), dtype=torch.uint8)
    if images is not None:
        images.read_into([0, len(images) - 1][:count], batch.numpy())
    several = len(trainer.encoders) > 1
    aligned = list(zip(trainer.encoders, trainer.model.mappers, strict=True))
    networks = {
        "VAE": trainer.model.autoencoder,
        **{f"mapper {encoder.name}" if several else "mapper": mapper for encoder, mapper in aligned},
        "discriminator": trainer.discriminator,
        **{f"VFM {encoder.name}": encoder for encoder in trainer.encoders},
        "LPIPS": trainer.objective.perceptual,
    }
    start_step = trainer.objective.config.discriminator_start  # so that the discriminator takes part
    dry_run.report(
        networks,
        lambda number: trainer.step(start_step + number, [batch], args.vae_learning_rate, args.disc_learning_rate),
        count * accelerator.num_processes,
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
    statistics: str | None = None

    def build() -> SendVAETask:
        nonlocal statistics
        trainer, statistics = build_trainer(args, loss_config, accelerator)
        return build_sendvae_task(args, trainer, images, held_out)

    def begin(task: SendVAETask) -> None:
        if statistics is None:
            initialise_statistics(args, task.trainer, images)

    return Job(
        project="sendvae",
        dataset=images,
        build=build,
        begin=begin,
        describe=lambda task: describe(args, task.trainer, images),
        products=("vae",),
    )


def describe(args: argparse.Namespace, trainer: SendVAETrainer, images: ImageDataset) -> list[str]:
    """The resolved sizes, for the log."""
    lines = [
        f"{len(images)} images at {args.resolution} px, {len(images.class_names)} classes",
        f"loss {trainer.objective.config}",
    ]
    for encoder in trainer.encoders:
        latent = trainer.model.autoencoder.latent_shape(args.resolution)
        grid, pixels, width = encoder.grid, encoder.input_size, encoder.embed_dim
        way = "mapper" if args.align_loss == "cosine" else "1×1 convolution"
        lines.append(f"latent {latent} → {way} → {grid}×{grid} tokens of {width} ({encoder.name} sees {pixels} px)")
    if trainer.encoders:
        loss = "1 − cosine" if trainer.vf_loss is None else f"{trainer.vf_loss}, in proportion to the fidelity,"
        lines.append(f"alignment: {loss} with weight {trainer.align_coeff:g}")
    return lines


if __name__ == "__main__":
    sys.exit(run(main))
