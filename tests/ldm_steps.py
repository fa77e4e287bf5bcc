"""Tiny LDM trainers for the tests, without a run or a cache."""

import torch
from accelerate import Accelerator

from dataset.latents import LatentBatch
from models.denoisers.sit import SiT, SiTConfig
from models.latent_statistics import LatentStatistics
from training.ema import EMA
from training.ldm import LDMTrainer
from training.optimizer import build_adamw

CONFIG = SiTConfig("SiT-Ti/2", 4, 8, num_classes=6, encoder_depth=4, feature_dims=(12,), projector_width=16)
ADAMW = {"betas": (0.9, 0.999), "weight_decay": 0.0, "eps": 1e-8}


def tiny_trainer(
    accelerator: Accelerator | None = None, seed: int = 0, ema_decay: float = 0.0, config: SiTConfig = CONFIG, **changes
) -> LDMTrainer:
    """SiT-Ti/2 whose zero-initialised layers are not zero; features come with the batch; no label is dropped."""
    accelerator = accelerator or Accelerator(cpu=True)
    torch.manual_seed(seed)
    model = SiT(config).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    statistics = LatentStatistics(config.latent_channels)
    statistics.load(torch.tensor([0.5, -0.2, 0.1, 0.0]), torch.tensor([1.5, 0.7, 1.0, 2.0]))
    options = {
        "proj_coeff": 0.5,
        "cfg_prob": 0.0,
        "path_type": "linear",
        "weighting": "uniform",
        "max_grad_norm": 1.0,
        "seed": seed,
        "optimizer": build_adamw(model.parameters(), **ADAMW),
        "ema": EMA(model, ema_decay) if ema_decay else None,
    } | changes
    return LDMTrainer(model, statistics, None, accelerator=accelerator, **options)


def random_batch(count: int, seed: int = 1, config: SiTConfig = CONFIG) -> LatentBatch:
    """What a cache would give."""
    generator = torch.Generator().manual_seed(seed)
    side, channels = config.latent_size, config.latent_channels
    mean = torch.randn(count, channels, side, side, generator=generator)
    std = torch.rand(count, channels, side, side, generator=generator)
    features = torch.randn(count, config.grid**2, config.feature_dims[0], generator=generator)
    labels = torch.randint(0, config.num_classes, (count,), generator=generator)
    return LatentBatch(torch.cat([mean, std], 1).half(), labels, None, (features.half(),))


def part_of(batch: tuple, part: slice):
    """Some items of a batch or of its draws."""

    def cut(value):
        if value is None:
            return None
        return tuple(map(cut, value)) if isinstance(value, tuple) else value[part]

    return type(batch)(*map(cut, batch))
