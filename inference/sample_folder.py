"""A folder of samples, as generate.py's flags ask for it: its name, what its images depend on, how they are made."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dataset.images import ImageDataset
from dataset.npz import npz_bytes
from dataset.packing import PackingJob, check_space, given_back_if_refused
from dataset.shards import ShardSpec
from diffusion.flow import settled_shift
from formats.averages import MAIN
from formats.run_folders import vae_label
from inference.arguments import OUTPUT_FLAG
from inference.latent_cache import autocast_for, chunk_size
from inference.sampling import NPZ_NAME, ImageSampler, SamplerSettings, ShardMaker, choose_labels, complete
from inference.sweep import Point, settle
from inference.trained_ldm import InternalGuide, PathDrop, TrainedLDM
from inference.untrained_ldm import UntrainedLDM
from models.denoisers import Denoiser
from models.denoisers.sprint import Shortcut
from models.precision import hold_products
from models.tokenizers import Tokenizer
from runtime.log import progress_bar
from runtime.processes import Process

# Which flag a setting comes from; of the model those of MODEL_SETTINGS.
FLAGS = {"precision": "--mixed-precision", "guide_sha256": "--guide", "decoder_sha256": "--decoder"}
# Of settings that older samples were made without.
UNSAID = {
    **{"time_shift": 1.0, "learned_guidance": None, "damped": False, "decoder": None, "decoder_sha256": None},
    **{"guide_scale": None, "guide_low": 0.0, "guide_high": 1.0},
}
MODEL_SETTINGS = ("weights_sha256", "vae", "latent_statistics", "path_type", "learned_guidance")


class Networks(NamedTuple):
    """On the device, compiled where that is wanted. A model that guides itself is both."""

    model: Denoiser
    guide: Denoiser | Shortcut | None
    tokenizer: Tokenizer


class Job(NamedTuple):
    """What a sample, or every point of a sweep, is made from.

    Attributes:
        trained: the checkpoint, its guide with it.
        tokenizer: the VAE, with the decoder of ``--decoder``.
        classes: that are sampled.
        process: who this is.
        networks: loads them, once.
        beside: real images for the preview.
    """

    trained: TrainedLDM
    tokenizer: Tokenizer
    classes: Sequence[int]
    process: Process
    networks: Callable[[], Networks]
    beside: ImageDataset | None


def default_folder(args: argparse.Namespace, trained: TrainedLDM | UntrainedLDM) -> Path:
    """A folder in the run, named by what is most often varied; of a sweep, whose points have the rest in theirs."""
    parts = [
        "samples" if args.sweep is None else "sweep",
        trained.label,
        f"{args.mode}{'-heun' if args.heun else ''}{args.num_steps}",
    ]
    if args.time_shift is not None:
        parts.append(f"shift{args.time_shift if args.time_shift == 'auto' else format(args.time_shift, 'g')}")
    if args.damped:
        parts.append("damped")
    if args.decoder is not None:
        parts.append(f"decoder-{vae_label(args.decoder)}")
    if args.sweep is None and args.cfg_scale != 1:
        parts.append(guidance_name(args, trained))
    if args.weights != MAIN:
        parts.append(args.weights)
    if args.label_sampling != "random":
        parts.append(args.label_sampling)
    return trained.folder / "-".join([*parts, f"{args.num_fid_samples}", f"seed{args.seed}"])


def guidance_name(args: argparse.Namespace, trained: TrainedLDM | UntrainedLDM) -> str:
    """Scale, interval, channels and guide, for the names of folders."""
    if args.cfg_scale == 1:
        return "unguided"
    guide = None if args.guide is None else trained.guide
    own = {PathDrop: "pathdrop", InternalGuide: "internal", type(None): "cfg"}
    kind = own.get(type(guide), "auto")
    parts = [f"{args.cfg_scale:g}", f"{args.guidance_low:g}", f"{args.guidance_high:g}"]
    if args.guide_scale is not None:
        parts = [f"{args.guide_scale:g}", f"{args.guide_low:g}", f"{args.guide_high:g}", f"cfg{parts[0]}", *parts[1:]]
    parts[0] = kind + parts[0]
    if args.guidance_channels is not None:
        parts.append(f"{args.guidance_channels}ch")
    if kind == "auto":
        is_own = guide.folder.resolve() == trained.folder.resolve()
        parts += [*([] if is_own else [guide.folder.resolve().name]), guide.label]
    return "-".join(parts)


def at_point(args: argparse.Namespace, point: Point, trained: TrainedLDM | UntrainedLDM) -> argparse.Namespace:
    """The flags of a point of a sweep, as if they had been given for it alone."""
    own = argparse.Namespace(**vars(args))
    settle(own, point)
    own.sample_dir = args.sample_dir / guidance_name(own, trained)
    return own


def sampler_settings(args: argparse.Namespace, trained: TrainedLDM | UntrainedLDM) -> SamplerSettings:
    return SamplerSettings(
        mode=args.mode,
        num_steps=args.num_steps,
        heun=args.heun,
        cfg_scale=args.cfg_scale,
        guidance_low=args.guidance_low,
        guidance_high=args.guidance_high,
        path_type=trained.path_type,
        time_shift=time_shift(args, trained),
        seed=args.seed,
        guidance_channels=args.guidance_channels,
        guide_scale=args.guide_scale,
        guide_low=args.guide_low,
        guide_high=args.guide_high,
        damped=args.damped,
    )


def time_shift(args: argparse.Namespace, trained: TrainedLDM | UntrainedLDM) -> float:
    """That of the flag, or of the training."""
    if args.time_shift is None:
        return trained.time_shift
    return settled_shift(args.time_shift, trained.config.latent_shape)


def describe(args: argparse.Namespace, job: Job) -> dict:
    """All that the images depend on; goes into the index, and a rerun in the same folder must agree with it."""
    trained, tf32 = job.trained, job.process.device.type == "cuda" and args.allow_tf32
    guide = None if args.guide is None else trained.guide
    return {
        "train_steps": trained.step,
        "weights": trained.weights,
        "weights_sha256": trained.checksum,
        "vae": trained.vae_checksum,
        "decoder": None if args.decoder is None else vae_label(args.decoder),
        "decoder_sha256": None if args.decoder is None else job.tokenizer.checksum(),
        "latent_statistics": job.tokenizer.statistics.checksum(),
        **vars(sampler_settings(args, trained)),
        "learned_guidance": trained.learned_guidance,
        "guide": None if guide is None else guide.as_guide,
        "guide_sha256": None if guide is None else guide.checksum,
        "num_fid_samples": args.num_fid_samples,
        "label_sampling": args.label_sampling,
        "classes": None if len(job.classes) == len(trained.class_names) else list(job.classes),
        "precision": "bf16" if args.mixed_precision == "bf16" else "tf32" if tf32 else "float32",
        "rounding": args.rounding,
        "shard_size": args.shard_size,
    }


def load_networks(
    args: argparse.Namespace, trained: TrainedLDM | UntrainedLDM, tokenizer: Tokenizer, process: Process
) -> Networks:
    """The denoiser, its guide and the VAE on the device."""
    device = process.device
    model = trained.load_model().to(device)
    guide = None if trained.guide is None else trained.guide.load_guide(model).to(device)
    for network in (model, guide):
        hold_products(network, args.mixed_precision)
    tokenizer.to(device)
    if device.type == "cpu":
        tokenizer.to(memory_format=torch.channels_last)
    networks = Networks(model, guide, tokenizer)
    for network in dict.fromkeys(networks) if args.compile else ():
        if network is not None:
            network.compile()  # the denoiser for two sizes: with and without the null class
    return networks


def build_sampler(
    args: argparse.Namespace, trained: TrainedLDM | UntrainedLDM, networks: Networks, process: Process
) -> ImageSampler:
    return ImageSampler(
        networks.model,
        networks.tokenizer,
        sampler_settings(args, trained),
        truncate=args.rounding == "truncate",
        decode_batch=chunk_size(trained.resolution, process.device),
        autocast=autocast_for(process.device, args.mixed_precision),
        guide=None if args.guide is None else networks.guide,
    )


def packing_job(args: argparse.Namespace, job: Job) -> PackingJob:
    """The folder of a sample."""
    spec = ShardSpec("images", (3, job.trained.resolution, job.trained.resolution), "uint8")
    flags = FLAGS | dict.fromkeys(MODEL_SETTINGS, "--exp-path")
    return PackingJob(args.sample_dir, spec, describe(args, job), OUTPUT_FLAG, flags, UNSAID)


def count_shards(args: argparse.Namespace) -> int:
    return -(-args.num_fid_samples // args.shard_size)


def make_samples(args: argparse.Namespace, job: Job) -> bool:
    """Make what is missing of this process's shards, complete what is complete, say what came out.

    Returns:
        whether all images are there.
    """
    packing, process, shards = packing_job(args, job), job.process, count_shards(args)
    show = print if process.is_main else lambda text: None
    with given_back_if_refused(packing, alone=process.world_size == 1):
        packing.begin()
        labels = choose_labels(args.num_fid_samples, job.classes, args.label_sampling, args.seed)
        todo = packing.missing(process.share(shards))
        if process.is_main:
            show_plan(args, packing, labels, len(job.classes), shards)
        if todo:
            sampler = build_sampler(args, job.trained, job.networks(), process)
            make_shards(args, packing, sampler, labels, todo, process)
        if not packing.finish(shards, job.trained.class_names):
            show(f"{args.sample_dir}: this process's shards are complete; whoever comes last completes the folder")
            return False
        complete(packing, args.npz, args.preview, job.beside)
        show(f"{args.sample_dir} is complete: {len(labels)} images" + (f", {NPZ_NAME}" if args.npz else ""))
    return True


def show_plan(args: argparse.Namespace, packing: PackingJob, labels: np.ndarray, num_classes: int, shards: int) -> None:
    """What will be made, and whether there is room."""
    missing, extra = packing.missing(range(shards)), len(labels) % num_classes
    if args.label_sampling == "equal" and extra:
        print(
            f"note: {len(labels)} images of {num_classes} classes: the first {extra} classes get one more than the rest"
        )
    count = min(len(missing) * args.shard_size, len(labels))
    npz = npz_bytes(len(labels), packing.spec.shape[-1]) if args.npz and not (packing.folder / NPZ_NAME).exists() else 0
    if count or npz:
        check_space(packing.folder, count * packing.spec.item_bytes + npz, "take fewer --num-fid-samples or --no-npz")


def make_shards(
    args: argparse.Namespace,
    packing: PackingJob,
    sampler: ImageSampler,
    labels: np.ndarray,
    todo: Sequence[int],
    process: Process,
) -> None:
    maker = ShardMaker(
        packing,
        sampler,
        labels,
        shard_size=args.shard_size,
        batch_size=args.pproc_batch_size,
        only_whole_batches=args.compile,
        device=process.device,
    )
    count, begin = sum(len(maker.items(number)) for number in todo), time.perf_counter()
    with progress_bar(count, 0, "sampling", "img", process.is_main) as progress:
        for number in todo:
            maker.make(number, progress)
    seconds = time.perf_counter() - begin
    rate = f"{count} images in {seconds:.1f} s, {count / seconds:.2f} images/s"
    print(f"process {process.rank} of {process.world_size}: {rate}")
