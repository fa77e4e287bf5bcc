"""Tokenizers: images ⇄ latents. One file a kind, one line in the registry; names need no torch.

The classes are imported when they are asked for.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypedDict

from schema import read_json

__all__ = ["STATISTICS_FILE", "TOKENIZERS", "Code", "PlainCode", "Tokenizer"]

# By the ``_class_name`` of config.json: a class, or where it is.
TOKENIZERS: dict[str, Any] = {
    "AutoencoderKL": "models.tokenizers.kl:KLTokenizer",
    "AutoencoderKLFlux2": "models.tokenizers.flux2:Flux2Tokenizer",
    "AutoencoderKLQwenImage": "models.tokenizers.qwenimage:QwenImageTokenizer",
    "AutoencoderRAE": "models.tokenizers.rae:RAETokenizer",
    "VFMAutoencoder": "models.tokenizers.vfm_autoencoder:VFMAutoencoder",
    "pixels": "models.tokenizers.pixels:PixelTokenizer",
}
CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs" / "vae"
CONFIG_FILE, STATISTICS_FILE = "config.json", "latents_stats.safetensors"


class Config(TypedDict):
    """``config.json``: of a tokenizer, what it is built from as well."""

    _class_name: str


def tokenizer_kind(name: str) -> "type[Tokenizer]":  # noqa: F821
    """The class of a name of the registry."""
    kind = TOKENIZERS[name]
    if isinstance(kind, str):
        module, _, attribute = kind.partition(":")
        kind = getattr(import_module(module), attribute)
    return kind


def build_tokenizer(config: Mapping) -> "Tokenizer":  # noqa: F821
    """One of random weights from ``Tokenizer.architecture``."""
    return tokenizer_kind(config["_class_name"]).from_architecture(config)


def architecture_names() -> list[str]:
    """The architectures of configs/vae that ``--vae`` knows."""
    return sorted(path.stem for path in CONFIG_DIR.glob("*.json"))


def named_config(name: str) -> dict:
    """The configuration of ``configs/vae/NAME.json``."""
    return read_json(CONFIG_DIR / f"{name}.json")


def stored_latent_shape(folder: Path, stored_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, h, w) of the latents of a cache, whose items have ``stored_shape``, by the tokenizer that made it.

    Raises:
        OSError, MalformedError, KeyError: the folder does not say which tokenizer it is.
        ValueError: the items are not this tokenizer's.
    """
    config = read_json(Path(folder) / CONFIG_FILE, Config)
    return tokenizer_kind(config["_class_name"]).latent_shape_of(stored_shape, config)


def stores_images(folder: Path) -> bool:
    """``Tokenizer.stores_images`` of the one in a folder.

    Raises:
        OSError, MalformedError, KeyError: the folder does not say which tokenizer it is.
    """
    return tokenizer_kind(read_json(Path(folder) / CONFIG_FILE, Config)["_class_name"]).stores_images


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("models.tokenizers.base"), name)
