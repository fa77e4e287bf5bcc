"""Tiny trainings on the GPU, built by the scripts themselves from their flags, with random weights and data."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState

import train_ldm
import train_repae
import train_sendvae
from formats.vae import load_tokenizer
from loss.vae_objective import load_loss_config
from training import dry_run
from training.method import Method, to_device
from training.run import begin

COMMON = ("--dry-run", "--random-weights", "--vae", "f4d4-tiny", "--enc-type", "dinov2-vit-s", "--resolution", "64")
DENOISER, REPA = ("--model", "SiT-Ti/2"), ("--encoder-depth", "2")
NAMES = ("sendvae", "ldm", "repae")
RECIPES = {
    "sendvae, Muon": ("sendvae", "--feature-norm", "spatial", "--noise-times", "lognormal", "--optimizer", "muon"),
    "sendvae, VF loss": ("sendvae", "--align-loss", "vf"),
    "sendvae, convolution": ("sendvae", "--mapper-head", "conv", "--align-schedule", "cosine"),
    "ldm, Muon": ("ldm", "--optimizer", "muon", "--time-shift", "2"),
    "ldm, LightningDiT": ("ldm", "--model", "LightningDiT-Ti/2", "--velocity-cosine-coeff", "1"),
    "ldm, DiTDH": ("ldm", "--model", "DiTDH-Ti/2", "--head-width", "256", "--weighting", "lognormal"),
    "ldm, DDT": ("ldm", "--model", "DDT-Ti/2", "--head-width", "256", "--qk-norm", "--lr-schedule", "linear"),
    "ldm, iREPA": ("ldm", "--align", "irepa", "--align-until", "50"),
    "ldm, SRA": ("ldm", "--align", "repa+sra"),
    "ldm, flow map": ("ldm", "--align", "none", "--flow-map-blocks", "2", "--flow-map-cfg-scale", "2.5"),
    "ldm, LightningDiT as a flow map": (
        *("ldm", "--model", "LightningDiT-Ti/2", "--qk-norm", "--align", "none"),
        *("--flow-map-blocks", "2", "--flow-map-tangent", "network"),
    ),
    "ldm, JiT": ("ldm", "--model", "JiT-Ti/2", "--weighting", "lognormal", "--time-mean", "0.8", "--time-std", "0.8"),
    "ldm, predicted data": ("ldm", "--model", "DDT-Ti/2", "--head-width", "256", "--prediction", "x"),
    "ldm, SPRINT": ("ldm", "--sprint", "--token-drop-until", "50"),
    "ldm, class token": ("ldm", "--reg-coeff", "0.03"),
    "ldm, class token, SPRINT, SRA": ("ldm", "--align", "repa+sra", "--reg-coeff", "0.03", "--sprint"),
    "ldm, internal guidance": (
        *("ldm", "--model", "DDT-Ti/2", "--head-width", "256", "--prediction", "x", "--guide-depth", "2"),
    ),
    "sendvae, features as latents": (
        *("sendvae", "--vae", "rae-tiny", "--resolution", "32", "--freeze-encoder", "--align-coeff", "0"),
    ),
    "sendvae, discriminator on features": (
        *("sendvae", "--loss-override", "discriminator=timm/vit_tiny_patch16_224", "discriminator_resolution=64"),
        "discriminator_augment=true",
    ),
    "sendvae, decoder": ("sendvae", "--freeze-encoder", "--align-coeff", "0", "--latent-noise", "0.5"),
}
UNCOMPILED = {"sendvae, equivariance": ("sendvae", "--align-loss", "equivariance", "--eq-scale", "0.5")}


class Training(NamedTuple):
    """A method and a way to a batch of so many images on its device."""

    method: Method
    batch: Callable[[int], Any]
    step: int = 0


def parsed(name: str, *flags: str) -> tuple[str, argparse.Namespace]:
    """The training of one of :data:`NAMES`, :data:`RECIPES` or :data:`UNCOMPILED`, and its settled flags."""
    name, *recipe = (RECIPES | UNCOMPILED).get(name, (name,))
    losses = ("--loss-cfg-path", "configs/l1_lpips_kl_gan.yaml", "--vae-ckpt", "none")
    script, own = {
        "sendvae": (train_sendvae, losses),
        "ldm": (train_ldm, DENOISER if "none" in recipe else (*DENOISER, *REPA)),
        "repae": (train_repae, (*losses, *DENOISER, *REPA)),
    }[name]
    return name, script.parse_arguments([*COMMON, *own, "--max-train-steps", "100", *recipe, *flags])


def tiny_training(name: str, *flags: str) -> Training:
    """One that :func:`parsed` knows; ``flags`` come last."""
    AcceleratorState._reset_state(reset_partial_state=True)
    name, args = parsed(name, *flags)
    if name == "ldm":
        accelerator = begin(args, None)
        tokenizer = train_ldm.open_tokenizer(args, None)
        config = train_ldm.resolve(args, None, tokenizer)
        method = train_ldm.build(args, config, tokenizer, accelerator)
        return Training(method, lambda count: on_device(method, train_ldm.random_batch(args, method, count)))
    if name == "sendvae":
        loss, accelerator = load_loss_config(args.loss_cfg_path, args.loss_override), begin(args, None)
        train_sendvae.resolve(args, None)
        method, _ = train_sendvae.build(args, loss, accelerator)
    else:
        loss, accelerator = load_loss_config(args.loss_cfg_path, args.loss_override), begin(args, None)
        tokenizer, _ = load_tokenizer(args.vae, args.vae_ckpt)
        config = train_repae.resolve(args, None, None, tokenizer)
        method = train_repae.build(args, loss, config, tokenizer, accelerator)

    def batch(count: int):
        return on_device(method, dry_run.image_batch(None, count, args.resolution, 1000))

    return Training(method, batch, loss.discriminator_start)


def on_device(method: Method, batch: Any) -> Any:
    """Drawn on the CPU, the same every time."""
    torch.manual_seed(1)
    return to_device(batch, method.accelerator.device)
