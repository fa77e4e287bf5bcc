"""Stage 1: a tokenizer trained with its discriminator and an alignment (Send-VAE, arXiv 2601.05823, section 3)."""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from dataset.images import ImageDataset
from dataset.latents import LatentBatch
from dataset.loader import ImageBatch
from diffusion.draws import Draws, Stream, draw, seeded_generator
from loss.alignment import TokenizerAlignment
from loss.augmentation import augmented
from loss.total import joined, total
from loss.vae_objective import VAEObjective, gradient_at
from models.discriminator import DiscriminatorPair, PatchDiscriminator
from models.encoders import Encoder
from models.feature_discriminator import FeatureDiscriminator
from models.feature_norm import FeatureNorm, SpatialNorm
from models.latent_statistics import LatentStatistics, latent_moments
from models.pixels import to_signed, to_uint8
from models.tokenizers import Tokenizer
from runtime.pictures import save_grid
from runtime.processes import mean_over_processes, sum_over_processes
from training.alignment_schedule import alignment_factor
from training.ema import EMA
from training.features import batch_features
from training.method import Method, Metrics, frozen, micro_batch_size
from training.optimizer import build_optimizer, optimizer_step, scheduled_rate
from training.validation import SpreadImages, validate_tokenizer

GRID_IMAGES = 8


class AlignedOutput(NamedTuple):
    """What the losses need.

    Attributes:
        latent: a sample, un-normalised ``[B, C, h, w]``.
        reconstruction: images ``[B, 3, H, W]``; None where the tokenizer is frozen.
        target: uint8 images that it shall be.
        regulariser: the tokenizer's own terms.
        alignment: the alignment's terms; empty without one.
    """

    latent: torch.Tensor
    reconstruction: torch.Tensor | None
    target: torch.Tensor
    regulariser: dict[str, torch.Tensor]
    alignment: dict[str, torch.Tensor]


class AlignedTokenizer(nn.Module):
    """Tokenizer and alignment behind one forward, so that DDP sees every parameter.

    Args:
        tokenizer: with its statistics.
        alignment: or None.
        is_frozen: the tokenizer stays as it is, and reconstructs nothing.
        keeps_latents: its encoder stays as it is, and the decoder trains alone.
        latent_noise: τ: the decoder is given normalised latents with Gaussian noise, whose standard deviation is drawn
            for each image, as |N(0, τ²)| (RAE, arXiv 2510.11690).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        alignment: TokenizerAlignment | None,
        is_frozen: bool = False,
        keeps_latents: bool = False,
        latent_noise: float = 0.0,
    ):
        super().__init__()
        self.tokenizer, self.alignment, self.is_frozen = tokenizer, alignment, is_frozen
        self.keeps_latents, self.latent_noise = is_frozen or keeps_latents, latent_noise
        if is_frozen:
            tokenizer.requires_grad_(False)
        elif keeps_latents:
            for part in tokenizer.encoder_parts():
                part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "AlignedTokenizer":
        """An encoder that stays as it is also answers as it does in use."""
        super().train(mode)
        if self.keeps_latents and not self.is_frozen:
            for part in self.tokenizer.encoder_parts():
                part.eval()
        return self

    def forward(self, batch: ImageBatch, features: Sequence[torch.Tensor], draws: Draws) -> AlignedOutput:
        """uint8 images ``[B, 3, H, W]`` with labels, their VFM features ``[B, N, D]``, and the draws for them."""
        images = batch.images if self.alignment is None else self.alignment.encoded(batch.images, draws)
        _, height, width = self.tokenizer.latent_shape(images.shape[-1])
        posterior, noise = (numbers[..., :height, :width] for numbers in (draws.posterior, draws.noise))
        draws = draws._replace(posterior=posterior, noise=noise)
        with torch.no_grad() if self.keeps_latents else nullcontext():
            code = self.tokenizer.encode(images)
            latent = code.sample(draws.posterior)
        reconstruction, regulariser, aligned, seen, target = None, {}, {}, latent, images
        if self.alignment is not None:
            seen, target = self.alignment.view(latent, images, draws)
        if not self.is_frozen:
            reconstruction = self.tokenizer.decode(self.with_noise(seen, draws.generator))
            regulariser = {} if self.keeps_latents else code.regulariser()
        if self.alignment is not None:
            aligned = self.alignment(latent, self.tokenizer.statistics, features, batch.labels, draws)
        return AlignedOutput(latent, reconstruction, target, regulariser, aligned)

    def with_noise(self, latent: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """What the decoder is given, un-normalised ``[B, C, h, w]``; drawn after all that is drawn otherwise."""
        if not self.latent_noise:
            return latent
        options = {"generator": generator, "device": generator.device}
        deviations = self.latent_noise * torch.randn(len(latent), 1, 1, 1, **options).abs()
        std = self.tokenizer.statistics.std.reshape(-1, 1, 1)
        return latent + std * deviations * torch.randn(latent.shape, **options)


class SendVAE(Method):
    """Trains a tokenizer; implements ``training.method.Method``.

    Args:
        args: the flags of train_sendvae.py or train_repae.py.
        accelerator: precision and processes.
        tokenizer: is trained, unless it is frozen.
        alignment: with parts of its own that train along, or None.
        encoders: frozen VFMs, whose features the alignment sees.
        objective: the VAE's loss.
        discriminator: PatchGAN, heads on a VFM's features, or None.
        ema: average of the tokenizer, or None.
        feature_norm: of the VFMs' features, or None: as they are.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        tokenizer: Tokenizer,
        alignment: TokenizerAlignment | None,
        encoders: Sequence[Encoder],
        objective: VAEObjective,
        discriminator: PatchDiscriminator | FeatureDiscriminator | None,
        ema: EMA | None = None,
        feature_norm: FeatureNorm | SpatialNorm | None = None,
    ):
        self.args, self.accelerator = args, accelerator
        self.tokenizer, self.alignment, self.encoders = tokenizer, alignment, encoders
        self.objective, self.discriminator, self.ema = objective, discriminator, ema
        self.feature_norm = feature_norm
        networks = AlignedTokenizer(
            tokenizer,
            alignment,
            is_frozen=args.freeze_vae,
            keeps_latents=args.freeze_encoder,
            latent_noise=args.latent_noise,
        )
        self.optimizer = build_optimizer(args, networks, args.optimizer)
        self.disc_optimizer = None if discriminator is None else build_optimizer(args, discriminator)
        # The wrapped modules are for the forwards that gradients are synchronised through, the plain ones for the rest.
        self.networks = accelerator.prepare_model(networks)
        self.pair = None if discriminator is None else accelerator.prepare_model(DiscriminatorPair(discriminator))
        self.bn_momentum = 0.0 if networks.keeps_latents else args.bn_momentum
        self.milestone = ("model",) if ema is None else ("ema",)
        self.batch_moments: torch.Tensor | None = None  # of the latents of the last global batch
        self.held_out = self.pictured = None

    @property
    def statistics(self) -> LatentStatistics:
        return self.tokenizer.statistics

    def accumulate(
        self, step: int, micro_step: int, batch: ImageBatch | LatentBatch, share: float, synchronise: bool
    ) -> tuple[Metrics, torch.Tensor]:
        """Add the gradients of one micro-batch; also returns its latents, detached and un-normalised.

        Of images that the alignment made smaller it returns none.
        """
        return self.backward(step, batch, self.draws(step, micro_step, batch), share, synchronise)

    def draws(self, step: int, micro_step: int, batch: ImageBatch) -> Draws:
        """A function of (seed, step, micro-step, rank)."""
        counters = (step, micro_step, self.accelerator.process_index)
        generator = seeded_generator(batch.images.device, Stream.TRAINING, self.args.seed, *counters)
        shape = self.tokenizer.latent_shape(batch.images.shape[-1])
        return draw((len(batch.images), *shape), generator, self.args.weighting)

    def features(self, batch: ImageBatch | LatentBatch) -> list[torch.Tensor]:
        """Of the images for each VFM, ``[b, N, D]``: those that came with them, or computed."""
        return batch_features(self.accelerator, self.encoders, self.feature_norm, batch)

    def backward(
        self,
        step: int,
        batch: ImageBatch | LatentBatch,
        draws: Draws,
        share: float,
        synchronise: bool,
        features: Sequence[torch.Tensor] | None = None,
    ) -> tuple[Metrics, torch.Tensor]:
        """:meth:`accumulate` with given draws, and :meth:`features` where they are known already."""
        features = self.features(batch) if features is None else features
        is_gan_active = self.discriminator is not None and self.objective.gan_active(step)
        judge = self.discriminator if is_gan_active else None

        def seen(images: torch.Tensor) -> torch.Tensor:
            return augmented(images, draws.generator) if self.objective.config.discriminator_augment else images

        # -- tokenizer and alignment
        with self.reducing(self.networks, synchronise):
            output = self.networks(batch, features, draws)
            terms, weights, varying, fidelity = {}, {}, {}, None
            if output.reconstruction is not None:
                # Frozen while this graph is recorded: this loss must not reach the discriminator's gradients.
                with self.accelerator.autocast(), frozen(judge):
                    images = to_signed(output.target)
                    terms = self.objective.generator_terms(
                        images,
                        output.reconstruction,
                        output.regulariser,
                        None if judge is None else lambda x: judge(seen(x)),
                        self.accelerator.scaler,
                    )
                weights = self.objective.generator_weights(terms, self.tokenizer.decoder_last_layer, self.gradient)
                fidelity = self.objective.fidelity(terms)
                if self.objective.config.adaptive_discriminator_weight and is_gan_active:
                    varying["gan_weight"] = weights["gan"]
            if self.alignment is not None:
                aligned = self.alignment.weights(output.alignment, fidelity, self.tokenizer, self.gradient)
                factor = alignment_factor(self.args, step)
                aligned = {name: factor * weight for name, weight in aligned.items()}
                terms, weights = joined(terms, output.alignment), joined(weights, aligned)
                varying |= self.alignment.varying(aligned)
            loss = total(terms, weights)
            self.accelerator.backward(loss * share)
        metrics = {"loss": loss.detach()} | {name: term.detach() for name, term in terms.items()} | varying

        # -- discriminator, on the same reconstruction
        if self.discriminator is not None and self.objective.discriminator_learns(step):
            with self.reducing(self.pair, synchronise):
                real, fake = self.pair(seen(to_signed(output.target)), seen(output.reconstruction.detach()))
                terms = self.objective.discriminator_terms(real, fake)
                self.accelerator.backward(total(terms, self.objective.discriminator_weights()) * share)
            metrics |= {name: term.detach() for name, term in terms.items()}
            metrics |= {"logits_real": real.detach().float().mean(), "logits_fake": fake.detach().float().mean()}
        latent = output.latent.detach()
        is_whole = latent.shape == draws.posterior.shape
        return metrics, latent if is_whole else latent[:0]  # statistics are those of whole images

    def update(self, step: int, metrics: Metrics, latents: Sequence[torch.Tensor]) -> Metrics:
        """Both optimizers, latent statistics, LeCam's anchors and the average."""
        args, scaler, rates = self.args, self.accelerator.scaler, self.rates(step)
        norm, skipped = optimizer_step(self.optimizer, rates["lr"], args.max_grad_norm, scaler)
        updated = {"grad_norm": norm, "skipped": skipped}
        if "discriminator" in metrics:
            norm, skipped = optimizer_step(self.disc_optimizer, rates["disc_lr"], args.max_grad_norm, scaler)
            updated |= {"disc_grad_norm": norm, "disc_skipped": skipped}
        self.batch_moments = sum_over_processes(sum(latent_moments(latent) for latent in latents))
        self.statistics.update(self.batch_moments, self.bn_momentum)
        if self.objective.lecam is not None and "logits_real" in metrics:
            self.objective.lecam.update(*(mean_over_processes(metrics[f"logits_{kind}"]) for kind in ("real", "fake")))
        if self.ema is not None:
            self.ema.update(step)
        return updated

    def gradient(self, loss: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """Of a scalar at a parameter, averaged over processes; for adaptive weights."""
        return mean_over_processes(gradient_at(loss, parameter, self.accelerator.scaler))

    def rates(self, step: int) -> dict[str, float]:
        """The discriminator's schedule begins, with a warm-up, where it is told to begin to learn, as RAE's does."""
        args, own_step = self.args, max(0, step - (self.objective.config.discriminator_update_start or 0))
        return {
            "lr": scheduled_rate(args, args.vae_learning_rate, step),
            "disc_lr": scheduled_rate(args, args.disc_learning_rate, own_step),
        }

    def modules(self) -> dict[str, nn.Module | None]:
        return {
            "model": self.tokenizer,
            "alignment": self.alignment,
            "discriminator": self.discriminator,
            "ema": None if self.ema is None else self.ema.module,
            "lecam": self.objective.lecam,
            "feature_norm": self.feature_norm,
        }

    def states(self) -> dict[str, object]:
        return {"optimizer": self.optimizer, "disc_optimizer": self.disc_optimizer, "scaler": self.accelerator.scaler}

    def networks_by_name(self) -> Mapping[str, nn.Module | None]:
        return {
            "VAE": self.tokenizer,
            "alignment": self.alignment,
            "discriminator": self.discriminator,
            **{f"VFM {encoder.name}": encoder for encoder in self.encoders},
            "LPIPS": self.objective.perceptual,
            **self._vfm_of_discriminator(),
        }

    def _vfm_of_discriminator(self) -> dict[str, nn.Module]:
        if not isinstance(self.discriminator, FeatureDiscriminator):
            return {}
        encoder = self.discriminator.encoder
        return {f"VFM {encoder.name} of the discriminator": encoder}

    def watch(self, images: ImageDataset, held_out: ImageDataset | None) -> None:
        """What :meth:`validate` measures on and :meth:`sample` shows: held-out images where there are any."""
        self.held_out = None if held_out is None else SpreadImages(held_out, self.args.max_val_images)
        self.pictured = SpreadImages(images if held_out is None else held_out, GRID_IMAGES)

    def validate(self) -> dict[str, float]:
        if self.held_out is None:
            return {}
        tokenizers = {"val": self.tokenizer} | ({} if self.ema is None else {"val_ema": self.ema.module})
        was_training, values = self.networks.training, {}
        self.networks.eval()
        for prefix, tokenizer in tokenizers.items():
            measured = validate_tokenizer(self, tokenizer, self.alignment, self.encoders, self.features, self.held_out)
            values |= {f"{prefix}/{name}": value for name, value in measured.items()}
        self.networks.train(was_training)
        return values

    def sample(self, path: Path) -> None:
        """Rows: originals, reconstructions without randomness, those of the average where there is one."""
        side = self.pictured.resolution
        images = np.empty((len(self.pictured), 3, side, side), np.uint8)
        self.pictured.read_into(range(len(self.pictured)), images)
        originals = torch.from_numpy(images)
        tokenizers = [self.tokenizer] if self.ema is None else [self.tokenizer, self.ema.module]
        save_grid([originals] + [self._reconstruct(tokenizer, originals) for tokenizer in tokenizers], path)

    def finish(self, folder: Path) -> None:
        """Write ``vae/``, a folder with latent statistics: the average's where there is one."""
        (self.tokenizer if self.ema is None else self.ema.module).save(folder / "vae")

    def measure_statistics(self, batches, images: int, least: int = 1024) -> int:
        """Set the latent statistics from the first batches of samples; for a tokenizer that came without.

        Args:
            batches: this process's micro-batches from step 0 on.
            images: size of the dataset, which is not gone through twice.
            least: images that suffice for a mean and a variance of every channel; each has h·w latents.

        Returns:
            the number of images used, over all processes.
        """
        device, moments, count = self.accelerator.device, 0, 0
        counters = (self.args.seed, self.accelerator.process_index)
        generator = seeded_generator(device, Stream.LATENT_STATISTICS, *counters)
        while count < min(least, images):
            for batch in next(batches):
                with torch.no_grad(), self.accelerator.autocast():
                    code = self.tokenizer.encode(batch.images.to(device))
                noise = torch.randn(code.mode.shape, generator=generator, device=device)
                moments = moments + latent_moments(code.sample(noise))
            count += self.args.batch_size
        self.statistics.update(sum_over_processes(moments), momentum=1.0)
        if self.ema is not None:
            self.ema.module.statistics.load_state_dict(self.statistics.state_dict())
        return count

    @torch.no_grad()
    def _reconstruct(self, tokenizer: Tokenizer, images: torch.Tensor) -> torch.Tensor:
        device = self.accelerator.device
        with self.accelerator.autocast():
            rows = [
                to_uint8(tokenizer.decode(tokenizer.encode(batch.to(device)).mode))
                for batch in images.split(micro_batch_size(self.args, self.accelerator))
            ]
        return torch.cat(rows)
