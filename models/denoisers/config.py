"""What determines a denoiser, and its flags; needs no torch."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from errors import UserError


@dataclass(frozen=True)
class DenoiserConfig:
    """Everything that determines a denoiser's parameters; a kind may add fields. Saved whole, as plain JSON values.

    Attributes:
        names: what ``--model`` may be, for its help.
        model: its name, which begins with the kind's: ``SiT-XL/1``.
        latent_channels: C.
        latent_size: h = w of the latent.
        num_classes: real classes; the null class of guidance comes on top.
    """

    names: ClassVar[str] = ""

    model: str
    latent_channels: int
    latent_size: int
    num_classes: int

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of what the denoiser is given."""
        return self.latent_channels, self.latent_size, self.latent_size

    @staticmethod
    def add_arguments(group: Any) -> None:
        """Flags of this kind alone, each a field."""

    def build(self) -> "Denoiser":  # noqa: F821
        """The network, its weights random."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise :class:`UserError` for a name or a combination that cannot be built."""

    def to_dict(self) -> dict:
        """Plain JSON values; :meth:`from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> "DenoiserConfig":
        return cls(**values)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **values: Any) -> "DenoiserConfig":
        """The fields given, and those of the kind's own flags."""
        own = {field.name: getattr(args, field.name) for field in fields(cls) if field.name not in values}
        config = cls(**values | own)
        config.check()
        return config


@dataclass(frozen=True)
class SiTSize:
    """Depth in blocks, width, attention heads."""

    depth: int
    width: int
    heads: int


SIT_SIZES = {
    "Ti": SiTSize(6, 192, 3),
    "S": SiTSize(12, 384, 6),
    "B": SiTSize(12, 768, 12),
    "L": SiTSize(24, 1024, 16),
    "XL": SiTSize(28, 1152, 16),
}
PATCH_SIZES = (1, 2, 4, 8)
PREFIX = "SiT-"


@dataclass(frozen=True)
class SiTConfig(DenoiserConfig):
    """Everything that determines a SiT's parameters.

    Attributes:
        model: ``SiT-SIZE/PATCH``, e.g. ``SiT-XL/1``.
        qk_norm: LayerNorm on queries and keys.
    """

    names: ClassVar[str] = f"SiT-SIZE/PATCH, sizes {', '.join(SIT_SIZES)}, patch 1, 2, 4 or 8 latent positions"

    qk_norm: bool = False

    @staticmethod
    def add_arguments(group: Any) -> None:
        group.add_argument(
            "--qk-norm", action=argparse.BooleanOptionalAction, default=False, help="SiT: normalise queries and keys"
        )

    def build(self) -> "SiT":  # noqa: F821
        from models.denoisers.sit import SiT

        return SiT(self)

    @property
    def size(self) -> SiTSize:
        return SIT_SIZES[self.model.removeprefix(PREFIX).partition("/")[0]]

    @property
    def patch_size(self) -> int:
        return int(self.model.partition("/")[2])

    @property
    def grid(self) -> int:
        """Tokens along a side."""
        return self.latent_size // self.patch_size

    def check(self) -> None:
        if self.model not in model_names():
            sizes, patches = ", ".join(SIT_SIZES), ", ".join(map(str, PATCH_SIZES))
            raise UserError(f"--model {self.model} is not known; give SiT-SIZE/PATCH with {sizes} and {patches}")
        if self.latent_size % self.patch_size:
            raise UserError(
                f"--model {self.model}: patch {self.patch_size} does not divide the "
                f"{self.latent_size}×{self.latent_size} latent"
            )


def model_names() -> list[str]:
    """All sizes with all patches."""
    return [f"{PREFIX}{size}/{patch}" for size in SIT_SIZES for patch in PATCH_SIZES]
