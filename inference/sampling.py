"""Many images from a trained model: labels, one batch, one shard, the folder's end. Processes are independent."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dataset.images import ImageDataset, open_images
from dataset.npz import write_npz
from dataset.packing import PackingJob
from dataset.verification import verify
from diffusion.counted_noise import counted_integers, counted_state
from diffusion.guidance import autoguided, guided, internally_guided
from diffusion.samplers import (
    Velocity,
    evaluation_times,
    model_velocity,
    sample_map,
    sample_ode,
    sample_sde,
    velocities_with_guide,
)
from errors import UserError
from models.denoisers import Denoiser
from models.pixels import to_uint8
from models.tokenizers import Tokenizer
from runtime.pictures import save_grid

NPZ_NAME = "samples.npz"
PREVIEW_NAME = "preview.png"
END_SECONDS = 3600.0  # processes that are done leave as soon as one of them has written the .npz
BATCHES_BEHIND = 2  # computed or computing, but not yet written
MAX_PREVIEW_ROWS = 16
BESIDE = 3  # real images of a class in a preview

StepNoise = Callable[[int], torch.Tensor]  # of a sampler's stochastic step, from 0


@dataclass(frozen=True)
class SamplerSettings:
    """How noise becomes a latent; flags of the same names.

    Attributes:
        mode: one of ``inference.MODES``.
        num_steps: of the sampler.
        heun: for the ODE; else Euler.
        cfg_scale: of guidance by the null class, or by a guide in its place; 1: none.
        guidance_low, guidance_high: times between which it acts.
        path_type: of the interpolant that the model was trained on.
        time_shift: of the sampler's times (``diffusion.flow.shift_times``).
        seed: of all noise.
        guidance_channels: of the latent, the first ones on which guidance acts; None: all.
        guide_scale: of a guide to which the null class is added, whose scale is then ``cfg_scale``; None: it has the
            null class's place.
        guide_low, guide_high: times between which such a guide acts.
        damped: whether predicted data are divided as in training (``Denoiser.damps``).
    """

    mode: str
    num_steps: int
    heun: bool
    cfg_scale: float
    guidance_low: float
    guidance_high: float
    path_type: str
    time_shift: float
    seed: int
    guidance_channels: int | None = None
    guide_scale: float | None = None
    guide_low: float = 0.0
    guide_high: float = 1.0
    damped: bool = False

    @property
    def cfg(self) -> tuple[float, float, float]:
        """Scale and interval of the null class, or of a guide in its place."""
        return self.cfg_scale, self.guidance_low, self.guidance_high

    @property
    def of_guide(self) -> tuple[float, float, float]:
        """Scale and interval of a guide."""
        return self.cfg if self.guide_scale is None else (self.guide_scale, self.guide_low, self.guide_high)

    @property
    def times(self) -> dict[str, Any]:
        """What samplers are told of their times."""
        return {"path_type": self.path_type, "shift": self.time_shift}

    def passes(self, has_guide: bool) -> tuple[int, int]:
        """Through the network, and through a guide if there is one, for one image."""
        times = evaluation_times(self.mode, self.num_steps, self.heun, self.time_shift, self.path_type)

        def acting(scale: float, low: float, high: float) -> list[bool]:
            return [scale != 1 and low <= time <= high for time in times]

        by_class = acting(*self.cfg) if self.guide_scale is not None or not has_guide else [False] * len(times)
        own = [1 + both for both in by_class]
        return sum(own), sum(np.multiply(own, acting(*self.of_guide)).tolist()) if has_guide else 0


def solve_ode(
    velocity: Velocity, noise: torch.Tensor, labels: torch.Tensor, settings: SamplerSettings, step_noise: StepNoise
) -> torch.Tensor:
    return sample_ode(velocity, noise, labels, settings.num_steps, settings.heun, **settings.times)


def solve_sde(
    velocity: Velocity, noise: torch.Tensor, labels: torch.Tensor, settings: SamplerSettings, step_noise: StepNoise
) -> torch.Tensor:
    return sample_sde(velocity, noise, labels, settings.num_steps, step_noise, **settings.times)


def solve_map(
    velocity: Velocity, noise: torch.Tensor, labels: torch.Tensor, settings: SamplerSettings, step_noise: StepNoise
) -> torch.Tensor:
    return sample_map(velocity, noise, labels, settings.num_steps, **settings.times)


# By ``--mode``: (velocity, noise at t = 1, labels, settings, noise of a step) → the state at t = 0.
SOLVERS = {"ode": solve_ode, "sde": solve_sde, "map": solve_map}


class ImageSampler:
    """Images by number: image ``i`` depends on the settings, ``i`` and its label, not on the batch or the process.

    Args:
        model: the denoiser, on the device.
        tokenizer: on the same.
        settings: of the sampler.
        truncate: cut off the fraction of pixel values, as REPA-E does, instead of rounding.
        decode_batch: latents decoded at once.
        autocast: precision of all networks, a new context each time.
        guide: the network that guides, in the place of the null class or beside it, on the same device
            (autoguidance), or the model itself, whose output on the way does where it has one; or None.
    """

    def __init__(
        self,
        model: Denoiser,
        tokenizer: Tokenizer,
        settings: SamplerSettings,
        *,
        truncate: bool,
        decode_batch: int,
        autocast: Callable[[], AbstractContextManager],
        guide: Denoiser | None = None,
    ):
        self.tokenizer, self.settings, self.truncate = tokenizer, settings, truncate
        self.decode_batch, self.autocast = decode_batch, autocast
        self.model = model
        self.velocity = model_velocity(model, autocast, settings.damped)
        channels = settings.guidance_channels
        if guide is model and model.config.guide_depth:
            both = velocities_with_guide(model, autocast, settings.damped)
            self.velocity = internally_guided(self.velocity, both, *settings.of_guide, channels)
        elif guide is not None:
            weaker = model_velocity(guide, autocast, settings.damped)
            self.velocity = autoguided(self.velocity, weaker, *settings.of_guide, channels)
        if guide is None or settings.guide_scale is not None:
            scale, low, high = settings.cfg  # with and without a class, the guide sharpens both
            self.velocity = guided(self.velocity, scale, model.null_class, low, high, channels)

    @torch.inference_mode()
    def __call__(self, items: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Make images ``items`` (int64 ``[B]``) of classes ``labels`` (int64 ``[B]``), without synchronising.

        Returns:
            uint8 ``[B, 3, H, W]``, and whether each came out finite, bool ``[B]``.
        """
        z = self.latents(items, labels)
        images = torch.cat([self.decode(part) for part in z.split(self.decode_batch)])
        return self.quantise(images).contiguous(), images.isfinite().flatten(1).all(dim=1)

    @torch.inference_mode()
    def latents(self, items: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Normalised latents, float32 ``[B, C, h, w]``."""
        solve, noise = SOLVERS[self.settings.mode], self.noise(items, 0)
        state = solve(self.velocity, noise, labels, self.settings, lambda step: self.noise(items, step + 1))
        return self.model.unpack(state)[0]

    def noise(self, items: torch.Tensor, step: int) -> torch.Tensor:
        """Step 0 is where sampling starts, step k + 1 belongs to the SDE's step k."""
        return counted_state(self.model, self.settings.seed, items, step)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Normalised latents → images ``[B, 3, H, W]``, nominally in [-1, 1]."""
        with self.autocast():
            return self.tokenizer.decode(self.tokenizer.statistics.denormalize(z))

    def quantise(self, images: torch.Tensor) -> torch.Tensor:
        """float32 in [-1, 1] → uint8, clamped."""
        return ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8) if self.truncate else to_uint8(images)


def choose_labels(count: int, classes: Sequence[int], label_sampling: str, seed: int) -> np.ndarray:
    """Labels of images 0…count − 1, int64: drawn uniformly, or in turn (``equal``)."""
    items = torch.arange(count)
    places = counted_integers(seed, items, len(classes)) if label_sampling == "random" else items % len(classes)
    return np.asarray(classes, np.int64)[places.numpy()]


def default_shard_size(count: int) -> int:
    """About a 64th of all images, in whole batches of 64, from 64 to 1024; the same for every number of processes."""
    return min(1024, max(64, -(-count // 64 // 64) * 64))


class ShardMaker:
    """Makes shards of generated images; the writes of a batch overlap the next one.

    Args:
        packing: the folder.
        sampler: makes a batch.
        labels: of all images, int64 ``[N]``.
        shard_size: images in a shard; the last may have fewer.
        batch_size: images at once.
        only_whole_batches: fill up a shard's last batch with images that are thrown away: compiled networks are made
            anew for every size.
        device: of the sampler.
    """

    def __init__(
        self,
        packing: PackingJob,
        sampler: ImageSampler,
        labels: np.ndarray,
        *,
        shard_size: int,
        batch_size: int,
        only_whole_batches: bool,
        device: torch.device,
    ):
        self.packing, self.sampler, self.labels = packing, sampler, labels
        self.shard_size, self.batch_size, self.device = shard_size, batch_size, device
        self.only_whole_batches = only_whole_batches
        self._device_labels = torch.from_numpy(labels).to(device)

    def items(self, number: int) -> range:
        """Numbers of the images in a shard."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, len(self.labels)))

    def make(self, number: int, progress: tqdm) -> None:
        """Make a shard, unless another process completed it meanwhile."""
        items = self.items(number)
        with self.packing.shard(number) as shard:
            if shard is None:
                progress.update(len(items))
                return
            shard.create(len(items))
            sizes: list[int] = []

            def write(first: int, images: Callable[[], np.ndarray], finite: Callable[[], np.ndarray]) -> None:
                check_finite(first, finite())
                batch = images()
                sizes.extend(shard.put(slot, image) for slot, image in enumerate(batch, first - items.start))
                progress.update(len(batch))

            with shard, ThreadPoolExecutor(1, "writer") as writer:
                pending: deque[Future] = deque()
                for first in range(items.start, items.stop, self.batch_size):
                    images, finite = self._batch(range(first, min(first + self.batch_size, items.stop)))
                    pending.append(writer.submit(write, first, on_host(images), on_host(finite)))
                    while len(pending) >= BATCHES_BEHIND:
                        pending.popleft().result()
                while pending:
                    pending.popleft().result()
            shard.finish(sizes, self.labels[items.start : items.stop].tolist())

    def _batch(self, items: range) -> tuple[torch.Tensor, torch.Tensor]:
        count = self.batch_size if self.only_whole_batches else len(items)
        numbers = torch.arange(items.start, items.start + count, device=self.device)
        labels = self._device_labels[numbers.clamp(max=len(self.labels) - 1)]
        images, finite = self.sampler(numbers, labels)
        return images[: len(items)], finite[: len(items)]


def on_host(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
    """Start to copy a tensor to the CPU; the answer waits for the copy alone."""
    if tensor.device.type != "cuda":
        return tensor.numpy
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return wait


def check_finite(first: int, finite: np.ndarray) -> None:
    """Refuse images that are not finite, by number."""
    if not finite.all():
        number = first + int(np.flatnonzero(~finite)[0])
        raise UserError(
            f"image {number} is not finite: add --mixed-precision no, or choose other weights with --train-steps, as "
            "these diverged"
        )


def complete(packing: PackingJob, npz: bool, preview: int, beside: ImageDataset | None = None) -> None:
    """Add what a complete folder lacks of ``samples.npz`` and ``preview.png``; one process does it.

    Args:
        packing: of a folder that is complete.
        npz: whether to write ``samples.npz``.
        preview: images in ``preview.png``; 0: none.
        beside: real images, of which some of the same classes are shown in it too.
    """
    folder = packing.folder
    with packing.lock(END_SECONDS):
        images = open_images(folder)
        if npz and not (folder / NPZ_NAME).exists():
            verify([images])  # what an earlier run left may have been damaged since
            write_npz(images, folder / NPZ_NAME)
        if preview and not (folder / PREVIEW_NAME).exists():
            save_preview(folder / PREVIEW_NAME, preview_rows(images.labels, preview), images, beside)


def preview_rows(labels: np.ndarray, count: int) -> list[list[int]]:
    """Which images to show: a row for each class where that fills a picture, else the first ones in a square."""
    count = min(count, len(labels))
    classes = np.unique(labels)
    columns = count // len(classes)
    if len(classes) <= MAX_PREVIEW_ROWS and columns > 1:
        columns = min(columns, int(min((labels == label).sum() for label in classes)))
        return [np.flatnonzero(labels == label)[:columns].tolist() for label in classes]
    columns = int(np.ceil(np.sqrt(count)))
    return [list(range(first, first + columns)) for first in range(0, count - columns + 1, columns)]


def save_preview(path: Path, rows: list[list[int]], images: ImageDataset, beside: ImageDataset | None = None) -> None:
    """Write a picture of some images of a dataset: a row's class at its left, real images of the class at its right.

    Args:
        path: of the PNG.
        rows: numbers of the images.
        images: the generated ones.
        beside: real ones; needed where rows are classes and the set has all of them, else left out.
    """
    grid, titles = read_rows(images, rows), []
    is_class = [len({int(images.labels[item]) for item in row}) == 1 for row in rows]
    names = [images.class_names[images.labels[row[0]]] for row in rows] if all(is_class) else None
    if beside is not None and names is not None:
        real = [np.flatnonzero(beside.labels == number)[:BESIDE] for number in _numbers_of(names, beside)]
        count = min(map(len, real), default=0)
        if count:
            titles = [(0, "generated"), (grid.shape[1], "real")]
            grid = torch.cat([grid, read_rows(beside, [row[:count].tolist() for row in real])], 1)
    save_grid(list(grid), path, names=names, titles=titles)


def _numbers_of(names: Sequence[str], images: ImageDataset) -> list[int]:
    """The labels of these classes; -1, which no image has, for one that the set lacks."""
    return [images.class_names.index(name) if name in images.class_names else -1 for name in names]


def read_rows(images: ImageDataset, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Images by number, uint8 ``[R, n, 3, H, W]``."""
    out = np.empty((len(rows), len(rows[0]), 3, images.resolution, images.resolution), np.uint8)
    for items, row in zip(rows, out, strict=True):
        images.read_into(list(items), row)
    return torch.from_numpy(out)
