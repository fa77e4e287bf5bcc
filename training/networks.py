"""Networks that several training scripts build from the same flags (``training.arguments``)."""

import argparse
from collections.abc import Sequence
from types import ModuleType

import torch
from accelerate import Accelerator
from torch import nn

from errors import UserError
from formats.averages import ema_names
from formats.discriminator import load_discriminator
from loss.alignment import (
    DENOISER_ALIGNMENTS,
    DenoiserAlignments,
    TokenGrid,
    TokenizerAlignment,
    build_denoiser_alignment,
)
from loss.perceptual import GO_WITHOUT, TRUNKS, build_lpips
from loss.vae_objective import VAELossConfig, VAEObjective
from models.denoisers import Denoiser, DenoiserConfig
from models.discriminator import PatchDiscriminator
from models.encoders import Encoder, encoder_names, encoder_spec
from models.feature_discriminator import FeatureDiscriminator
from models.feature_norm import FeatureNorm, SpatialNorm
from models.precision import hold_products
from models.tokenizers import Tokenizer
from runtime.processes import goes_first
from training.ema import EMA
from training.sendvae import SendVAE


def build_objective(
    args: argparse.Namespace, loss_config: VAELossConfig, accelerator: Accelerator, resolution: int
) -> tuple[VAEObjective, PatchDiscriminator | FeatureDiscriminator | None]:
    """The VAE's objective, with LPIPS where it counts, and the discriminator, or None.

    ``resolution`` is the side of the smallest images that are compared, pixels.
    """
    discriminator = perceptual = None
    vfm = loss_config.vfm_of_discriminator if loss_config.uses_gan else None
    if args.disc_enc_ckpt and vfm is None:
        raise UserError(
            f"--disc-enc-ckpt {args.disc_enc_ckpt}: the loss has no VFM as its discriminator; leave it out, or add "
            "--loss-override discriminator=NAME"
        )
    if loss_config.uses_gan:
        if vfm is None:
            discriminator = build_patch_discriminator(args, resolution)
        else:
            discriminator = build_feature_discriminator(args, loss_config, accelerator)
    if loss_config.perceptual_weight:
        check_size(args, resolution, TRUNKS["vgg"].min_resolution, "LPIPS", GO_WITHOUT)
        with goes_first(accelerator.is_local_main_process):
            perceptual = build_lpips(args.lpips_ckpt, args.random_weights)
    return VAEObjective(loss_config, perceptual), discriminator


def build_patch_discriminator(args: argparse.Namespace, resolution: int) -> PatchDiscriminator:
    """Pretrained where a file is given."""
    discriminator = PatchDiscriminator()
    least = discriminator.min_resolution
    check_size(args, resolution, least, "the PatchGAN", "--loss-override discriminator_weight=0")
    if args.disc_pretrained_ckpt:
        load_discriminator(discriminator, args.disc_pretrained_ckpt)
    return discriminator


def build_feature_discriminator(
    args: argparse.Namespace, loss_config: VAELossConfig, accelerator: Accelerator
) -> FeatureDiscriminator:
    """Heads on a frozen VFM, which only runs under autocast."""
    from models.encoders import build_encoder  # timm takes seconds, which a training without VFMs need not wait

    name, side = loss_config.vfm_of_discriminator, loss_config.discriminator_resolution
    if args.disc_pretrained_ckpt:
        raise UserError(f"--disc-pretrained-ckpt holds a PatchGAN, and the loss has discriminator {name}: leave it out")
    try:
        stride = encoder_spec(name).stride
        if side % stride or side < 2 * stride:
            raise UserError(
                f"discriminator_resolution {side} is no multiple of {stride}, the patch of discriminator {name}, that "
                f"has 2×2 patches or more: take {max(2, round(side / stride)) * stride}"
            )
        with goes_first(accelerator.is_local_main_process):  # who downloads; the others find the file in the cache
            encoder = build_encoder(name, side // stride, args.disc_enc_ckpt, args.random_weights)
    except UserError as error:
        said = str(error).replace("--enc-ckpt", "--disc-enc-ckpt").replace("--enc-type", "discriminator of the loss,")
        raise UserError(said) from error
    discriminator = FeatureDiscriminator(encoder)
    hold_products(encoder, accelerator.mixed_precision)
    return discriminator


def check_size(args: argparse.Namespace, resolution: int, least: int, part: str, go_without: str) -> None:
    """Refuse images, ``resolution`` px wide, that are too small for a part of the objective."""
    if resolution < least:
        made = "" if resolution == args.resolution else f", as --align-loss {args.align_loss} makes them"
        raise UserError(
            f"{part} needs images of {least} px or more, not {resolution}{made}: raise --resolution, or {go_without}"
        )


def build_vfms(args: argparse.Namespace, grid: int, accelerator: Accelerator) -> list[Encoder]:
    """The frozen VFMs of ``--enc-type`` on a grid of tokens, on the device; they only run under autocast."""
    from models.encoders import build_encoders  # timm takes seconds, which a training without VFMs need not wait

    with goes_first(accelerator.is_local_main_process):  # who downloads; the others find the file in the cache
        encoders = build_encoders(encoder_names(args.enc_type), grid, args.enc_ckpt, args.random_weights)
    for encoder in encoders:
        encoder.to(accelerator.device)
        hold_products(encoder, accelerator.mixed_precision)
        if args.channels_last:
            encoder.to(memory_format=torch.channels_last)
    return encoders


def build_feature_norm(
    args: argparse.Namespace, features: Sequence[TokenGrid], accelerator: Accelerator
) -> FeatureNorm | SpatialNorm | None:
    """The normalisation of ``--feature-norm`` for these VFMs, on the device; statistics are measured later."""
    if args.feature_norm == "none" or not features:
        return None
    if args.feature_norm == "spatial":
        if any(vfm.grid == 1 for vfm in features):
            raise UserError("--feature-norm spatial compares the tokens of an image, and here it has one: take another")
        return SpatialNorm()
    shapes = [(vfm.grid**2, vfm.width) for vfm in features]
    return FeatureNorm(shapes, per_token=args.feature_norm == "token").to(accelerator.device)


def aligned(args: argparse.Namespace, alignments: Sequence[str], denoiser: Denoiser) -> DenoiserAlignments:
    """The alignments of these names for a denoiser; no VFM is built for it."""
    needed = any(DENOISER_ALIGNMENTS[name].needs_features for name in alignments)
    features = vfm_features(args.enc_type, denoiser.grid) if needed else []
    alignment = build_denoiser_alignment(args, alignments, denoiser, features)
    if alignment.needs_average and not ema_names(args.ema_decay):
        raise UserError(
            f"--align {'+'.join(alignments)} compares with the averaged network, and --ema-decay 0 keeps none: leave "
            "that flag out"
        )
    return alignment


def vfm_features(enc_type: str, grid: int) -> list[TokenGrid]:
    """What is known of the VFMs of ``--enc-type`` on a grid of tokens; nothing is built."""
    return [TokenGrid(name, grid, encoder_spec(name).embed_dim) for name in encoder_names(enc_type)]


def token_grids(encoders: Sequence[Encoder]) -> list[TokenGrid]:
    """The tokens of VFMs that are built."""
    return [TokenGrid(encoder.name, encoder.grid, encoder.embed_dim) for encoder in encoders]


def build_sendvae(
    args: argparse.Namespace,
    accelerator: Accelerator,
    tokenizer: Tokenizer,
    alignment: TokenizerAlignment | None,
    encoders: Sequence[Encoder],
    objective: VAEObjective,
    discriminator: PatchDiscriminator | FeatureDiscriminator | None,
    ema_decay: float = 0.0,
) -> SendVAE:
    """A tokenizer's training, all networks on the device; ``ema_decay`` is of its average, 0: none."""
    for network in (tokenizer, alignment, objective, discriminator):
        if network is not None:
            network.to(accelerator.device)
            if args.channels_last:
                network.to(memory_format=torch.channels_last)
    for network in (tokenizer, alignment, discriminator):
        if network is not None:
            network.train()
    if args.gradient_checkpointing:
        tokenizer.enable_gradient_checkpointing()
    ema = EMA(tokenizer, ema_decay) if ema_decay else None
    norm = build_feature_norm(args, token_grids(encoders), accelerator)
    return SendVAE(args, accelerator, tokenizer, alignment, encoders, objective, discriminator, ema, norm)


def build_aligned_denoiser(
    args: argparse.Namespace,
    config: DenoiserConfig,
    alignments: Sequence[str],
    accelerator: Accelerator,
) -> tuple[Denoiser, DenoiserAlignments]:
    """Denoiser and projectors on the device; one seed gives the same network, whatever it is aligned with."""
    torch.manual_seed(args.seed)
    denoiser = config.build()
    if args.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    alignment = aligned(args, alignments, denoiser)
    return denoiser.to(accelerator.device).train(), alignment.to(accelerator.device).train()


def compile_networks(*networks: nn.Module | None) -> None:
    """Compile in place, so that state-dict keys keep their names; after averages have been copied off.

    Mappers and projectors stay as they are: they are a few per cent of a step, and mostly matrix products, which a
    compiler leaves alone.
    """
    import torch._dynamo.config  # here, because it takes a second
    import torch._functorch.config

    # Adaptive weights take gradients through a graph that is kept; a compiled one must then not give its buffers away.
    _set_in_all_threads(torch._functorch.config, "donated_buffer", False)
    # Blocks are smaller than DDP's buckets, and one that it split would be recomputed unsplit: torch 2.6 refuses that.
    torch._dynamo.config.optimize_ddp = False
    for network in networks:
        if network is not None:
            network.compile(dynamic=False)  # as models.compilation says; LPIPS and discriminator are torch's to compile


def _set_in_all_threads(config: ModuleType, name: str, value: object) -> None:
    """Set what autograd's threads read too: to newer torch an assignment is of the thread that makes it."""
    setattr(config, name, value)
    entry = getattr(config, "_config", {}).get(name)
    if hasattr(entry, "default"):
        entry.default = value
