"""Run on two processes by test_repae_step: two steps, each on its half of the batches; the state into a file."""

import sys

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import save_file

from tests.ldm_steps import part_of
from tests.repae_steps import batch_draws, fixed_draws, random_batch, state_of, tiny_trainer
from training.method import train_step

BATCH = 8


def main(path: str) -> None:
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    rank, half = accelerator.process_index, BATCH // accelerator.num_processes
    assert accelerator.num_processes == 2
    trainer = tiny_trainer(accelerator, gan=False)
    mine = slice(rank * half, (rank + 1) * half)
    for number in (0, 1):
        fixed_draws(trainer, [part_of(batch_draws(BATCH, seed=number), mine)])
        train_step(trainer, number, [part_of(random_batch(BATCH, seed=number), mine)])
    save_file({name: tensor.contiguous() for name, tensor in state_of(trainer).items()}, f"{path}-{rank}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
