"""Tiny Send-VAE trainings for the tests: flags, and a method without a run."""

import argparse
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import nn

from dataset.loader import ImageBatch
from diffusion.draws import Draws, draw
from formats.vae import load_tokenizer
from loss.alignment import TokenGrid, TokenizerAlignment
from loss.alignment.mapper import MapperAlignment
from loss.alignment.vf import VFAlignment
from loss.vae_objective import VAELossConfig, VAEObjective
from models.discriminator import PatchDiscriminator
from models.encoders import Encoder, build_encoder
from tests.command_line import argv_of
from training.ema import EMA
from training.sendvae import AlignedTokenizer, SendVAE

RESOLUTION = 32
LATENT = (4, 8, 8)  # f4d4-tiny's at 32 px
GRID = 2
FLAGS = {
    "resolution": RESOLUTION,
    "freeze_vae": False,
    "freeze_encoder": False,
    "latent_noise": 0.0,
    "weighting": "uniform",
    "path_type": "linear",
    "align_loss": "cosine",
    "align_coeff": 1.0,
    "mapper_depth": 1,
    "mapper_width": 64,
    "mapper_head": "mlp",
    "noise_injection": True,
    "noise_times": "uniform",
    "noise_shift": 1.0,
    "noise_max": 1.0,
    "noise_statistics": "running",
    "align_schedule": "constant",
    "align_until": None,
    "vf_weight": 0.1,
    "vf_cosine_margin": 0.5,
    "vf_distance_margin": 0.25,
    "bn_momentum": 0.1,
    "ema_decay": 0.0,
    "vae_learning_rate": 1e-3,
    "disc_learning_rate": 1e-3,
    "lr_schedule": "constant",
    "lr_hold_steps": 0,
    "lr_decay_until": None,
    "lr_floor": 0.0,
    "warmup_steps": 0,
    "max_train_steps": 100,
    "max_grad_norm": 1.0,
    "optimizer": "adamw",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 0.0,
    "adam_epsilon": 1e-8,
}


def flags(data, output, name: str = "run", **changes) -> list[str]:
    """Flags of a tiny training; ``changes`` replace or add (True: a bare flag, None: leave out)."""
    values = {
        "output_dir": output,
        "exp_name": name,
        "data_dir": data,
        "resolution": RESOLUTION,
        "vae": "f4d4-tiny",
        "vae_ckpt": "none",
        "enc_type": "efficientnet-lite0",
        "loss_cfg_path": "configs/l1_kl_gan.yaml",
        "batch_size": 4,
        "max_train_steps": 2,
        "log_steps": 1,
        "num_workers": 1,
    } | changes
    return argv_of(values)


def tiny_trainer(
    accelerator: Accelerator | None = None,
    seed: int = 0,
    gan: bool = True,
    vfms: Sequence[str] = ("efficientnet-lite0",),
    perceptual: nn.Module | None = None,
    loss: Mapping[str, object] | None = None,
    **flags: object,
) -> SendVAE:
    """f4d4-tiny, mappers of a ViT block on a 2×2 grid (vf: linear, on the latent's 8×8); random weights from ``seed``.

    Args:
        accelerator: one process on the CPU by default.
        seed: of weights and draws.
        gan: whether there is a discriminator.
        vfms: names, each with a mapper of its own.
        perceptual: stands for LPIPS; None: the loss has no such term.
        loss: of the VAE's loss, what differs from the defaults.
        flags: that differ from ``FLAGS``.
    """
    args = argparse.Namespace(**FLAGS | {"seed": seed} | flags)
    torch.manual_seed(seed)
    tokenizer, _ = load_tokenizer("f4d4-tiny", "none")
    encoders, alignment = [], None
    if args.align_coeff:
        encoders = [build_encoder(name, LATENT[1] if args.align_loss == "vf" else GRID) for name in vfms]
        alignment = tiny_alignment(args, encoders).train()
    discriminator = PatchDiscriminator(width=8).train() if gan else None
    options = {"perceptual_weight": float(perceptual is not None), "discriminator_weight": 0.1 if gan else 0.0}
    objective = VAEObjective(VAELossConfig(**options | dict(loss or {})), perceptual)
    ema = EMA(tokenizer, args.ema_decay) if args.ema_decay else None
    networks = tokenizer.train(), alignment, encoders, objective, discriminator
    return SendVAE(args, accelerator or Accelerator(cpu=True), *networks, ema)


def tiny_alignment(args: argparse.Namespace, encoders: Sequence[Encoder]) -> TokenizerAlignment:
    """That of ``--align-loss``."""
    features = [TokenGrid(encoder.name, encoder.grid, encoder.embed_dim) for encoder in encoders]
    kind = VFAlignment if args.align_loss == "vf" else MapperAlignment
    return kind.from_arguments(args, LATENT, features)


def networks(trainer: SendVAE) -> AlignedTokenizer:
    """All that the first optimizer trains: parameters ``tokenizer.…`` and ``alignment.…``."""
    return trainer.accelerator.unwrap_model(trainer.networks)


def random_images(count: int, seed: int = 1) -> torch.Tensor:
    """uint8 ``[count, 3, 32, 32]``."""
    return torch.randint(
        0, 256, (count, 3, RESOLUTION, RESOLUTION), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def image_batch(count: int, seed: int = 1) -> ImageBatch:
    """Random images, all of one class."""
    return ImageBatch(random_images(count, seed), torch.zeros(count, dtype=torch.int64))


def draws_for(count: int, seed: int = 2) -> Draws:
    """For so many images."""
    return draw((count, *LATENT), torch.Generator().manual_seed(seed))


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all gradients by name."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
