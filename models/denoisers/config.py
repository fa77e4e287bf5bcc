"""What determines a denoiser, and its flags; needs no torch."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
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
        class_token_width: channels of a VFM's class token that is generated beside the latent (REG, arXiv 2507.01467);
            0: none. A kind that can makes it a field.
        sparse_blocks: numbers, from 1, of the blocks that may see a part of the tokens in training (SPRINT).
        flow_map_blocks: last blocks that are told where a jump ends (Decoupled MeanFlow); 0: the network makes none. A
            kind that can makes it a field.
        prediction: what the network makes, a name of ``PREDICTIONS``. A kind that can makes it a field.
        guide_depth: block after which a second output guides the network (internal guidance); 0: there is none. A kind
            that can makes it a field.
        always: flags that have one value in all networks of the kind.
    """

    names: ClassVar[str] = ""
    class_token_width = 0  # without a type, so that it is no field here
    sparse_blocks = range(0)
    flow_map_blocks = 0
    prediction = "v"
    guide_depth = 0
    always: ClassVar[Mapping[str, Any]] = {}

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

    def with_class_token(self, width: int) -> "DenoiserConfig":
        """The same, with a class token of ``width`` channels beside the latent."""
        raise UserError(f"--model {self.model} takes no class token: leave --reg-coeff out, or give a SiT")

    def with_flow_map(self, blocks: int) -> "DenoiserConfig":
        """The same, its last ``blocks`` told where a jump ends."""
        raise UserError(
            f"--model {self.model} cannot learn to jump (--flow-map-blocks, --mode map): give a SiT or a LightningDiT "
            "that predicts the velocity"
        )

    def to_dict(self) -> dict:
        """Plain JSON values; :meth:`from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> "DenoiserConfig":
        return cls(**values)

    @classmethod
    def own_flags(cls) -> set[str]:
        """Fields that this kind adds to the common ones and that are flags."""
        names = {field.name for field in fields(cls) if field.metadata.get("has_flag", True)}
        return names - {field.name for field in fields(DenoiserConfig)}

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **values: Any) -> "DenoiserConfig":
        """The fields given, and those of the kind's own flags."""
        config = cls(**values | {name: getattr(args, name) for name in cls.own_flags() - values.keys()})
        config.check()
        return config


PATCHES = (1, 2, 4, 8, 16, 32)  # sides, in latent positions; the large ones are for pixels
PREDICTIONS = {"v": "the velocity", "x": "the data"}

# SPRINT: share of the tokens that is dropped → side of the squares in which it is, and how many of each are kept.
TOKEN_GROUPS = {0.5: (2, 2), 0.625: (4, 6), 0.75: (2, 1), 0.875: (4, 2)}


@dataclass(frozen=True)
class TransformerSize:
    """Depth in blocks, width, attention heads."""

    depth: int
    width: int
    heads: int


@dataclass(frozen=True)
class TransformerConfig(DenoiserConfig):
    """Everything that determines a transformer over patches of the latent.

    Attributes:
        kind: what its names begin with.
        sizes: by name.
        patches: sides that there are, in latent positions.
        can_jump: whether it can be told where a jump ends.
        model: ``KIND-SIZE/PATCH``, e.g. ``SiT-XL/1``.
        qk_norm: a norm on the queries and keys of each head.
        sprint: the middle blocks see a part of the tokens in training (``models.denoisers.sprint``).
        flow_map_blocks: as in :class:`DenoiserConfig`.
        prediction: what the network makes, a name of ``PREDICTIONS``; the denoiser answers the velocity that follows.
        guide_depth: as in :class:`DenoiserConfig`.
    """

    kind: ClassVar[str] = ""
    sizes: ClassVar[Mapping[str, TransformerSize]] = {}
    patches: ClassVar[tuple[int, ...]] = PATCHES
    can_jump: ClassVar[bool] = True

    qk_norm: bool = False
    class_token_width: int = field(default=0, metadata={"has_flag": False})
    sprint: bool = False
    flow_map_blocks: int = field(default=0, metadata={"has_flag": False})
    prediction: str = "v"
    guide_depth: int = 0

    def with_class_token(self, width: int) -> "TransformerConfig":
        config = replace(self, class_token_width=width)
        config.check()
        return config

    def with_flow_map(self, blocks: int) -> "TransformerConfig":
        config = replace(self, flow_map_blocks=blocks)
        config.check()
        return config

    def to_dict(self) -> dict:
        values = super().to_dict()
        for name in ("class_token_width", "sprint", "flow_map_blocks", "guide_depth"):
            if not values[name]:  # as before there was such a thing
                del values[name]
        if self.prediction == type(self).prediction:
            del values["prediction"]
        return values

    @staticmethod
    def add_arguments(group: Any) -> None:
        group.add_argument(
            "--qk-norm", action=argparse.BooleanOptionalAction, default=False, help="normalise queries and keys"
        )
        group.add_argument(
            "--sprint",
            action=argparse.BooleanOptionalAction,
            default=False,
            help="SPRINT (arXiv 2510.21986): all but the first and last two blocks (of fewer than 8: one) are trained "
            "on a quarter of the tokens, which takes a SiT-XL 36 %% of the arithmetic and a B half, a DiTDH-XL or "
            "DDT-XL, whose head sees all tokens, somewhat more than half; see --token-drop",
        )
        group.add_argument(
            "--guide-depth",
            type=int,
            default=0,
            metavar="N",
            help="internal guidance (RAEv2, arXiv 2605.18324): a second output after block N is trained alike, and "
            "guides samples in the same pass: generate.py --guide internal; RAEv2: 8 of 28 (default: none)",
        )

    @property
    def sparse_blocks(self) -> range:
        """Numbers, from 1, of the blocks that may see a part of the tokens: all but two at either end, of a shallow
        network one; none without ``sprint``."""
        dense = 2 if self.size.depth >= 8 else 1
        return range(1 + dense, 1 + self.size.depth - dense) if self.sprint else range(0)

    @property
    def size(self) -> TransformerSize:
        return self.sizes[self.model.removeprefix(f"{self.kind}-").partition("/")[0]]

    @property
    def patch_size(self) -> int:
        return int(self.model.partition("/")[2])

    @property
    def grid(self) -> int:
        """Tokens along a side."""
        return self.latent_size // self.patch_size

    @classmethod
    def model_names(cls) -> list[str]:
        """All sizes with all patches."""
        return [f"{cls.kind}-{size}/{patch}" for size in cls.sizes for patch in cls.patches]

    @classmethod
    def name_of(cls, depth: int, width: int, patch: int) -> str | None:
        """The model of these sizes; None: there is none."""
        names = [name for name, size in cls.sizes.items() if (size.depth, size.width) == (depth, width)]
        return f"{cls.kind}-{names[0]}/{patch}" if names and patch in cls.patches else None

    @classmethod
    def sizes_in_words(cls) -> str:
        sizes = (f"{name} {size.depth} × {size.width}" for name, size in cls.sizes.items())
        return f"{', '.join(sizes)}, patch {', '.join(map(str, cls.patches))}"

    def _check_guide(self) -> None:
        depth, given = self.guide_depth, f"--guide-depth {self.guide_depth}"
        if type(depth) is not int or not 0 <= depth < self.size.depth:
            raise UserError(
                f"{given}: {self.model} has {self.size.depth} blocks, and the guide is weaker by some: give 1 to "
                f"{self.size.depth - 1}"
            )
        if depth and self.class_token_width:
            raise UserError(f"{given} with --reg-coeff: the guide makes no class token; leave one of them out")
        if depth and self.flow_map_blocks:
            raise UserError(f"{given} with --flow-map-blocks: the guide makes no jumps; leave one of them out")
        if depth in self.sparse_blocks:
            first, last = self.sparse_blocks[0], self.sparse_blocks[-1]
            raise UserError(
                f"{given} with --sprint: blocks {first} to {last} see a part of the tokens; give 1 to {first - 1}"
            )

    def check(self) -> None:
        if self.model not in self.model_names():
            sizes, patches = ", ".join(self.sizes), ", ".join(map(str, self.patches))
            raise UserError(
                f"--model {self.model} is not known; give {self.kind}-SIZE/PATCH with {sizes} and {patches}"
            )
        if self.latent_size % self.patch_size:
            raise UserError(
                f"--model {self.model}: patch {self.patch_size} does not divide the "
                f"{self.latent_size}×{self.latent_size} latent"
            )
        if self.prediction not in PREDICTIONS:
            raise UserError(f"--prediction {self.prediction} is not known; give {' or '.join(PREDICTIONS)}")
        if self.flow_map_blocks and not (self.can_jump and self.prediction == "v"):
            super().with_flow_map(self.flow_map_blocks)
        if type(self.flow_map_blocks) is not int or not 0 <= self.flow_map_blocks < self.size.depth:
            raise UserError(
                f"--flow-map-blocks {self.flow_map_blocks}: of the {self.size.depth} blocks of {self.model} at least "
                f"one must see where a jump begins; give 1 to {self.size.depth - 1}"
            )
        self._check_guide()


SIT_SIZES = {
    "Ti": TransformerSize(6, 192, 3),
    "S": TransformerSize(12, 384, 6),
    "B": TransformerSize(12, 768, 12),
    "L": TransformerSize(24, 1024, 16),
    "XL": TransformerSize(28, 1152, 16),
}


@dataclass(frozen=True)
class SiTConfig(TransformerConfig):
    """``qk_norm`` is a LayerNorm."""

    names: ClassVar[str] = (
        f"SiT-SIZE/PATCH, sizes {', '.join(SIT_SIZES)}, patch {', '.join(map(str, PATCHES))} latent positions (pixels: "
        "the large ones)"
    )
    kind: ClassVar[str] = "SiT"
    sizes: ClassVar[Mapping[str, TransformerSize]] = SIT_SIZES

    def build(self) -> "SiT":  # noqa: F821
        from models.denoisers.sit import SiT

        return SiT(self)


# The public code's, and the two small ones of SiT.
LIGHTNINGDIT_SIZES = SIT_SIZES | {"1p0B": TransformerSize(24, 1536, 24), "1p6B": TransformerSize(28, 1792, 28)}


@dataclass(frozen=True)
class LightningDiTConfig(TransformerConfig):
    """``qk_norm`` is an RMSNorm; the public recipe is without, and turns it on where a training diverges."""

    names: ClassVar[str] = f"LightningDiT-SIZE/PATCH, sizes {', '.join(LIGHTNINGDIT_SIZES)}, the same patches"
    kind: ClassVar[str] = "LightningDiT"
    sizes: ClassVar[Mapping[str, TransformerSize]] = LIGHTNINGDIT_SIZES

    def build(self) -> "LightningDiT":  # noqa: F821
        from models.denoisers.lightningdit import LightningDiT

        return LightningDiT(self)


# The public code's, and the two small ones of SiT.
JIT_SIZES = {name: SIT_SIZES[name] for name in ("Ti", "S", "B", "L")} | {"H": TransformerSize(32, 1280, 16)}


@dataclass(frozen=True)
class JiTConfig(TransformerConfig):
    """A LightningDiT for large patches of pixels (``models.denoisers.jit``); queries and keys always have a norm."""

    names: ClassVar[str] = f"JiT-SIZE/PATCH, sizes {', '.join(JIT_SIZES)}, the same patches"
    kind: ClassVar[str] = "JiT"
    sizes: ClassVar[Mapping[str, TransformerSize]] = JIT_SIZES
    can_jump: ClassVar[bool] = False
    always: ClassVar[Mapping[str, Any]] = {"qk_norm": True}

    qk_norm: bool = True
    prediction: str = "x"

    @property
    def bottleneck(self) -> int:
        """Channels between a patch and its token."""
        return 128 if self.size.width <= 1024 else 256

    @property
    def blocks_before_class(self) -> int:
        """Blocks before tokens of the class join those of the image."""
        return min(10, self.size.depth // 3)

    def check(self) -> None:
        super().check()
        if self.sprint:
            raise UserError(f"--sprint: {self.model} takes tokens of the class on the way; give another --model")

    def build(self) -> "JiT":  # noqa: F821
        from models.denoisers.jit import JiT

        return JiT(self)


HEAD_CHANNELS = 128  # of an attention head in the wide head


@dataclass(frozen=True)
class DiTDHConfig(TransformerConfig):
    """A LightningDiT's blocks and a wide head; sizes are those of the blocks before the head.

    Attributes:
        head_depth, head_width: blocks and channels of the head.
    """

    names: ClassVar[str] = f"DiTDH-SIZE/PATCH, sizes {', '.join(SIT_SIZES)}, the same patches"
    kind: ClassVar[str] = "DiTDH"
    sizes: ClassVar[Mapping[str, TransformerSize]] = SIT_SIZES
    can_jump: ClassVar[bool] = False

    head_depth: int = 2
    head_width: int = 2048

    @staticmethod
    def add_arguments(group: Any) -> None:
        group.add_argument(
            "--head-depth", type=int, default=2, metavar="N", help="DiTDH and DDT: blocks of the wide head"
        )
        group.add_argument(
            "--head-width",
            type=int,
            default=2048,
            metavar="N",
            help=f"DiTDH and DDT: its channels, a multiple of {HEAD_CHANNELS}; with fewer than a latent's patch has "
            "numbers it cannot learn them",
        )

    @property
    def head(self) -> TransformerSize:
        return TransformerSize(self.head_depth, self.head_width, self.head_width // HEAD_CHANNELS)

    def check(self) -> None:
        super().check()
        if self.head_depth < 1:
            raise UserError(f"--head-depth {self.head_depth}: give 1 or more")
        if self.head_width < 1 or self.head_width % HEAD_CHANNELS:
            raise UserError(f"--head-width {self.head_width}: give a multiple of {HEAD_CHANNELS}")

    def build(self) -> "DiTDH":  # noqa: F821
        from models.denoisers.ditdh import DiTDH

        return DiTDH(self)


DDT_SIZES = SIT_SIZES | {"XXL": TransformerSize(28, 1440, 20)}  # RAEv2's


@dataclass(frozen=True)
class DDTConfig(DiTDHConfig):
    """Time and class are tokens; diffusion-bench's has a norm on queries and keys (``qk_norm``)."""

    names: ClassVar[str] = f"DDT-SIZE/PATCH, sizes {', '.join(DDT_SIZES)}, the same patches"
    kind: ClassVar[str] = "DDT"
    sizes: ClassVar[Mapping[str, TransformerSize]] = DDT_SIZES

    def build(self) -> "DDT":  # noqa: F821
        from models.denoisers.ddt import DDT

        return DDT(self)
