"""How much an alignment weighs at a step: constant, fading, or switched off (HASTE, arXiv 2505.16792)."""

import argparse
import math


def settle_alignment_schedule(args: argparse.Namespace) -> None:
    """A weight that fades does so until the last step, unless ``--align-until`` says otherwise."""
    if args.align_schedule != "constant" and args.align_until is None:
        args.align_until = args.max_train_steps


def alignment_factor(args: argparse.Namespace, step: int) -> float:
    """What the alignment's weight is multiplied by, from 1 to 0.

    Args:
        args: ``align_schedule`` and ``align_until``, settled.
        step: counted from 0.
    """
    if args.align_until is None:
        return 1.0
    progress = min(1.0, step / args.align_until)
    if args.align_schedule == "linear":
        return 1.0 - progress
    if args.align_schedule == "cosine":
        return (1.0 + math.cos(math.pi * progress)) / 2
    return float(progress < 1)
