"""Tiny LDM trainings for the tests, without a run or a cache."""

import argparse
from collections.abc import Sequence
from unittest.mock import patch

import torch
from accelerate import Accelerator

from dataset.latents import LatentBatch
from diffusion.draws import Draws
from formats.vae import load_tokenizer
from loss.alignment import TokenGrid, build_denoiser_alignment
from models.denoisers import DenoiserConfig
from models.denoisers.config import SiTConfig
from training.ldm import LDM, AlignedDenoiser
from training.method import Metrics

CONFIG = SiTConfig("SiT-Ti/2", 4, 8, num_classes=6)
FEATURES = (TokenGrid("vfm", 4, 12),)
FLAGS = {
    "cfg_prob": 0.0,
    "velocity_cosine_coeff": 0.0,
    "guide_coeff": 1.0,
    "path_type": "linear",
    "weighting": "uniform",
    "time_shift": 1.0,
    "time_mean": 0.0,
    "time_std": 1.0,
    "learning_rate": 1e-3,
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
    "ema_decay": 0.0,
    "posthoc_ema": "none",
    "proj_coeff": 0.5,
    "encoder_depth": 4,
    "projector_width": 16,
    "vae_repa_coeff": 1.0,
    "vae_repa_depth": 2,
    "vae_repa_width": 24,
    "vae_repa_times": (0.0, 1.0),
    "sra_coeff": 0.2,
    "sra_depth": 2,
    "sra_teacher_depth": 3,
    "sra_interval": 0.2,
    "sra_loss": "smooth-l1",
    "feature_norm": "none",
    "irepa_coeff": 0.5,
    "irepa_strength": 1.0,
    "reg_coeff": 0.0,
    "align_schedule": "constant",
    "align_until": None,
}


def tiny_trainer(
    accelerator: Accelerator | None = None,
    seed: int = 0,
    align: Sequence[str] = ("repa",),
    config: DenoiserConfig = CONFIG,
    features: Sequence[TokenGrid] = FEATURES,
    kind: type[LDM] = LDM,
    **flags: object,
) -> LDM:
    """A denoiser whose zero-initialised layers are not zero; features come with the batch; no label is dropped.

    Args:
        accelerator: one process on the CPU by default.
        seed: of weights and draws.
        align: names of alignments.
        config: of the denoiser, for latents of 4 channels.
        features: what REPA compares with.
        kind: of the training.
        flags: that differ from ``FLAGS``.
    """
    args = argparse.Namespace(**FLAGS | {"seed": seed} | flags)
    torch.manual_seed(seed)
    denoiser = config.build().train()
    alignment = build_denoiser_alignment(args, align, denoiser, features).train()
    for module in (denoiser, alignment):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    tokenizer, _ = load_tokenizer("f4d4-tiny", "none")
    tokenizer.statistics.load(torch.tensor([0.5, -0.2, 0.1, 0.0]), torch.tensor([1.5, 0.7, 1.0, 2.0]))
    return kind(args, accelerator or Accelerator(cpu=True), denoiser, alignment, tokenizer, encoders=None)


def networks(trainer: LDM) -> AlignedDenoiser:
    """All that is trained: parameters ``denoiser.…`` and ``alignment.NAME.…``."""
    return trainer.accelerator.unwrap_model(trainer.networks)


def accumulate(trainer: LDM, batch: LatentBatch, draws: Draws, share: float = 1.0) -> Metrics:
    """Add the gradients of a micro-batch for which just these numbers are drawn."""
    with patch.object(trainer, "draws", lambda step, micro_step, batch: draws):
        return trainer.accumulate(0, 0, batch, share, synchronise=True)[0]


def random_batch(
    count: int, seed: int = 1, config: DenoiserConfig = CONFIG, features: Sequence[TokenGrid] = FEATURES
) -> LatentBatch:
    """What a cache would give."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, *config.latent_shape, generator=generator)
    std = torch.rand(count, *config.latent_shape, generator=generator)
    cached = tuple(torch.randn(count, grid**2, width, generator=generator).half() for _, grid, width in features)
    labels = torch.randint(0, config.num_classes, (count,), generator=generator)
    width = config.class_token_width
    token = 3 * torch.randn(count, width, generator=generator).half() if width else None
    return LatentBatch(torch.cat([mean, std], 1).half(), labels, None, cached, token)


def part_of(batch: tuple, part: slice):
    """Some items of a batch or of its draws."""

    def cut(value):
        if value is None or isinstance(value, torch.Generator):
            return value
        return tuple(map(cut, value)) if isinstance(value, tuple) else value[part]

    return type(batch)(*map(cut, batch))
