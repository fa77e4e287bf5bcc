"""Run by torchrun from test_ldm_step: each process's gradients of a step on its half of a batch, into a file."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import save_file

from diffusion.draws import draw
from tests.ldm_steps import part_of, random_batch, tiny_trainer
from tests.sendvae_runs import gradients
from training.ldm import latent_shape

BATCH = 8


def batch_draws(weighting: str = "uniform"):
    shape = latent_shape(random_batch(BATCH))
    return draw(shape, weighting, torch.device("cpu"), torch.Generator().manual_seed(2))


def main(path: str) -> None:
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    rank, half = accelerator.process_index, BATCH // accelerator.num_processes
    assert accelerator.num_processes == 2
    trainer = tiny_trainer(accelerator)
    mine = slice(rank * half, (rank + 1) * half)
    trainer.accumulate(part_of(random_batch(BATCH), mine), part_of(batch_draws(), mine), share=1.0)
    save_file(gradients(trainer.model), f"{path}-{rank}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
