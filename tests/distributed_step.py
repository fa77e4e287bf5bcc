"""Run on two processes by test_distributed: one step of each process on its half of a batch; gradients into a file."""

import sys

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import save_file

from models.latent_statistics import latent_moments
from runtime.processes import sum_over_processes
from tests.ldm_steps import part_of
from tests.sendvae_runs import draws_for, gradients, image_batch, networks, tiny_trainer

BATCH = 8


def main(path: str, mode: str) -> None:
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    rank, half = accelerator.process_index, BATCH // accelerator.num_processes
    assert accelerator.num_processes == 2
    gan, align_loss = mode == "gan", "vf" if mode == "vf" else "cosine"
    trainer = tiny_trainer(accelerator, gan=gan, align_loss=align_loss, loss={"adaptive_discriminator_weight": gan})
    mine = slice(rank * half, (rank + 1) * half)
    batch, draws = part_of(image_batch(BATCH), mine), part_of(draws_for(BATCH), mine)
    metrics, latent = trainer.backward(0, batch, draws, share=1.0, synchronise=True)
    trainer.statistics.update(sum_over_processes(latent_moments(latent)), 0.1)
    tensors = {f"model.{name}": g for name, g in gradients(networks(trainer)).items()}
    tensors |= {f"statistics.{name}": t.clone() for name, t in trainer.statistics.state_dict().items()}
    if trainer.discriminator is not None:
        tensors |= {f"discriminator.{name}": g for name, g in gradients(trainer.discriminator).items()}
    tensors |= {name: metrics[name] for name in ("gan_weight", "vf_weight") if name in metrics}
    save_file(tensors, f"{path}-{rank}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
