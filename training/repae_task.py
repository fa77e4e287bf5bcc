"""REPA-E training as the loop sees it: schedules, validation, pictures, and what is saved."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from dataset.loader import LabelledImages, sequential_batches
from inference.trained_ldm import OWN_STATISTICS, OWN_VAE, statistics_checksum
from models.denoisers.sit import SiT
from models.tokenizers.kl import Autoencoder
from training.ldm import draw
from training.ldm_task import HeldOutLatents, mean_denoising_error, save_sample_grid
from training.randomness import Purpose, seeded_generator
from training.repae import RepaeTrainer
from training.sendvae_task import SendVAETask


class RepaeTask:
    """Implements ``training.loop.Task``.

    Args:
        trainer: the step.
        vae_task: schedules, validation and pictures of its VAE's half.
        rate: base learning rate of the SiT.
        grid_steps: Euler steps of a sample grid.
        grid_cfg_scale: guidance of its lower half; 1: none.
    """

    def __init__(
        self, trainer: RepaeTrainer, vae_task: SendVAETask, *, rate: float, grid_steps: int, grid_cfg_scale: float
    ):
        self.trainer, self.vae_task, self.rate = trainer, vae_task, rate
        self.grid_steps, self.grid_cfg_scale = grid_steps, grid_cfg_scale
        # generate.py needs the VAE of the same step beside the SiT
        self.milestone = ("model", OWN_VAE) if trainer.sit.ema is None else ("ema", OWN_VAE, OWN_STATISTICS)

    def step(self, step: int, micro_batches: list) -> dict[str, torch.Tensor]:
        return self.trainer.step(step, micro_batches, self.rates(step))

    def rates(self, step: int) -> dict[str, float]:
        vae = self.vae_task.rates(step)
        sit = self.vae_task.schedule.rate(self.rate, step)
        return {"lr": sit, "vae_lr": vae["lr"], "disc_lr": vae["disc_lr"]}

    def modules(self) -> dict[str, nn.Module]:
        trainer = self.trainer
        modules = self.vae_task.modules() | {"model": trainer.sit.model, OWN_VAE: trainer.vae.model.autoencoder}
        if trainer.sit.ema is not None:
            modules |= {"ema": trainer.sit.ema.module, OWN_STATISTICS: trainer.statistics_ema.module}
        return modules

    def states(self) -> dict[str, object]:
        states = self.vae_task.states()
        return states | {"optimizer": self.trainer.sit.optimizer, "vae_optimizer": states["optimizer"]}

    def facts(self) -> dict[str, object]:
        """Which VAE this checkpoint's SiT belongs to, in the words of a train_ldm.py run."""
        tuned = self.trainer.tuned_vae
        return {"vae_checksum": tuned.checksum(), "statistics_checksum": statistics_checksum(tuned)}

    def validate(self, step: int) -> dict[str, float]:
        values = self.vae_task.validate(step)
        if not values:
            return {}
        trainer = self.trainer
        values["val/denoise"] = self.denoising_loss(trainer.sit.model, trainer.vae.model.autoencoder)
        if trainer.sit.ema is not None:
            values["val_ema/denoise"] = self.denoising_loss(trainer.sit.ema.module, trainer.tuned_vae)
        return values

    def denoising_loss(self, network: SiT, autoencoder: Autoencoder) -> float:
        """Mean error on held-out images, latents normalised by the autoencoder's statistics."""
        return mean_denoising_error(self.trainer.sit, network, self._held_out_latents(autoencoder))

    @torch.no_grad()
    def _held_out_latents(self, autoencoder: Autoencoder) -> Iterator[HeldOutLatents]:
        accelerator, sit = self.trainer.accelerator, self.trainer.sit
        batches = sequential_batches(
            LabelledImages(self.vae_task.held_out),
            self.vae_task.val_batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=self.vae_task.num_workers,
        )
        for items, batch in batches:
            images, labels = (part.to(accelerator.device) for part in batch)
            generator = seeded_generator(images.device, Purpose.VALIDATION, sit.seed, int(items[0]))
            shape = (len(images), *autoencoder.latent_shape(images.shape[-1]))
            draws = draw(shape, "uniform", images.device, generator)
            with accelerator.autocast():
                posterior = autoencoder.encode(images)
            x = autoencoder.statistics.normalize(posterior.sample(draws.posterior))
            yield HeldOutLatents(items, x, draws.noise, labels)

    def sample(self, path: Path) -> None:
        """Two pictures: samples of the SiT's average through the VAE as it is, and the VAE's reconstructions."""
        sit = self.trainer.sit
        network = sit.model if sit.ema is None else sit.ema.module
        save_sample_grid(network, self.trainer.tuned_vae, sit, self.grid_steps, self.grid_cfg_scale, path)
        self.vae_task.sample(path.with_name(f"{path.stem}-reconstructions{path.suffix}"))

    def finish(self, folder: Path) -> None:
        """Write ``vae/``, a diffusers folder: the VAE's weights as trained, the statistics of the average."""
        self.trainer.tuned_vae.save(folder / "vae")
