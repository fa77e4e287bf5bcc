"""Alignment of latents and of hidden states: one file a method, one line in a registry.

Names and flags need no torch; modules are imported when they are asked for.
"""

import argparse
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from errors import UserError
from loss.alignment.flags import (
    AlignmentFlags,
    DenoiserAlignmentFlags,
    EquivarianceFlags,
    IREPAFlags,
    MapperFlags,
    REPAFlags,
    SRAFlags,
    TokenizerAlignmentFlags,
    VAEREPAFlags,
    VFFlags,
)
from runtime.cli import flag_of

__all__ = [
    "DenoiserAlignment",
    "DenoiserAlignments",
    "DenoisingStep",
    "TokenGrid",
    "TokenizerAlignment",
    "build_denoiser_alignment",
]

# --align-loss of train_sendvae.py
TOKENIZER_ALIGNMENTS: dict[str, type[TokenizerAlignmentFlags]] = {
    "cosine": MapperFlags,
    "vf": VFFlags,
    "equivariance": EquivarianceFlags,
}
# --align of train_ldm.py
DENOISER_ALIGNMENTS: dict[str, type[DenoiserAlignmentFlags]] = {
    "repa": REPAFlags,
    "irepa": IREPAFlags,
    "vae": VAEREPAFlags,
    "sra": SRAFlags,
}
NONE = "none"


def settle_arguments(
    args: argparse.Namespace, chosen: Sequence[str], registry: Mapping[str, type[AlignmentFlags]], flag: str
) -> None:
    """Give the flags of the chosen alignments their defaults, and refuse those of others.

    Args:
        args: flags, None where they are not given.
        chosen: names of the registry.
        registry: all there are.
        flag: that chooses, for messages.

    Raises:
        UserError: a flag of an alignment that was not chosen, or values that cannot be meant.
    """
    owned = {name for key in chosen for name in registry[key].DEFAULTS}
    unasked = getattr(args, "defaults", {})  # a method of one's own may have left its defaults to the parser
    for key, cls in registry.items():
        for name in cls.DEFAULTS:
            value = getattr(args, name, None)
            if name in owned or value is None:
                continue
            if value is False or (isinstance(value, float) and value == 0):
                # A switch that is off and a weight of 0 ask for nothing, here and on resume; a depth of 0 does.
                setattr(args, name, None)
            elif value != unasked.get(name):
                raise UserError(
                    f"{flag_of(name)} belongs to {flag} {key}, not to {flag} {'+'.join(chosen) or NONE}: leave it out, "
                    "or choose that alignment"
                )
    for key in chosen:
        for name, default in registry[key].DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
        registry[key].check_arguments(args)


def defaults_of_methods() -> dict[str, Any]:
    """Flags that are None where no alignment which has them was chosen, and what they are by default elsewhere.

    None again: it follows from something else.
    """
    kinds = [*TOKENIZER_ALIGNMENTS.values(), *DENOISER_ALIGNMENTS.values()]
    return {name: default for kind in kinds for name, default in kind.DEFAULTS.items()}


def parse_sum(text: str) -> list[str]:
    """``repa+vae`` → its names in the registry's order; none of ``none``.

    Raises:
        UserError: an unknown name.
    """
    names = [] if text == NONE else text.split("+")
    for name in names:
        if name not in DENOISER_ALIGNMENTS:
            known = ", ".join(DENOISER_ALIGNMENTS)
            raise UserError(f"--align {text}: {name!r} is not known; give {known}, a sum such as repa+vae, or {NONE}")
    return [name for name in DENOISER_ALIGNMENTS if name in names]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "sums" if name in ("DenoiserAlignments", "build_denoiser_alignment") else "base"
    return getattr(import_module(f"{__name__}.{module}"), name)
