"""Sets of images to be compared, in whatever they lie: ``.npz``, a folder, a packed dataset, what generate.py made."""

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dataset.images import ImageDataset, open_images
from dataset.npz_images import ARRAY, NpzImages, array_names, open_npz
from dataset.shards import is_unfinished, read_index
from dataset.transforms import IMAGE_SUFFIXES, BadImageError, image_size, load_image
from dataset.trees import FolderTree, describe_left_out, images_in
from errors import UserError
from metrics.arguments import INCEPTION
from metrics.frechet import Gaussian
from metrics.inception import POOLED, SPATIAL
from metrics.record import folder_beside, metrics_folder
from runtime.log import logger

LAYOUTS = "an .npz, a folder of images, a packed dataset, or a sample folder of generate.py"
POOLED_KEYS, SPATIAL_KEYS = ("mu", "sigma"), ("mu_s", "sigma_s")  # ADM's names
ASYMMETRY = 1e-3  # of a stored covariance, as a share of its largest entry


@dataclass(frozen=True)
class ImageSet:
    """One side of a comparison.

    Attributes:
        path: where it lies.
        flag: which names it, for messages.
        images: None where there are only statistics.
        pooled, spatial: a network's statistics, where an ``.npz`` brings them.
        statistics_of: that network, as ``--features`` names it.
        made_by: settings of generate.py or preprocessing.py, where those made it.
    """

    path: Path
    flag: str
    images: ImageDataset | None
    pooled: Gaussian | None = None
    spatial: Gaussian | None = None
    statistics_of: str = INCEPTION
    made_by: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.flag} {self.path}"

    def count(self, wanted: int | None) -> int:
        """How many images are measured: ``--num-samples``, or all.

        Raises:
            UserError: there are no images, or fewer.
        """
        if self.images is None:
            raise UserError(f"{self} holds statistics and no images (arr_0); give the images")
        if wanted is not None and wanted > len(self.images):
            raise UserError(f"--num-samples {wanted}: {self.path} has {len(self.images)} images")
        return wanted or len(self.images)

    def describe(self) -> dict:
        """What a measurement says of the images that were measured."""
        return {
            "path": str(self.path),
            "resolution": self.images.resolution,
            "fingerprint": self.images.fingerprint(),
            "made_by": self.made_by,
        }

    @property
    def own_name(self) -> list[str]:
        """The name of an ``.npz`` that is not the only one in its folder, for the names of its measurements."""
        return [self.path.stem] if self.path.is_file() and self.path.stem != "samples" else []

    @property
    def metrics_folder(self) -> Path:
        """Where what is measured of it goes: nothing is written into a folder of somebody's images."""
        return folder_beside(self.path) if isinstance(self.images, FolderImages) else metrics_folder(self.path)


class FolderImages:
    """All image files below a folder, by name, as a :class:`dataset.images.ImageDataset` without labels.

    Nothing is cropped or resized: all must be square and of the first one's size.

    Raises:
        UserError: no images, or the first one is not square.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        names, left_out = images_in(FolderTree(path))
        self._files = sorted(map(Path, names))
        for line in describe_left_out(left_out):
            logger.warning("%s: %s", path, line)
        if not self._files:
            raise UserError(f"{path} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))}); give {LAYOUTS}")
        width, height = self._size(0, (path / self._files[0]).read_bytes())
        if width != height:
            raise UserError(f"{path / self._files[0]} is {width}×{height}, {self._advice}")
        self.resolution = width
        self.labels = np.zeros(len(self), np.int64)
        self.class_names = [""]
        self.shard_counts = [len(self)]

    def __len__(self) -> int:
        return len(self._files)

    def name(self, item: int) -> str:
        return str(self._files[item])

    @property
    def readers(self) -> list:
        """None of these files has a checksum."""
        return []

    def fingerprint(self) -> str:
        """Of names, sizes and times of change; the contents are not read."""
        digest = hashlib.sha256()
        for file in self._files:
            status = (self.path / file).stat()
            digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return f"files:{digest.hexdigest()}"

    def read_into(self, items: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
        for item, pixels in zip(items, out, strict=True):
            encoded = (self.path / self._files[item]).read_bytes()
            width, height = self._size(item, encoded)
            if (width, height) != (self.resolution, self.resolution):
                raise UserError(
                    f"{self.path / self._files[item]} is {width}×{height}, {self._files[0]} is "
                    f"{self.resolution}×{self.resolution}; {self._advice}"
                )
            try:
                pixels[...] = load_image(encoded, self.resolution)
            except BadImageError as error:
                raise self._unusable(item, error) from error

    _advice = "images must be square and of one size: run preprocessing.py and give the packed dataset"

    def _size(self, item: int, encoded: bytes) -> tuple[int, int]:
        try:
            return image_size(encoded)
        except BadImageError as error:
            raise self._unusable(item, error) from error

    def _unusable(self, item: int, error: Exception) -> UserError:
        return UserError(f"{self.path / self._files[item]} cannot be used ({error}); remove it or make it again")


def open_image_set(path: Path, flag: str, features: str = INCEPTION) -> ImageSet:
    """Open whatever ``path`` is.

    Args:
        path: ``.npz``, folder of images, packed dataset, folder of generate.py, or a run that has one.
        flag: which names it, for messages.
        features: the network that the statistics of an ``.npz`` without images are of, unless they are as wide as
            Inception's.

    Raises:
        UserError: nothing usable there.
    """
    if not path.exists():
        raise UserError(f"{flag} {path} does not exist; give {LAYOUTS}")
    if path.is_file():
        if path.suffix.lower() != ".npz":
            raise UserError(f"{flag} {path} is a file, but no .npz; give {LAYOUTS}")
        return _open_npz(path, flag, features)
    if read_index(path) is None and (path / "args.json").is_file():
        path = _only_sample_folder(path, flag)
    index = read_index(path)
    if index is not None:
        return ImageSet(path, flag, open_images(path), made_by=index.get("source") or {})
    if is_unfinished(path):
        raise UserError(f"{flag} {path} is not finished; run the command that makes it again, it continues")
    return ImageSet(path, flag, FolderImages(path))


def _only_sample_folder(run: Path, flag: str) -> Path:
    folders = sorted(index.parent.name for index in run.glob("*/index.json") if _holds_images(index.parent))
    if not folders:
        raise UserError(f"{flag} {run} is a run without complete samples; run generate.py --exp-path {run} first")
    if len(folders) > 1:
        raise UserError(f"{flag} {run} has several folders of samples; give one: {', '.join(folders)}")
    return run / folders[0]


def _holds_images(folder: Path) -> bool:
    index = read_index(folder)
    return index is not None and index["kind"] == "images"


def _open_npz(path: Path, flag: str, features: str) -> ImageSet:
    with open_npz(path) as archive:
        names = array_names(archive)
    if features != INCEPTION and ARRAY not in names and set(POOLED_KEYS) <= set(names):
        statistics = read_statistics(path, POOLED_KEYS)
        if len(statistics.mean) != POOLED:
            return ImageSet(path, flag, None, statistics, statistics_of=features)
    pooled = read_statistics(path, POOLED_KEYS, POOLED) if set(POOLED_KEYS) <= set(names) else None
    spatial = read_statistics(path, SPATIAL_KEYS, SPATIAL) if set(SPATIAL_KEYS) <= set(names) else None
    if spatial is not None and spatial.mean.min() < 0:
        raise UserError(
            f"{path}: mu_s has negative entries (down to {spatial.mean.min():.3g}), but sFID's features come after a "
            "ReLU; take --metrics without sfid, or a reference made by ADM's protocol"
        )
    images = NpzImages(path) if ARRAY in names or pooled is None else None
    return ImageSet(path, flag, images, pooled, spatial)


def read_statistics(path: Path, keys: tuple[str, str], dim: int | None = None) -> Gaussian:
    """A Gaussian that an ``.npz`` holds under the names of its mean ``[dim]`` and covariance ``[dim, dim]``.

    Raises:
        UserError: not readable, other shapes, not finite, or no covariance.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, cov = (np.asarray(file[key], np.float64) for key in keys)
    except (ValueError, TypeError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: {', '.join(keys)} are not readable ({error}); copy or download it again") from error
    where = f"{path}: {', '.join(keys)}"
    dim = mean.size if dim is None else dim
    if mean.shape != (dim,) or cov.shape != (dim, dim):
        raise UserError(f"{where} have shapes {list(mean.shape)}, {list(cov.shape)}; [{dim}], [{dim}, {dim}] is needed")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise UserError(f"{where} are not finite; make or download the reference again")
    if np.abs(cov - cov.T).max() > ASYMMETRY * np.abs(cov).max() or np.diag(cov).min() < 0:
        raise UserError(f"{where}: {keys[1]} is not a covariance (it must be symmetric); make the reference again")
    return Gaussian(mean, (cov + cov.T) / 2)
