"""Latents by number: a cache made by cache_latents.py, with what a diffusion transformer is trained on as well.

::

    index.json labels.npy     a packed dataset of kind "latents": what the VAE stores, e.g. [2C, h, w]
    latents-00000.npy …
    latents_stats.safetensors mean, std, var of samples over the whole set
    vae/                      the VAE that made it, a diffusers folder
    flipped/                  a packed dataset: latents of the mirrored images; none of pixels
    features/ENC/             a packed dataset of kind "features": [N, D], what the VFM ENC sees
    features-flipped/ENC/     the same of the mirrored images
    class-tokens/ENC/         a packed dataset of kind "class-tokens": [D], the class token of the VFM ENC
    class-tokens-flipped/ENC/ the same of the mirrored images

ENC is a name of --enc-type, with -- for /.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from dataset.images import ImageDataset
from dataset.shards import PackedReader, read_index
from dataset.verification import SHOWN_BYTES
from errors import UserError
from files import is_out_of_reach, read_safetensors
from models.latent_statistics import LatentStatistics
from models.tokenizers import stored_latent_shape, stores_images
from schema import MalformedError

STATISTICS_NAME = "latents_stats.safetensors"
VAE_NAME = "vae"
FLIPPED_NAME = "flipped"
_MAKE = "make it with cache_latents.py"


class LatentBatch(NamedTuple):
    """What a training step is given.

    Attributes:
        stored: ``[b, S, h, w]``, of the cache's type; ``Tokenizer.sample`` makes latents of it; or None.
        labels: int64 ``[b]``.
        images: uint8 ``[b, 3, H, W]``, 0…255, or None.
        features: ``[b, N, D]`` of each VFM, of the cache's type, in the order asked for; or None.
        class_token: ``[b, D]`` of a VFM, of the cache's type, or None.
    """

    stored: Tensor | None
    labels: Tensor
    images: Tensor | None = None
    features: tuple[Tensor, ...] | None = None
    class_token: Tensor | None = None


def features_name(enc_type: str, flipped: bool = False) -> str:
    """The sub-folder of a VFM's features."""
    return f"{'features-flipped' if flipped else 'features'}/{enc_type.replace('/', '--')}"


def class_tokens_name(enc_type: str, flipped: bool = False) -> str:
    """The sub-folder of a VFM's class tokens."""
    return f"{'class-tokens-flipped' if flipped else 'class-tokens'}/{enc_type.replace('/', '--')}"


def latents_folder(data_dir: str | os.PathLike | None, name: str, flag: str = "--vae-latents-name") -> Path:
    """The folder that ``flag`` means: a name is a folder in a packed dataset, a path is itself.

    Raises:
        UserError: a name without a packed dataset, or no name at all.
    """
    if os.sep in name or "/" in name:
        return Path(name)
    if name in ("", ".", ".."):
        raise UserError(f"{flag} {name!r} is not a name; give one, or a path such as ./latents")
    if data_dir is None:
        raise UserError(f"{flag} {name} is a folder in --data-dir, which is not given; give it, or a path")
    if read_index(data_dir) is None:
        raise UserError(
            f"--data-dir {data_dir} is not a packed dataset that could hold a folder {name}; give "
            f"{flag} a path, such as ./{name}"
        )
    return Path(data_dir) / name


class LatentDataset:
    """A latent cache, and on demand its mirrored copy, VFM features, and the images it was made from.

    What fits is held in memory and gathered with one vectorised take; the rest is read item by item. Feeds
    ``dataset.loader``; several threads may read at once.

    Args:
        folder: of the cache.
        hflip: open the mirrored copy too.
        features: VFMs whose features are read, names of ``--enc-type``.
        features_folder: another cache of the same images that has them, and class tokens; by default this one.
        class_token: VFM whose class token is read; None: none is.
        images: the dataset that the cache was made from, to read its images too.
        latents: read the latents themselves; False: only what comes with them.
        memory_limit: bytes that may be held in memory; by default a quarter of what is available, divided by the
            processes; 0 reads from the files always.
        local_processes: processes on this machine, each of which holds its own copy.
        show_progress: show a bar while a large set is read into memory.

    Attributes:
        latent_shape: (C, h, w).
        resolution: side in pixels of the images that were encoded.
        labels: int64 ``[N]``.
        class_names: label ``c`` means ``class_names[c]``.
        vae_folder: diffusers folder of the VAE that made the cache.
        statistics: of samples over the whole set.
        feature_shapes: (N, D) of each VFM.
        class_token_source: which VFM and grid the class tokens come from, and their width; None where none is read.
        has_flipped: whether items can be mirrored.
        source: what the cache was made from and how, from its index.

    Raises:
        UserError: no complete cache, no such part in it, or images of another dataset.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        hflip: bool = False,
        features: Sequence[str] = (),
        features_folder: str | os.PathLike | None = None,
        class_token: str | None = None,
        images: ImageDataset | None = None,
        latents: bool = True,
        memory_limit: int | None = None,
        local_processes: int = 1,
        show_progress: bool = True,
    ) -> None:
        self.folder = Path(folder)
        if read_index(self.folder) is None:
            raise UserError(_explain_missing(self.folder))
        reader = PackedReader(self.folder, kind="latents")
        self.source: dict = reader.index["source"]
        self.resolution: int = self.source.get("resolution", 0)
        self.labels = reader.labels
        self.class_names = reader.class_names
        self.vae_folder = self.folder / VAE_NAME
        self.latent_shape = self._latent_shape(reader)
        self.statistics = self._load_statistics()
        self.has_flipped = hflip
        self._fingerprint = reader.fingerprint()
        self._images = images
        if images is not None:
            self._check_images(images)
        limit = available_memory() // (4 * local_processes) if memory_limit is None else memory_limit
        self._arrays: dict[str, _Array] = {}
        if latents:
            mirrors = stores_images(self.vae_folder)
            readers = [reader, self._open(FLIPPED_NAME, "latents")] if hflip and not mirrors else [reader]
            self._arrays["stored"] = _Array(readers, limit, show_progress, mirrors)
        flips = (False, True) if hflip else (False,)
        for enc_type in features:
            names = [features_name(enc_type, flipped) for flipped in flips]
            readers = [self._open(name, "features", features_folder) for name in names]
            self._arrays[names[0]] = _Array(readers, limit - self.held_bytes, show_progress)
        self._feature_names = tuple(features_name(enc_type) for enc_type in features)
        self.feature_shapes = tuple(self._arrays[name].spec.shape for name in self._feature_names)
        self.class_token_source: dict | None = None
        if class_token is not None:
            names = [class_tokens_name(class_token, flipped) for flipped in flips]
            readers = [self._open(name, "class-tokens", features_folder) for name in names]
            self._arrays["class_token"] = _Array(readers, limit - self.held_bytes, show_progress)
            source = {key: readers[0].index["source"].get(key) for key in ("enc_type", "encoder", "grid")}
            self.class_token_source = source | {"width": readers[0].spec.shape[0]}

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """The same for the same latents and labels in the same order, on any machine; cheap."""
        return f"latents:{self._fingerprint}"

    @property
    def readers(self) -> list[PackedReader]:
        """Packed files that can be compared with their checksums; what is held in memory was, as it was read."""
        arrays = self._arrays.values()
        readers = [reader for array in arrays if not array.held_bytes for reader in array.readers]
        return readers + ([] if self._images is None else self._images.readers)

    @property
    def held_bytes(self) -> int:
        """Bytes that this process holds in memory."""
        return sum(array.held_bytes for array in self._arrays.values())

    @property
    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each array of an item."""
        arrays = {name: _torch_layout(array) for name, array in self._arrays.items()}
        layout = {name: arrays[name] for name in ("stored",) if name in arrays} | {"labels": ((), torch.int64)}
        if self._images is not None:
            layout["images"] = ((3, self._images.resolution, self._images.resolution), torch.uint8)
        return layout | arrays

    def read_arrays(self, items: np.ndarray, flips: np.ndarray | None, out: Mapping[str, np.ndarray]) -> None:
        """Read n items into arrays ``[n, …]`` of :attr:`layout`; those in ``flips``, bool ``[n]``, mirrored.

        What is not in ``out`` is not read.
        """
        out["labels"][...] = self.labels[items]
        if "images" in out:
            pixels = out["images"]
            self._images.read_into(items, pixels)
            if flips is not None:
                pixels[flips] = pixels[flips, :, :, ::-1]
        for name in self._arrays.keys() & out.keys():
            self._arrays[name].read(items, flips, out[name])

    def batch(self, tensors: Mapping[str, Tensor]) -> LatentBatch:
        """What the loader hands out."""
        features = tuple(tensors[name] for name in self._feature_names if name in tensors) or None
        stored, images, class_token = (tensors.get(name) for name in ("stored", "images", "class_token"))
        return LatentBatch(stored, tensors["labels"], images, features, class_token)

    def _latent_shape(self, reader: PackedReader) -> tuple[int, int, int]:
        shape = reader.spec.shape
        try:
            return stored_latent_shape(self.vae_folder, shape)
        except (OSError, MalformedError, KeyError, TypeError) as error:
            if is_out_of_reach(error):
                raise
            raise UserError(
                f"{self.vae_folder / 'config.json'} does not say which VAE it is of ({error}); copy the whole cache "
                "again"
            ) from error
        except ValueError as error:
            raise UserError(f"{self.folder} holds items of shape {shape}; {error}; {_MAKE}") from error

    def _load_statistics(self) -> LatentStatistics:
        path = self.folder / STATISTICS_NAME
        try:
            tensors = read_safetensors(path)
            statistics = LatentStatistics(self.latent_shape[0])
            statistics.load(tensors["mean"], tensors["std"], tensors["var"])
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            if is_out_of_reach(error):
                raise
            raise UserError(f"{path} cannot be read ({error}); copy the whole cache again") from error
        return statistics

    def _check_images(self, images: ImageDataset) -> None:
        if images.fingerprint() != self.source.get("dataset"):
            raise UserError(
                f"{self.folder} was made from another dataset than the one given ({len(self)} latents, {len(images)} "
                "images); give its --data-dir, or make a cache of this one"
            )

    def _open(self, name: str, kind: str, cache: str | os.PathLike | None = None) -> PackedReader:
        cache = self.folder if cache is None else Path(cache)
        folder = cache / name
        if read_index(folder) is None:
            raise UserError(missing_part(cache, name))
        reader = PackedReader(folder, kind)
        is_of_others = cache != self.folder and reader.index["source"].get("dataset") != self.source.get("dataset")
        if is_of_others or not np.array_equal(reader.labels, self.labels):
            raise UserError(f"{folder} belongs to another dataset than {self.folder}; delete it and make it again")
        return reader


class _Array:
    """The items of a packed dataset and, as numbers N and up, those of its mirrored copy.

    With ``mirrors`` there is no copy: items are mirrored as they are read, along their last axis.
    """

    def __init__(self, readers: Sequence[PackedReader], limit: int, show_progress: bool, mirrors: bool = False) -> None:
        self._mirrors = mirrors
        self.spec = readers[0].spec
        self.readers = readers
        self._length = len(readers[0])
        if any(reader.spec != self.spec for reader in readers):
            raise UserError(
                f"{readers[1].folder} holds {readers[1].spec.shape} of {readers[1].spec.dtype}, {readers[0].folder} "
                f"{self.spec.shape} of {self.spec.dtype}; make one of them again"
            )
        self._held: np.ndarray | None = None
        size = self.spec.item_bytes * self._length * len(readers)
        if size <= limit:
            self._held = np.empty((len(readers) * self._length, *self.spec.shape), self.spec.dtype)
            quiet = not show_progress or size < SHOWN_BYTES
            with tqdm(total=size, unit="B", unit_scale=True, desc=f"reading {self.spec.kind}", disable=quiet) as bar:
                for number, reader in enumerate(readers):
                    reader.read_all(self._held[number * self._length : (number + 1) * self._length], bar.update)

    @property
    def held_bytes(self) -> int:
        return 0 if self._held is None else self._held.nbytes

    def read(self, items: np.ndarray, flips: np.ndarray | None, out: np.ndarray) -> None:
        if self._mirrors and flips is not None:
            self.read(items, None, out)
            out[flips] = out[flips, ..., ::-1]
            return
        if self._held is not None:
            rows = items if flips is None else items + self._length * flips
            # "clip" writes straight into out, where "raise" goes through a copy; the numbers are within bounds
            np.take(self._held, rows, axis=0, out=out, mode="clip")
            return
        for place, item in enumerate(items):
            reader = self.readers[0 if flips is None else int(flips[place])]
            reader.read_into(int(item), out[place])


def available_memory() -> int:
    """Bytes of main memory that this process could still take: the machine's, or less where a cgroup says so."""
    available = _meminfo("MemAvailable")
    if available is None:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for folder in _memory_cgroups():
        try:
            limit = int((folder / "memory.max").read_text())
            # what is used and cannot be dropped: the page cache counts as used too
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
            available = min(available, limit - used)
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return max(0, available)


def _memory_cgroups() -> list[Path]:
    """This process's cgroup (version 2) and all above it: a Slurm job's limit lies several levels down."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    inner = next((line.partition("::")[2].strip("/") for line in lines if line.startswith("0::")), "")
    folder = root / inner
    return [folder, *(parent for parent in folder.parents if parent == root or root in parent.parents)]


def missing_part(cache: Path, part: str) -> str:
    """What to tell who asks a cache for a sub-folder that it lacks."""
    kind, _, enc_type = part.partition("/")
    makes = {"features": "--cache-features", "class-tokens": "--cache-class-tokens"}
    flags = [makes[kind.removesuffix("-flipped")], "--enc-type", enc_type.replace("--", "/")] if enc_type else []
    flags += ["--hflip"] if kind == FLIPPED_NAME or kind.endswith("-flipped") else []
    return f"{cache} has no complete {part}/; run the same cache_latents.py command again with {' '.join(flags)}"


def cache_files(folder: Path, parts: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """What of a cache has to be copied: its packed folders, itself last, and its other files; relative to ``folder``.

    Args:
        folder: of the cache.
        parts: sub-folders in use, e.g. ``"flipped"`` or ``features_name(...)``; None: all that are complete.
    """
    if parts is None:
        kinds = ("features", "features-flipped", "class-tokens", "class-tokens-flipped")
        found = [folder / FLIPPED_NAME, *(path for kind in kinds for path in sorted(folder.glob(f"{kind}/*")))]
        parts = [path.relative_to(folder).as_posix() for path in found if read_index(path) is not None]
    others = [STATISTICS_NAME, *(f"{VAE_NAME}/{path.name}" for path in sorted((folder / VAE_NAME).iterdir()))]
    return [*parts, "."], others


def _meminfo(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _torch_layout(array: _Array) -> tuple[tuple[int, ...], torch.dtype]:
    return array.spec.shape, getattr(torch, array.spec.dtype)


def _explain_missing(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} does not exist; {_MAKE}, or correct the name"
    if any(folder.glob("latents-?????.*")) or (folder / "settings.json").exists():
        return f"{folder} is not finished; run the same cache_latents.py command again, it continues"
    return f"{folder} is not a latent cache (it has no index.json); {_MAKE}"
