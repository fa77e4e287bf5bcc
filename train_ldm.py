"""Stage 3: train a denoiser such as SiT on cached latents, its hidden states aligned with frozen VFM features (REPA).

--align vae aligns them with the VAE's latents instead (VAE-REPA), sra with later states of the averaged network (SRA),
both without any VFM; repa+vae with two of them, none with nothing. --reg-coeff also generates the VFM's class token
beside the latent (REG). --flow-map-blocks teaches a trained denoiser to make images in a few jumps.

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
from functools import partial

from errors import UserError, one_line
from formats.arguments import add_encoder_arguments
from loss.alignment import DENOISER_ALIGNMENTS, NONE, parse_sum, settle_arguments
from models.tokenizers import architecture_names
from runtime.cli import ArgumentParser, answer_early, non_negative_float, run
from training import arguments
from training.flow_map_flags import add_flow_map_arguments, describe_flow_map, settle_flow_map

CONTINUE_HELP = (
    "with --exp-name: begin that run with weights, average, optimizer state and step of another run (--resume-step "
    "chooses which); alone: resume the run in DIR. Other people's checkpoints become a run with "
    "export_ldm.py --format run"
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
    arguments.add_denoiser_arguments(parser, model="SiT-XL/1")
    add_alignment_arguments(parser)
    add_flow_map_arguments(parser.add_argument_group("flow map"))
    arguments.add_schedule_arguments(parser, batch_size=256, epochs=80)
    arguments.add_speed_arguments(parser)
    arguments.add_interval_arguments(parser)
    arguments.add_grid_arguments(parser)
    args = parser.parse_args(argv)
    arguments.check_arguments(args)
    arguments.check_denoiser_arguments(parser, args)
    settle_alignment(args)
    settle_flow_map(args)
    if "/" not in (args.vae_latents_name or "/"):  # a folder in --data-dir
        args.data_dir = args.data_dir or arguments.default_data_dir()
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
        "--val-vae-latents-name", metavar="NAME", help="held-out cache, if it has another name or is a path"
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
        default="repa",
        metavar="NAME",
        help=f"what hidden states are aligned with: {', '.join(DENOISER_ALIGNMENTS)}, a sum such as repa+vae, or "
        f"{NONE}; repa: VFM features, irepa: their spatial structure, vae: the clean latents (VAE-REPA), sra: later "
        "states of the averaged network at less noise (both: no VFM, no images)",
    )
    add_encoder_arguments(group, default="dinov2-vit-b")
    arguments.add_feature_arguments(group)
    arguments.add_alignment_schedule_arguments(group)
    group.add_argument(
        "--repa-source",
        choices=("auto", "images", "features"),
        default="auto",
        help="run the VFM on the images, or read cached features; auto: features where the cache has them, or where "
        "--cached-features says so",
    )
    group.add_argument(
        "--reg-coeff",
        type=non_negative_float,
        default=0.0,
        metavar="X",
        help="REG: generate the class token of the (first) VFM of --enc-type beside the latent; weight of its loss, in "
        "the paper 0.03; 0: the latent alone",
    )
    for alignment in DENOISER_ALIGNMENTS.values():
        alignment.add_arguments(group)


def settle_alignment(args: argparse.Namespace) -> None:
    """Settle what is aligned; what has weight 0 is not, and flags of what is not are refused."""
    names = parse_sum(args.align)
    settle_arguments(args, names, DENOISER_ALIGNMENTS, "--align")
    if not args.reg_coeff and not any(DENOISER_ALIGNMENTS[name].needs_features for name in names):
        for flag, given in (("--enc-ckpt", args.enc_ckpt), ("--repa-source", args.repa_source != "auto")):
            if given:
                raise UserError(
                    f"{flag} is for VFM features, and --align {args.align} uses no VFM: leave it out, or add repa to "
                    "--align"
                )
    if args.cached_features is not None and args.repa_source == "images":
        raise UserError("--cached-features are not read with --repa-source images: leave one of them out")
    args.align = "+".join(name for name in names if DENOISER_ALIGNMENTS[name].weight_of(args)) or NONE
    is_aligned = any(DENOISER_ALIGNMENTS[name].needs_features for name in parse_sum(args.align))
    arguments.check_feature_arguments(args, is_aligned, f"--align {args.align}", bool(args.reg_coeff))
    arguments.check_alignment_schedule(args, args.align != NONE, f"--align {args.align}")


if __name__ == "__main__":
    answer_early(parse_arguments)

import torch
from accelerate import Accelerator

from dataset.images import DEFAULT_RESOLUTION
from dataset.latents import LatentBatch, LatentDataset
from diffusion.flow import settled_shift
from models.denoisers import DenoiserConfig, denoiser_kind
from models.tokenizers import Tokenizer
from runtime import NUM_CLASSES
from training import dry_run, ldm_source
from training.alignment_cost import alignment_cost_lines
from training.alignment_schedule import settle_alignment_schedule
from training.data import measure_features
from training.flow_map import FlowMap
from training.latent_data import check_features, class_token_vfm, open_latents, open_tokenizer, with_class_token
from training.ldm import LDM
from training.loop import Loop
from training.micro_batch import Trial
from training.networks import aligned, build_aligned_denoiser, build_feature_norm, build_vfms, compile_networks
from training.run import Run, begin, open_run
from training.token_drop import at_its_largest, check_token_drop, describe_token_drop


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    folder, origin = (None, args.continue_train_exp_dir) if args.dry_run else ldm_source.resolve_folder(args)
    accelerator = begin(args, folder)
    latents, held_out = open_latents(args, accelerator)
    tokenizer = open_tokenizer(args, latents)
    config = resolve(args, latents, tokenizer)
    source = ldm_source.open_source(args, config, origin, folder, None if latents is None else tokenizer)
    trial = Trial(
        build=partial(build, args, config, tokenizer, accelerator),
        batch_of=partial(random_batch, args),
        later=args.token_drop_until,
        build_largest=lambda: build(at_its_largest(args), config, tokenizer, accelerator),
    )
    if args.dry_run:
        dry_run.dry_run(args, accelerator, trial, partial(prepare_dry_run, args, source))
        return 0
    with open_run(folder, accelerator, args) as this_run:
        # of a run that begins elsewhere, --resume-step chose a checkpoint there
        checkpoint = this_run.checkpoint(args.resume_step if source is None else 0)
        start_step = checkpoint.step if checkpoint is not None else 0 if source is None else source.step
        if this_run.is_finished(start_step):
            return 0
        trial.find_for_run(args, this_run, checkpoint)
        method = trial.build()
        method.watch(held_out)
        with Loop(method, this_run, latents, args, start_step) as loop:
            if checkpoint is not None:
                loop.restore(checkpoint)
            elif source is not None:
                source.take_over(method)
            else:
                measure_features(method, latents)
            keep_vae(this_run, tokenizer, is_new=checkpoint is None)
            this_run.start(start_step)
            this_run.start_trackers("sendvae-ldm")
            lines = describe(args, method, latents) + cost_lines(args, method)
            this_run.describe(args, lines, start_step)
            return loop.fit()


def resolve(args: argparse.Namespace, latents: LatentDataset | None, tokenizer: Tokenizer) -> DenoiserConfig:
    """Replace every default that depends on the data, so that ``args.json`` and checkpoints say what was done."""
    args.resolution = args.resolution or (DEFAULT_RESOLUTION if latents is None else latents.resolution)
    if latents is not None and args.resolution != latents.resolution:
        raise UserError(f"--resolution {args.resolution}: {latents.folder} was made at {latents.resolution} px")
    channels, side, _ = tokenizer.latent_shape(args.resolution)
    config = denoiser_kind(args.model).from_arguments(
        args,
        model=args.model,
        latent_channels=channels,
        latent_size=side,
        num_classes=NUM_CLASSES if latents is None else len(latents.class_names),
    )
    config = with_class_token(config, args)
    config = config.with_flow_map(args.flow_map_blocks) if args.flow_map_blocks else config
    args.denoiser = config.to_dict()
    args.time_shift = settled_shift(args.time_shift, config.latent_shape)
    with torch.device("meta"):  # what does not fit the denoiser is refused, and what follows from it settled
        denoiser = config.build()
        check_token_drop(args, denoiser.grid)
        vfms = aligned(args, parse_sum(args.align), denoiser).features
    args.feature_widths = [vfm.width for vfm in vfms]
    if latents is not None:
        check_features(args, denoiser, latents)
        args.class_names = latents.class_names
        args.data_fingerprint = latents.fingerprint()
        args.vae_checksum = latents.source["vae"]  # open_tokenizer compared it
        args.statistics_checksum = tokenizer.statistics.checksum()
        if not args.dry_run:
            args.max_train_steps = arguments.resolve_max_steps(args, len(latents))
    settle_alignment_schedule(args)
    return config


def build(args: argparse.Namespace, config: DenoiserConfig, tokenizer: Tokenizer, accelerator: Accelerator) -> LDM:
    """Everything that is trained, and the VFMs that images are run through."""
    denoiser, alignment = build_aligned_denoiser(args, config, parse_sum(args.align), accelerator)
    encoders = None
    if (alignment.needs_features or denoiser.class_token_width) and args.repa_source != "features":
        encoders = build_vfms(args, denoiser.grid, accelerator)
    tokenizer.requires_grad_(False).to(accelerator.device)
    norm = build_feature_norm(args, alignment.features, accelerator)
    kind = FlowMap if args.flow_map_blocks else LDM
    method = kind(args, accelerator, denoiser, alignment, tokenizer, encoders, norm)
    if args.compile:
        compile_networks(denoiser, method.teacher, *(encoders or ()))
    return method


def keep_vae(this_run: Run, tokenizer: Tokenizer, is_new: bool) -> None:
    """Put the VAE into the folder of a run that starts, or that lost it."""
    if this_run.is_main and (is_new or not this_run.has_vae):
        tokenizer.save(this_run.folder / "vae")


def describe(args: argparse.Namespace, method: LDM, latents: LatentDataset) -> list[str]:
    """The resolved sizes, for the log."""
    denoiser, held = method.denoiser, latents.held_bytes / 1e9
    source = [] if args.repa_source == "none" else [f"VFM features come from {args.repa_source}"]
    flow_map = describe_flow_map(args, denoiser.depth)
    reg = [f"class token of {class_token_vfm(args)} beside the latent, weight {args.reg_coeff:g}"]
    return [
        f"{len(latents)} latents {denoiser.latent_shape}, {denoiser.null_class} classes, {held:.2f} GB held in memory",
        denoiser.describe(),
        *describe_token_drop(args, denoiser.config.sparse_blocks, denoiser.grid**2),
        *method.alignment.describe(),
        *flow_map,
        *(reg if args.reg_coeff else []),
        *source,
    ]


def cost_lines(args: argparse.Namespace, method: LDM) -> list[str]:
    """What the alignment costs, or SPRINT saves, counted; on the main process, which alone has a use for it."""
    if not (len(method.alignment) or args.token_drop) or not method.accelerator.is_main_process:
        return []
    try:
        with method.accelerator.autocast():
            return alignment_cost_lines(args, method.denoiser.config, [*method.alignment], method.encoders or ())
    except (NotImplementedError, RuntimeError) as error:  # of a method of one's own that the meta device does not know
        return [f"the cost of the alignment was not measured ({one_line(error)})"]


def prepare_dry_run(args: argparse.Namespace, source: ldm_source.StartingRun | None, method: LDM) -> None:
    """Begin where the training would, and say what the alignment costs."""
    if source is not None:
        source.take_over(method)
    for line in cost_lines(args, method):
        print(line)


def random_batch(args: argparse.Namespace, method: LDM, count: int) -> LatentBatch:
    """What a batch of the cache would hold, made up."""
    images = features = class_token = None
    if args.repa_source == "features":
        features = tuple(torch.randn(count, grid**2, width) for _, grid, width in method.alignment.features)
        class_token = torch.randn(count, method.denoiser.class_token_width) if args.reg_coeff else None
    elif method.encoders is not None:
        images = torch.randint(0, 256, (count, 3, args.resolution, args.resolution), dtype=torch.uint8)
    return LatentBatch(
        stored=torch.rand(count, *method.tokenizer.stored_shape(args.resolution)),
        labels=torch.randint(0, method.denoiser.null_class, (count,)),
        images=images,
        features=features,
        class_token=class_token,
    )


if __name__ == "__main__":
    sys.exit(run(main))
