"""A trained diffusion transformer for use elsewhere: as a folder with its VAE.

  python export_ldm.py exps/ldm exported/ldm

Formats:

  diffusers   transformer/ (config.json and safetensors, models.sit.SiT.from_pretrained), vae/ (a diffusers folder with
              latent statistics), model_index.json, and a README.md with 15 lines that sample an image from a clone

RUN is a run of train_ldm.py or train_repae.py, or an experiment of REPA-E. Everything is written beside and
renamed when it is complete.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from errors import UserError
from formats.exported_ldm import write_exported
from models.autoencoder import Autoencoder
from training.cli import ArgumentParser, add_debug_argument, positive_int, run
from training.dry_run import count_parameters
from training.foreign_ldm import FLAGS, ForeignLDM, is_foreign, open_foreign_ldm
from training.trained_ldm import WEIGHTS, TrainedLDM, open_trained_ldm

FORMATS = ("diffusers",)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="export_ldm.py", usage="%(prog)s RUN OUT [flags]", description=__doc__)
    parser.add_argument("exp_path", type=Path, metavar="RUN", help="exps/NAME")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--format", choices=FORMATS, default="diffusers", help="see above")
    parser.add_argument(
        "--train-steps", type=positive_int, metavar="N", help="checkpoint of step N (default: a finished run's newest)"
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="ema",
        help="their moving average, or as trained",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it is an earlier export")
    parser.add_argument(
        "--dry-run", action="store_true", help="read everything, print what would be written, write nothing"
    )
    add_debug_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    check_place(args)
    trained = open_run(args)
    autoencoder = trained.load_autoencoder()
    beside = args.out.with_name(f".{args.out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        export_folder(args, trained, autoencoder, beside)
        if args.dry_run:
            print("nothing was written")
            return 0
        shutil.rmtree(args.out, ignore_errors=True)
        beside.rename(args.out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for path in sorted(path for path in args.out.rglob("*") if path.is_file()):
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


def check_place(args: argparse.Namespace) -> None:
    """The folder must be new, or an earlier export that may be replaced."""
    if not args.out.exists():
        return
    if not args.out.is_dir():
        raise UserError(f"OUT {args.out} is a file; give a new folder")
    names = {path.name for path in args.out.iterdir()}
    is_export = "model_index.json" in names or {"args.json", "checkpoints"} == names
    if names and not (args.overwrite and is_export):
        hint = "add --overwrite to replace it" if is_export else "give a new folder"
        raise UserError(f"OUT {args.out} holds {'an export' if is_export else 'other files'}; {hint}")


def open_run(args: argparse.Namespace) -> TrainedLDM | ForeignLDM:
    if not is_foreign(args.exp_path):
        try:
            return open_trained_ldm(args.exp_path, args.train_steps, args.weights, warn)
        except UserError as error:
            raise UserError(str(error).replace("--exp-path", "RUN")) from error
    unset = argparse.Namespace(**dict.fromkeys((*FLAGS, "ckpt")), **vars(args))
    return open_foreign_ldm(unset, warn)


def warn(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr)


def export_folder(
    args: argparse.Namespace, trained: TrainedLDM | ForeignLDM, autoencoder: Autoencoder, folder: Path
) -> None:
    model = trained.load_model()
    print(
        f"{trained.config.model} of step {trained.step} ({trained.weights}): {count_parameters(model)[0]:,} parameters"
    )
    print(f"VAE: {count_parameters(autoencoder)[0]:,} parameters, checksum {trained.vae_checksum}")
    if args.dry_run:
        return
    facts = {
        "path_type": trained.path_type,
        "resolution": trained.resolution,
        "steps": trained.step,
        "weights": trained.weights,
        "class_names": trained.class_names,
    }
    write_exported(folder, str(args.out), model, autoencoder, facts)


if __name__ == "__main__":
    sys.exit(run(main))
