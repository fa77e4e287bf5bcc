"""Held-out quality: of a tokenizer, reconstruction and alignment; of a denoiser, the error of its velocity."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dataset.images import ImageDataset
from dataset.loader import ImageBatch, LabelledImages, sequential_batches
from diffusion.draws import Stream, draw, seeded_generator
from diffusion.flow import add_noise, velocity
from loss.alignment import TokenizerAlignment
from loss.alignment.cosine import constant_predictor_cosine
from loss.denoising import denoising_error
from loss.reconstruction import psnr
from models.denoisers import Denoiser
from models.encoders import Encoder
from models.pixels import to_signed, to_uint8
from models.tokenizers import Tokenizer
from runtime.processes import sum_over_processes
from training.method import Method, micro_batch_size, to_device

GOLDEN_RATIO = (5**0.5 - 1) / 2


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


def held_out_batches(method: Method, images: SpreadImages):
    """This process's share: (item numbers, an ``ImageBatch`` on the device)."""
    accelerator, args = method.accelerator, method.args
    batches = sequential_batches(
        LabelledImages(images),
        micro_batch_size(args, accelerator),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=args.num_workers,
    )
    for items, batch in batches:
        yield items, to_device(batch, accelerator.device)


@torch.no_grad()
def validate_tokenizer(
    method: Method,
    tokenizer: Tokenizer,
    alignment: TokenizerAlignment | None,
    encoders: Sequence[Encoder],
    features_of: Callable[[ImageBatch], Sequence[torch.Tensor]],
    held_out: SpreadImages,
) -> dict[str, float]:
    """Measure on held-out images; every process takes a share, all get the result.

    Args:
        method: precision and processes.
        tokenizer: is measured.
        alignment: whose scores are taken too, where it has any; in eval mode.
        encoders: the VFMs that it compares with.
        features_of: gives their features of a batch, ``[b, N, D]`` each.
        held_out: the images.

    Returns:
        ``psnr`` (dB, without randomness, uint8 images), ``l1`` (in [-1, 1] units), and what the alignment scores:
        ``align_cosine`` (as in training), ``align_cosine_clean`` (without noise), next to ``constant_cosine`` (the best
        image-independent prediction, fitted on these very images). With several VFMs these are averages, and those of
        each are called ``align_cosine/NAME`` and so on.
    """
    device = method.accelerator.device
    names = () if alignment is None else alignment.score_names
    encoders = encoders if names else ()
    # psnr, l1, count, then the scores of each VFM
    sums = torch.zeros(3 + len(names) * len(encoders), dtype=torch.float64, device=device)
    unit_features = [torch.zeros(vfm.grid**2, vfm.embed_dim, dtype=torch.float64, device=device) for vfm in encoders]
    for items, batch in held_out_batches(method, held_out):
        images = batch.images
        generator = seeded_generator(device, Stream.VALIDATION, method.args.seed, int(items[0]))
        draws = draw((len(images), *tokenizer.latent_shape(images.shape[-1])), generator, method.args.weighting)
        with method.accelerator.autocast():
            code = tokenizer.encode(images)
            reconstruction = tokenizer.decode(code.mode)
            scores = [psnr(images, to_uint8(reconstruction)), _l1(images, reconstruction), images.new_ones(len(images))]
            if names:
                features = features_of(batch)
                aligned = alignment.scores(code, tokenizer.statistics, features, draws)
                scores += [score for name in names for score in aligned[name]]
                for feature_sum, part in zip(unit_features, features, strict=True):
                    feature_sum += F.normalize(part.double(), dim=-1).sum(0)
        sums += torch.stack([score.double().sum() for score in scores])
    psnr_sum, l1_sum, count, *scored = sum_over_processes(sums).tolist()
    values = {"psnr": psnr_sum / count, "l1": l1_sum / count}
    columns = {name: [value / count for value in _nth(scored, i, len(encoders))] for i, name in enumerate(names)}
    if names:
        columns["constant_cosine"] = [
            float(constant_predictor_cosine(sum_over_processes(total), int(count))) for total in unit_features
        ]
    values |= {name: sum(column) / len(column) for name, column in columns.items()}
    if len(encoders) > 1:
        for name, column in columns.items():
            values |= {f"{name}/{vfm.name}": value for vfm, value in zip(encoders, column, strict=True)}
    return values


class HeldOutLatents(NamedTuple):
    """A held-out batch: item numbers, normalised states of the denoiser (``[b, C, h, w]``), noise, labels ``[b]``."""

    items: np.ndarray
    x: torch.Tensor
    noise: torch.Tensor
    labels: torch.Tensor


@torch.no_grad()
def mean_denoising_errors(
    method: Method, denoiser: Denoiser, path_type: str, batches: Iterable[HeldOutLatents]
) -> dict[str, float]:
    """Mean errors at times that cover [0, 1] evenly, the same at every call; no label dropped.

    Args:
        method: precision and processes.
        denoiser: is measured.
        path_type: of the interpolant.
        batches: this process's share; all get the result.

    Returns:
        ``denoise``, of latents, and ``class_token`` where there is one.
    """
    names = ("denoise", "class_token") if denoiser.class_token_width else ("denoise",)
    was_training = denoiser.training
    denoiser.eval()
    sums = torch.zeros(1 + len(names), dtype=torch.float64, device=method.accelerator.device)
    for items, x, noise, labels in batches:
        t = torch.from_numpy((items + 0.5) * GOLDEN_RATIO % 1).to(x.device, torch.float32)
        with method.accelerator.autocast():
            prediction, _ = denoiser(add_noise(x, t, noise, path_type), t, labels)
        target = denoiser.target(velocity(x, t, noise, path_type), t)
        parts = zip(*map(denoiser.unpack, (prediction, target)), strict=True)
        errors = [denoising_error(*pair).double().sum() for pair in list(parts)[: len(names)]]
        sums += torch.stack([*errors, sums.new_tensor(float(len(items)))])
    denoiser.train(was_training)
    *totals, count = sum_over_processes(sums).tolist()
    return {name: total / count for name, total in zip(names, totals, strict=True)}


def _nth(values: Sequence[float], place: int, size: int) -> Sequence[float]:
    return values[place * size : (place + 1) * size]


def _l1(images: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    return (to_signed(images) - reconstruction).abs().mean((1, 2, 3))
