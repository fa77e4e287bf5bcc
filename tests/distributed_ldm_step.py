"""Run by torchrun from test_ldm_step: each process's gradients of a step on its half of a batch, into a file."""

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


def batch_draws(weighting: str = "uniform") -> Draws:
    return draw((BATCH, *CONFIG.latent_shape), torch.Generator().manual_seed(2), weighting)


def config_of(model: str) -> DenoiserConfig:
    return denoiser_config(CONFIG.to_dict() | {"model": model})


def main(path: str, model: str) -> None:
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    rank, half = accelerator.process_index, BATCH // accelerator.num_processes
    assert accelerator.num_processes == 2
    trainer = tiny_trainer(accelerator, config=config_of(model))
    mine = slice(rank * half, (rank + 1) * half)
    accumulate(trainer, part_of(random_batch(BATCH), mine), part_of(batch_draws(), mine))
    save_file(gradients(networks(trainer)), f"{path}-{rank}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
