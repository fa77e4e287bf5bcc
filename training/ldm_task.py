"""LDM training as the loop sees it: schedules, validation, sample grids, and what is saved."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from dataset.latents import LatentBatch, LatentDataset
from dataset.loader import read_batches
from diffusion.counted_noise import counted_normal
from diffusion.flow import add_noise
from diffusion.flow import velocity as target_velocity
from diffusion.guidance import guided
from diffusion.samplers import model_velocity, sample_ode
from loss.denoising import denoising_error
from models.denoisers.sit import SiT
from models.pixels import to_uint8
from models.tokenizers.kl import Autoencoder
from runtime.pictures import save_grid
from runtime.processes import sum_over_processes
from training.ldm import LDMTrainer, draw, latent_shape, to_device
from training.loop import Schedule
from training.randomness import Purpose, seeded_generator

GRID_COLUMNS, GRID_ROWS = 8, 2
GOLDEN_RATIO = (5**0.5 - 1) / 2


class LDMTask:
    """Implements ``training.loop.Task``.

    Args:
        trainer: the step.
        schedule: learning rates.
        rate: base learning rate.
        autoencoder: decodes sample grids.
        held_out: a latent cache for validation, or None.
        val_batch_size: latents at once on a process.
        max_val_images: of ``held_out``.
        num_workers: reading threads of a validation.
        grid_steps: Euler steps of a sample grid.
        grid_cfg_scale: guidance of its lower half; 1: none.
    """

    milestone = ("model",)

    def __init__(
        self,
        trainer: LDMTrainer,
        schedule: Schedule,
        *,
        rate: float,
        autoencoder: Autoencoder,
        held_out: LatentDataset | None,
        val_batch_size: int,
        max_val_images: int,
        num_workers: int,
        grid_steps: int,
        grid_cfg_scale: float,
    ):
        self.trainer, self.schedule, self.rate = trainer, schedule, rate
        self.autoencoder, self.held_out = autoencoder, held_out
        self.val_batch_size, self.max_val_images, self.num_workers = val_batch_size, max_val_images, num_workers
        self.grid_steps, self.grid_cfg_scale = grid_steps, grid_cfg_scale
        if trainer.ema is not None:
            self.milestone = ("ema",)

    def step(self, step: int, micro_batches: list) -> dict[str, torch.Tensor]:
        return self.trainer.step(step, micro_batches, self.rates(step)["lr"])

    def rates(self, step: int) -> dict[str, float]:
        return {"lr": self.schedule.rate(self.rate, step)}

    def modules(self) -> dict[str, nn.Module]:
        modules = {"model": self.trainer.model}
        if self.trainer.ema is not None:
            modules["ema"] = self.trainer.ema.module
        return modules

    def states(self) -> dict[str, object]:
        states = {"optimizer": self.trainer.optimizer}
        if self.trainer.accelerator.scaler is not None:
            states["scaler"] = self.trainer.accelerator.scaler
        return states

    def facts(self) -> dict[str, object]:
        return {}

    def validate(self, step: int) -> dict[str, float]:
        if self.held_out is None:
            return {}
        networks = {"val": self.trainer.model}
        if self.trainer.ema is not None:
            networks["val_ema"] = self.trainer.ema.module
        return {f"{name}/denoise": self.denoising_loss(network) for name, network in networks.items()}

    def denoising_loss(self, network: SiT) -> float:
        """Mean error on held-out latents, see :func:`mean_denoising_error`."""
        return mean_denoising_error(self.trainer, network, self._held_out_latents())

    def _held_out_latents(self) -> Iterator["HeldOutLatents"]:
        trainer, device = self.trainer, self.trainer.accelerator.device
        for items, batch in self._held_out_batches():
            batch = to_device(batch, device)
            generator = seeded_generator(device, Purpose.VALIDATION, trainer.seed, int(items[0]))
            draws = draw(latent_shape(batch), "uniform", device, generator)
            x = trainer.normalised_sample(batch, draws.posterior)
            yield HeldOutLatents(items, x, draws.noise, batch.labels)

    def _held_out_batches(self) -> Iterator[tuple[np.ndarray, LatentBatch]]:
        """This process's share of the items, evenly spread over the held-out set."""
        accelerator = self.trainer.accelerator
        count = min(self.max_val_images, len(self.held_out))
        items = np.unique(np.linspace(0, len(self.held_out) - 1, count).astype(np.int64))
        items = items[accelerator.process_index :: accelerator.num_processes]
        batches = [items[first : first + self.val_batch_size] for first in range(0, len(items), self.val_batch_size)]
        yield from zip(batches, read_batches(self.held_out, batches, num_workers=self.num_workers), strict=True)

    def sample(self, path: Path) -> None:
        """Two rows without and two with guidance, of the EMA where there is one; the same noise and labels always."""
        network = self.trainer.model if self.trainer.ema is None else self.trainer.ema.module
        save_sample_grid(network, self.autoencoder, self.trainer, self.grid_steps, self.grid_cfg_scale, path)

    def finish(self, folder: Path) -> None:
        """Nothing beside the last checkpoint, which holds the EMA."""


class HeldOutLatents(NamedTuple):
    """A held-out batch: item numbers, normalised latents and noise ``[b, C, h, w]``, labels ``[b]``."""

    items: np.ndarray
    x: torch.Tensor
    noise: torch.Tensor
    labels: torch.Tensor


@torch.no_grad()
def mean_denoising_error(trainer: LDMTrainer, network: SiT, batches: Iterable[HeldOutLatents]) -> float:
    """Mean error at times that cover [0, 1] evenly, the same at every call; no label dropped.

    Args:
        trainer: precision, processes and path.
        network: the SiT that is measured.
        batches: this process's share; all get the result.
    """
    accelerator, path_type = trainer.accelerator, trainer.path_type
    was_training = network.training
    network.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for items, x, noise, labels in batches:
        t = torch.from_numpy((items + 0.5) * GOLDEN_RATIO % 1).to(x.device, torch.float32)
        with accelerator.autocast():
            prediction = network(add_noise(x, t, noise, path_type), t, labels)
        error = denoising_error(prediction, target_velocity(x, t, noise, path_type))
        sums += torch.stack([error.double().sum(), sums.new_tensor(float(len(error)))])
    network.train(was_training)
    total, count = sum_over_processes(sums).tolist()
    return total / count


@torch.no_grad()
def save_sample_grid(
    network: SiT, autoencoder: Autoencoder, trainer: LDMTrainer, steps: int, cfg_scale: float, path: Path
) -> None:
    """Two rows of samples without and two with guidance (none where ``cfg_scale`` is 1).

    Args:
        network: the SiT that is sampled.
        autoencoder: decodes, with the statistics that the SiT's latents are normalised by.
        trainer: precision and seed.
        steps: Euler steps.
        cfg_scale: guidance of the lower half.
        path: the PNG.
    """
    was_training = network.training
    network.eval()
    scales = [1.0] if cfg_scale == 1 else [1.0, cfg_scale]
    images = torch.cat([_sample(network, autoencoder, trainer, steps, scale) for scale in scales])
    network.train(was_training)
    save_grid(list(images.split(GRID_COLUMNS)), path)


def _sample(network: SiT, autoencoder: Autoencoder, trainer: LDMTrainer, steps: int, cfg_scale: float) -> torch.Tensor:
    """uint8 images ``[GRID_ROWS · GRID_COLUMNS, 3, H, W]``, labels spread over the classes."""
    accelerator, config = trainer.accelerator, network.config
    count = GRID_COLUMNS * GRID_ROWS
    items = torch.arange(count, device=accelerator.device)
    labels = items * max(1, config.num_classes // count) % config.num_classes
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    noise = counted_normal(trainer.seed, items, 0, shape)
    velocity = guided(model_velocity(network, accelerator.autocast), cfg_scale, network.null_class)
    latent = sample_ode(velocity, noise, labels, steps)
    with accelerator.autocast():
        return to_uint8(autoencoder.decode(autoencoder.statistics.denormalize(latent)))
