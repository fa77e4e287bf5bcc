"""Write a VAE for other software: a diffusers folder, an LDM file, or the three files that REPA-E takes.

  python export_vae.py exps/sendvae pretrained/sendvae --format diffusers
  python export_vae.py exps/sendvae pretrained/sendvae.safetensors --format ldm --train-steps 50000
  python export_vae.py exps/sendvae pretrained/sendvae/sendvae.pt --format repa-e
  python export_vae.py exps/sendvae pretrained/sendvae-unit --format diffusers --fold-statistics

SOURCE is anything that --vae-ckpt takes elsewhere: a run of ours (its vae/, or with --train-steps any of its
checkpoints), an LDM, Lightning, Stable Diffusion or REPA-E file, a diffusers folder or file, a name on the hub. So this
also turns one public layout into another. Weights are stored in float32 and keep every bit, unless --dtype says
otherwise.

diffusers  OUT is a folder that AutoencoderKL.from_pretrained and diffusers' pipelines use unchanged. The latent
           statistics go into config.json as scaling_factor and shift_factor, where channels differ also as latents_mean
           and latents_std, and exactly into latents_stats.safetensors.
ldm        OUT is one .pt or .safetensors file in latent-diffusion's layout. It has no place for statistics.
repa-e     OUT is a .pt file X.pt in the same layout; next to it X-latents-stats.pt and, where there is a discriminator
           in SOURCE, next to it (NAME-discriminator-ckpt.pt) or in --disc-pretrained-ckpt, X-discriminator-ckpt.pt.

--fold-statistics is for code that knows one scaling factor or none, where channels differ: the VAE written encodes to
latents of mean 0 and std 1 and decodes these. docs/bridge.md says who needs it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from errors import UserError
from runtime.cli import ArgumentParser, add_debug_argument, answer_early, non_negative_int, run

FORMATS = ("diffusers", "ldm", "repa-e")
SUFFIXES = (".pt", ".safetensors")  # of single files
DTYPES = ("float32", "float16")
REPAE_ARCHITECTURES = ("f8d4", "f16d32")  # which its code can build


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="export_vae.py",
        usage="%(prog)s SOURCE OUT --format FORMAT [flags]",
        description=__doc__,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="run, file, folder or hub name of the VAE")
    add("out", metavar="OUT", help="folder (diffusers) or file (ldm, repa-e) to write")
    add("--format", choices=FORMATS, required=True, help="whose layout to write")
    add(
        "--train-steps",
        type=non_negative_int,
        metavar="N",
        help="step of the checkpoint, where SOURCE is a run (default: the vae/ of the finished run)",
    )
    add("--vae", metavar="NAME", help="architecture, where SOURCE does not tell it (default: read off its tensors)")
    add(
        "--vae-latents-stats",
        metavar="FILE",
        help="latent statistics, REPA-E's, LightningDiT's or ours; repa: mean 0 and scale 0.18215 (default: those in "
        "SOURCE or next to it)",
    )
    add(
        "--disc-pretrained-ckpt",
        metavar="PATH",
        help="discriminator for --format repa-e: file, run or hub name (default: that in SOURCE or next to it, if any)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help="of the weights, for --format diffusers; float16 takes half the space and rounds them",
    )
    add(
        "--fold-statistics",
        action="store_true",
        help="for diffusers and ldm: normalise inside the VAE, so that its latents have mean 0 and std 1",
    )
    add("--overwrite", action="store_true", help="replace what OUT holds (default: refuse)")
    add(
        "--dry-run", action="store_true", help="read and convert everything, print what would be written, write nothing"
    )
    add_debug_argument(parser)
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse an OUT that does not go with --format, or that would be replaced without being told to."""
    out, suffix = Path(args.out), Path(args.out).suffix
    if args.format == "ldm" and suffix not in SUFFIXES:
        raise UserError(f"{out}: --format ldm writes one file; give a name that ends in {' or '.join(SUFFIXES)}")
    if args.format == "repa-e" and suffix != ".pt":
        raise UserError(f"{out}: --format repa-e writes X.pt and more next to it; give a name that ends in .pt")
    if args.format == "repa-e" and args.out.count(".pt") > 1:
        raise UserError(f"{out}: REPA-E replaces every .pt in the path to find the statistics; let it occur once")
    if args.dtype != DTYPES[0] and args.format != "diffusers":
        raise UserError(f"--dtype {args.dtype} is for --format diffusers; leave it out")
    if args.fold_statistics and args.format == "repa-e":
        raise UserError("--fold-statistics: --format repa-e has a file for the statistics; leave the flag out")
    if args.disc_pretrained_ckpt and args.format != "repa-e":
        raise UserError(f"--disc-pretrained-ckpt: --format {args.format} has no place for it; take --format repa-e")
    if args.format == "diffusers" and out.exists():
        check_folder(out, args.overwrite)
    elif out.is_dir():
        raise UserError(f"{out} is a folder; give the file to write, such as {out / f'vae{SUFFIXES[0]}'}")


def check_folder(out: Path, overwrite: bool) -> None:
    """Only a VAE's folder is replaced, because nothing of it is left then."""
    if not out.is_dir():
        raise UserError(f"{out} is a file; --format diffusers writes a folder")
    names = sorted(path.name for path in out.iterdir())
    if not names:
        return
    if not overwrite:
        raise UserError(f"{out} exists; give another OUT, or --overwrite to replace it")
    strange = [name for name in names if name != "config.json" and not name.endswith((".safetensors", ".bin"))]
    if strange or "config.json" not in names:
        raise UserError(f"{out} is not a VAE's folder alone ({(strange or names)[0]} is in it); give another OUT")


if __name__ == "__main__":
    answer_early(parse_arguments)

from files import checksum
from formats.architecture import known_names
from formats.discriminator import named_discriminator, read_discriminator
from formats.export import fold_statistics, ldm_state, repae_files, scaling_config, set_scaling, write_files
from formats.layers import State
from formats.statistics import discriminator_beside
from formats.vae import LoadedVAE, load_vae
from models.tokenizers.diffusers_network import DiffusersTokenizer
from models.tokenizers.kl import KLTokenizer
from models.weight_files import NotWeightsError
from runtime.measure import count_parameters


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    loaded = load_vae(args.vae, args.source, args.vae_latents_stats, step=args.train_steps, flag="")
    if isinstance(loaded.tokenizer, DiffusersTokenizer) and not isinstance(loaded.tokenizer, KLTokenizer):
        raise UserError(
            f"{args.source} is an {loaded.tokenizer.network_name}: diffusers reads its folder as it is, and other "
            "layouts have no place for it"
        )
    if not isinstance(loaded.tokenizer, KLTokenizer):
        raise UserError(f"{args.source} is a {type(loaded.tokenizer).__name__}, which other software does not read")
    describe(args.source, loaded)
    if args.fold_statistics:
        fold(args.source, loaded)
    if args.format == "diffusers":
        export_folder(args, loaded)
    else:
        export_files(args, loaded)
    return 0


def describe(source: str, loaded: LoadedVAE) -> None:
    """What was read."""
    vae = loaded.tokenizer
    names = known_names(vae)
    name = names[0] if names else f"f{vae.downsampling}d{vae.latent_channels} of its own kind"
    print(f"{source}: {loaded.layout}, {name}, {count_parameters(vae)[0]:,} parameters")
    print(f"latent statistics: {loaded.statistics_source or 'none'}")


def fold(source: str, loaded: LoadedVAE) -> None:
    """Latents of mean 0 and std 1, or the reason why not."""
    if loaded.statistics_source is None:
        raise UserError(f"--fold-statistics: {source} has no latent statistics; give --vae-latents-stats")
    try:
        fold_statistics(loaded.tokenizer)
    except ValueError as error:
        raise UserError(f"--fold-statistics: {error}; leave the flag out") from error
    print("folded into the VAE: its latents have mean 0 and std 1")


def export_folder(args: argparse.Namespace, loaded: LoadedVAE) -> None:
    """A diffusers folder with the statistics in its configuration."""
    out, vae = Path(args.out), loaded.tokenizer
    if loaded.statistics_source is None:
        factor = scaling_config(vae)["scaling_factor"]
        print(f"scaling_factor stays {factor}, and no latents_stats.safetensors is written: give --vae-latents-stats")
    else:
        set_scaling(vae)
        for key, value in scaling_config(vae).items():
            print(f"config.json: {key} {value}")
    if args.dry_run:
        print(f"would write {out}; nothing was written")
        return
    if args.dtype == "float16":
        round_to_half(vae, args.source)
    out.parent.mkdir(parents=True, exist_ok=True)
    vae.save(out, with_statistics=loaded.statistics_source is not None)
    show_written(sorted(out.iterdir()))


def round_to_half(vae: KLTokenizer, source: str) -> None:
    """Weights in float16, statistics as they are."""
    vae.network.half()
    for name, parameter in vae.network.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"--dtype float16: {source} has weights beyond its range ({name}); leave the flag out")


def export_files(args: argparse.Namespace, loaded: LoadedVAE) -> None:
    """One LDM file, or REPA-E's three."""
    out = Path(args.out)
    files = {out: ldm_state(loaded.tokenizer)} if args.format == "ldm" else trio(args, out, loaded)
    existing = [path for path in files if path.exists()]
    if existing and not args.overwrite:
        raise UserError(f"{existing[0]} exists; give another OUT, or --overwrite to replace it")
    if args.format == "ldm" and loaded.statistics_source is not None and not args.fold_statistics:
        print("the latent statistics are left out, because the layout has no place for them (repa-e has)")
    if args.dry_run:
        for path, state in files.items():
            size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
            print(f"would write {path}: {len(state)} tensors, about {size} bytes")
        print("nothing was written")
        return
    write_files(files)
    show_written(files)


def trio(args: argparse.Namespace, out: Path, loaded: LoadedVAE) -> dict[Path, State]:
    """What REPA-E takes; its code cannot do without the statistics."""
    if loaded.statistics_source is None:
        raise UserError(
            f"{args.source} has no latent statistics, which REPA-E needs: give --vae-latents-stats (cache_latents.py "
            "measures them: latents_stats.safetensors of a latent cache)"
        )
    if not set(known_names(loaded.tokenizer)) & set(REPAE_ARCHITECTURES):
        print(f"note: REPA-E's code builds {' and '.join(REPAE_ARCHITECTURES)} only, and this is another architecture")
    source = args.disc_pretrained_ckpt or args.source
    flag = "--disc-pretrained-ckpt " if args.disc_pretrained_ckpt else ""
    try:
        if args.disc_pretrained_ckpt:
            discriminator = named_discriminator(source)
        else:
            discriminator = source_discriminator(Path(source), loaded, args.train_steps)
        if discriminator is None:
            print("no discriminator: REPA-E then trains one from scratch (leave out its --disc-pretrained-ckpt)")
        return repae_files(loaded.tokenizer, out, discriminator)
    except NotWeightsError as error:
        raise UserError(f"{flag}{source}: {error}") from error


def source_discriminator(path: Path, loaded: LoadedVAE, step: int | None) -> State | None:
    """The discriminator in SOURCE, else the one next to the VAE's file, as statistics are; None: there is none."""
    if path.exists():  # else a name on the hub
        try:
            state = read_discriminator(path, step)
        except NotWeightsError:
            state = None  # the file holds a VAE alone
        if state is not None:
            return state
    path = None if loaded.path is None else discriminator_beside(loaded.path)
    return None if path is None else read_discriminator(path)


def show_written(paths: Sequence[Path]) -> None:
    for path in paths:
        print("{path}: {bytes} bytes, sha256 {sha256}".format(path=path, **checksum(path)))


if __name__ == "__main__":
    sys.exit(run(main))
