"""Run by torchrun from test_distributed: one step of each process on its half of a batch; gradients into a file."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import save_file

from loss.alignment.vf import VFLoss
from models.latent_statistics import latent_moments
from runtime.processes import sum_over_processes
from tests.sendvae_runs import gradients, random_images, tiny_trainer
from training.sendvae import draw_noise

BATCH = 8


def batch_noise():
    return draw_noise((BATCH, 4, 8, 8), torch.device("cpu"), torch.Generator().manual_seed(2))


def main(path: str, mode: str) -> None:
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    rank, half = accelerator.process_index, BATCH // accelerator.num_processes
    assert accelerator.num_processes == 2
    vf_loss = VFLoss() if mode == "vf" else None
    gan = mode == "gan"
    trainer = tiny_trainer(accelerator, gan=gan, adaptive_discriminator_weight=gan, vf_loss=vf_loss)
    mine = slice(rank * half, (rank + 1) * half)
    noise = batch_noise()
    metrics, latent = trainer.accumulate(
        random_images(BATCH)[mine], type(noise)(*(tensor[mine] for tensor in noise)), step=0, share=1.0
    )
    trainer.statistics.update(sum_over_processes(latent_moments(latent)), 0.1)
    tensors = {f"model.{name}": g for name, g in gradients(trainer.model).items()}
    tensors |= {f"statistics.{name}": t.clone() for name, t in trainer.statistics.state_dict().items()}
    if trainer.discriminator is not None:
        tensors |= {f"discriminator.{name}": g for name, g in gradients(trainer.discriminator).items()}
        tensors["gan_weight"] = metrics["gan_weight"]
    if vf_loss is not None:
        tensors["vf_weight"] = metrics["vf_weight"]
    save_file(tensors, f"{path}-{rank}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
