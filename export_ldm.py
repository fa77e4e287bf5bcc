"""A trained diffusion transformer for use elsewhere: as a folder with its VAE, or as REPA-E's checkpoint.

  python export_ldm.py exps/ldm exported/ldm
  python export_ldm.py exps/ldm exported/ldm-repae --format repa

Formats:

  diffusers   transformer/ (config.json and safetensors, models.denoisers.sit.SiT.from_pretrained), vae/ (a diffusers
              folder with latent statistics), model_index.json, and a README.md that samples an image from a clone
  repa        args.json and checkpoints/0400000.pt in the layout of REPA-E (model, ema, vae, args, steps), which
              REPA-E's generate.py reads: --exp-path FOLDER --train-steps 400000

RUN is a run of train_ldm.py or train_repae.py; for the format diffusers also an experiment of REPA or REPA-E, with
--vae-ckpt where its VAE is neither in the checkpoint nor where its args.json says. Everything is written beside and
renamed when it is complete.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from errors import UserError
from formats.arguments import add_foreign_vae_arguments
from formats.exported_ldm import INDEX_FILE, write_exported
from formats.layers import to_ldm
from formats.sit import repae_checkpoint, repae_facts, what_repae_lacks
from inference.foreign_ldm import FLAGS, VAE_FLAGS, ForeignLDM, is_foreign, open_foreign_ldm
from inference.trained_ldm import WEIGHTS, TrainedLDM, open_trained_ldm
from models.denoisers.sit import SiT
from models.tokenizers import Tokenizer
from runtime.cli import ArgumentParser, add_debug_argument, positive_int, run
from runtime.files import write_json
from runtime.measure import count_parameters
from training.ldm_source import open_source

FORMATS = ("diffusers", "repa")
ARGUMENTS_FILE = "args.json"
EXPORTED_FROM = "exported_from"  # in a JSON file of every export, which --overwrite may then replace


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
        help="for the format diffusers: their moving average, or as trained",
    )
    add_foreign_vae_arguments(parser.add_argument_group("VAE of an experiment of REPA or REPA-E"))
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
    tokenizer = trained.load_autoencoder()
    beside = args.out.with_name(f".{args.out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        if args.format == "diffusers":
            export_folder(args, trained, tokenizer, beside)
        else:
            export_repae(args, trained, tokenizer, beside)
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
    is_export = any(is_ours(args.out / name) for name in (INDEX_FILE, ARGUMENTS_FILE))
    if any(args.out.iterdir()) and not (args.overwrite and is_export):
        hint = "add --overwrite to replace it" if is_export else "give a new folder"
        raise UserError(f"OUT {args.out} holds {'an export' if is_export else 'other files'}; {hint}")


def is_ours(path: Path) -> bool:
    """Whether this script wrote a JSON file."""
    try:
        return EXPORTED_FROM in json.loads(path.read_text())
    except (OSError, ValueError):
        return False


def open_run(args: argparse.Namespace) -> TrainedLDM | ForeignLDM:
    if not is_foreign(args.exp_path):
        given = next((name for name in VAE_FLAGS if getattr(args, name) is not None), None)
        if given is not None:
            raise UserError(
                f"--{given.replace('_', '-')} is for experiments of REPA and REPA-E; RUN {args.exp_path} holds its "
                "VAE: leave the flag away"
            )
        try:
            return open_trained_ldm(args.exp_path, args.train_steps, args.weights, warn)
        except UserError as error:
            raise UserError(str(error).replace("--exp-path", "RUN")) from error
    if args.format == "repa":
        raise UserError(
            f"{args.exp_path} is an experiment of REPA or REPA-E already; only --format diffusers is of use"
        )
    unset = dict.fromkeys((*FLAGS, "ckpt"))
    return open_foreign_ldm(argparse.Namespace(**(unset | vars(args))), warn, "RUN")


def warn(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr)


def export_folder(
    args: argparse.Namespace, trained: TrainedLDM | ForeignLDM, tokenizer: Tokenizer, folder: Path
) -> None:
    model = trained.load_model()
    print(
        f"{trained.config.model} of step {trained.step} ({trained.weights}): {count_parameters(model)[0]:,} parameters"
    )
    print(f"VAE: {count_parameters(tokenizer)[0]:,} parameters, checksum {trained.vae_checksum}")
    if args.dry_run:
        return
    facts = {
        "path_type": trained.path_type,
        "resolution": trained.resolution,
        "steps": trained.step,
        "weights": trained.weights,
        "class_names": trained.class_names,
        EXPORTED_FROM: args.exp_path.name,
    }
    write_exported(folder, str(args.out), model, tokenizer, facts)


def export_repae(args: argparse.Namespace, trained: TrainedLDM, tokenizer: Tokenizer, folder: Path) -> None:
    """Both sets of weights with REPA's projectors, from the same checkpoint."""
    source = open_source(args.exp_path, trained.step)
    config = replace(source.config, latent_depth=0, latent_width=0)
    facts = repae_facts(config, trained.resolution, trained.path_type, source.facts)
    for reason in what_repae_lacks(config, facts):
        warn(f"REPA-E's own code cannot read this: {reason}")
    sets = {"model": source.model, "ema": source.model if source.ema is None else source.ema}
    with torch.device("meta"):
        wanted = SiT(config).state_dict()
    sets = {name: {key: state[key] for key in wanted} for name, state in sets.items()}
    statistics = tokenizer.statistics.tensors()
    vae = to_ldm(tokenizer.network.state_dict())
    checkpoint = repae_checkpoint(sets, statistics["mean"], statistics["var"], vae, facts, trained.step)
    count = sum(tensor.numel() for tensor in sets["ema"].values())
    print(f"{config.model} of step {trained.step}, model and ema: {count:,} numbers each")
    print(f"VAE: {count_parameters(tokenizer)[0]:,} parameters, checksum {trained.vae_checksum}")
    if args.dry_run:
        return
    (folder / "checkpoints").mkdir(parents=True)
    write_json(folder / ARGUMENTS_FILE, facts | {EXPORTED_FROM: args.exp_path.name})
    torch.save(checkpoint, folder / "checkpoints" / f"{trained.step:07d}.pt")


if __name__ == "__main__":
    sys.exit(run(main))
