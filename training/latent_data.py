"""The latent caches of a training, what of them it reads, and the VAE that made them."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from dataset.images import DEFAULT_RESOLUTION, ImageDataset, open_images
from dataset.latents import FLIPPED_NAME, VAE_NAME, LatentDataset, class_tokens_name, features_name, latents_folder
from dataset.loader import stage_dataset
from dataset.shards import read_index
from dataset.verification import verify_on_all
from errors import UserError
from formats.vae import load_tokenizer
from loss.alignment import DENOISER_ALIGNMENTS, TokenGrid, parse_sum
from models.denoisers import Denoiser, DenoiserConfig
from models.encoders import encoder_names, encoder_spec
from models.tokenizers import STATISTICS_FILE, Tokenizer, stores_images
from runtime import DEFAULT_VAE
from runtime.processes import goes_first, this_process
from schema import MalformedError
from training.networks import vfm_features


def open_latents(
    args: argparse.Namespace, accelerator: Accelerator
) -> tuple[LatentDataset | None, LatentDataset | None]:
    """The latent caches to train on and held out; a dry run does without where none is named."""
    if not args.vae_latents_name:
        return None, None
    folder = latents_folder(args.data_dir, args.vae_latents_name)
    features_folder = folder  # before the latents are copied elsewhere
    if args.cached_features is not None:
        features_folder = latents_folder(args.data_dir, args.cached_features, "--cached-features")
    args.repa_source = choose_repa_source(args, features_folder)
    images = None
    if args.stage_dir and not args.dry_run:
        folder = stage_once(folder, "latents", used_parts(args, folder), args, accelerator)
    if args.repa_source == "images":
        images = open_repa_images(args, accelerator, cached_resolution(folder))
    share = {"local_processes": this_process().local_size}
    if args.dry_run:  # which reads little or nothing of it
        share["memory_limit"] = 0
    is_cached = args.repa_source == "features"
    features = encoder_names(args.enc_type) if is_cached and needs_features(args) else ()
    class_token = class_token_vfm(args) if is_cached else None
    if args.cached_features is None:
        features_folder = folder
    vfm = {"features": features, "features_folder": features_folder, "class_token": class_token}
    latents = LatentDataset(folder, hflip=args.hflip, images=images, **vfm, **share)
    held_out = None
    if args.val_data_dir or args.val_vae_latents_name:
        images = open_held_out_images(args, latents.resolution) if class_token_vfm(args) and not is_cached else None
        held_out = LatentDataset(held_out_folder(args), class_token=class_token, images=images, **share)
        check_held_out(held_out, latents)
    verify_once(args, latents, held_out)
    return latents, held_out


def used_parts(args: argparse.Namespace, folder: Path) -> list[str]:
    """The sub-folders of the cache that this training reads."""
    flips = (False, True) if args.hflip else (False,)
    parts = [FLIPPED_NAME] if args.hflip and not mirrors_as_it_reads(folder) else []
    if args.repa_source == "features" and args.cached_features is None:  # another cache's are read where they are
        parts += [name for flipped in flips for name in vfm_parts(args, flipped)]
    return parts


def mirrors_as_it_reads(folder: Path) -> bool:
    """Whether a cache needs no copy of its mirrored latents; where it does not say so, it does."""
    try:
        return stores_images(folder / VAE_NAME)
    except (OSError, MalformedError, KeyError, TypeError):
        return False


def vfm_parts(args: argparse.Namespace, flipped: bool = False) -> list[str]:
    """The sub-folders of a cache with all that is asked of VFMs."""
    parts = [features_name(name, flipped) for name in encoder_names(args.enc_type)] if needs_features(args) else []
    class_token = class_token_vfm(args)
    return parts if class_token is None else [*parts, class_tokens_name(class_token, flipped)]


def stage_once(
    folder: Path, kind: str, parts: list[str] | None, args: argparse.Namespace, accelerator: Accelerator
) -> Path:
    """Copy a packed folder to --stage-dir, by one process on each machine."""
    with goes_first(accelerator.is_local_main_process):
        return stage_dataset(folder, args.stage_dir, kind=kind, parts=parts)


def verify_once(args: argparse.Namespace, *datasets: ImageDataset | LatentDataset | None) -> None:
    """Compare data with their checksums where --verify asks for it."""
    if args.verify:
        verify_on_all(datasets, this_process())


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
        "VFM of class tokens": (held_out.class_token_source, latents.class_token_source),
    }
    for what, (theirs, ours) in same.items():
        if theirs != ours:
            raise UserError(f"{held_out.folder} has another {what} than {latents.folder}; make a cache that matches it")


def needs_features(args: argparse.Namespace) -> bool:
    """Whether something is aligned with a VFM."""
    return any(DENOISER_ALIGNMENTS[name].needs_features for name in parse_sum(args.align))


def class_token_vfm(args: argparse.Namespace) -> str | None:
    """The VFM whose class token is generated beside the latent: the first of --enc-type; None without --reg-coeff."""
    return encoder_names(args.enc_type)[0] if args.reg_coeff else None


def with_class_token(config: DenoiserConfig, args: argparse.Namespace) -> DenoiserConfig:
    """A denoiser's configuration, with the class token that --reg-coeff asks for."""
    name = class_token_vfm(args)
    return config if name is None else config.with_class_token(encoder_spec(name).embed_dim)


def choose_repa_source(args: argparse.Namespace, folder: Path) -> str:
    """Where the features come from: ``none``, ``features`` (those in ``folder``) or ``images``."""
    if not (needs_features(args) or args.reg_coeff):
        return "none"
    if args.cached_features is not None:
        return "features"
    if args.repa_source == "auto":
        indices = [read_index(folder / name) for name in vfm_parts(args)]
        return "images" if None in indices else "features"
    return args.repa_source


def cached_resolution(folder: Path) -> int:
    """Pixels of the images that a cache was made from, which class folders do not say; without a cache the usual."""
    index = read_index(folder)
    return DEFAULT_RESOLUTION if index is None else index["source"].get("resolution", DEFAULT_RESOLUTION)


def open_repa_images(args: argparse.Namespace, accelerator: Accelerator, default: int) -> ImageDataset:
    if not args.data_dir:
        raise UserError("--data-dir is needed: REPA reads the images (or cache features, or --proj-coeff 0)")
    path = Path(args.data_dir)
    if args.stage_dir and not args.dry_run and read_index(path) is not None:
        path = stage_once(path, "images", None, args, accelerator)
    return open_images(path, args.resolution, default=default)


def open_held_out_images(args: argparse.Namespace, default: int) -> ImageDataset:
    """What the class tokens of held-out latents are computed from."""
    if not args.val_data_dir:
        raise UserError(
            "--val-data-dir is needed: --reg-coeff computes class tokens of the held-out images (or cache them, "
            "cache_latents.py --cache-class-tokens, for both sets)"
        )
    return open_images(args.val_data_dir, args.resolution, default=default)


def open_tokenizer(args: argparse.Namespace, latents: LatentDataset | None) -> Tokenizer:
    """The cache's VAE with its statistics; for a dry run without a cache a random one of ``--vae``.

    Raises:
        UserError: the cache has lost its statistics, or holds another VAE than it was made with.
    """
    if latents is None:
        return load_tokenizer(args.vae or DEFAULT_VAE, "none")[0]
    tokenizer, statistics = load_tokenizer(str(latents.vae_folder))
    remedy = "copy the cache again, or make it anew with cache_latents.py"
    if statistics is None:
        raise UserError(f"{latents.vae_folder} has no latent statistics ({STATISTICS_FILE}): {remedy}")
    if tokenizer.checksum() != latents.source.get("vae"):
        raise UserError(f"{latents.vae_folder} is not the VAE that {latents.folder} was made with: {remedy}")
    if args.vae:
        named, _ = load_tokenizer(args.vae, "none")
        if (named.latent_channels, named.downsampling) != (tokenizer.latent_channels, tokenizer.downsampling):
            raise UserError(
                f"--vae {args.vae} is not the VAE that {latents.folder} was made with: leave the flag out, or give "
                "the cache of that VAE"
            )
    return tokenizer


def check_features(args: argparse.Namespace, denoiser: Denoiser, latents: LatentDataset) -> None:
    """Cached features must lie on the denoiser's token grid, and class tokens be of images that give such a grid."""
    if args.repa_source != "features":
        return
    if needs_features(args):
        check_feature_shapes(latents, vfm_features(args.enc_type, denoiser.grid), args.model)
    source, grid, width = latents.class_token_source, denoiser.grid, denoiser.class_token_width
    if source is not None and (source["grid"], source["width"]) != (grid, width):
        raise UserError(
            f"{latents.folder}: cached class tokens of {source['enc_type']} are {source['width']} numbers, from images "
            f"of {source['grid']}×{source['grid']} tokens; {args.model} needs {width} and {grid}×{grid}: cache them "
            f"with --features-grid {grid}"
        )


def check_feature_shapes(latents: LatentDataset, needed: Sequence[TokenGrid], whose: str) -> None:
    """Refuse cached features on another grid, or of another width, than ``whose`` needs."""
    for (name, grid, width), shape in zip(needed, latents.feature_shapes, strict=True):
        if shape != (grid**2, width):
            raise UserError(
                f"{latents.folder}: cached features of {name} are {shape[0]} tokens of {shape[1]}, {whose} needs "
                f"{grid**2} of {width}: cache them with --features-grid {grid}"
            )
