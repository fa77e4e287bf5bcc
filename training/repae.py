"""REPA-E (arXiv 2504.10483): one step that trains a VAE, its discriminator and a SiT together, end to end."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from dataset.latents import LatentBatch
from dataset.loader import ImageBatch
from diffusion.flow import add_noise, training_times
from loss.alignment import averaged, patch_cosine_loss
from models.latent_statistics import LatentStatistics, latent_moments, normalize_by_batch
from models.tokenizers.kl import Autoencoder
from runtime.processes import sum_over_processes
from training.ema import EMA
from training.ldm import Draws, LDMTrainer, draw
from training.randomness import Purpose, seeded_generator
from training.sendvae import Noise, SendVAETrainer, frozen


class Encoded(NamedTuple):
    """What the SiT's half of a step takes over from the VAE's half.

    Attributes:
        latent: un-normalised ``[b, C, h, w]``, detached: the denoising loss never reaches the VAE.
        draws: the very noise and times that the VAE was aligned with.
        labels: int64 ``[b]``.
        features: of the images, ``[b, N, D]`` for each VFM.
    """

    latent: torch.Tensor
    draws: Draws
    labels: torch.Tensor
    features: list[torch.Tensor]


class RepaeTrainer:
    """One training step, made of those of a VAE and of a SiT.

    1. The VAE's own losses and ``align_coeff`` times the alignment of the SiT's first blocks with the VFM, through a
       frozen SiT, without label dropout, on latents normalised by the running statistics as constants.
    2. The discriminator.
    3. The SiT (denoising and REPA) on the same latents, detached, with the same times and noise, normalised by the mean
       and variance of the global batch, as a BatchNorm in training mode does; the running statistics then follow.
    4. The averages of the SiT and of the statistics.

    Every gradient is that at the weights the step began with, so gradient accumulation changes nothing but memory.

    Args:
        vae: the VAE's half: no mapper and no VFM; its ``align_coeff`` is ``--vae-align-proj-coeff``.
        sit: the SiT's half, whose statistics are those of the VAE.
        statistics_ema: average of the statistics, or None; belongs to the SiT's average.
    """

    def __init__(self, vae: SendVAETrainer, sit: LDMTrainer, statistics_ema: EMA | None):
        assert sit.statistics is vae.statistics
        self.vae, self.sit, self.statistics_ema = vae, sit, statistics_ema
        self.accelerator = sit.accelerator

    @property
    def tuned_vae(self) -> Autoencoder:
        """The VAE as it is, with the statistics that fit the SiT's average: those averaged likewise."""
        autoencoder = self.vae.model.autoencoder
        if self.statistics_ema is None:
            return autoencoder
        tuned = Autoencoder(autoencoder.network)
        tuned.statistics = self.statistics_ema.module
        return tuned

    def step(self, step: int, micro_batches: list[ImageBatch], rates: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """One step of the three optimizers.

        Args:
            step: counted from 0.
            micro_batches: this process's.
            rates: learning rates ``lr`` (of the SiT), ``vae_lr``, ``disc_lr``.

        Returns:
            scalars on the device: unweighted terms (averaged over micro-batches), gradient norms, skipped steps.
        """
        share, last = 1 / len(micro_batches), len(micro_batches) - 1
        collected, encoded = [], []
        for micro_step, batch in enumerate(micro_batches):
            batch = ImageBatch(*(part.to(self.accelerator.device, non_blocking=True) for part in batch))
            draws = self.draws_for(batch.images, step, micro_step)
            metrics, kept = self.accumulate_vae(batch, draws, step, share, synchronise=micro_step == last)
            collected.append(metrics)
            encoded.append(kept)
        moments = sum_over_processes(sum(latent_moments(kept.latent) for kept in encoded))
        metrics = means(collected)
        metrics |= self.vae.update(moments, metrics, rates["vae_lr"], rates["disc_lr"])
        collected = [
            self.accumulate_sit(kept, moments, share, synchronise=micro_step == last)
            for micro_step, kept in enumerate(encoded)
        ]
        sit_metrics = means(collected) | self.sit.update(rates["lr"])
        if self.statistics_ema is not None:
            self.statistics_ema.update()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        return together(sit_metrics, metrics)

    def draws_for(self, images: torch.Tensor, step: int, micro_step: int) -> Draws:
        """The draws of a micro-step on this process: a function of (seed, step, micro-step, rank)."""
        counters = (step, micro_step, self.accelerator.process_index)
        generator = seeded_generator(images.device, Purpose.TRAINING, self.sit.seed, *counters)
        shape = self.vae.model.autoencoder.latent_shape(images.shape[-1])
        return draw((len(images), *shape), self.sit.weighting, images.device, generator)

    def accumulate_vae(
        self, batch: ImageBatch, draws: Draws, step: int, share: float, synchronise: bool = True
    ) -> tuple[dict[str, torch.Tensor], Encoded]:
        """Add the gradients of one micro-batch, of the VAE and of its discriminator.

        Args:
            batch: on the device.
            draws: for it.
            step: counted from 0; decides whether the discriminator plays yet.
            share: weight of this micro-batch in the step.
            synchronise: reduce gradients over processes in this backward pass.

        Returns:
            the scalars of this micro-batch, and what the SiT goes on with.
        """
        sit = self.sit
        features = sit.features(LatentBatch(moments=None, labels=batch.labels, images=batch.images, features=None))
        t = training_times(draws.times, sit.weighting, sit.path_type)

        def alignment(z: torch.Tensor) -> tuple[dict, dict]:
            noisy = add_noise(self.vae.statistics.normalize(z), t, draws.noise, sit.path_type)
            with self.accelerator.autocast():
                tokens = sit.model(noisy, t, batch.labels, only_tokens=True)
            losses = [patch_cosine_loss(*pair) for pair in zip(tokens, features, strict=True)]
            return averaged("alignment", sit.encoder_names, losses, self.vae.align_coeff)

        # Frozen until the backward pass is through: gradient checkpointing records the SiT's blocks again there.
        with frozen(sit.model):
            metrics, latent = self.vae.accumulate(
                batch.images,
                Noise(draws.posterior, t, draws.noise),
                step,
                share,
                synchronise,
                alignment if features and self.vae.align_coeff else None,
            )
        return metrics, Encoded(latent, draws, batch.labels, features)

    def accumulate_sit(
        self, encoded: Encoded, moments: torch.Tensor, share: float, synchronise: bool = True
    ) -> dict[str, torch.Tensor]:
        """Add the SiT's gradients of one micro-batch; ``moments`` are those of the latents of the global batch."""
        x = normalize_by_batch(encoded.latent, moments)
        return self.sit.accumulate_latents(x, encoded.draws, encoded.labels, encoded.features, share, synchronise)

    def start_averages(self) -> None:
        """Let the averaged statistics start from the statistics as they are, e.g. once these have been measured."""
        if self.statistics_ema is not None:
            self.statistics_ema.module.load_state_dict(self.statistics.state_dict())

    @property
    def statistics(self) -> LatentStatistics:
        return self.vae.statistics


def means(collected: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Means over micro-batches of scalars with the same names."""
    return {name: torch.stack([metrics[name] for metrics in collected]).mean() for name in collected[0]}


def together(sit: dict[str, torch.Tensor], vae: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The SiT's scalars by their names, of the VAE's those that would collide with a prefix; either's skip counts."""
    renamed = {f"vae_{name}" if name in sit else name: value for name, value in vae.items()}
    return sit | renamed | {"skipped": torch.maximum(sit["skipped"], vae["skipped"])}
