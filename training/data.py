"""The images that several training scripts open and measure by the same flags (``training.arguments``)."""

import argparse

from accelerate import Accelerator

from dataset.images import DEFAULT_RESOLUTION, ImageDataset, open_images
from dataset.loader import LabelledImages
from runtime.log import logger
from training.latent_data import stage_once
from training.loop import build_loader
from training.repae import Repae
from training.sendvae import SendVAE


def open_image_data(
    args: argparse.Namespace, accelerator: Accelerator
) -> tuple[ImageDataset | None, ImageDataset | None]:
    """Training and held-out images; None where they are not given (a dry run needs none)."""
    path = args.data_dir
    if path and args.stage_dir and not args.dry_run:
        path = stage_once(path, "images", None, args, accelerator)
    images = open_images(path, args.resolution, default=DEFAULT_RESOLUTION) if path else None
    resolution = images.resolution if images is not None else args.resolution
    held_out = open_images(args.val_data_dir, resolution, default=DEFAULT_RESOLUTION) if args.val_data_dir else None
    return images, held_out


def measure_statistics(method: SendVAE | Repae, images: ImageDataset) -> None:
    """The latent statistics of a VAE that came without, from the first batches of its training."""
    with build_loader(method.args, LabelledImages(images), method.accelerator, 0) as first_batches:
        count = method.measure_statistics(first_batches, len(images))
    logger.info("the VAE has no latent statistics: measured over %d images", count)
