"""The images that several training scripts open and measure by the same flags (``training.arguments``)."""

import argparse

from accelerate import Accelerator

from dataset.images import DEFAULT_RESOLUTION, ImageDataset, open_images
from dataset.latents import LatentDataset, latents_folder
from dataset.loader import LabelledImages
from runtime.log import logger
from runtime.processes import sum_over_processes, this_process
from training.latent_data import cached_resolution, check_feature_shapes, stage_once, verify_once
from training.ldm import LDM
from training.loop import build_loader
from training.method import to_device
from training.networks import token_grids
from training.repae import Repae
from training.sendvae import SendVAE

# For --feature-norm; each has a feature a token: a mean within 2 % of a standard deviation, if tokens were alike.
MEASURED_IMAGES = 2048


def open_image_data(
    args: argparse.Namespace, accelerator: Accelerator
) -> tuple[ImageDataset | None, ImageDataset | None]:
    """Training and held-out images; None where they are not given (a dry run needs none)."""
    path = args.data_dir
    if path and args.stage_dir and not args.dry_run:
        path = stage_once(path, "images", None, args, accelerator)
    default = DEFAULT_RESOLUTION
    if path and args.cached_features is not None:
        default = cached_resolution(latents_folder(args.data_dir, args.cached_features, "--cached-features"))
    images = open_images(path, args.resolution, default=default) if path else None
    resolution = images.resolution if images is not None else args.resolution
    held_out = open_images(args.val_data_dir, resolution, default=DEFAULT_RESOLUTION) if args.val_data_dir else None
    verify_once(args, images, held_out)
    return images, held_out


def open_features(args: argparse.Namespace, images: ImageDataset, method: SendVAE) -> LatentDataset:
    """The images with their VFM features from the cache of ``--cached-features``.

    Raises:
        UserError: no cache with features of these VFMs, of other images, or on another grid of tokens.
    """
    folder = latents_folder(args.data_dir, args.cached_features, "--cached-features")
    needed = token_grids(method.encoders)
    names, local = [vfm.name for vfm in needed], this_process().local_size
    parts = {"features": names, "images": images, "latents": False}
    cache = LatentDataset(folder, hflip=args.hflip, local_processes=local, **parts)
    check_feature_shapes(cache, needed, "the alignment")
    verify_once(args, cache)
    return cache


def measure_statistics(method: SendVAE | Repae, images: ImageDataset) -> None:
    """The latent statistics of a VAE that came without, from the first batches of its training."""
    with build_loader(method.args, LabelledImages(images), method.accelerator, 0) as first_batches:
        count = method.measure_statistics(first_batches, len(images))
    logger.info("the VAE has no latent statistics: measured over %d images", count)


def measure_features(method: SendVAE | LDM, source: LabelledImages | LatentDataset) -> None:
    """The statistics of ``--feature-norm``, from the first batches of the training; nothing without it."""
    if method.feature_norm is None or not method.feature_norm.is_measured:
        return
    norm, device, count = method.feature_norm, method.accelerator.device, 0
    moments = [0] * norm.count
    with build_loader(method.args, source, method.accelerator, 0) as first_batches:
        while count < min(MEASURED_IMAGES, len(source)):
            for batch in to_device(next(first_batches), device):
                moments = [sum(pair) for pair in zip(moments, norm.moments(method.features(batch)), strict=True)]
            count += method.args.batch_size
    norm.load([sum_over_processes(sums) for sums in moments])
    logger.info("VFM features are standardised by their statistics over %d images", count)
