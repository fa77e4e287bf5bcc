"""Flags of the alignments, and what can be said of a method without its networks; needs no torch.

A class here is what the registries of ``loss.alignment`` hold for the methods of this project: it answers for the flags
and builds the module that has them (:meth:`from_arguments`). A method of your own may be one class with both.
"""

import argparse
import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

from diffusion import WEIGHTINGS
from errors import UserError
from runtime.cli import flag_of, fraction, non_negative_float, non_negative_int, positive_float, positive_int

MAPPER_HEADS, NOISE_STATISTICS = ("mlp", "conv"), ("running", "batch")
# VAE-REPA: published for B, L and XL; smaller denoisers follow B.
DEEP, DEPTHS = 12, (2, 8)  # the block, of denoisers of up to so many blocks and of deeper ones
# SRA's of XL, by its code; where there are fewer than 20 blocks, a third and two thirds of them: its 4 and 8 of B's 12.
SRA_DEPTHS = (8, 20)
SRA_WEIGHTS = {"smooth-l1": 0.2, "cosine": 0.5}


class AlignmentFlags:
    """What both kinds have.

    Attributes:
        DEFAULTS: of those flags that say nothing unless this alignment is chosen, by their names in ``args``; the flags
            themselves default to None, so that one which is given to another alignment is noticed.
        implementation: where the class with the networks is, ``MODULE:NAME``; it is imported when it is built.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    implementation: ClassVar[str] = ""

    @classmethod
    def add_arguments(cls, group: Any) -> None:
        """Its flags."""

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        """Refuse what cannot be meant, with its flags settled; may change ``args``."""

    @classmethod
    def resolve_arguments(cls, args: argparse.Namespace) -> None:
        """Replace those of its defaults that follow from the data (``args.resolution``)."""

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, *context: Any) -> Any:
        """The module, with random weights; ``context`` is told by ``TokenizerAlignment`` and ``DenoiserAlignment``."""
        module, _, name = cls.implementation.partition(":")
        return getattr(import_module(module), name).from_arguments(args, *context)


class TokenizerAlignmentFlags(AlignmentFlags):
    """Of an alignment of a tokenizer.

    Attributes:
        trains_alone: whether it makes sense with a frozen tokenizer, by parts of its own.
        needs_features: whether it compares with VFM features; without, no VFM is built.
        keeps_size: whether what is decoded is as large in every step; else nothing is compiled.
    """

    trains_alone: ClassVar[bool] = False
    needs_features: ClassVar[bool] = True
    keeps_size: ClassVar[bool] = True

    @classmethod
    def smallest_side(cls, args: argparse.Namespace, side: int) -> int:
        """Positions along a side of the smallest latent that is decoded, for one of ``side``."""
        return side

    @classmethod
    def features_grid(cls, args: argparse.Namespace, latent_size: int) -> int:
        """On which token grid the VFMs are wanted, for a latent of ``latent_size`` positions along a side."""
        raise NotImplementedError


class DenoiserAlignmentFlags(AlignmentFlags):
    """Of an alignment of a denoiser.

    Attributes:
        needs_features: whether it compares with VFM features.
        title: of the method, for the log; by default the name of its class.
        FIXED: those of its flags that a run which continues from another one cannot change.
    """

    needs_features: ClassVar[bool] = False
    title: ClassVar[str] = ""
    FIXED: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def called(cls) -> str:
        """:attr:`title`, or the name of a class that has none."""
        return cls.title or cls.__name__

    @classmethod
    def weight_of(cls, args: argparse.Namespace) -> float:
        """Its weight by its flags; with 0 it is left out."""
        raise NotImplementedError


class MapperFlags(TokenizerAlignmentFlags):
    """Send-VAE's, through a mapper."""

    implementation = "loss.alignment.mapper:MapperAlignment"
    trains_alone = True
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "mapper_depth": 1,
        "mapper_width": 2048,
        "mapper_head": "mlp",
        "noise_injection": True,
        "noise_times": "uniform",
        "noise_shift": 1.0,
        "noise_max": 1.0,
        "noise_statistics": "running",
    }

    @classmethod
    def add_arguments(cls, group: Any) -> None:
        group.add_argument(
            "--mapper-depth",
            type=non_negative_int,
            metavar="N",
            help="cosine only: ViT blocks; 0: MLP only (default: 1)",
        )
        group.add_argument(
            "--mapper-width",
            type=positive_int,
            metavar="N",
            help="cosine only: hidden width of the mapper's MLP (default: 2048)",
        )
        group.add_argument(
            "--mapper-head",
            choices=MAPPER_HEADS,
            help="cosine only: what follows the ViT blocks; conv: one 3×3 convolution over the tokens, as iREPA's "
            "projector (default: mlp)",
        )
        group.add_argument(
            "--noise-injection",
            action=argparse.BooleanOptionalAction,
            default=None,
            help="cosine only: the mapper sees latents with noise of a random time (default: yes)",
        )
        group.add_argument(
            "--noise-times", choices=WEIGHTINGS, help="cosine only: how that time is drawn (default: uniform)"
        )
        group.add_argument(
            "--noise-shift",
            type=positive_float,
            metavar="X",
            help="cosine only: noise-to-data ratios of those times, times X (default: 1)",
        )
        group.add_argument(
            "--noise-max",
            type=fraction,
            metavar="T",
            help="cosine only: the latest of those times, in whose range all are scaled; 1 is noise alone (default: 1)",
        )
        group.add_argument(
            "--noise-statistics",
            choices=NOISE_STATISTICS,
            help="cosine only: by what latents are normalised before the noise: running statistics, as constants, or "
            "the batch's own, so that a larger latent is no way around the noise (default: running)",
        )

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        given = {flag_of(name) for name, default in cls.DEFAULTS.items() if getattr(args, name) != default}
        for unused, because in (
            (("--noise-times", "--noise-shift", "--noise-max"), not args.noise_injection and "--no-noise-injection"),
            (("--mapper-width",), args.mapper_head == "conv" and "--mapper-head conv"),
        ):
            if because and given.intersection(unused):
                flag = next(flag for flag in unused if flag in given)
                raise UserError(f"{flag} says nothing with {because}; leave one of them out")

    @classmethod
    def resolve_arguments(cls, args: argparse.Namespace) -> None:
        args.mapper_grid = args.mapper_grid or max(1, args.resolution // 16)

    @classmethod
    def features_grid(cls, args: argparse.Namespace, latent_size: int) -> int:
        if latent_size % args.mapper_grid:
            divisors = ", ".join(str(n) for n in range(1, latent_size + 1) if latent_size % n == 0)
            raise UserError(
                f"--mapper-grid {args.mapper_grid} does not divide the {latent_size}×{latent_size} latent; "
                f"{divisors} do"
            )
        return args.mapper_grid


class VFFlags(TokenizerAlignmentFlags):
    """VA-VAE's, of projected latents."""

    implementation = "loss.alignment.vf:VFAlignment"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"vf_weight": 0.1, "vf_cosine_margin": 0.5, "vf_distance_margin": 0.25}

    @classmethod
    def add_arguments(cls, group: Any) -> None:
        group.add_argument(
            "--vf-weight",
            type=non_negative_float,
            metavar="X",
            help="vf only: its gradient in the encoder's last layer, in units of that of L1 + LPIPS; --align-coeff "
            "multiplies it (default: 0.1)",
        )
        group.add_argument(
            "--vf-cosine-margin",
            type=fraction,
            metavar="X",
            help="vf only: cosines above 1 - X cost nothing (default: 0.5)",
        )
        group.add_argument(
            "--vf-distance-margin",
            type=fraction,
            metavar="X",
            help="vf only: differences of cosines up to X cost nothing (default: 0.25)",
        )

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        if not args.vf_weight:
            args.align_coeff = 0.0

    @classmethod
    def features_grid(cls, args: argparse.Namespace, latent_size: int) -> int:
        return latent_size  # every position has its feature


class EquivarianceFlags(TokenizerAlignmentFlags):
    """EQ-VAE's: no term of its own, but other images to be reconstructed."""

    implementation = "loss.alignment.equivariance:Equivariance"
    needs_features = False
    keeps_size = False
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"eq_probability": 0.5, "eq_scale": 0.25, "eq_image_probability": 0.25}

    @classmethod
    def add_arguments(cls, group: Any) -> None:
        group.add_argument(
            "--eq-probability",
            type=fraction,
            metavar="P",
            help="equivariance only: share of the micro-batches whose latents are scaled and turned (default: 0.5)",
        )
        group.add_argument(
            "--eq-scale",
            type=fraction,
            metavar="X",
            help="equivariance only: the smallest scale; larger ones up to the latent's side less one are as probable "
            "(default: 0.25)",
        )
        group.add_argument(
            "--eq-image-probability",
            type=fraction,
            metavar="P",
            help="equivariance only: of the other micro-batches, the share whose images are scaled before they are "
            "encoded, and reconstructed as small (default: 0.25)",
        )

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        name = "--align-loss equivariance"
        if args.align_coeff != 1:
            raise UserError(f"--align-coeff {args.align_coeff:g}: {name} has no term to weight; give --eq-probability")
        if args.align_until is not None or args.align_schedule != "constant":
            raise UserError(f"--align-until and --align-schedule weight a term, and {name} has none: leave them out")
        if not args.eq_scale:
            raise UserError("--eq-scale 0: nothing would be left of an image; give a share of its side, e.g. 0.25")

    @classmethod
    def smallest_side(cls, args: argparse.Namespace, side: int) -> int:
        is_scaled = args.eq_probability or args.eq_image_probability
        return min(side, max(1, math.ceil(args.eq_scale * side))) if is_scaled else side


class REPAFlags(DenoiserAlignmentFlags):
    """REPA's, with VFM features."""

    implementation = "loss.alignment.repa:REPA"
    needs_features = True
    title = "REPA"
    FIXED = ("encoder_depth", "projector_width")
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"proj_coeff": 0.5, "encoder_depth": 8, "projector_width": 2048}

    @classmethod
    def add_arguments(cls, group: Any) -> None:
        group.add_argument(
            "--proj-coeff",
            type=non_negative_float,
            metavar="X",
            help="weight of REPA in the denoiser's loss; 0: none (default: 0.5)",
        )
        group.add_argument(
            "--encoder-depth",
            type=positive_int,
            metavar="N",
            help="block whose output REPA and iREPA align, from 1 (default: 8)",
        )
        group.add_argument(
            "--projector-width",
            type=positive_int,
            metavar="N",
            help="hidden width of REPA's projectors (default: 2048)",
        )

    @classmethod
    def weight_of(cls, args: argparse.Namespace) -> float:
        return args.proj_coeff


class IREPAFlags(DenoiserAlignmentFlags):
    """iREPA's, with VFM features; it shares REPA's ``--encoder-depth``."""

    implementation = "loss.alignment.irepa:IREPA"
    needs_features = True
    title = "iREPA"
    FIXED = ("encoder_depth",)
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"irepa_coeff": 0.5, "irepa_strength": 1.0, "encoder_depth": 8}

    @classmethod
    def add_arguments(cls, group: Any) -> None:
        group.add_argument(
            "--irepa-coeff", type=non_negative_float, metavar="X", help="weight of iREPA; 0: none (default: 0.5)"
        )
        group.add_argument(
            "--irepa-strength",
            type=fraction,
            metavar="X",
            help="how much of an image's mean feature iREPA takes away before it divides by the deviation over the "
            "tokens (default: 1)",
        )

    @classmethod
    def weight_of(cls, args: argparse.Namespace) -> float:
        return args.irepa_coeff


class VAEREPAFlags(DenoiserAlignmentFlags):
    """VAE-REPA's, with the clean latent."""

    implementation = "loss.alignment.vae_repa:VAEREPA"
    title = "VAE-REPA"
    FIXED = ("vae_repa_depth", "vae_repa_width")
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "vae_repa_coeff": 1.0,
        "vae_repa_depth": None,
        "vae_repa_width": None,
        "vae_repa_times": [0.0, 1.0],
    }

    @classmethod
    def add_arguments(cls, group: Any) -> None:
        group.add_argument(
            "--vae-repa-coeff",
            type=non_negative_float,
            metavar="X",
            help="weight of VAE-REPA (default: 1.0; REPA-E's --vae-align-proj-coeff is another thing)",
        )
        group.add_argument(
            "--vae-repa-depth",
            type=positive_int,
            metavar="N",
            help=f"block whose output predicts the clean latent, from 1 (default: {DEPTHS[0]} of up to {DEEP} blocks, "
            f"else {DEPTHS[1]})",
        )
        group.add_argument(
            "--vae-repa-times",
            type=fraction,
            nargs=2,
            metavar=("LOW", "HIGH"),
            help="range of times at which it is predicted; 0 is data, 1 noise (default: 0 1)",
        )
        group.add_argument(
            "--vae-repa-width",
            type=positive_int,
            metavar="N",
            help="hidden width of its projector, five linear layers (default: twice the denoiser's)",
        )

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        low, high = args.vae_repa_times
        if low >= high:
            raise UserError(f"--vae-repa-times {low:g} {high:g}: the lower time comes first, and they differ")

    @classmethod
    def weight_of(cls, args: argparse.Namespace) -> float:
        return args.vae_repa_coeff


class SRAFlags(DenoiserAlignmentFlags):
    """SRA's, with the averaged network."""

    implementation = "loss.alignment.sra:SRA"
    title = "SRA"
    FIXED = ("sra_depth", "sra_teacher_depth")
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "sra_coeff": None,
        "sra_depth": None,
        "sra_teacher_depth": None,
        "sra_interval": 0.2,
        "sra_loss": "smooth-l1",
    }

    @classmethod
    def add_arguments(cls, group: Any) -> None:
        weights = ", ".join(f"{weight:g} of {loss}" for loss, weight in SRA_WEIGHTS.items())
        student, teacher = SRA_DEPTHS
        group.add_argument(
            "--sra-loss", choices=tuple(SRA_WEIGHTS), help="SRA's distance of hidden states (default: smooth-l1)"
        )
        group.add_argument(
            "--sra-coeff", type=non_negative_float, metavar="X", help=f"weight of SRA (default: {weights})"
        )
        group.add_argument(
            "--sra-depth",
            type=positive_int,
            metavar="N",
            help="block, from 1, whose output predicts what the averaged network sees (default: after a third of fewer "
            f"than {teacher} blocks, else {student})",
        )
        group.add_argument(
            "--sra-teacher-depth",
            type=positive_int,
            metavar="N",
            help=f"block of the averaged network (default: after two thirds of fewer than {teacher} blocks, else "
            f"{teacher})",
        )
        group.add_argument(
            "--sra-interval",
            type=fraction,
            metavar="X",
            help="the averaged network sees less noise: a time that is earlier by up to X (default: 0.2)",
        )

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        if args.sra_coeff is None:
            args.sra_coeff = SRA_WEIGHTS[args.sra_loss]

    @classmethod
    def weight_of(cls, args: argparse.Namespace) -> float:
        return args.sra_coeff
