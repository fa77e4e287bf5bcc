"""Send-VAE training as the loop sees it: schedules, validation, pictures, and what is saved."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dataset.images import ImageDataset
from dataset.loader import BatchLoader
from models.latent_statistics import latent_moments
from models.pixels import to_uint8
from models.tokenizers.kl import Autoencoder
from runtime.log import logger
from runtime.pictures import save_grid
from runtime.processes import sum_over_processes
from training.loop import Schedule
from training.randomness import Purpose, seeded_generator
from training.sendvae import SendVAETrainer
from training.session import build_loader, micro_batch_size
from training.validation import SpreadImages, validate

GRID_IMAGES = 8
STATISTICS_IMAGES = 1024  # enough for a mean and a variance of every channel; each image has h·w latents


class SendVAETask:
    """Implements ``training.loop.Task``.

    Args:
        trainer: the step.
        schedule: learning rates.
        vae_rate, disc_rate: base learning rates.
        images: training images.
        held_out: validation images, or None.
        val_batch_size: images at once on a process.
        max_val_images: of ``held_out``, evenly spread.
        num_workers: reading threads of a validation.
    """

    milestone = ("model",)

    def __init__(
        self,
        trainer: SendVAETrainer,
        schedule: Schedule,
        *,
        vae_rate: float,
        disc_rate: float,
        images: ImageDataset,
        held_out: ImageDataset | None,
        val_batch_size: int,
        max_val_images: int,
        num_workers: int,
    ):
        self.trainer, self.schedule, self.vae_rate, self.disc_rate = trainer, schedule, vae_rate, disc_rate
        self.held_out = None if held_out is None else SpreadImages(held_out, max_val_images)
        self.val_batch_size, self.num_workers = val_batch_size, num_workers
        self.pictured = SpreadImages(images if held_out is None else held_out, GRID_IMAGES)
        if trainer.ema is not None:
            self.milestone = ("ema",)

    def step(self, step: int, micro_batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        rates = self.rates(step)
        return self.trainer.step(step, micro_batches, rates["lr"], rates["disc_lr"])

    def rates(self, step: int) -> dict[str, float]:
        return {"lr": self.schedule.rate(self.vae_rate, step), "disc_lr": self.schedule.rate(self.disc_rate, step)}

    def modules(self) -> dict[str, nn.Module]:
        trainer = self.trainer
        modules = {"model": trainer.model}
        if trainer.discriminator is not None:
            modules["discriminator"] = trainer.discriminator
        if trainer.ema is not None:
            modules["ema"] = trainer.ema.module
        if trainer.objective.lecam is not None:
            modules["lecam"] = trainer.objective.lecam
        return modules

    def states(self) -> dict[str, object]:
        trainer = self.trainer
        states = {"optimizer": trainer.optimizer}
        if trainer.disc_optimizer is not None:
            states["disc_optimizer"] = trainer.disc_optimizer
        if trainer.accelerator.scaler is not None:
            states["scaler"] = trainer.accelerator.scaler
        return states

    def facts(self) -> dict[str, object]:
        return {}

    def validate(self, step: int) -> dict[str, float]:
        if self.held_out is None:
            return {}
        values = {f"val/{name}": value for name, value in self._validate(None).items()}
        if self.trainer.ema is not None:
            averaged = self._validate(self.trainer.ema.module)
            values |= {f"val_ema/{name}": value for name, value in averaged.items()}
        return values

    def sample(self, path: Path) -> None:
        """Rows: originals, reconstructions of the posterior mean, those of the EMA where there is one."""
        shape = (len(self.pictured), 3, self.pictured.resolution, self.pictured.resolution)
        images = np.empty(shape, np.uint8)
        self.pictured.read_into(range(len(self.pictured)), images)
        originals = torch.from_numpy(images)
        networks = [self.trainer.model.autoencoder]
        if self.trainer.ema is not None:
            networks.append(self.trainer.ema.module)
        save_grid([originals] + [self._reconstruct(network, originals) for network in networks], path)

    def finish(self, folder: Path) -> None:
        """Write ``vae/``, a diffusers folder with latent statistics: the EMA's where there is one."""
        ema = self.trainer.ema
        (self.trainer.model.autoencoder if ema is None else ema.module).save(folder / "vae")

    def _validate(self, autoencoder: Autoencoder | None) -> dict[str, float]:
        return validate(
            self.trainer.model,
            self.trainer.encoders,
            self.held_out,
            batch_size=self.val_batch_size,
            seed=self.trainer.seed,
            accelerator=self.trainer.accelerator,
            num_workers=self.num_workers,
            autoencoder=autoencoder,
        )

    @torch.no_grad()
    def _reconstruct(self, autoencoder: Autoencoder, images: torch.Tensor) -> torch.Tensor:
        accelerator = self.trainer.accelerator
        with accelerator.autocast():
            rows = [
                to_uint8(autoencoder.decode(autoencoder.encode(batch.to(accelerator.device)).mean))
                for batch in images.split(self.val_batch_size)
            ]
        return torch.cat(rows)


@torch.no_grad()
def measure_latent_statistics(trainer: SendVAETrainer, loader: BatchLoader, batch_size: int, images: int) -> int:
    """Set the VAE's latent statistics from the first batches of posterior samples; for a VAE that came without.

    Args:
        trainer: whose autoencoder is measured.
        loader: yields this process's micro-batches from step 0 on.
        batch_size: the global one.
        images: size of the dataset, which is not gone through twice.

    Returns:
        the number of images used, over all processes.
    """
    accelerator, autoencoder = trainer.accelerator, trainer.model.autoencoder
    moments, count = 0, 0
    generator = seeded_generator(accelerator.device, Purpose.LATENT_STATISTICS, trainer.seed, accelerator.process_index)
    while count < min(STATISTICS_IMAGES, images):
        for batch in next(loader):
            with accelerator.autocast():
                posterior = autoencoder.encode(batch.to(accelerator.device))
            noise = torch.randn(posterior.mean.shape, generator=generator, device=accelerator.device)
            moments = moments + latent_moments(posterior.sample(noise))
        count += batch_size
    autoencoder.statistics.update(sum_over_processes(moments), momentum=1.0)
    return count


def build_sendvae_task(
    args: argparse.Namespace, trainer: SendVAETrainer, images: ImageDataset, held_out: ImageDataset | None
) -> SendVAETask:
    """A task by the flags that train_sendvae.py and train_repae.py share."""
    return SendVAETask(
        trainer,
        Schedule(args.lr_schedule, args.warmup_steps, args.max_train_steps),
        vae_rate=args.vae_learning_rate,
        disc_rate=args.disc_learning_rate,
        images=images,
        held_out=held_out,
        val_batch_size=micro_batch_size(args, trainer.accelerator),
        max_val_images=args.max_val_images,
        num_workers=args.num_workers,
    )


def initialise_statistics(args: argparse.Namespace, trainer: SendVAETrainer, images: ImageDataset) -> None:
    """Measure the latent statistics of a VAE that came without."""
    with build_loader(args, images, trainer.accelerator, 0) as first_batches:
        count = measure_latent_statistics(trainer, first_batches, args.batch_size, len(images))
    if trainer.ema is not None:
        trainer.ema.module.statistics.load_state_dict(trainer.statistics.state_dict())
    logger.info("the VAE has no latent statistics: measured over %d images", count)
