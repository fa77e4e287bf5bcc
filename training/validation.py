"""Held-out quality of a Send-VAE: reconstruction and alignment, beside what a constant would reach."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from dataset.images import ImageDataset
from dataset.loader import sequential_batches
from loss.alignment import constant_predictor_cosine, patch_cosine
from loss.reconstruction import psnr
from models.encoders import Encoder
from models.pixels import to_signed, to_uint8
from models.tokenizers.kl import Autoencoder
from runtime.processes import sum_over_processes
from training.randomness import Purpose, seeded_generator
from training.sendvae import SendVAE, draw_noise


class SpreadImages:
    """``count`` images of a dataset, evenly spread over it (and so over its classes)."""

    def __init__(self, dataset: ImageDataset, count: int):
        self._items = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(np.int64))
        self._dataset, self.resolution = dataset, dataset.resolution
        self.labels = dataset.labels[self._items]

    def __len__(self) -> int:
        return len(self._items)

    def read_into(self, items, out: np.ndarray) -> None:
        self._dataset.read_into(self._items[np.asarray(items)], out)


@torch.no_grad()
def validate(
    model: SendVAE,
    encoders: Sequence[Encoder],
    dataset: ImageDataset,
    *,
    batch_size: int,
    seed: int,
    accelerator: Accelerator,
    num_workers: int,
    autoencoder: Autoencoder | None = None,
) -> dict[str, float]:
    """Measure on held-out images; every process takes a share, all get the result.

    Args:
        model: the networks that are trained.
        encoders: the frozen VFMs, one for each mapper; none where nothing is aligned.
        dataset: the images.
        batch_size: images at once on a process.
        seed: of the noise that the mapper sees.
        accelerator: precision and processes.
        num_workers: reading threads.
        autoencoder: the EMA's, to be measured in place of the model's.

    Returns:
        ``psnr`` (dB, posterior mean, uint8 images), ``l1`` (in [-1, 1] units), and with an encoder ``align_cosine``
        (noise as in training), ``align_cosine_clean`` (posterior mean, no noise) and ``constant_cosine`` (the best
        image-independent prediction, fitted on these very images). With several encoders these are averages, and those
        of each are called ``align_cosine/NAME`` and so on.
    """
    device, rank = accelerator.device, accelerator.process_index
    autoencoder = autoencoder or model.autoencoder
    was_training = model.training
    model.eval()
    # psnr, l1, count, then cosine and clean cosine of each encoder
    sums = torch.zeros(3 + 2 * len(encoders), dtype=torch.float64, device=device)
    unit_features = [
        torch.zeros(encoder.grid**2, encoder.embed_dim, dtype=torch.float64, device=device) for encoder in encoders
    ]
    batches = sequential_batches(
        dataset, batch_size, rank=rank, world_size=accelerator.num_processes, num_workers=num_workers
    )
    for items, images in batches:
        images = images.to(device)
        generator = seeded_generator(device, Purpose.VALIDATION, seed, int(items[0]))
        noise = draw_noise((len(images), *autoencoder.latent_shape(images.shape[-1])), device, generator)
        with accelerator.autocast():
            posterior = autoencoder.encode(images)
            reconstruction = autoencoder.decode(posterior.mean)
            scores = [psnr(images, to_uint8(reconstruction)), _l1(images, reconstruction), images.new_ones(len(images))]
            noisy = model.noisy_latent(posterior.sample(noise.posterior), noise)
            clean = posterior.mean if model.raw_latent else autoencoder.statistics.normalize(posterior.mean)
            for encoder, mapper, feature_sum in zip(encoders, model.mappers, unit_features, strict=True):
                features = encoder(images)
                scores += [patch_cosine(mapper(z), features).mean(1) for z in (noisy, clean)]
                feature_sum += F.normalize(features.double(), dim=-1).sum(0)
        sums += torch.stack([score.double().sum() for score in scores])
    model.train(was_training)
    return _averages(sums, unit_features, [encoder.name for encoder in encoders])


def _averages(sums: torch.Tensor, unit_features: Sequence[torch.Tensor], names: Sequence[str]) -> dict[str, float]:
    psnr_sum, l1_sum, count, *cosines = sum_over_processes(sums).tolist()
    result = {"psnr": psnr_sum / count, "l1": l1_sum / count}
    if not names:
        return result
    columns = {
        "align_cosine": [value / count for value in cosines[::2]],
        "align_cosine_clean": [value / count for value in cosines[1::2]],
        "constant_cosine": [
            float(constant_predictor_cosine(sum_over_processes(total), int(count))) for total in unit_features
        ],
    }
    result |= {metric: sum(values) / len(values) for metric, values in columns.items()}
    if len(names) > 1:
        for metric, values in columns.items():
            result |= {f"{metric}/{name}": value for name, value in zip(names, values, strict=True)}
    return result


def _l1(images: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    return (to_signed(images) - reconstruction).abs().mean((1, 2, 3))
