"""Stage 3: train a SiT on cached latents, its hidden states aligned with frozen VFM features (REPA).

--align vae aligns them with the VAE's latents instead (VAE-REPA), without any VFM; repa+vae with both, none with
neither.

  python train_ldm.py --exp-name ldm --data-dir data/imagenet256 --vae-latents-name sendvae --model SiT-XL/1

Reads the cache that cache_latents.py made, and the images themselves only where REPA's features are not cached. Writes
exps/NAME with checkpoints (weights, EMA), metrics.jsonl, sample grids and vae/, a copy of the cache's VAE, so that
generate.py needs nothing else. The same command resumes exactly where the run stopped; SIGTERM and SIGUSR1 save and
stop. Runs under python, torchrun and accelerate launch. Exit codes: 0 finished, 1 training failed, 2 wrong input,
128 + n stopped by signal n (a launcher of several processes makes 1 of it).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from dataset.images import DEFAULT_RESOLUTION, ImageDataset, open_images
from dataset.latents import FLIPPED_NAME, LatentBatch, LatentDataset, features_name, latents_folder
from dataset.loader import stage_dataset
from dataset.shards import read_index
from errors import UserError
from formats.arguments import add_encoder_arguments
from formats.runs import arguments_of
from formats.vae import build_autoencoder
from inference.foreign_ldm import statistics_of
from inference.trained_ldm import statistics_checksum
from models.denoisers.sit import SiT, SiTConfig
from models.encoders import Encoder, encoder_names
from models.tokenizers.kl import STATISTICS_FILE, Autoencoder, architecture_names
from runtime.checkpoint import CheckpointFolder
from runtime.cli import ArgumentParser, fraction, non_negative_float, positive_int, run
from runtime.processes import this_process
from training import arguments, dry_run, ldm_source
from training.alignment_cost import alignment_cost_lines
from training.ema import EMA
from training.ldm import LDMTrainer
from training.ldm_source import Source
from training.ldm_task import LDMTask
from training.loop import Schedule
from training.networks import build_optimizer, build_token_encoders, feature_dims
from training.run import build_accelerator, set_numerics
from training.session import Job, dry_run_batch_size, micro_batch_size, train

ALIGNMENTS = ("repa", "vae", "repa+vae", "none")
REPA_COEFF, VAE_REPA_COEFF = 0.5, 1.0
# Published for B, L and XL; the small ones follow B. The width is not published: this one costs XL/2 the published 4 %.
VAE_REPA_DEPTHS = {"Ti": 2, "S": 2, "B": 2, "L": 8, "XL": 8}
VAE_REPA_WIDTH = 2  # in widths of the SiT
CONTINUE_HELP = (
    "with --exp-name: begin that run with weights, average, optimizer state and step of another run, of an experiment "
    "of REPA or REPA-E, or of a checkpoint file of theirs (--resume-step chooses which); alone: resume the run in DIR"
)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="train_ldm.py",
        usage="%(prog)s --exp-name NAME --data-dir DIR --vae-latents-name NAME [flags]",
        description=__doc__,
    )
    arguments.add_run_arguments(parser, CONTINUE_HELP)
    arguments.add_data_arguments(parser)
    add_latent_arguments(parser)
    arguments.add_sit_arguments(parser, model="SiT-XL/1")
    add_alignment_arguments(parser)
    arguments.add_schedule_arguments(parser, batch_size=256, epochs=80)
    arguments.add_speed_arguments(parser)
    arguments.add_interval_arguments(parser)
    arguments.add_grid_arguments(parser)
    args = parser.parse_args(argv)
    arguments.check_arguments(args)
    resolve_alignment(args)
    if not args.dry_run and not args.vae_latents_name:
        raise UserError("--vae-latents-name is needed: the latent cache that cache_latents.py made")
    return args


def add_latent_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("latents")
    group.add_argument(
        "--vae-latents-name",
        metavar="NAME",
        help="latent cache: a folder inside --data-dir (and inside --val-data-dir), or a path",
    )
    group.add_argument(
        "--val-vae-latents-name", metavar="NAME", help="held-out cache, where it is called otherwise or is a path"
    )
    group.add_argument(
        "--vae",
        metavar="NAME",
        help=f"architecture for a --dry-run without a cache ({', '.join(architecture_names())}, or a diffusers "
        "folder); else the cache's own VAE is used",
    )


def add_alignment_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("alignment")
    group.add_argument(
        "--align",
        choices=ALIGNMENTS,
        default="repa",
        help="of hidden states: repa with VFM features, vae with the clean latents (VAE-REPA; no VFM, no images), with "
        "both, with neither",
    )
    group.add_argument(
        "--proj-coeff",
        type=non_negative_float,
        metavar="X",
        help=f"weight of REPA; 0: no VFM is used (default: {REPA_COEFF})",
    )
    group.add_argument(
        "--encoder-depth", type=positive_int, default=8, metavar="N", help="block whose output is aligned, from 1"
    )
    add_encoder_arguments(group, default="dinov2-vit-b")
    group.add_argument(
        "--projector-width", type=positive_int, default=2048, metavar="N", help="hidden width of the projectors"
    )
    group.add_argument(
        "--repa-source",
        choices=("auto", "images", "features"),
        default="auto",
        help="run the VFM on the images, or read cached features; auto: features where the cache has them",
    )
    group.add_argument(
        "--vae-repa-coeff",
        type=non_negative_float,
        metavar="X",
        help=f"weight of VAE-REPA (default: {VAE_REPA_COEFF}; REPA-E's --vae-align-proj-coeff is another thing)",
    )
    group.add_argument(
        "--vae-repa-depth",
        type=positive_int,
        metavar="N",
        help="block whose output predicts the clean latent, from 1 (default: "
        + ", ".join(f"{size} {depth}" for size, depth in VAE_REPA_DEPTHS.items())
        + ")",
    )
    group.add_argument(
        "--vae-repa-times",
        type=fraction,
        nargs=2,
        default=[0.0, 1.0],
        metavar=("LOW", "HIGH"),
        help="times at which it does, 0 is data, 1 noise (default: 0 1)",
    )
    group.add_argument(
        "--vae-repa-width",
        type=positive_int,
        metavar="N",
        help="hidden width of its projector, five linear layers (default: twice the SiT's)",
    )


def resolve_alignment(args: argparse.Namespace) -> None:
    """Settle what is aligned and how strongly; what is not has weight 0, and its flags are refused."""
    chosen = set(args.align.split("+")) - {"none"}
    if "repa" not in chosen and (args.proj_coeff or args.enc_ckpt or args.repa_source != "auto"):
        flag = "--proj-coeff" if args.proj_coeff else "--enc-ckpt" if args.enc_ckpt else "--repa-source"
        raise UserError(
            f"{flag} is REPA's, and --align {args.align} uses no VFM: leave it away, or add repa to --align"
        )
    if "vae" not in chosen and (args.vae_repa_coeff or args.vae_repa_depth or args.vae_repa_width):
        flag = "coeff" if args.vae_repa_coeff else "depth" if args.vae_repa_depth else "width"
        raise UserError(f"--vae-repa-{flag} is VAE-REPA's: leave it away, or add vae to --align {args.align}")
    low, high = args.vae_repa_times
    if low >= high:
        raise UserError(f"--vae-repa-times {low:g} {high:g}: the lower time comes first, and they differ")
    if "vae" not in chosen and (low, high) != (0.0, 1.0):
        raise UserError(f"--vae-repa-times is VAE-REPA's: leave it away, or add vae to --align {args.align}")
    args.proj_coeff = 0.0 if "repa" not in chosen else REPA_COEFF if args.proj_coeff is None else args.proj_coeff
    coeff = VAE_REPA_COEFF if args.vae_repa_coeff is None else args.vae_repa_coeff
    args.vae_repa_coeff = coeff if "vae" in chosen else 0.0
    parts = [name for name, weight in (("repa", args.proj_coeff), ("vae", args.vae_repa_coeff)) if weight]
    args.align = "+".join(parts) or "none"


@dataclass
class Data:
    """What is trained on; a dry run may lack all of it."""

    latents: LatentDataset | None = None
    held_out: LatentDataset | None = None


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    folder, origin = (None, args.continue_train_exp_dir) if args.dry_run else ldm_source.resolve_folder(args)
    accelerator = build_accelerator(args.mixed_precision, args.report_to, folder)
    set_numerics(args.seed, args.allow_tf32, args.deterministic)
    data = open_data(args, accelerator)
    autoencoder = load_autoencoder(args, data.latents)
    config = resolve(args, accelerator, data, autoencoder)
    source = open_source(args, config, origin, folder, None if data.latents is None else autoencoder)
    if args.dry_run:
        dry_run_step(args, config, source, autoencoder, accelerator)
        return 0
    job = build_job(args, config, data, autoencoder, source, accelerator)
    return train(args, vars(args), folder, job, accelerator)


def open_data(args: argparse.Namespace, accelerator: Accelerator) -> Data:
    """The latent caches; a dry run does without where none is named."""
    if not args.vae_latents_name:
        return Data()
    folder = latents_folder(args.data_dir, args.vae_latents_name)
    args.repa_source = choose_repa_source(args, folder)
    images = None
    if args.stage_dir and not args.dry_run:
        folder = stage_once(folder, "latents", used_parts(args), args, accelerator)
    if args.repa_source == "images":
        images = open_repa_images(args, accelerator)
    share = {"local_processes": this_process().local_size}
    features = encoder_names(args.enc_type) if args.repa_source == "features" else ()
    latents = LatentDataset(folder, hflip=args.hflip, features=features, images=images, **share)
    held_out = None
    if args.val_data_dir or args.val_vae_latents_name:
        held_out = LatentDataset(held_out_folder(args), **share)
        check_held_out(held_out, latents)
    return Data(latents, held_out)


def used_parts(args: argparse.Namespace) -> list[str]:
    """The sub-folders of the cache that this training reads."""
    flips = (False, True) if args.hflip else (False,)
    parts = [FLIPPED_NAME] if args.hflip else []
    if args.repa_source == "features":
        parts += [features_name(name, flipped) for name in encoder_names(args.enc_type) for flipped in flips]
    return parts


def stage_once(
    folder: Path, kind: str, parts: list[str] | None, args: argparse.Namespace, accelerator: Accelerator
) -> Path:
    """Copy a packed folder to --stage-dir, by one process on each machine."""
    if accelerator.is_local_main_process:
        stage_dataset(folder, args.stage_dir, kind=kind, parts=parts)
    accelerator.wait_for_everyone()
    return stage_dataset(folder, args.stage_dir, kind=kind, parts=parts)


def held_out_folder(args: argparse.Namespace) -> Path:
    name = args.val_vae_latents_name or args.vae_latents_name
    if not args.val_vae_latents_name and "/" in name:
        raise UserError(
            f"--vae-latents-name {name} is a path, which --val-data-dir cannot hold; give the held-out cache's path "
            "with --val-vae-latents-name"
        )
    return latents_folder(args.val_data_dir, name)


def check_held_out(held_out: LatentDataset, latents: LatentDataset) -> None:
    """Held-out latents must be of the same VAE, resolution and classes."""
    same = {
        "VAE": (held_out.source.get("vae"), latents.source.get("vae")),
        "resolution": (held_out.resolution, latents.resolution),
        "classes": (held_out.class_names, latents.class_names),
    }
    for what, (theirs, ours) in same.items():
        if theirs != ours:
            raise UserError(f"{held_out.folder} has another {what} than {latents.folder}; make a cache that matches it")


def choose_repa_source(args: argparse.Namespace, folder: Path) -> str:
    """Where the features come from: ``none``, ``features`` (cached) or ``images``."""
    if not args.proj_coeff:
        return "none"
    if args.repa_source == "auto":
        indices = [read_index(folder / features_name(name)) for name in encoder_names(args.enc_type)]
        return "images" if None in indices else "features"
    return args.repa_source


def open_repa_images(args: argparse.Namespace, accelerator: Accelerator) -> ImageDataset:
    if not args.data_dir:
        raise UserError("--data-dir is needed: REPA reads the images (or cache features, or --proj-coeff 0)")
    path = Path(args.data_dir)
    if args.stage_dir and not args.dry_run and read_index(path) is not None:
        path = stage_once(path, "images", None, args, accelerator)
    return open_images(path, args.resolution, default=DEFAULT_RESOLUTION)


def load_autoencoder(args: argparse.Namespace, latents: LatentDataset | None) -> Autoencoder:
    """The cache's VAE with its statistics; for a dry run without a cache a random one of ``--vae``.

    Raises:
        UserError: the cache has lost its statistics, or holds another VAE than it was made with.
    """
    if latents is None:
        return build_autoencoder(args.vae or dry_run.DEFAULT_VAE, "none")[0]
    autoencoder, statistics = build_autoencoder(str(latents.vae_folder))
    remedy = "copy the cache again, or make it anew with cache_latents.py"
    if statistics is None:
        raise UserError(f"{latents.vae_folder} has no latent statistics ({STATISTICS_FILE}): {remedy}")
    if autoencoder.checksum() != latents.source.get("vae"):
        raise UserError(f"{latents.vae_folder} is not the VAE that {latents.folder} was made with: {remedy}")
    if args.vae:
        named, _ = build_autoencoder(args.vae, "none")
        if (named.latent_channels, named.downsampling) != (autoencoder.latent_channels, autoencoder.downsampling):
            raise UserError(
                f"--vae {args.vae} is not the VAE that {latents.folder} was made with: leave the flag away, or give "
                "the cache of that VAE"
            )
    return autoencoder


def resolve(args: argparse.Namespace, accelerator: Accelerator, data: Data, autoencoder: Autoencoder) -> SiTConfig:
    """Replace every default that depends on the data, so that ``args.json`` and checkpoints say what was done."""
    args.mixed_precision = accelerator.mixed_precision
    latents = data.latents
    if args.channels_last is None:
        args.channels_last = accelerator.device.type == "cpu"
    args.resolution = args.resolution or (DEFAULT_RESOLUTION if latents is None else latents.resolution)
    if latents is not None and args.resolution != latents.resolution:
        raise UserError(f"--resolution {args.resolution}: {latents.folder} was made at {latents.resolution} px")
    channels, side, _ = autoencoder.latent_shape(args.resolution)
    config = SiTConfig(
        model=args.model,
        latent_channels=channels,
        latent_size=side,
        num_classes=dry_run.NUM_CLASSES if latents is None else len(latents.class_names),
        qk_norm=args.qk_norm,
        encoder_depth=args.encoder_depth,
        feature_dims=feature_dims(args),
        projector_width=args.projector_width,
    )
    config.check()
    if args.vae_repa_coeff:
        args.vae_repa_depth = args.vae_repa_depth or VAE_REPA_DEPTHS[config.size_name]
        args.vae_repa_width = args.vae_repa_width or VAE_REPA_WIDTH * config.size.width
        config = replace(config, latent_depth=args.vae_repa_depth, latent_width=args.vae_repa_width)
        config.check()
    args.sit = config.to_dict()
    if latents is not None:
        check_features(args, config, latents)
        args.class_names = latents.class_names
        args.data_fingerprint = latents.fingerprint()
        args.vae_checksum = latents.source["vae"]  # load_autoencoder compared it
        args.statistics_checksum = statistics_checksum(autoencoder)
        if not args.dry_run:
            args.max_train_steps = arguments.resolve_max_steps(args, len(latents))
    return config


def open_source(
    args: argparse.Namespace,
    config: SiTConfig,
    origin: str | Path | None,
    folder: Path | None,
    autoencoder: Autoencoder | None,
) -> Source | None:
    """What a run goes on from that has no checkpoint of its own yet; noted in ``args``."""
    if folder is not None and CheckpointFolder(folder).list():
        before = arguments_of(folder) or {}
        if "continued_from" in before:
            args.continued_from = before["continued_from"]
        return None
    if origin is None:
        return None
    source = ldm_source.open_source(Path(origin), args.resume_step)
    ldm_source.check_source(source, config, args, None if autoencoder is None else statistics_of(autoencoder))
    args.continued_from = source.record()
    return source


def check_features(args: argparse.Namespace, config: SiTConfig, latents: LatentDataset) -> None:
    """Cached features must lie on the SiT's token grid."""
    if args.repa_source != "features":
        return
    names = encoder_names(args.enc_type)
    for name, (tokens, width), dim in zip(names, latents.feature_shapes, config.feature_dims, strict=True):
        if (tokens, width) != (config.grid**2, dim):
            raise UserError(
                f"{latents.folder}: cached features of {name} are {tokens} tokens of {width}, {args.model} needs "
                f"{config.grid**2} of {dim}: cache them with --features-grid {config.grid}"
            )


def build_trainer(
    args: argparse.Namespace, config: SiTConfig, autoencoder: Autoencoder, accelerator: Accelerator
) -> LDMTrainer:
    """Build every network and the optimizer."""
    device = accelerator.device
    torch.manual_seed(args.seed)
    model = SiT(config).to(device).train()
    model.gradient_checkpointing = args.gradient_checkpointing
    encoders = build_alignment(args, config, accelerator)
    ema = EMA(model, args.ema_decay) if args.ema_decay else None
    if args.compile:
        for network in (model, *(encoders or ())):
            network.compile()
    return LDMTrainer(
        model,
        autoencoder.to(device).statistics,
        encoders,
        encoder_names=encoder_names(args.enc_type) if args.proj_coeff else (),
        proj_coeff=args.proj_coeff,
        cfg_prob=args.cfg_prob,
        path_type=args.path_type,
        weighting=args.weighting,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        optimizer=build_optimizer(args, model),
        ema=ema,
        accelerator=accelerator,
        latent_coeff=args.vae_repa_coeff,
        latent_times=tuple(args.vae_repa_times),
    )


def build_alignment(args: argparse.Namespace, config: SiTConfig, accelerator: Accelerator) -> list[Encoder] | None:
    """The VFMs that images are run through; None where features are cached or nothing is aligned."""
    if not args.proj_coeff or args.repa_source == "features":
        return None
    return build_token_encoders(args, config.grid, accelerator)


def build_job(
    args: argparse.Namespace,
    config: SiTConfig,
    data: Data,
    autoencoder: Autoencoder,
    source: Source | None,
    accelerator: Accelerator,
) -> Job:
    def build() -> LDMTask:
        trainer = build_trainer(args, config, autoencoder, accelerator)
        return LDMTask(
            trainer,
            Schedule(args.lr_schedule, args.warmup_steps, args.max_train_steps),
            rate=args.learning_rate,
            autoencoder=autoencoder,
            held_out=data.held_out,
            val_batch_size=micro_batch_size(args, accelerator),
            max_val_images=args.max_val_images,
            num_workers=args.num_workers,
            grid_steps=args.grid_steps,
            grid_cfg_scale=args.grid_cfg_scale,
        )

    return Job(
        "sendvae-ldm",
        data.latents,
        build,
        begin=lambda task: None if source is None else source.take_over(task.trainer),
        first_step=None if source is None else source.step,
        describe=lambda task: describe(args, config, data) + cost_lines(args, config, task.trainer),
        products=("vae",),
        prepare=lambda folder: autoencoder.save(folder / "vae"),
    )


def describe(args: argparse.Namespace, config: SiTConfig, data: Data) -> list[str]:
    """The resolved sizes, for the log."""
    shape, held = (config.latent_channels, config.latent_size, config.latent_size), data.latents.held_bytes
    lines = [
        f"{len(data.latents)} latents {shape}, {config.num_classes} classes, {held / 1e9:.2f} GB held in memory",
        f"{config.model}: {config.size.depth} blocks of {config.size.width}, {config.grid}×{config.grid} tokens",
    ]
    if args.proj_coeff:
        lines.append(
            f"REPA after block {config.encoder_depth} with {args.enc_type}, from {args.repa_source}, weight "
            f"{args.proj_coeff:g}"
        )
    if args.vae_repa_coeff:
        low, high = args.vae_repa_times
        lines.append(
            f"VAE-REPA after block {config.latent_depth}, times {low:g} to {high:g}, weight {args.vae_repa_coeff:g}"
        )
    return lines


def cost_lines(args: argparse.Namespace, config: SiTConfig, trainer: LDMTrainer) -> list[str]:
    """What the alignment costs, measured; on the main process, which alone has a use for it."""
    if args.align == "none" or not trainer.accelerator.is_main_process:
        return []
    return alignment_cost_lines(config, trainer.encoders or (), args.resolution)


def dry_run_step(
    args: argparse.Namespace,
    config: SiTConfig,
    source: Source | None,
    autoencoder: Autoencoder,
    accelerator: Accelerator,
) -> None:
    """Two steps at the real shapes: a small batch on each process, of random latents."""
    trainer = build_trainer(args, config, autoencoder, accelerator)
    if source is not None:
        source.take_over(trainer)
    count = dry_run_batch_size(args, accelerator)
    batch = random_batch(args, config, count)
    for line in cost_lines(args, config, trainer):
        print(line)
    networks = {
        args.model: trainer.model,
        **{f"VFM {encoder.name}": encoder for encoder in trainer.encoders or ()},
        "VAE": autoencoder,
    }
    dry_run.report(
        networks,
        lambda number: trainer.step(number, [batch], args.learning_rate),
        count * accelerator.num_processes,
        accelerator.device,
        shown=accelerator.is_main_process,
    )


def random_batch(args: argparse.Namespace, config: SiTConfig, count: int) -> LatentBatch:
    """What a batch of the cache would hold, made up."""
    side = config.latent_size
    images = features = None
    if args.repa_source == "features":
        features = tuple(torch.randn(count, config.grid**2, dim) for dim in config.feature_dims)
    elif args.proj_coeff:
        images = torch.randint(0, 256, (count, 3, args.resolution, args.resolution), dtype=torch.uint8)
    return LatentBatch(
        moments=torch.rand(count, 2 * config.latent_channels, side, side),
        labels=torch.randint(0, config.num_classes, (count,)),
        images=images,
        features=features,
    )


if __name__ == "__main__":
    sys.exit(run(main))
