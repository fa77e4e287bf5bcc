"""Tokenizers: images ⇄ latents. One file a kind, one line in the registry."""

import json
from collections.abc import Mapping
from pathlib import Path

from models.tokenizers.base import CONFIG_FILE, STATISTICS_FILE, Code, PlainCode, Tokenizer
from models.tokenizers.kl import KLTokenizer

__all__ = ["STATISTICS_FILE", "TOKENIZERS", "Code", "PlainCode", "Tokenizer", "build_tokenizer", "stored_latent_shape"]

TOKENIZERS: dict[str, type[Tokenizer]] = {"AutoencoderKL": KLTokenizer}  # by the ``_class_name`` of config.json


def build_tokenizer(config: Mapping) -> Tokenizer:
    """One of random weights from ``Tokenizer.architecture``."""
    return TOKENIZERS[config["_class_name"]].from_architecture(config)


def stored_latent_shape(folder: Path, stored_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, h, w) of the latents of a cache, whose items have ``stored_shape``, by the tokenizer that made it.

    Raises:
        OSError, KeyError, TypeError: the folder does not say which tokenizer it is.
        ValueError: the items are not this tokenizer's, or its config.json is not JSON.
    """
    config = json.loads((Path(folder) / CONFIG_FILE).read_bytes())
    return TOKENIZERS[config["_class_name"]].latent_shape_of(stored_shape, config)
