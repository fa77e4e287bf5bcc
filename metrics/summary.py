"""One pass over a set of images: what all metrics need of it, made by any number of processes, kept for a reference."""

import hashlib
import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dataset.images import ImageDataset
from dataset.loader import read_batches
from errors import UserError
from files import remove_leftovers, whole_file
from metrics.features import Extractor, Features
from metrics.frechet import Gaussian, Moments
from metrics.inception_score import InceptionScore
from runtime.log import progress_bar
from runtime.processes import Process, agree_on

CACHE_VERSION = 1
NOT_FINITE = "the network's features are not finite: its weights are damaged; give another file"


@dataclass(frozen=True)
class Needs:
    """What is kept of the features: for FID, for sFID, for the Inception Score; all pooled ones for KID, P and R."""

    pooled: bool
    spatial: bool
    scores: bool
    features: bool


@dataclass
class Summary:
    """What was kept of a set of images.

    Attributes:
        count: images.
        pooled, spatial: Gaussians fitted to the features.
        score: the Inception Score.
        features: pooled ones, float32 ``[N, D]``, in the order of the images, on the extractor's device.
    """

    count: int
    pooled: Gaussian | None = None
    spatial: Gaussian | None = None
    score: float | None = None
    features: torch.Tensor | None = None

    @property
    def is_finite(self) -> bool:
        means = [gaussian.mean for gaussian in (self.pooled, self.spatial) if gaussian is not None]
        return all(np.isfinite(mean).all() for mean in means) and (
            self.features is None or bool(self.features.isfinite().all())
        )


class Sums:
    """What one process has seen of a set: its images are ``rank, rank + world_size, …`` of ``count``.

    Args:
        needs: what is kept.
        count: images of the whole set.
        dims: of pooled and spatial features and logits; 0 where the extractor has none.
        rank, world_size: which share this is.
        device: of the features.
    """

    def __init__(
        self, needs: Needs, count: int, dims: tuple[int, int, int], rank: int, world_size: int, device: torch.device
    ):
        pooled, spatial, classes = dims
        self.items = np.arange(rank, count, world_size)
        self.pooled = Moments(pooled, device) if needs.pooled else None
        self.spatial = Moments(spatial, device) if needs.spatial else None
        self.score = InceptionScore(count, classes, device=device) if needs.scores else None
        self.features = torch.zeros(len(self.items), pooled, device=device) if needs.features else None
        self._seen = 0

    def add(self, features: Features) -> None:
        """Of the next images of this share."""
        place = slice(self._seen, self._seen + len(features.pooled))
        self._seen = place.stop
        if self.pooled is not None:
            self.pooled.update(features.pooled)
        if self.spatial is not None:
            self.spatial.update(features.spatial)
        if self.score is not None:
            self.score.update(torch.from_numpy(self.items[place]).to(features.logits.device), features.logits)
        if self.features is not None:
            self.features[place] = features.pooled

    def parts(self) -> list[torch.Tensor]:
        """All sums, to be sent or to be received into."""
        tensors = []
        for moments in (self.pooled, self.spatial):
            if moments is not None:
                moments.flush()
                tensors += [moments.mean, moments.scatter]
        if self.score is not None:
            tensors.append(self.score.sums)
        if self.features is not None:
            tensors.append(self.features)
        return tensors

    def merge(self, other: "Sums") -> None:
        """Add another share; its features are left to the caller."""
        for ours, theirs in ((self.pooled, other.pooled), (self.spatial, other.spatial)):
            if ours is not None:
                ours.merge(len(other.items), theirs.mean, theirs.scatter)
        if self.score is not None:
            self.score.sums += other.score.sums.to(self.score.sums)


def summarise(
    images: ImageDataset,
    count: int,
    extractor: Extractor,
    needs: Needs,
    process: Process,
    *,
    batch_size: int,
    num_workers: int,
    description: str,
) -> Summary | None:
    """Go once over the first ``count`` images; several processes share them and rank 0 gets the summary, others None.

    Args:
        images: the set.
        count: images taken, at least 2.
        extractor: on the process's device.
        needs: what is kept.
        process: who this is; all of them call it, in ``runtime.processes.process_group``.
        batch_size: images at once on a process.
        num_workers: reading threads.
        description: of the progress bar.

    Raises:
        UserError: features that are not finite; on every process.
    """
    items = np.arange(process.rank, count, process.world_size)
    batches = [items[first : first + batch_size] for first in range(0, len(items), batch_size)]
    if getattr(images, "is_sequential", False):
        num_workers = min(num_workers, 1)
    pinned = process.device.type == "cuda"
    read = read_batches(images, batches, num_workers=num_workers, prefetch=2, pin_memory=pinned)
    sums = None
    with progress_bar(len(items), 0, description, "img", process.is_main) as progress:
        for batch in read:
            features = extractor(batch.to(process.device, non_blocking=True))
            if sums is None:
                sums = Sums(needs, count, features.dims, process.rank, process.world_size, process.device)
            sums.add(features)
            progress.update(len(batch))
    if not process.is_main:
        for part in sums.parts() if sums is not None else ():
            dist.send(part.cpu(), 0)
    summary = _total(sums, needs, count, features.dims, process) if process.is_main else None
    if agree_on(lambda: not summary.is_finite):
        raise UserError(NOT_FINITE)
    return summary


def _total(sums: Sums, needs: Needs, count: int, dims: tuple[int, int, int], process: Process) -> Summary:
    """On rank 0: collect the other processes' shares."""
    features = sums.features
    if features is not None and process.world_size > 1:
        features = features.new_empty(count, dims[0])
        features[process.rank :: process.world_size] = sums.features
    for rank in range(1, min(process.world_size, count)):
        other = Sums(needs, count, dims, rank, process.world_size, torch.device("cpu"))
        for part in other.parts():
            dist.recv(part, rank)
        sums.merge(other)
        if features is not None:
            features[rank :: process.world_size] = other.features.to(features)
    return Summary(
        count,
        sums.pooled.gaussian() if sums.pooled is not None else None,
        sums.spatial.gaussian() if sums.spatial is not None else None,
        sums.score.score() if sums.score is not None else None,
        features,
    )


class SummaryCache:
    """Summaries of reference sets, kept in a folder, found again by what they depend on.

    Args:
        path: of the set, all of whose images are summarised.
        images: the set.
        extractor: whose features.
        folder: made when something is kept; None: ``PATH.features``, next to the set.
    """

    def __init__(self, path: Path, images: ImageDataset, extractor: Extractor, folder: Path | None = None):
        path, count = path.resolve(), len(images)
        key = [CACHE_VERSION, images.fingerprint(), images.resolution, count, extractor.name, extractor.weights_sha256]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self.folder, self.count = folder or path.with_name(f"{path.name}.features"), count
        self._device = extractor.device
        self._name = f"{extractor.name.replace('/', '-')}-{digest}"

    def load(self, needs: Needs) -> Summary | None:
        """What is kept, if that is all that is needed."""
        summary = Summary(self.count)
        try:
            for name in [name for name in ("pooled", "spatial") if getattr(needs, name)]:
                with np.load(self._path(name), allow_pickle=False) as file:
                    setattr(summary, name, Gaussian(file["mean"], file["cov"]))
            if needs.features:
                features = np.load(self._path("features"), allow_pickle=False)["features"]
                summary.features = torch.from_numpy(features).to(self._device)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # not there, or damaged: made again
        return summary

    def keep(self, summary: Summary) -> None:
        """Write what there is; a folder that cannot be written is not an error."""
        arrays = {
            name: {"mean": gaussian.mean, "cov": gaussian.cov}
            for name, gaussian in (("pooled", summary.pooled), ("spatial", summary.spatial))
            if gaussian is not None
        }
        if summary.features is not None:
            arrays["features"] = {"features": summary.features.cpu().numpy()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder, f"{self._name}*")
            for name, content in arrays.items():
                with whole_file(self._path(name)) as temporary, open(temporary, "wb") as file:
                    np.savez(file, **content)
        except OSError as error:
            print(f"note: the reference's features are not kept ({error}); --ref-cache names a folder", file=sys.stderr)

    def _path(self, part: str) -> Path:
        return self.folder / f"{self._name}-{part}.npz"
