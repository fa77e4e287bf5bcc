"""REPA-E's way to take VAE, latent statistics and discriminator out of one of its checkpoints.

  python save_vae_weights.py --repae-ckpt CHECKPOINT.pt --vae-name NAME --save-dir DIR

is export_vae.py CHECKPOINT.pt DIR/NAME/NAME.pt --format repa-e, which takes any other kind of VAE too.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.cli import ArgumentParser, add_debug_argument, run


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="save_vae_weights.py", description=__doc__)
    add = parser.add_argument
    add("--repae-ckpt", required=True, metavar="FILE", help="checkpoint of REPA-E's train_repae.py")
    add("--vae-name", default="e2e-vae", metavar="NAME", help="name of the folder to make, and of its files")
    add("--save-dir", default="exps", metavar="DIR", help="where that folder goes")
    add("--overwrite", action="store_true", help="replace files that are there (default: refuse)")
    add("--dry-run", action="store_true", help="read everything, print what would be written, write nothing")
    add_debug_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    import export_vae  # takes seconds

    out = Path(args.save_dir, args.vae_name, f"{args.vae_name}.pt")
    flags = ["--overwrite"] * args.overwrite + ["--dry-run"] * args.dry_run
    command = [args.repae_ckpt, str(out), "--format", "repa-e", *flags]
    print(shlex.join(["python", "export_vae.py", *command]))
    return export_vae.main(command)


if __name__ == "__main__":
    sys.exit(run(main))
