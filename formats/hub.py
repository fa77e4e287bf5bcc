"""VAEs by their names on the Hugging Face hub: ``stabilityai/sd-vae-ft-mse``, ``NAME:FOLDER`` for a folder in it.

The hub's local cache goes first; what it lacks is downloaded, where the hub can be reached.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, snapshot_download

from errors import one_line
from formats.run_folders import WEIGHT_SUFFIXES
from formats.statistics import DISCRIMINATOR_SUFFIX, LIGHTNINGDIT_FILE, REPAE_SUFFIX, vae_files
from models.hub import hub_answers
from models.tokenizers import STATISTICS_FILE
from models.weight_files import NotWeightsError

_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<folder>[\w./-]+))?")
_WEIGHTS = tuple(f"diffusion_pytorch_model{suffix}" for suffix in (".safetensors", ".bin"))


def is_hub_name(text: str) -> bool:
    """Whether a text can be a hub name and is not a path: nothing is there, and its first part is not a folder here."""
    found = _NAME.fullmatch(text)
    return found is not None and not Path(text).exists() and not Path(text.split("/")[0]).exists()


def holds_vae(folder: Path) -> bool:
    """Whether a VAE's weights are in a folder, or in its ``vae/``; statistics alone are no VAE."""
    return any(path.is_dir() and vae_files(path) for path in (folder, folder / "vae"))


def hub_folder(name: str, holds: Callable[[Path], object] = holds_vae) -> Path:
    """A local folder with the files of a hub name, as the repository has them.

    Args:
        name: of a repository, perhaps with a folder in it.
        holds: says of a folder in the cache whether what is wanted is there.

    Raises:
        NotWeightsError: neither in the cache nor to be had.
    """
    found = _NAME.fullmatch(name)
    repository, inside = found["repository"], found["folder"] or ""
    cached = _cached(repository, inside)
    if cached is not None and holds(cached):
        return cached
    if constants.HF_HUB_OFFLINE or not hub_answers():
        raise NotWeightsError(
            f"no such file or folder, and as a name on the hub: it is not in the cache ({constants.HF_HUB_CACHE}) and "
            "the hub cannot be reached; download it on a machine with a network (hf download "
            f"{repository} --local-dir DIR) and give the folder"
        )
    try:
        files = choose_files(HfApi().list_repo_files(repository), inside)
        return Path(snapshot_download(repository, allow_patterns=files)) / inside
    except OSError as error:  # what the hub's own errors derive from
        raise NotWeightsError(f"no such file or folder, and the hub does not have it ({one_line(error)})") from error


def choose_files(files: Sequence[str], inside: str = "") -> list[str]:
    """Which of a repository's files to download: those of a VAE, with its statistics.

    Args:
        files: all of the repository's.
        inside: the folder of the repository that is meant; by default its root, or ``vae/``.

    Raises:
        NotWeightsError: no VAE in them, or several.
    """
    prefix = f"{inside.strip('/')}/" if inside.strip("/") else ""
    for folder in (prefix, f"{prefix}vae/"):
        if f"{folder}config.json" in files:
            weights = next((f"{folder}{name}" for name in _WEIGHTS if f"{folder}{name}" in files), None)
            if weights is not None:
                statistics = [f"{folder}{name}" for name in (STATISTICS_FILE, LIGHTNINGDIT_FILE)]
                return [f"{folder}config.json", weights, *(name for name in statistics if name in files)]
    here = [name for name in files if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
    weights = [name for name in here if PurePosixPath(name).suffix in WEIGHT_SUFFIXES]
    beside = (REPAE_SUFFIX, DISCRIMINATOR_SUFFIX, "latents_stats")
    vaes = [name for name in weights if not PurePosixPath(name).stem.endswith(beside)]
    if len(vaes) != 1:
        raise NotWeightsError(
            f"the repository has {len(vaes) or 'no'} files that may be a VAE {vaes[:3]}: download the one you mean "
            "and give the file"
        )
    return vaes + [name for name in weights if PurePosixPath(name).stem.endswith(beside)]


def _cached(repository: str, inside: str) -> Path | None:
    """The repository's folder in the cache, if there is one."""
    try:
        folder = Path(snapshot_download(repository, local_files_only=True)) / inside
    except (OSError, ValueError):
        return None
    return folder if folder.is_dir() else None
