"""Networks and optimizers that several training scripts build from the same flags (``training.arguments``)."""

import argparse

import torch
import torch._functorch.config
from accelerate import Accelerator
from torch import nn

from errors import UserError
from formats.discriminator import load_discriminator
from loss.perceptual import build_lpips
from loss.vae_objective import VAELossConfig, VAEObjective
from models.discriminator import PatchDiscriminator
from models.encoders import Encoder, build_encoders, encoder_names, encoder_spec
from models.tokenizers.kl import Autoencoder
from training.optimizer import build_adamw


def build_discriminator(args: argparse.Namespace, loss_config: VAELossConfig) -> PatchDiscriminator | None:
    """The PatchGAN, pretrained where a file is given; None where the loss has no use for it."""
    if not loss_config.uses_gan:
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
    """The VAE's loss, with LPIPS where it counts."""
    perceptual = None
    if loss_config.perceptual_weight:
        with accelerator.local_main_process_first():
            perceptual = build_lpips(args.lpips_ckpt, args.random_weights)
    return VAEObjective(loss_config, perceptual)


def build_token_encoders(args: argparse.Namespace, grid: int, accelerator: Accelerator) -> list[Encoder]:
    """The frozen VFMs whose features a SiT of ``grid`` tokens along a side is aligned with, on the device."""
    with accelerator.local_main_process_first():  # who downloads; the others find the file in the cache
        encoders = build_encoders(encoder_names(args.enc_type), grid, args.enc_ckpt, args.random_weights)
    for encoder in encoders:
        encoder.to(accelerator.device)
        if args.channels_last:
            encoder.to(memory_format=torch.channels_last)
    return encoders


def feature_dims(args: argparse.Namespace) -> tuple[int, ...]:
    """D of each VFM that a SiT is aligned with, one projector each; nothing is built for it."""
    if not args.proj_coeff:
        return ()
    return tuple(encoder_spec(name).embed_dim for name in encoder_names(args.enc_type))


def build_optimizer(args: argparse.Namespace, module: nn.Module) -> torch.optim.AdamW:
    """AdamW over a module's trained parameters."""
    return build_adamw(
        module.parameters(),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def compile_networks(autoencoder: Autoencoder, *others: nn.Module | None) -> None:
    """Compile in place, so that state-dict keys keep their names."""
    # Adaptive weights take gradients through a graph that is kept; a compiled one must then not give its buffers away.
    torch._functorch.config.donated_buffer = False
    for module in (autoencoder.network.encoder, autoencoder.network.decoder, *others):
        if module is not None:
            module.compile()
