"""Stage 1: the networks that are trained together, and one step of their training."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from diffusion.flow import add_noise
from loss.alignment import averaged, patch_cosine_loss
from loss.total import total
from loss.vae_objective import VAEObjective
from loss.vf_alignment import VFLoss
from models.discriminator import DiscriminatorPair, PatchDiscriminator
from models.encoders import Encoder
from models.latent_statistics import latent_moments
from models.mapper import LinearMapper, Mapper
from models.pixels import to_signed
from models.tokenizers.kl import Autoencoder
from runtime.processes import mean_over_processes, sum_over_processes
from training.ema import EMA
from training.optimizer import optimizer_step
from training.randomness import Purpose, seeded_generator


class Noise(NamedTuple):
    """What a forward pass draws: standard normal ``posterior`` and ``path`` ``[B, C, h, w]``, uniform ``t`` ``[B]``."""

    posterior: torch.Tensor
    t: torch.Tensor
    path: torch.Tensor


class SendVAEOutput(NamedTuple):
    """What the losses need.

    Attributes:
        mean, logvar: posterior parameters ``[B, C, h, w]``.
        latent: the posterior sample, un-normalised.
        reconstruction: images ``[B, 3, H, W]``; None where the VAE is frozen.
        tokens: predicted features ``[B, N, D]`` of each VFM; empty without a mapper.
    """

    mean: torch.Tensor
    logvar: torch.Tensor
    latent: torch.Tensor
    reconstruction: torch.Tensor | None
    tokens: tuple[torch.Tensor, ...]


class SendVAE(nn.Module):
    """VAE, latent statistics and mapper behind one forward, so that DDP sees every parameter (Send-VAE, section 3).

    Args:
        autoencoder: the VAE with its statistics.
        mapper: predicts VFM features; None trains the VAE alone.
        noise_injection: add noise to the normalised latent at a random time before the mapper sees it.
        path_type: ``linear`` or ``cosine`` interpolant.
        freeze_vae: train the mapper on a VAE that stays as it is.
        more_mappers: of further VFMs.
        raw_latent: the mappers see the posterior sample as it is, neither normalised nor noisy (VA-VAE).
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        mapper: Mapper | LinearMapper | None,
        noise_injection: bool = True,
        path_type: str = "linear",
        freeze_vae: bool = False,
        more_mappers: Sequence[Mapper | LinearMapper] = (),
        raw_latent: bool = False,
    ):
        super().__init__()
        self.autoencoder, self.mapper = autoencoder, mapper
        self.more_mappers = nn.ModuleList(more_mappers)
        self.noise_injection, self.path_type, self.freeze_vae = noise_injection, path_type, freeze_vae
        self.raw_latent = raw_latent
        if freeze_vae:
            autoencoder.requires_grad_(False)

    @property
    def mappers(self) -> list[Mapper | LinearMapper]:
        """One for each VFM; none where the VAE is trained alone."""
        return [] if self.mapper is None else [self.mapper, *self.more_mappers]

    def forward(self, images: torch.Tensor, noise: Noise) -> SendVAEOutput:
        """uint8 images ``[B, 3, H, W]`` and the draws for them → :class:`SendVAEOutput`."""
        with torch.no_grad() if self.freeze_vae else nullcontext():
            posterior = self.autoencoder.encode(images)
            z = posterior.sample(noise.posterior)
        reconstruction = None if self.freeze_vae else self.autoencoder.decode(z)
        noisy = self.noisy_latent(z, noise) if self.mappers else None
        tokens = tuple(mapper(noisy) for mapper in self.mappers)
        return SendVAEOutput(posterior.mean, posterior.logvar, z, reconstruction, tokens)

    def noisy_latent(self, z: torch.Tensor, noise: Noise) -> torch.Tensor:
        """The mapper's input: the normalised latent, with noise where that is switched on; or the latent as it is."""
        if self.raw_latent:
            return z
        z = self.autoencoder.statistics.normalize(z)
        return add_noise(z, noise.t, noise.path, self.path_type) if self.noise_injection else z


def draw_noise(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Noise:
    """Draw for a batch of latents of ``shape`` ``[B, C, h, w]``."""
    posterior = torch.randn(shape, generator=generator, device=device)
    t = torch.rand(shape[0], generator=generator, device=device)
    return Noise(posterior, t, torch.randn(shape, generator=generator, device=device))


class SendVAETrainer:
    """One training step, and everything that changes in it.

    Args:
        model: the trained networks.
        objective: the VAE's loss.
        discriminator: PatchGAN, or None.
        encoders: the frozen VFMs, one for each mapper.
        align_coeff: weight of the alignment loss.
        bn_momentum: of the latent statistics.
        max_grad_norm: for each of the two optimizers.
        seed: of the noise.
        optimizer, disc_optimizer: over the parameters of ``model`` and ``discriminator``; one may be None.
        ema: average of the autoencoder, or None.
        accelerator: precision and processes.
        vf_loss: VA-VAE's loss in place of Send-VAE's cosine; ``align_coeff`` is then in proportion to the fidelity.
    """

    def __init__(
        self,
        model: SendVAE,
        objective: VAEObjective,
        discriminator: PatchDiscriminator | None,
        encoders: Sequence[Encoder],
        *,
        align_coeff: float,
        bn_momentum: float,
        max_grad_norm: float,
        seed: int,
        optimizer: torch.optim.Optimizer,
        disc_optimizer: torch.optim.Optimizer | None,
        ema: EMA | None,
        accelerator: Accelerator,
        vf_loss: VFLoss | None = None,
    ):
        self.model, self.objective, self.discriminator, self.encoders = model, objective, discriminator, encoders
        self.align_coeff, self.bn_momentum, self.max_grad_norm = align_coeff, bn_momentum, max_grad_norm
        self.seed, self.vf_loss = seed, vf_loss
        self.optimizer, self.disc_optimizer, self.ema, self.accelerator = optimizer, disc_optimizer, ema, accelerator
        # The wrapped modules are for the forwards that gradients are synchronised through; `model` for everything else.
        self.wrapped = accelerator.prepare_model(model)
        self.wrapped_pair = None
        if discriminator is not None:
            self.wrapped_pair = accelerator.prepare_model(DiscriminatorPair(discriminator))

    @property
    def encoder_names(self) -> list[str]:
        return [encoder.name for encoder in self.encoders]

    @property
    def statistics(self):
        return self.model.autoencoder.statistics

    def noise_for(self, images: torch.Tensor, step: int, micro_step: int) -> Noise:
        """The draws of a micro-step on this process: a function of (seed, step, micro-step, rank)."""
        counters = (step, micro_step, self.accelerator.process_index)
        generator = seeded_generator(images.device, Purpose.TRAINING, self.seed, *counters)
        shape = self.model.autoencoder.latent_shape(images.shape[-1])
        return draw_noise((len(images), *shape), images.device, generator)

    def step(
        self, step: int, micro_batches: list[torch.Tensor], vae_rate: float, disc_rate: float
    ) -> dict[str, torch.Tensor]:
        """One step of both optimizers.

        Args:
            step: counted from 0.
            micro_batches: this process's uint8 images, ``[b, 3, H, W]`` each.
            vae_rate, disc_rate: learning rates.

        Returns:
            scalars on the device: unweighted terms (averaged over micro-batches), weights that vary, gradient norms,
            skipped steps.
        """
        collected: list[dict[str, torch.Tensor]] = []
        moments = 0
        for micro_step, images in enumerate(micro_batches):
            images = images.to(self.accelerator.device, non_blocking=True)
            is_last = micro_step == len(micro_batches) - 1
            noise = self.noise_for(images, step, micro_step)
            metrics, latent = self.accumulate(images, noise, step, 1 / len(micro_batches), synchronise=is_last)
            collected.append(metrics)
            moments = moments + latent_moments(latent)
        metrics = {name: torch.stack([m[name] for m in collected]).mean() for name in collected[0]}
        metrics |= self.update(sum_over_processes(moments), metrics, vae_rate, disc_rate)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        return metrics

    def accumulate(
        self,
        images: torch.Tensor,
        noise: Noise,
        step: int,
        share: float,
        synchronise: bool = True,
        alignment: Callable[[torch.Tensor], tuple[dict, dict]] | None = None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Add the gradients of one micro-batch, of VAE and mapper and of the discriminator.

        Args:
            images: uint8 ``[b, 3, H, W]`` on the device.
            noise: draws for them.
            step: counted from 0; decides whether the discriminator plays yet.
            share: weight of this micro-batch in the step.
            synchronise: reduce gradients over processes in this backward pass.
            alignment: un-normalised latents → terms and weights of an alignment without mappers (REPA-E), or None.

        Returns:
            the scalars of this micro-batch and its latents ``[b, C, h, w]``, detached and un-normalised.
        """
        plays = self.discriminator is not None and self.objective.gan_active(step)
        with self._reducing(self.wrapped, synchronise):
            output = self.wrapped(images, noise)
            terms, weights = self._generator_loss(images, output, plays, alignment)
            loss = total(terms, weights)
            self.accelerator.backward(loss * share)
        metrics = {"loss": loss.detach()} | {name: term.detach() for name, term in terms.items()}
        if self.objective.config.adaptive_discriminator_weight and "gan" in weights:
            metrics["gan_weight"] = weights["gan"]
        if "vf_cosine" in weights:
            metrics["vf_weight"] = weights["vf_cosine"]
        if plays:
            metrics |= self._discriminator_backward(images, output.reconstruction.detach(), share, synchronise)
        return metrics, output.latent.detach()

    def _generator_loss(
        self,
        images: torch.Tensor,
        output: SendVAEOutput,
        plays: bool,
        alignment: Callable[[torch.Tensor], tuple[dict, dict]] | None = None,
    ) -> tuple[dict, dict]:
        terms, weights = {}, {}
        if output.reconstruction is not None:
            # Frozen while this graph is recorded: the generator's loss must not reach the discriminator's gradients.
            with self.accelerator.autocast(), frozen(self.discriminator if plays else None):
                terms = self.objective.generator_terms(
                    to_signed(images),
                    output.reconstruction,
                    output.mean,
                    output.logvar,
                    self.discriminator if plays else None,
                )
            last_layer = self.model.autoencoder.last_layer
            weights = self.objective.generator_weights(terms, last_layer, mean_over_processes, self.accelerator.scaler)
        if output.tokens:
            with self.accelerator.autocast():
                features = [encoder(images) for encoder in self.encoders]
            pairs = list(zip(output.tokens, features, strict=True))
            if self.vf_loss is None:
                losses = [patch_cosine_loss(*pair) for pair in pairs]
                aligned, weight = averaged("alignment", self.encoder_names, losses, self.align_coeff)
            else:
                aligned, weight = self._vf_terms(terms, pairs, images[0].numel())
            terms, weights = terms | aligned, weights | weight
        elif alignment is not None:
            aligned, weight = alignment(output.latent)
            terms, weights = terms | aligned, weights | weight
        return terms, weights

    def _vf_terms(
        self, terms: dict[str, torch.Tensor], pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], values_per_image: int
    ) -> tuple[dict, dict]:
        """Terms and weights of VA-VAE's loss; ``terms`` are the VAE's own, ``pairs`` tokens and features of each VFM.

        With gradient accumulation every micro-batch has a weight of its own, as in the adaptive GAN weight.
        """
        parts = [self.vf_loss.terms(*pair) for pair in pairs]
        alignment = torch.stack([sum(part.values()) for part in parts]).mean()
        layer, scaler = self.model.autoencoder.encoder_last_layer, self.accelerator.scaler
        factor = self.objective.alignment_weight(terms, alignment, layer, values_per_image, mean_over_processes, scaler)
        aligned, weights = {}, {}
        for metric in parts[0]:
            losses = [part[metric] for part in parts]
            more = averaged(metric, self.encoder_names, losses, self.align_coeff * factor)
            aligned, weights = aligned | more[0], weights | more[1]
        return aligned, weights

    def _discriminator_backward(
        self, images: torch.Tensor, reconstruction: torch.Tensor, share: float, synchronise: bool
    ) -> dict[str, torch.Tensor]:
        with self._reducing(self.wrapped_pair, synchronise):
            real, fake = self.wrapped_pair(to_signed(images), reconstruction)
            terms = self.objective.discriminator_terms(real, fake)
            self.accelerator.backward(total(terms, self.objective.discriminator_weights()) * share)
        logits = {"logits_real": real.detach().float().mean(), "logits_fake": fake.detach().float().mean()}
        return {name: term.detach() for name, term in terms.items()} | logits

    def update(self, moments: torch.Tensor, metrics: dict, vae_rate: float, disc_rate: float) -> dict:
        """Optimizers, latent statistics, LeCam's anchors and the EMA; the caller updates fp16's scaler.

        Args:
            moments: of the latents of the whole global batch.
            metrics: of its micro-batches, averaged.
            vae_rate, disc_rate: learning rates.
        """
        scaler = self.accelerator.scaler
        norm, skipped = optimizer_step(self.optimizer, vae_rate, self.max_grad_norm, scaler)
        updated = {"grad_norm": norm, "skipped": skipped}
        if "discriminator" in metrics:
            norm, skipped = optimizer_step(self.disc_optimizer, disc_rate, self.max_grad_norm, scaler)
            updated |= {"disc_grad_norm": norm, "disc_skipped": skipped}
        self.statistics.update(moments, self.bn_momentum)
        if self.objective.lecam is not None and "logits_real" in metrics:
            self.objective.lecam.update(*(mean_over_processes(metrics[f"logits_{kind}"]) for kind in ("real", "fake")))
        if self.ema is not None:
            self.ema.update()
        return updated

    def _reducing(self, wrapped: nn.Module, synchronise: bool):
        return nullcontext() if synchronise else self.accelerator.no_sync(wrapped)


class frozen:
    """Context: parameters of a module take no gradient. ``None`` is allowed and does nothing."""

    def __init__(self, module: nn.Module | None):
        self.module = module

    def __enter__(self) -> None:
        if self.module is not None:
            self.module.requires_grad_(False)

    def __exit__(self, *exception) -> None:
        if self.module is not None:
            self.module.requires_grad_(True)
