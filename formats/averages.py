"""Names of the averages of a denoiser that a run keeps, as flags and files call them. Needs no torch.

ema             by the first --ema-decay
ema_0.9996      by a further one
posthoc_0.05    by a power function of this relative length (``formats.power_average``); after the training, of any

Where the VAE is trained along, ``statistics_NAME`` holds the latent statistics averaged in the same way.
"""

import argparse

from formats.power_average import LARGEST_LENGTH
from runtime.cli import fraction_below_one

MAIN, MODEL = "ema", "model"
FURTHER, POSTHOC, STATISTICS = "ema_", "posthoc_", "statistics_"
NO_LENGTHS = "none"
DEFAULT_LENGTHS = "0.05,0.1"


def ema_decays(text: str) -> float | str:
    """An argparse type: a decay in [0, 1), 0 for no average; or several above 0 with commas between, kept as text."""
    decays = [fraction_below_one(part) for part in text.split(",")]
    if len(decays) == 1:
        return decays[0]
    if 0.0 in decays:
        raise argparse.ArgumentTypeError(f"0 means no average and has no place in a list: {text}")
    return _without_repetition(decays, text)


def relative_lengths(text: str) -> str:
    """An argparse type: relative lengths of power-function averages with commas between, or ``none``."""
    if text == NO_LENGTHS:
        return text
    return _without_repetition([_relative_length(part) for part in text.split(",")], text)


def weights_name(text: str) -> str:
    """An argparse type: ``model``, or the name of an average."""
    for prefix, number in ((FURTHER, fraction_below_one), (POSTHOC, _relative_length)):
        if text.startswith(prefix):
            return f"{prefix}{number(text.removeprefix(prefix))!r}"
    if text not in (MAIN, MODEL):
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of ema, model, ema_X (X: a further --ema-decay) and posthoc_X (X: any relative length, "
            "of a run with --posthoc-ema)"
        )
    return text


def ema_names(decays: float | str) -> dict[str, float]:
    """The averages that :func:`ema_decays` asks for, and their decays; the first is the main one."""
    if not decays:
        return {}
    main, *further = map(float, str(decays).split(","))
    return {MAIN: main} | {f"{FURTHER}{decay!r}": decay for decay in further}


def posthoc_names(lengths: str) -> dict[str, float]:
    """The averages that :func:`relative_lengths` asks for, and their relative lengths."""
    if lengths == NO_LENGTHS:
        return {}
    return {f"{POSTHOC}{length!r}": length for length in map(float, lengths.split(","))}


def posthoc_length(name: str) -> float | None:
    """The relative length of an average by a power function; None of other weights."""
    return float(name.removeprefix(POSTHOC)) if name.startswith(POSTHOC) else None


def statistics_of(weights: str) -> str | None:
    """Name of the latent statistics that belong to an average; None of weights as trained, which the VAE's own fit."""
    return None if weights == MODEL else f"{STATISTICS}{weights}"


def _relative_length(text: str) -> float:
    length = fraction_below_one(text)
    if not 0 < length <= LARGEST_LENGTH:
        raise argparse.ArgumentTypeError(f"a relative length lies above 0 and up to {LARGEST_LENGTH:.4f}, got {text}")
    return length


def _without_repetition(values: list[float], text: str) -> str:
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"the same number twice: {text}")
    return ",".join(map(repr, values))
