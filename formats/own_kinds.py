"""Tokenizers that are no ``AutoencoderKL``: named by their kind, or folders of them, on the hub too."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from errors import UserError, one_line
from files import is_out_of_reach
from formats.hub import hub_folder, is_hub_name
from formats.run_folders import refuse_unfinished
from models.tokenizers import (
    CONFIG_FILE,
    TOKENIZERS,
    Config,
    Tokenizer,
    architecture_names,
    named_config,
    tokenizer_kind,
)
from models.weight_files import NotWeightsError
from schema import MalformedError, read_json

KL = "AutoencoderKL"


@dataclass(frozen=True)
class OwnKind:
    """What a name of ``--vae`` or ``--vae-ckpt`` means.

    Attributes:
        name: its kind, as the registry calls it.
        folder: that it was saved in; None where it was named.
        given: what names it.
        named: the configuration that a name means, where that is one of configs/vae.
    """

    name: str
    folder: Path | None
    given: str
    named: Mapping = field(default_factory=dict)

    def config(self) -> Mapping:
        """What it is built from."""
        return self.named if self.folder is None else read_json(self.folder / CONFIG_FILE)

    def build(self) -> Tokenizer:
        """One with random weights."""
        try:
            tokenizer = tokenizer_kind(self.name).from_architecture(self.config())
            if (said := tokenizer.architecture.get("_class_name")) != self.name:
                raise ValueError(f"its architecture has the _class_name {said}, by which nothing would find it again")
            return tokenizer
        except UserError as error:
            raise UserError(f"--vae {self.given}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"--vae {self.given}: no {self.name} is built ({one_line(error)}); give a folder with its config.json"
            ) from error

    def load(self) -> tuple[Tokenizer, str | None]:
        """The one in the folder, and where its latent statistics come from: None where it has none."""
        if self.folder is None and not tokenizer_kind(self.name).needs_weights:
            tokenizer = self.build()
            return tokenizer, tokenizer.take_statistics()
        if self.folder is None:
            if self.named:
                raise UserError(
                    f"--vae {self.given} names an architecture without weights: give the folder of a trained one "
                    "(train_sendvae.py --vae-ckpt none)"
                )
            raise UserError(f"--vae {self.given} names a kind of tokenizer: give a folder of one, or --vae-ckpt none")
        try:
            return tokenizer_kind(self.name).load(self.folder)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            if is_out_of_reach(error):
                raise
            raise UserError(f"{self.folder}: no {self.name} loads from it ({one_line(error)})") from error


def find_own_kind(name: str | None) -> OwnKind | None:
    """None for what is an ``AutoencoderKL``, a file, or nothing at all."""
    if name is None:
        return None
    if name in architecture_names():
        config = named_config(name)
        kind = config.get("_class_name", KL)
        return None if kind == KL or kind not in TOKENIZERS else OwnKind(kind, None, name, config)
    folder, kind = None, name
    path = Path(name)
    if name not in TOKENIZERS and is_hub_name(name):
        try:
            path = hub_folder(name)
        except NotWeightsError:
            return None  # who reads it says why
    if path.is_dir() and (name not in TOKENIZERS or tokenizer_kind(name).needs_weights):
        refuse_unfinished(str(path / "vae"))  # a training that began anew leaves the old one there
        folder = next((place for place in (path, path / "vae") if (place / CONFIG_FILE).is_file()), None)
        try:
            kind = read_json(folder / CONFIG_FILE, Config)["_class_name"] if folder else KL
        except (OSError, MalformedError):
            return None  # who reads it says what is wrong
    return None if kind == KL or kind not in TOKENIZERS else OwnKind(kind, folder, name)
