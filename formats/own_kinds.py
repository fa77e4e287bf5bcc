"""Tokenizers of this project that are no ``AutoencoderKL``: named by their class, or folders that they saved."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from errors import UserError, one_line
from files import is_out_of_reach
from formats.run_folders import refuse_unfinished
from models.tokenizers import CONFIG_FILE, STATISTICS_FILE, TOKENIZERS, Config, Tokenizer, tokenizer_kind
from schema import MalformedError, read_json

KL = "AutoencoderKL"


@dataclass(frozen=True)
class OwnKind:
    """What a name of ``--vae`` or ``--vae-ckpt`` means.

    Attributes:
        kind: its class.
        folder: that it was saved in; None where the class was named.
    """

    kind: type[Tokenizer]
    folder: Path | None

    def build(self) -> Tokenizer:
        """One with random weights."""
        try:
            config = {} if self.folder is None else read_json(self.folder / CONFIG_FILE)
            return self.kind.from_architecture(config)
        except (KeyError, TypeError, ValueError) as error:
            name = self.kind.__name__
            raise UserError(
                f"--vae {self.folder or name}: no {name} is built from {config} ({one_line(error)}); give a folder "
                "with its config.json"
            ) from error

    def load(self) -> tuple[Tokenizer, str | None]:
        """The one in the folder, and where its latent statistics come from: None where it has none."""
        if self.folder is None:
            name = self.kind.__name__
            raise UserError(f"--vae {name} names a kind of tokenizer: give a folder of one, or --vae-ckpt none")
        try:
            tokenizer, has_statistics = self.kind.load(self.folder)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            if is_out_of_reach(error):
                raise
            raise UserError(f"{self.folder}: no {self.kind.__name__} loads from it ({one_line(error)})") from error
        return tokenizer, str(self.folder / STATISTICS_FILE) if has_statistics else None


def find_own_kind(name: str | None) -> OwnKind | None:
    """None for what is an ``AutoencoderKL``, a file, or nothing at all."""
    if name is None:
        return None
    folder, kind = None, name
    if Path(name).is_dir():
        refuse_unfinished(str(Path(name) / "vae"))  # a training that began anew leaves the old one there
        folder = next((path for path in (Path(name), Path(name) / "vae") if (path / CONFIG_FILE).is_file()), None)
        try:
            kind = read_json(folder / CONFIG_FILE, Config)["_class_name"] if folder else KL
        except (OSError, MalformedError):
            return None  # who reads it says what is wrong
    return None if kind == KL or kind not in TOKENIZERS else OwnKind(tokenizer_kind(kind), folder)
