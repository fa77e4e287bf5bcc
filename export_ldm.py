"""A diffusion transformer for use elsewhere; or one from elsewhere, as a run of this project.

  python export_ldm.py exps/ldm exported/ldm
  python export_ldm.py exps/ldm exported/ldm-repae --format repa
  python export_ldm.py pretrained/sit-repae-vavae exps/sit-repae-vavae --format run
  python export_ldm.py last.pt exps/repa --format run --vae-ckpt stabilityai/sd-vae-ft-ema

Formats:

  diffusers   transformer/ (config.json and safetensors, for from_pretrained of its class), vae/ (a diffusers folder
              with latent statistics), model_index.json, and a README.md that samples an image from a clone
  repa        args.json and checkpoints/0400000.pt in the layout of REPA-E (model, ema, vae, args, steps), which
              REPA-E's generate.py reads: --exp-path FOLDER --train-steps 400000
  run         a checkpoint of REPA, REPA-E, LightningDiT, RAE, diffusion-bench or Decoupled MeanFlow as a run:
              generate.py --exp-path OUT samples it, and train_ldm.py --exp-name NEW --continue-train-exp-dir OUT
              continues from it, with AdamW's moments (not those of RAE and diffusion-bench) and its step

SOURCE is a run of train_ldm.py or train_repae.py; for --format run an experiment of REPA or REPA-E with its args.json,
one of LightningDiT, or a single file (.pt, .safetensors) of any of them, with --vae-ckpt where its VAE is neither in
the checkpoint nor where its args say. Everything is written under a temporary name and renamed when it is complete.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from diffusion import PATH_TYPES
from errors import UserError
from formats.arguments import add_foreign_vae_arguments
from formats.averages import MAIN, MODEL, weights_name
from models.denoisers.config import PREDICTIONS
from runtime.cli import ArgumentParser, add_debug_argument, answer_early, flag_of, positive_int, run

FORMATS = ("diffusers", "repa", "run")
EXPORTED_FROM = "exported_from"  # in a JSON file of every export, which --overwrite may then replace


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="export_ldm.py", usage="%(prog)s SOURCE OUT [flags]", description=__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="exps/NAME; for the format run see above")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--format", choices=FORMATS, default="diffusers", help="see above")
    parser.add_argument(
        "--train-steps", type=positive_int, metavar="N", help="checkpoint of step N (default: a finished run's newest)"
    )
    parser.add_argument(
        "--weights",
        type=weights_name,
        metavar="NAME",
        help="ema, model, ema_X or posthoc_X, as generate.py has them; the format repa holds an average beside what "
        "was trained (default: ema)",
    )
    group = parser.add_argument_group("what other people's checkpoint does not say itself, for --format run")
    add_foreign_vae_arguments(group)
    group.add_argument(
        "--path-type", choices=PATH_TYPES, help="interpolant it was trained on (default: as its args say, else linear)"
    )
    group.add_argument(
        "--resolution", type=positive_int, metavar="PX", help="side of the images, pixels; only checked against the VAE"
    )
    group.add_argument(
        "--flow-map-blocks",
        type=positive_int,
        metavar="N",
        help="of a checkpoint of Decoupled MeanFlow: last blocks that are told where a jump ends (public ones: 8)",
    )
    group.add_argument(
        "--prediction",
        choices=tuple(PREDICTIONS),
        help="of diffusion-bench's DDT on pixels: x, the data (jit-, pixelgen-ddt), or v, the velocity (pixnerd-ddt); "
        "of a DDT with internal guidance (RAEv2's: x) too",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it is an earlier export")
    parser.add_argument(
        "--dry-run", action="store_true", help="read everything, print what would be written, write nothing"
    )
    add_debug_argument(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    answer_early(parse_arguments)

import torch

from files import read_safetensors, whole_folder, write_json, write_torch
from formats.export import ldm_state
from formats.exported_ldm import INDEX_FILE, repae_checkpoint, repae_facts, what_repae_lacks, write_exported
from formats.foreign_run import FLAGS, ForeignRun, open_foreign_run
from formats.run_folders import ARGUMENTS, is_foreign_experiment, is_run, refuse_foreign, refuse_own_file
from formats.sit import REPA_PREFIX
from inference.trained_ldm import TrainedLDM, open_trained_ldm
from loss.alignment import DenoiserAlignments
from models.denoisers.config import SiTConfig
from models.tokenizers import Tokenizer
from models.tokenizers.kl import KLTokenizer
from runtime.checkpoint import Checkpoint, CheckpointFolder
from runtime.measure import count_parameters
from training.ldm import AlignedDenoiser
from training.metrics import MeanMetrics
from training.optimizer import build_adamw


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    check_place(args)
    if args.format == "run":
        write = convert(args)
    else:
        trained = open_run(args)
        write = (export_folder if args.format == "diffusers" else export_repae)(args, trained)
    if args.dry_run:
        print("nothing was written")
        return 0
    with whole_folder(args.out) as temporary:
        write(temporary)
    for path in sorted(path for path in args.out.rglob("*") if path.is_file()):
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


def check_place(args: argparse.Namespace) -> None:
    """The folder must be new, or an earlier export that may be replaced."""
    if not args.out.exists():
        return
    if not args.out.is_dir():
        raise UserError(f"OUT {args.out} is a file; give a new folder")
    is_export = any(is_ours(args.out / name) for name in (INDEX_FILE, ARGUMENTS))
    if any(args.out.iterdir()) and not (args.overwrite and is_export):
        hint = "add --overwrite to replace it" if is_export else "give a new folder"
        raise UserError(f"OUT {args.out} holds {'an export' if is_export else 'other files'}; {hint}")


def is_ours(path: Path) -> bool:
    """Whether this script wrote a JSON file."""
    try:
        return EXPORTED_FROM in json.loads(path.read_text())
    except (OSError, ValueError):
        return False


def warn(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr)


def open_run(args: argparse.Namespace) -> TrainedLDM:
    flags = [word for name in FLAGS if getattr(args, name) for word in (flag_of(name), str(getattr(args, name)))]
    steps = [] if args.train_steps is None else ["--train-steps", str(args.train_steps)]
    refuse_foreign(args.source, "SOURCE", "SOURCE", *steps, *flags)
    if flags:
        raise UserError(
            f"{flags[0]} is for other people's checkpoints (--format run); SOURCE {args.source} says it itself: "
            "leave the flag out"
        )
    try:
        trained = open_trained_ldm(args.source, args.train_steps, args.weights or MAIN, warn)
    except UserError as error:
        raise UserError(str(error).replace("--exp-path", "SOURCE")) from error
    print(f"{trained.config.model} of step {trained.step}, {trained.resolution} px")
    return trained


def open_vae(args: argparse.Namespace, trained: TrainedLDM) -> Tokenizer:
    """The VAE, which both formats for other codes store as theirs."""
    tokenizer = trained.load_autoencoder()
    if not isinstance(tokenizer, KLTokenizer):
        raise UserError(
            f"--format {args.format} is for VAEs that are an AutoencoderKL, and that of {args.source} is a "
            f"{type(tokenizer).__name__}: use the run as it is"
        )
    print(f"VAE: {count_parameters(tokenizer)[0]:,} parameters, checksum {trained.vae_checksum}")
    return tokenizer


def export_folder(args: argparse.Namespace, trained: TrainedLDM) -> Callable[[Path], None]:
    """What writes the format diffusers into a folder."""
    tokenizer, model = open_vae(args, trained), trained.load_model()
    print(f"{trained.weights}: {count_parameters(model)[0]:,} parameters")
    facts = {
        "path_type": trained.path_type,
        "time_shift": trained.time_shift,
        "cfg_prob": trained.cfg_prob,
        "resolution": trained.resolution,
        "steps": trained.step,
        "weights": trained.weights,
        "class_names": trained.class_names,
        EXPORTED_FROM: args.source.name,
    }
    return lambda folder: write_exported(folder, str(args.out), model, tokenizer, facts)


def export_repae(args: argparse.Namespace, trained: TrainedLDM) -> Callable[[Path], None]:
    """What writes the format repa: both sets of weights, and REPA's projectors with each."""
    if not isinstance(trained.config, SiTConfig):
        raise UserError(f"--format repa: REPA-E knows no {trained.config.model}, only SiTs; take --format diffusers")
    if trained.config.class_token_width:
        raise UserError("--format repa: REPA-E knows no class token (--reg-coeff); take --format diffusers")
    if trained.config.sparse_blocks:
        raise UserError("--format repa: REPA-E knows no SPRINT (--sprint); take --format diffusers")
    if trained.config.guide_depth:
        raise UserError("--format repa: REPA-E knows no second output (--guide-depth); take --format diffusers")
    if trained.config.prediction != "v":
        raise UserError("--format repa: REPA-E knows no predicted data (--prediction x); take --format diffusers")
    if trained.config.flow_map_blocks:
        raise UserError("--format repa: REPA-E knows no jumps (--flow-map-blocks); take --format diffusers")
    tokenizer, arguments = open_vae(args, trained), trained.checkpoint.manifest()["args"]
    model, alignment = (load_module(trained.checkpoint, name) for name in (MODEL, "alignment"))
    chosen = trained.load_model().state_dict()
    sets = {"model": model or chosen, "ema": chosen}
    if trained.weights == MODEL:
        sets["ema"] = load_module(trained.checkpoint, MAIN) or chosen
    has_projectors = any(name.startswith(REPA_PREFIX) for name in alignment)
    facts = repae_facts(trained.config, arguments, has_projectors)
    for reason in what_repae_lacks(facts, arguments.get("projector_width") if has_projectors else None):
        warn(f"REPA-E's own code cannot use this as it is: {reason}")
    checkpoint = repae_checkpoint(sets, alignment, tokenizer.statistics, ldm_state(tokenizer), facts, trained.step)
    print(f"model and ema: {sum(tensor.numel() for tensor in checkpoint['ema'].values()):,} numbers each")

    def write(folder: Path) -> None:
        (folder / "checkpoints").mkdir(parents=True)
        write_json(folder / ARGUMENTS, facts | {EXPORTED_FROM: args.source.name})
        write_torch(checkpoint, folder / "checkpoints" / f"{trained.step:07d}.pt")

    return write


def load_module(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a module, verified; empty where the checkpoint has none of that name."""
    path = checkpoint.folder / f"{name}.safetensors"
    if not path.exists():
        return {}
    if fault := checkpoint.fault(name):
        raise UserError(f"{checkpoint.folder} is damaged ({fault}); choose another with --train-steps")
    return read_safetensors(path)


def convert(args: argparse.Namespace) -> Callable[[Path], None]:
    """What writes the format run."""
    if args.weights is not None:
        raise UserError(f"--weights {args.weights}: a run holds both weights; leave the flag out")
    refuse_own_file(args.source, "SOURCE", "SOURCE")
    if is_run(args.source) and not is_foreign_experiment(args.source):
        raise UserError(f"SOURCE {args.source} is a run of this project already; leave out --format run")
    foreign = open_foreign_run(args, warn)
    modules, arguments = foreign.modules(), foreign.arguments()
    print(f"{foreign.checkpoint.config.model} of step {foreign.step}, {foreign.resolution} px")
    for name, module in modules.items():
        print(f"{name}: {sum(tensor.numel() for tensor in module.state_dict().values()):,} numbers")
    print(f"VAE: {count_parameters(foreign.tokenizer)[0]:,} parameters, checksum {arguments['vae_checksum']}")
    alignment = modules.get("alignment", DenoiserAlignments({}))
    states = {"optimizer": optimizer_state(foreign, AlignedDenoiser(modules["model"], alignment))}

    def write(folder: Path) -> None:
        states["metrics"] = MeanMetrics().state_dict()
        CheckpointFolder(folder).save(foreign.step, modules, states, arguments)
        foreign.tokenizer.save(folder / "vae")
        # without names of classes, which nobody knows: the run itself may go on too, whatever the cache calls them
        known = {name: value for name, value in arguments.items() if name != "class_names"}
        write_json(folder / ARGUMENTS, {"args": known, EXPORTED_FROM: args.source.name})
        status = {"state": "finished", "step": foreign.step, "max_train_steps": foreign.step, "reason": None}
        write_json(folder / "status.json", status)

    return write


def optimizer_state(foreign: ForeignRun, networks: AlignedDenoiser) -> dict:
    """The state of AdamW as train_ldm.py builds it over these networks, with the moments of the foreign one."""
    optimizer = build_adamw(networks.named_parameters(), **foreign.checkpoint.adamw)
    moments = {our_name(name): values for name, values in (foreign.checkpoint.moments or {}).items()}
    group = optimizer.state_dict()["param_groups"][0]
    state = {n: moments[name] for n, name in enumerate(group["param_names"]) if name in moments}
    optimizer.load_state_dict({"state": state, "param_groups": [group]})
    return optimizer.state_dict()


def our_name(name: str) -> str:
    """Of a parameter of a foreign checkpoint, among those of ``AlignedDenoiser``."""
    return f"alignment.{name}" if name.startswith(REPA_PREFIX) else f"denoiser.{name}"


if __name__ == "__main__":
    sys.exit(run(main))
