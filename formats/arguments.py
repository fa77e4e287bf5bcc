"""Flags that name other people's files: a VAE with its weights and statistics, and the vision foundation models."""

import argparse

from models.encoders import ENCODERS
from models.tokenizers import architecture_names


def add_encoder_arguments(group: argparse._ArgumentGroup, default: str | None) -> None:
    """Which VFMs, and where their weights are."""
    group.add_argument(
        "--enc-type",
        default=default,
        metavar="NAME",
        help=f"frozen VFM, or several separated by commas: {', '.join(ENCODERS)}",
    )
    group.add_argument(
        "--enc-ckpt",
        metavar="FILE",
        help="its weights; for several VFMs one file each, in the same order, separated by commas (an empty entry is "
        "searched for) (default: searched for in $VFM_DIR, timm's cache, the hub)",
    )


def add_vae_source_arguments(group: argparse._ActionsContainer, default: str | None, several: bool = False) -> None:
    """Flags that name a VAE, its weights and its latent statistics: what ``formats.vae.load_tokenizer`` takes.

    With ``several``, ``--vae`` may be repeated, and gives a list.
    """
    group.add_argument(
        "--vae",
        "--vae-arch",
        default=default,
        action="append" if several else "store",
        metavar="NAME",
        help=f"architecture ({', '.join(architecture_names())}), or a VAE in any form that --vae-ckpt takes"
        f"{'; repeat it for several VAEs' if several else ''}",
    )
    group.add_argument(
        "--vae-ckpt",
        "--vae-ckpt-path",
        metavar="PATH",
        help="its weights: an LDM, Lightning, Stable Diffusion or REPA-E file (.pt, .ckpt, .safetensors), a diffusers "
        "folder or file, a run or its checkpoint, a name on the hub such as stabilityai/sd-vae-ft-mse; none: random "
        "ones (default: those of --vae)",
    )
    group.add_argument(
        "--vae-latents-stats",
        metavar="FILE",
        help="its latent statistics, REPA-E's, LightningDiT's or ours; repa: mean 0 and scale 0.18215, which REPA's "
        "checkpoints assume (default: those in the VAE's file, next to it as X-latents-stats.pt, or in its folder)",
    )


def add_foreign_vae_arguments(group: argparse._ActionsContainer) -> None:
    """The VAE of other people's checkpoint, where that does not hold it."""
    group.add_argument("--vae", metavar="NAME", help="architecture of --vae-ckpt, e.g. f8d4, where it does not tell")
    group.add_argument(
        "--vae-ckpt",
        metavar="FILE",
        help="the VAE of its latents (default: in the checkpoint, or the file that its args name)",
    )
    group.add_argument(
        "--vae-latents-stats",
        metavar="FILE",
        help="its latent statistics; repa: mean 0 and scale 0.18215 (default: the checkpoint's, else REPA's for 4 "
        "channels)",
    )


def add_unfinished_argument(group: argparse._ActionsContainer) -> None:
    """The flag that :func:`training.run.refuse_unfinished` names."""
    group.add_argument(
        "--allow-unfinished", action="store_true", help="take the VAE of a training that has not finished"
    )


def add_verify_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify",
        action="store_true",
        help="first compare all packed data with their checksums: every byte is read once, shared by the processes "
        "(a core does about 1 GB a second, ImageNet at 256 px has 252)",
    )
