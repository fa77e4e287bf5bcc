"""Flags of REPA-E's scripts that our scripts of the same purpose do not have. Needs no torch.

A command line of REPA-E (github.com/End2End-Diffusion/REPA-E) works as it stands, or one line says what to give
instead: a flag that asks for what is done here anyway is accepted, hidden from --help, and leaves no trace in the
arguments; a flag that asks for something else is refused. The parser of ``runtime.cli`` looks here.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError

DATA_DIR = "data"  # where REPA-E's preprocessing writes and everything else reads, unless told otherwise
_DEST = "repae_flag_{}"  # of what is accepted and then forgotten


@dataclass(frozen=True)
class RepaeFlag:
    """What becomes of a flag.

    Attributes:
        options: of ``add_argument``; with a ``dest`` the flag is another name of one of ours.
        refusal: (value, all arguments) → what to give instead, or None where the value is accepted.
        note: what to say on stderr where it is accepted.
    """

    options: Mapping[str, Any]
    refusal: Callable[[Any, argparse.Namespace], str | None] = lambda value, args: None
    note: str | None = None


def _attention_is_fused(fused: bool, args: argparse.Namespace) -> str | None:
    return None if fused else "attention is always fused, which gives the same numbers up to rounding; leave it out"


def _caches_lie_in_the_dataset(folder: str, args: argparse.Namespace) -> str | None:
    """``--output-dir`` of caching: where it is --data-dir, a cache goes there by its name alone."""
    if Path(folder).resolve() == Path(args.data_dir or DATA_DIR).resolve():
        return None
    path = os.path.join(folder, args.vae_latents_name or "NAME")
    return f"give the cache's folder as a path instead: --vae-latents-name {path}"


_TRAINING = {
    "--num-classes": RepaeFlag({"type": int}, note="is not read: the data say how many classes there are"),
    "--fused-attn": RepaeFlag({"action": argparse.BooleanOptionalAction}, _attention_is_fused),
    "--logging-dir": RepaeFlag({}, note="is not read: logs and trackers write into the run's folder"),
    "--wandb-history-path": RepaeFlag({}),  # REPA-E does not read it either
}
REPAE_FLAGS: dict[str, dict[str, RepaeFlag]] = {
    "cache_latents.py": {"--output-dir": RepaeFlag({}, _caches_lie_in_the_dataset)},
    "train_repae.py": _TRAINING,
    "train_ldm.py": _TRAINING
    | {"--vae-ckpt": RepaeFlag({}, note="is not read: the latent cache holds the VAE that made it")},
    "generate.py": {
        "--tf32": RepaeFlag({"action": argparse.BooleanOptionalAction, "dest": "allow_tf32"}),
        "--no-heun": RepaeFlag({"action": "store_false", "dest": "heun"}),
    },
}


def add_repae_flags(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the flags of its program, each of them once."""
    for flag, old in REPAE_FLAGS.get(parser.prog, {}).items():
        if flag not in parser._option_string_actions:
            options = {"dest": _dest(flag)} | old.options
            action = parser.add_argument(flag, default=argparse.SUPPRESS, **options)
            action.help = argparse.SUPPRESS


def settle_repae_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Forget the flags that are accepted.

    Raises:
        UserError: one asks for something else than what is done here.
    """
    for flag, old in REPAE_FLAGS.get(parser.prog, {}).items():
        if not hasattr(args, _dest(flag)):
            continue
        value = vars(args).pop(_dest(flag))
        given = _in_words(flag, value)
        refusal = old.refusal(value, args)
        if refusal is not None:
            raise UserError(f"{given}: {refusal}")
        if old.note is not None and os.environ.get("RANK", "0") == "0":
            _say_once(f"{parser.prog}: note: {given} {old.note}")


def default_data_dir() -> str | None:
    """REPA-E's default of --data-dir, where preprocessing.py has packed images into it."""
    return DATA_DIR if Path(DATA_DIR, "index.json").is_file() else None


@functools.cache
def _say_once(line: str) -> None:
    """A script may read its flags twice."""
    print(line, file=sys.stderr)


def _dest(flag: str) -> str:
    return _DEST.format(flag.lstrip("-").replace("-", "_"))


def _in_words(flag: str, value: Any) -> str:
    """A flag as it was given."""
    if isinstance(value, bool):
        return flag if value else f"--no-{flag.removeprefix('--')}"
    return f"{flag} {value}"
