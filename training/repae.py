"""REPA-E (arXiv 2504.10483): a VAE, its discriminator and a denoiser trained together, end to end."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dataset.images import ImageDataset
from dataset.loader import ImageBatch
from diffusion.draws import Draws, Stream, draw, seeded_generator
from formats.averages import MAIN, statistics_of
from formats.run_folders import OWN_VAE
from models.latent_statistics import normalize_by_batch
from models.tokenizers import Tokenizer
from training.ema import Average, build_averages
from training.ldm import LDM
from training.method import Method, Metrics, Phase, frozen
from training.sendvae import SendVAE
from training.validation import HeldOutLatents, held_out_batches, mean_denoising_errors


class Encoded(NamedTuple):
    """What the denoiser's half of a step takes over from the VAE's half.

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


class VAEPhase(Phase):
    """First half of a step: the VAE's own losses, its alignment through the frozen denoiser, and the discriminator."""

    def __init__(self, vae: SendVAE, ldm: LDM):
        self.vae, self.ldm = vae, ldm

    def accumulate(
        self, step: int, micro_step: int, batch: ImageBatch, share: float, synchronise: bool
    ) -> tuple[Metrics, Encoded]:
        draws, features = self.vae.draws(step, micro_step, batch), self.vae.features(batch)
        # Frozen until the backward pass is through: gradient checkpointing records the denoiser's blocks again there.
        with frozen(self.ldm.denoiser, self.ldm.alignment):
            metrics, latent = self.vae.backward(step, batch, draws, share, synchronise, features)
        metrics["vae_loss"] = metrics.pop("loss")
        return metrics, Encoded(latent, draws, batch.labels, features if self.ldm.alignment.needs_features else [])

    def update(self, step: int, metrics: Metrics, kept: Sequence[Encoded]) -> Metrics:
        """The VAE's and the discriminator's optimizers; the running statistics follow the batch."""
        values = self.vae.update(step, metrics, [encoded.latent for encoded in kept])
        return {f"vae_{name}" if name in ("grad_norm", "skipped") else name: value for name, value in values.items()}


class DenoiserPhase(Phase):
    """Second half: the denoiser on the same latents, detached, with the same times and noise."""

    def __init__(self, vae: SendVAE, ldm: LDM, statistics_averages: Iterable[Average]):
        self.vae, self.ldm, self.statistics_averages = vae, ldm, statistics_averages

    def accumulate(
        self, step: int, micro_step: int, batch: Encoded, share: float, synchronise: bool
    ) -> tuple[Metrics, None]:
        # by mean and variance of the global batch, as a BatchNorm in training mode does
        x = normalize_by_batch(batch.latent, self.vae.batch_moments)
        route = self.ldm.route(step, batch.draws)
        return self.ldm.backward(x, batch.draws, batch.labels, batch.features, share, synchronise, route), None

    def update(self, step: int, metrics: Metrics, kept: Sequence[None]) -> Metrics:
        """The denoiser's optimizer, its averages and those of the statistics."""
        values = self.ldm.update(step, metrics, kept)
        for average in self.statistics_averages:
            average.update(step)
        return values | {"skipped": torch.maximum(values["skipped"], metrics["vae_skipped"])}


class Repae(Method):
    """Trains both; implements ``training.method.Method``.

    Every gradient is that at the weights the step began with, so gradient accumulation changes nothing but memory.

    Args:
        vae: its half; aligned by ``loss.alignment.denoiser``, or not at all.
        ldm: the denoiser's half, on the latents of the same tokenizer.
    """

    def __init__(self, vae: SendVAE, ldm: LDM):
        assert ldm.tokenizer is vae.tokenizer
        self.args, self.accelerator, self.vae, self.ldm = ldm.args, ldm.accelerator, vae, ldm
        # each belongs to an average of the denoiser, whose latents it normalises
        averages = build_averages(ldm.args, vae.statistics)
        self.statistics_averages = {statistics_of(name): average for name, average in averages.items()}
        self.statistics_ema = self.statistics_averages.get(statistics_of(MAIN))
        # generate.py needs the VAE of the same step as the denoiser
        self.milestone = (*ldm.milestone, *self._beside(ldm.milestone))
        self.snapshot, self.beside_snapshot = ldm.snapshot, self._beside(ldm.snapshot)

    @property
    def phases(self) -> Sequence[Phase]:
        return VAEPhase(self.vae, self.ldm), DenoiserPhase(self.vae, self.ldm, self.statistics_averages.values())

    def _beside(self, names: Sequence[str]) -> tuple[str, ...]:
        """What sampling needs with these weights."""
        return (OWN_VAE, *(name for name in map(statistics_of, names) if name in self.statistics_averages))

    @property
    def tuned_vae(self) -> Tokenizer:
        """The VAE as it is, with the statistics that fit the denoiser's average: those averaged likewise."""
        if self.statistics_ema is None:
            return self.vae.tokenizer
        return self.vae.tokenizer.with_statistics(self.statistics_ema.module)

    def rates(self, step: int) -> dict[str, float]:
        vae = self.vae.rates(step)
        return self.ldm.rates(step) | {"vae_lr": vae["lr"], "disc_lr": vae["disc_lr"]}

    def modules(self) -> dict[str, nn.Module | None]:
        modules = self.ldm.modules() | {OWN_VAE: self.vae.tokenizer, "feature_norm": self.vae.feature_norm}
        statistics = {name: average.module for name, average in self.statistics_averages.items()}
        return self.vae.modules() | modules | statistics

    def states(self) -> dict[str, object]:
        vae = self.vae.states()
        return {**vae, **self.ldm.states(), "vae_optimizer": vae["optimizer"]}

    def facts(self) -> dict[str, object]:
        """Which VAE this checkpoint's denoiser belongs to, in the words of a train_ldm.py run."""
        tuned = self.tuned_vae
        return {"vae_checksum": tuned.checksum(), "statistics_checksum": tuned.statistics.checksum()}

    def networks_by_name(self) -> Mapping[str, nn.Module | None]:
        return self.vae.networks_by_name() | self.ldm.networks_by_name()

    def watch(self, images: ImageDataset, held_out: ImageDataset | None) -> None:
        """What :meth:`validate` measures on and :meth:`sample` shows."""
        self.vae.watch(images, held_out)

    def measure_statistics(self, batches, images: int) -> int:
        """As :meth:`SendVAE.measure_statistics`; the averaged statistics start from them."""
        count = self.vae.measure_statistics(batches, images)
        for average in self.statistics_averages.values():
            average.module.load_state_dict(self.vae.statistics.state_dict())
        return count

    def validate(self) -> dict[str, float]:
        values = self.vae.validate()
        if not values:
            return {}
        values["val/denoise"] = self._denoising_error(self.ldm.denoiser, self.vae.tokenizer)
        if self.ldm.ema is not None:
            values["val_ema/denoise"] = self._denoising_error(self.ldm.ema.module, self.tuned_vae)
        return values

    def sample(self, path: Path) -> None:
        """Two pictures: samples of the denoiser's average through the VAE as it is, and the VAE's reconstructions."""
        self.ldm.save_sample_grid(self.tuned_vae, path)
        self.vae.sample(path.with_name(f"{path.stem}-reconstructions{path.suffix}"))

    def finish(self, folder: Path) -> None:
        """Write ``vae/``: the VAE's weights as trained, the statistics of the average."""
        self.tuned_vae.save(folder / "vae")

    def _denoising_error(self, denoiser: nn.Module, tokenizer: Tokenizer) -> float:
        held_out = self._held_out_latents(tokenizer)
        return mean_denoising_errors(self, denoiser, self.args.path_type, held_out)["denoise"]

    @torch.no_grad()
    def _held_out_latents(self, tokenizer: Tokenizer) -> Iterator[HeldOutLatents]:
        """Latents of held-out images, normalised by the tokenizer's statistics."""
        for items, (images, labels, _) in held_out_batches(self, self.vae.held_out):
            generator = seeded_generator(images.device, Stream.VALIDATION, self.args.seed, int(items[0]))
            draws = draw((len(images), *tokenizer.latent_shape(images.shape[-1])), generator)
            with self.accelerator.autocast():
                code = tokenizer.encode(images)
            x = tokenizer.statistics.normalize(code.sample(draws.posterior))
            yield HeldOutLatents(items, x, draws.noise, labels)
