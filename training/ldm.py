"""Stage 3: one step of training a SiT on cached latents: denoising, REPA (arXiv 2410.06940), VAE-REPA (2601.17830)."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator

from dataset.latents import LatentBatch
from diffusion.flow import add_noise, training_times, velocity
from loss.alignment import averaged, patch_cosine_loss
from loss.denoising import denoising_error
from loss.latent_alignment import latent_alignment_loss
from loss.total import total
from models.denoisers.sit import SiT
from models.encoders import Encoder
from models.latent_statistics import LatentStatistics
from training.ema import EMA
from training.optimizer import optimizer_step
from training.randomness import Purpose, seeded_generator


class Draws(NamedTuple):
    """What a step draws for a batch.

    Attributes:
        posterior, noise: standard normal ``[B, C, h, w]``.
        times: ``[B]``, uniform or standard normal, as ``diffusion.flow.training_times`` wants them.
        dropout: uniform ``[B]``; the label is dropped where it is below the probability.
    """

    posterior: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    dropout: torch.Tensor


def draw(shape: Sequence[int], weighting: str, device: torch.device, generator: torch.Generator) -> Draws:
    """Draw for a batch of latents of ``shape`` ``[B, C, h, w]``."""
    options = {"generator": generator, "device": device}
    times = torch.randn if weighting == "lognormal" else torch.rand
    return Draws(
        torch.randn(shape, **options),
        torch.randn(shape, **options),
        times(shape[0], **options),
        torch.rand(shape[0], **options),
    )


class LDMTrainer:
    """One training step, and everything that changes in it.

    Args:
        model: the SiT.
        statistics: the VAE's, by which latents are normalised.
        encoders: frozen VFMs, one for each of the model's projectors; None where features come with the batch.
        encoder_names: of the VFMs, for the metrics of each where there are several.
        proj_coeff: weight of the REPA loss.
        latent_coeff: weight of the VAE-REPA loss, where the model has its projector.
        latent_times: lowest and highest time that this loss counts.
        cfg_prob: probability that a label is replaced by the null class.
        path_type, weighting: the interpolant and how times are drawn.
        max_grad_norm: gradients are clipped to this 2-norm.
        seed: of all draws.
        optimizer: over the parameters of ``model``.
        ema: average of the model, or None.
        accelerator: precision and processes.
    """

    def __init__(
        self,
        model: SiT,
        statistics: LatentStatistics,
        encoders: list[Encoder] | None,
        *,
        encoder_names: Sequence[str] = (),
        proj_coeff: float,
        cfg_prob: float,
        path_type: str,
        weighting: str,
        max_grad_norm: float,
        seed: int,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        accelerator: Accelerator,
        latent_coeff: float = 0.0,
        latent_times: tuple[float, float] = (0.0, 1.0),
    ):
        self.model, self.statistics, self.encoders = model, statistics, encoders
        self.encoder_names = encoder_names
        self.proj_coeff, self.cfg_prob = proj_coeff, cfg_prob
        self.latent_coeff, self.latent_times = latent_coeff, latent_times
        self.path_type, self.weighting = path_type, weighting
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.optimizer, self.ema, self.accelerator = optimizer, ema, accelerator
        self.wrapped = accelerator.prepare_model(model)

    def step(self, step: int, micro_batches: list[LatentBatch], rate: float) -> dict[str, torch.Tensor]:
        """One optimizer step.

        Args:
            step: counted from 0.
            micro_batches: this process's.
            rate: learning rate.

        Returns:
            scalars on the device: unweighted terms (averaged over micro-batches), gradient norm, skipped steps.
        """
        collected = []
        for micro_step, batch in enumerate(micro_batches):
            batch = to_device(batch, self.accelerator.device)
            draws = self.draws_for(batch, step, micro_step)
            is_last = micro_step == len(micro_batches) - 1
            collected.append(self.accumulate(batch, draws, 1 / len(micro_batches), synchronise=is_last))
        metrics = {name: torch.stack([m[name] for m in collected]).mean() for name in collected[0]}
        metrics |= self.update(rate)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        return metrics

    def draws_for(self, batch: LatentBatch, step: int, micro_step: int) -> Draws:
        """The draws of a micro-step on this process: a function of (seed, step, micro-step, rank)."""
        device = self.accelerator.device
        counters = (step, micro_step, self.accelerator.process_index)
        generator = seeded_generator(device, Purpose.TRAINING, self.seed, *counters)
        return draw(latent_shape(batch), self.weighting, device, generator)

    def accumulate(
        self, batch: LatentBatch, draws: Draws, share: float, synchronise: bool = True
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of one micro-batch on the device; ``share`` is its weight in the step."""
        x = self.normalised_sample(batch, draws.posterior)
        return self.accumulate_latents(x, draws, batch.labels, self.features(batch), share, synchronise)

    def accumulate_latents(
        self,
        x: torch.Tensor,
        draws: Draws,
        labels: torch.Tensor,
        features: list[torch.Tensor],
        share: float,
        synchronise: bool = True,
    ) -> dict[str, torch.Tensor]:
        """The same for normalised latents ``x`` ``[B, C, h, w]`` and what :meth:`features` says of their images."""
        t = training_times(draws.times, self.weighting, self.path_type)
        labels = torch.where(draws.dropout < self.cfg_prob, self.model.null_class, labels)
        with nullcontext() if synchronise else self.accelerator.no_sync(self.wrapped):
            noisy = add_noise(x, t, draws.noise, self.path_type)
            prediction, tokens, latent = self.wrapped(noisy, t, labels, with_latent=True)
            target = velocity(x, t, draws.noise, self.path_type)
            terms, weights = {"denoise": denoising_error(prediction, target).mean()}, {"denoise": 1.0}
            if tokens:
                losses = [patch_cosine_loss(*pair) for pair in zip(tokens, features, strict=True)]
                repa = averaged("repa", self.encoder_names, losses, self.proj_coeff)
                terms, weights = terms | repa[0], weights | repa[1]
            if latent is not None:
                terms["vae_repa"] = latent_alignment_loss(latent, x, t, *self.latent_times)
                weights["vae_repa"] = self.latent_coeff
            loss = total(terms, weights)
            self.accelerator.backward(loss * share)
        return {"loss": loss.detach()} | {name: term.detach() for name, term in terms.items()}

    def normalised_sample(self, batch: LatentBatch, noise: torch.Tensor) -> torch.Tensor:
        """A posterior sample of cached moments ``[B, 2C, h, w]``, normalised, float32 ``[B, C, h, w]``."""
        mean, std = batch.moments.float().chunk(2, dim=1)
        return self.statistics.normalize(torch.addcmul(mean, std, noise))

    @torch.no_grad()
    def features(self, batch: LatentBatch) -> list[torch.Tensor]:
        """What the projected tokens are compared with, ``[B, N, D]`` for each VFM; empty without REPA."""
        if not self.model.projectors:
            return []
        if self.encoders is None:
            return list(batch.features)
        with self.accelerator.autocast():
            return [encoder(batch.images) for encoder in self.encoders]

    def update(self, rate: float) -> dict[str, torch.Tensor]:
        """Optimizer and EMA; the caller updates fp16's scaler."""
        norm, skipped = optimizer_step(self.optimizer, rate, self.max_grad_norm, self.accelerator.scaler)
        if self.ema is not None:
            self.ema.update()
        return {"grad_norm": norm, "skipped": skipped}


def to_device(batch: LatentBatch, device: torch.device) -> LatentBatch:
    """Copy what a batch holds to the device, without waiting."""

    def copy(part):
        if part is None:
            return None
        return tuple(map(copy, part)) if isinstance(part, tuple) else part.to(device, non_blocking=True)

    return LatentBatch(*map(copy, batch))


def latent_shape(batch: LatentBatch) -> tuple[int, int, int, int]:
    """``(B, C, h, w)`` of the samples of a batch of moments."""
    count, channels, height, width = batch.moments.shape
    return count, channels // 2, height, width
