"""How many tokens SPRINT's middle blocks are trained on, and when (``models.denoisers.sprint``)."""

import argparse
from typing import Any

from errors import UserError
from models.denoisers.config import TOKEN_GROUPS
from runtime.cli import flag_of, fraction_below_one, positive_int

DEFAULTS = {"token_drop": 0.75, "path_drop": 0.1}  # the method's, by its code


def add_token_drop_arguments(group: Any) -> None:
    group.add_argument(
        "--token-drop",
        type=float,
        choices=(0.0, *TOKEN_GROUPS),
        metavar="X",
        help=f"SPRINT: share of the tokens that its middle blocks do not see in training, one of "
        f"{', '.join(map(str, TOKEN_GROUPS))}; 0: they see all (default: {DEFAULTS['token_drop']})",
    )
    group.add_argument(
        "--token-drop-until",
        type=positive_int,
        metavar="N",
        help="SPRINT: they see all from step N on, as in sampling (default: never)",
    )
    group.add_argument(
        "--path-drop",
        type=fraction_below_one,
        metavar="P",
        help="SPRINT: probability that what they make of an image is thrown away, for generate.py --guide path-drop "
        f"(default: {DEFAULTS['path_drop']}; with --cfg-prob 0, without the null class that guides, 0)",
    )


def settle_token_drop(args: argparse.Namespace) -> None:
    """Defaults of these flags; without ``--sprint`` they say nothing, are refused, and stay None."""
    for name in ("token_drop", "token_drop_until", "path_drop"):
        if getattr(args, name) is not None and not args.sprint:
            raise UserError(f"{flag_of(name)} is for --sprint: add that, or leave it out")
    if not args.sprint:
        return
    if args.path_drop and not args.cfg_prob:
        raise UserError(
            "--path-drop with --cfg-prob 0: what it is for also wants the null class; leave one of them out"
        )
    defaults = DEFAULTS if args.cfg_prob else DEFAULTS | {"path_drop": 0.0}
    for name in defaults:
        setattr(args, name, defaults[name] if getattr(args, name) is None else getattr(args, name))
    if args.token_drop_until and not args.token_drop:
        raise UserError("--token-drop-until with --token-drop 0: no token is dropped; leave one of them out")


def check_token_drop(args: argparse.Namespace, grid: int) -> None:
    """Refuse to drop tokens in squares that do not divide the denoiser's ``grid`` of tokens."""
    if not args.token_drop or grid % (side := TOKEN_GROUPS[args.token_drop][0]) == 0:
        return
    fits = [f"{share:g}" for share, (other, _) in TOKEN_GROUPS.items() if grid % other == 0]
    remedy = f"take one of {', '.join(fits)}" if fits else "take another patch, or leave --sprint out"
    raise UserError(
        f"--token-drop {args.token_drop:g} drops tokens of each {side}×{side}, and --model {args.model} has "
        f"{grid}×{grid}: {remedy}"
    )


def describe_token_drop(args: argparse.Namespace, blocks: range, tokens: int) -> list[str]:
    """What SPRINT does, for the log; nothing without it."""
    if not args.sprint:
        return []
    kept = round(tokens * (1 - args.token_drop))
    line = f"SPRINT: blocks {blocks.start} to {blocks.stop - 1} see {kept} of {tokens} tokens"
    if args.token_drop_until is not None:
        line += f", all of them after step {args.token_drop_until}"
        if args.token_drop_until >= args.max_train_steps:
            line += f" (which this run of {args.max_train_steps} does not reach: lower --token-drop-until)"
    return [f"{line}; what they make of an image is dropped with probability {args.path_drop:g}"]


def at_its_largest(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of what takes as much memory as any step: with ``--token-drop-until`` no token is dropped."""
    return args if args.token_drop_until is None else argparse.Namespace(**vars(args) | {"token_drop": 0.0})


def token_drop_at(args: argparse.Namespace, step: int) -> float:
    """Share of the tokens that is dropped at a step, counted from 0."""
    return 0.0 if args.token_drop_until is not None and step >= args.token_drop_until else args.token_drop
