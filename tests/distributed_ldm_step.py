"""Run on two processes by test_ldm_step: each process's gradients of a step on its half of a batch, into a file."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import save_file

from diffusion.draws import Draws, draw
from models.denoisers import DenoiserConfig, denoiser_config
from tests.ldm_steps import CONFIG, accumulate, networks, part_of, random_batch, tiny_trainer
from tests.sendvae_runs import gradients

BATCH = 8
STEP = {"reg_coeff": 0.5, "ema_decay": 0.5, "sra_interval": 0.0}  # 0: SRA's times are not drawn, process by process


def batch_draws(weighting: str = "uniform", class_token_width: int = 0) -> Draws:
    generator = torch.Generator().manual_seed(2)
    draws = draw((BATCH, *CONFIG.latent_shape), generator, weighting)
    if not class_token_width:
        return draws
    token = torch.randn(BATCH, class_token_width, generator=generator)
    return draws._replace(noise=torch.cat([draws.noise.flatten(1), token], 1))


def config_of(model: str, class_token_width: int = 0) -> DenoiserConfig:
    return denoiser_config(CONFIG.to_dict() | {"model": model, "class_token_width": class_token_width})


def main(path: str, model: str, width: str = "0", align: str = "repa") -> None:
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    rank, half = accelerator.process_index, BATCH // accelerator.num_processes
    assert accelerator.num_processes == 2
    config = config_of(model, int(width))
    trainer = tiny_trainer(accelerator, config=config, align=align.split("+"), **STEP)
    mine = slice(rank * half, (rank + 1) * half)
    draws = batch_draws(class_token_width=config.class_token_width)
    accumulate(trainer, part_of(random_batch(BATCH, config=config), mine), part_of(draws, mine))
    save_file(gradients(networks(trainer)), f"{path}-{rank}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
