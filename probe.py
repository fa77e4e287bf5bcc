"""What a VAE's latents know: attributes, classes, and how they fill their space.

  python probe.py attributes --vae exps/sendvae/vae --data data/celeba
  python probe.py attributes uniformity discrimination pictures --vae exps/quickstart-vae/vae --data data/toy
  python probe.py classes --vae exps/sendvae/vae --data data/imagenet256 --val-data data/imagenet256-val
  python probe.py attributes diffusability --vae exps/one/vae --vae exps/other/vae --data data/celeba

  attributes      linear probe of binary attributes on the flattened latent: F1, mean average precision, top-5 recall
  classes         linear probe of the class: top-1 and top-5 accuracy
  uniformity      how evenly latent vectors are spread: Gini coefficient of a kernel density estimate, 0 is perfect
  discrimination  fit of Gaussian mixtures to whole latents: log-likelihood, BIC, agreement of components with classes
  diffusability   measures that are said to matter for diffusion: spatial structure, spectrum, equivariance, dimension…
  pictures        latents as colours, a map by class, the way from one image to another
  all             all of these that the data allow; a line says why one is left out

The images are encoded once (posterior mean) and stay in memory; diffusability encodes them again (a posterior sample,
and transformed images). Values go into metrics/probe-WHAT.json next to the VAE. Several --vae are probed one after the
other, and compared in a table at the end.
What latents may be compared with, all with --output-dir: --features pixels, or a VFM's tokens (--features
dinov2-vit-b), both without a VAE; or a random VAE (--vae f4d4-tiny --vae-ckpt none).
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from dataset.attributes import READERS
from errors import UserError
from metrics.arguments import CHECKPOINT_FLAG, add_output_arguments, add_vae_arguments
from runtime.cli import ArgumentParser, add_debug_argument, answer_early, non_negative_int, positive_int, run

LATENT, PIXELS = "latent", "pixels"
PROBES = ("attributes", "classes", "uniformity", "discrimination", "diffusability", "pictures")
MAP_IMAGES = 2000


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="probe.py", usage="%(prog)s WHAT … --vae DIR --data DIR [flags]", description=__doc__)
    parser.add_argument("what", nargs="+", choices=(*PROBES, "all"), metavar="WHAT", help=f"{', '.join(PROBES)}, all")
    group = parser.add_argument_group("what is probed")
    add_vae_arguments(group, several=True)
    add = group.add_argument
    add(
        "--features",
        default=LATENT,
        metavar="NAME",
        help="latent, or without a VAE: pixels (raw ones), or the tokens of a VFM, a name of --enc-type",
    )
    add(
        "--features-grid",
        type=positive_int,
        metavar="N",
        help="the VFM's tokens along a side (default: resolution / 16)",
    )
    add(CHECKPOINT_FLAG, metavar="FILE", help="the VFM's weights (default: searched)")
    add("--data", "--data-dir", metavar="DIR", help="photographs (with their annotation files), or a packed dataset")
    add("--val-data", "--val-data-dir", metavar="DIR", help="images to test on (default: the data's split, or 20 %%)")
    add("--attributes", choices=("auto", *READERS), default="auto", help="layout of the annotation files in --data")
    add("--resolution", type=positive_int, metavar="PX", help="side, pixels (default: the packed dataset's, or 256)")
    add("--max-images", type=positive_int, metavar="N", help="evenly spread over the data (default: all)")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="seed of random splits, positions, a random VAE")
    add = parser.add_argument_group("details").add_argument
    add(
        "--num-points",
        type=positive_int,
        default=10000,
        metavar="N",
        help="images in uniformity (3 at least), mixtures and diffusability",
    )
    add("--tsne", action=argparse.BooleanOptionalAction, default=True, help="uniformity over a t-SNE, as VA-VAE's")
    add(
        "--components",
        metavar="K,K,…",
        help="components of the mixtures (default: 10, 50, 100 and the classes, as data suffice)",
    )
    add("--num-pictures", type=positive_int, default=16, metavar="N", help="images in pictures, at least 2")
    add("--steps", type=positive_int, default=8, metavar="N", help="decoded images from one to another")
    group = parser.add_argument_group("output and speed")
    add_output_arguments(group)
    add = group.add_argument
    add(
        "--name",
        metavar="TEXT",
        help="in the files' names, probe-WHAT-TEXT, replaced (default: the attributes' layout, if any, for a VAE "
        "in a file followed by its name; where that exists for other --data, also by theirs)",
    )
    add("--batch-size", type=positive_int, default=64, metavar="N", help="images read at once; changes no value")
    add("--num-workers", type=non_negative_int, default=4, metavar="N", help="reading threads")
    add("--mixed-precision", choices=("no", "bf16"), default="no", help="precision of the VAE")
    add("--allow-tf32", action=argparse.BooleanOptionalAction, default=False, help="TF32 on Ampere and up")
    add("--dry-run", action="store_true", help="encode two batches; print sizes, bytes, seconds; write nothing")
    add_debug_argument(group)
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is built."""
    if not args.data:
        raise UserError("--data is needed: photographs with their annotation files, or a packed dataset")
    check_vaes(args)
    if args.features != LATENT and (args.vae or args.vae_ckpt):
        raise UserError(f"--features {args.features} are probed without a VAE: leave out --vae and --vae-ckpt")
    args.is_vfm = args.features not in (LATENT, PIXELS)
    for flag, given in (("--features-grid", args.features_grid), (CHECKPOINT_FLAG, args.enc_ckpt)):
        if given is not None and not args.is_vfm:
            raise UserError(f"{flag} is for a VFM, and --features {args.features} is none: leave it out")
    if args.num_pictures < 2:
        raise UserError("--num-pictures 1: the way from one image to another needs 2")
    if args.name is not None and (not args.name or "/" in args.name):
        raise UserError(f"--name {args.name} is not part of a file's name; give one without slashes")
    if args.components is not None:
        parts = args.components.split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise UserError(f"--components {args.components} must be numbers of at least 1, separated by commas")
        args.components = sorted({int(part) for part in parts})
    args.wants_all = "all" in args.what
    args.what = [name for name in PROBES if args.wants_all or name in args.what]
    if args.features != LATENT and "diffusability" in args.what:
        if not args.wants_all:
            raise UserError("diffusability is of a VAE: give --vae, without --features")
        args.what.remove("diffusability")


def check_vaes(args: argparse.Namespace) -> None:
    """One VAE may have its weights and statistics in other flags; several have their records next to themselves."""
    args.vaes = args.vae or [None]
    if len(args.vaes) > 1:
        single = (("--vae-ckpt", args.vae_ckpt), ("--vae-latents-stats", args.vae_latents_stats))
        for flag, given in single:
            if given is not None:
                raise UserError(f"{flag} is for one VAE, and there are {len(args.vaes)}: give each by --vae alone")
        if len(set(args.vaes)) < len(args.vaes):
            raise UserError("the same --vae is given twice; leave one out")
    args.vae = args.vaes[0]


if __name__ == "__main__":
    answer_early(parse_arguments)

import numpy as np
import torch

from dataset.images import DEFAULT_RESOLUTION
from inference.latent_cache import ChunkEncoder, autocast_for, chunk_size, one_thread_each
from metrics.diffusability import Diffused, encode_diffused, measure_diffusability, moved_shapes
from metrics.encoding import chunked, encode_dataset, latent_modes, normalise, scaled_pixels, token_grids
from metrics.equivariance import TRANSFORMS
from metrics.features import build_vfm
from metrics.latent_pictures import pick, save_colours, save_map, save_ways, ways
from metrics.probe_data import ProbeData, open_probe_data
from metrics.probes import (
    Latents,
    Outcome,
    check_attributes,
    check_classes,
    check_points,
    plan_mixtures,
    probe_attributes,
    probe_classes,
    probe_discrimination,
    probe_uniformity,
    spread,
    write_files,
)
from metrics.reconstruction import decoder
from metrics.record import Measurement, default_name, metrics_folder, write_measurement
from metrics.subject import Subject, file_suffix, open_vae, output_folder, output_subject
from models.latent_statistics import LatentStatistics
from models.tokenizers import Tokenizer
from reporting.tables import NOTHING, Column, aligned
from runtime.log import progress_bar
from runtime.measure import count_parameters, peak_memory
from runtime.processes import Process, set_inference_numerics, this_process


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    process = this_process()
    if process.world_size > 1:
        raise UserError("probe.py is one process, whatever the number of GPUs: start it with python or probe.sh")
    set_inference_numerics(process, args.mixed_precision, args.allow_tf32)
    data = open_probe_data(
        args.data,
        args.resolution,
        default=DEFAULT_RESOLUTION,
        val_path=args.val_data,
        kind=args.attributes,
        needs_attributes="attributes" in args.what and not args.wants_all,
        max_images=args.max_images,
        seed=args.seed,
    )
    args.what = possible_probes(args, data)
    if args.is_vfm:
        args.features_grid = args.features_grid or max(1, data.images.resolution // 16)
    labels = labels_of(args.vaes)
    of_each = [
        argparse.Namespace(**vars(args) | {"vae": vae, "label": label})
        for vae, label in zip(args.vaes, labels, strict=True)
    ]
    for of_one in of_each[1:]:  # none of them turns out to be missing, or not to fit, hours later
        open_vae(of_one, process).tokenizer.latent_shape(data.images.resolution)
    found = {of_one.label: probe_one(of_one, data, process) for of_one in of_each}
    if len(found) > 1 and not args.dry_run:
        print(comparison(found))
    return 0


def labels_of(vaes: Sequence[str | None]) -> list[str]:
    """What VAEs are called side by side: names of runs or folders, or whole paths where two are called alike."""
    paths = [Path(vae or "") for vae in vaes]
    names = [path.parent.name if path.name == "vae" and path.parent.name else path.stem for path in paths]
    return names if len(set(names)) == len(names) else [str(path).strip("/").replace("/", "-") for path in paths]


def comparison(found: Mapping[str, Mapping[str, float | None]]) -> str:
    """A table with a row for each VAE, and a column for each figure that one has."""
    keys = list(dict.fromkeys(key for values in found.values() for key in values))
    columns = [Column("VAE", is_number=False), *(Column(key.partition("/")[2]) for key in keys)]
    return aligned(columns, [[label, *(word(values.get(key)) for key in keys)] for label, values in found.items()])


def word(value: float | None) -> str:
    """A figure with four digits; a dash for one that is not defined."""
    return NOTHING if value is None else f"{value:.4f}"


def probe_one(args: argparse.Namespace, data: ProbeData, process: Process) -> dict[str, float | None]:
    """Encode the images with one VAE, and run the probes on the latents; the figures as ``WHAT/NAME``."""
    subject = open_vae(args, process) if args.features == LATENT else None
    names = {} if args.dry_run else names_of(args, data, subject)
    function, shape = encoder_of(args, subject, data.images.resolution, process)
    if "diffusability" in args.what:
        leave_out_transforms(subject.tokenizer, data.images.resolution)
    diffused = None
    with one_thread_each() if process.device.type == "cpu" else nullcontext(1) as threads:
        autocast = autocast_for(process.device, args.mixed_precision)
        chunk = chunk_size(data.images.resolution, process.device)
        worker = ChunkEncoder(process.device, chunk, threads, autocast)
        if args.dry_run:
            dry_run(args, data, subject, function, shape, worker, process)
        else:
            show_plan(data, shape)
            encoded = partial(encode_all, args, data, worker)
            raw = encoded(function, shape)
            own = own_statistics(subject)
            statistics = normalise(raw, own)
            latents = Latents(raw, data, process.device, args.seed)
            if "diffusability" in names:
                diffused = encode_diffused(latents, subject.tokenizer, statistics, own, encoded)
    found = {} if args.dry_run else probe_all(args, names, latents, subject, statistics, worker, diffused)
    worker.close()
    return found


def encode_all(
    args: argparse.Namespace,
    data: ProbeData,
    worker: ChunkEncoder,
    function: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
) -> torch.Tensor:
    """All images through a function, float32 ``[N, *shape]``."""
    with progress_bar(len(data.items), 0, "encoding", "img", True) as progress:
        return encode_dataset(
            data.images,
            data.items,
            function,
            shape,
            worker,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            progress=progress,
        )


def possible_probes(args: argparse.Namespace, data: ProbeData) -> list[str]:
    """Those that the data can carry; of ``all``, each of the others is left out with a line, else it is an error."""
    checks = {
        "attributes": lambda: check_attributes(data),
        "classes": lambda: check_classes(data),
        "uniformity": lambda: check_points(data, args.num_points),
        "discrimination": lambda: plan_mixtures(data, args.num_points, args.components),
        "diffusability": lambda: check_points(data, args.num_points),
    }
    found = []
    for what in args.what:
        try:
            checks.get(what, lambda: None)()
        except UserError as error:
            leave_out(args, what, error)
            continue
        found.append(what)
    return found


def leave_out(args: argparse.Namespace, what: str, reason: UserError) -> None:
    """Go on with the others of ``all``; what was asked for by name is not left out."""
    if not args.wants_all:
        raise reason
    print(f"{what} is left out: {reason}", file=sys.stderr)


def leave_out_transforms(tokenizer: Tokenizer, resolution: int) -> None:
    """A line for each error of equivariance that is not measured, because the VAE cannot encode the images for it."""
    for name in TRANSFORMS.keys() - moved_shapes(tokenizer, resolution):
        side = int(resolution * TRANSFORMS[name].scale)
        print(f"{name}-error of diffusability is left out: this VAE encodes no images of {side} px", file=sys.stderr)


def names_of(args: argparse.Namespace, data: ProbeData, subject: Subject | None) -> dict[str, str]:
    """The names of the probes' records; an error, before anything is encoded, where these would replace others'."""
    folder, names = metrics_folder(output_subject(args)), {}
    for what in args.what:
        text = args.name or (data.kind if what == "attributes" and data.kind != "csv" else None)
        names[what] = f"probe-{what}" + (f"-{text}" if text else "")
        if args.output_dir is not None and len(args.vaes) > 1:
            names[what] += f"-{args.label}"
        if args.name is None:
            usual = f"{names[what]}{file_suffix(args)}"
            names[what] = default_name(
                folder, usual, Path(args.data), data.images.fingerprint, description_of(args, subject)
            )
    return names


def description_of(args: argparse.Namespace, subject: Subject | None) -> dict:
    """What is probed, for records."""
    if subject is not None:
        return subject.description
    if args.features == PIXELS:
        return {"path": "raw pixels"}
    return {"path": f"{args.features_grid}×{args.features_grid} tokens of {args.features}"}


def encoder_of(
    args: argparse.Namespace, subject: Subject | None, resolution: int, process: Process
) -> tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...]]:
    """What turns images into latents, and the latents' shape (C, h, w); without a VAE raw pixels, or a VFM's tokens."""
    if subject is not None:
        return latent_modes(subject.tokenizer), subject.tokenizer.latent_shape(resolution)
    if args.features == PIXELS:
        return scaled_pixels, (3, resolution, resolution)
    grid = args.features_grid
    encoder = build_vfm(args.features, grid, args.enc_ckpt, args.dry_run).to(process.device)
    return token_grids(encoder), (encoder.embed_dim, grid, grid)


def own_statistics(subject: Subject | None) -> LatentStatistics | None:
    """The VAE's latent statistics, on the CPU; None where it came without any."""
    if subject is None or not subject.has_statistics:
        return None
    return copy.deepcopy(subject.tokenizer.statistics).cpu()


def show_plan(data: ProbeData, shape: tuple[int, ...]) -> None:
    """What is probed, and the memory that it takes."""
    size = int(np.prod(shape))
    counts = ", ".join(f"{count} {name}" for name, count in data.counts().items())
    print(
        f"{len(data.items)} images ({counts}), {size} numbers each: {4 * len(data.items) * size / 1e6:.1f} MB in memory"
    )


def probe_all(
    args: argparse.Namespace,
    names: dict[str, str],
    latents: Latents,
    subject: Subject | None,
    statistics: LatentStatistics,
    worker: ChunkEncoder,
    diffused: Diffused | None,
) -> dict[str, float | None]:
    """Run the probes one by one, as ``names`` has them; each one's results are written before the next begins."""
    probes = {
        "attributes": lambda name: probe_attributes(latents),
        "classes": lambda name: probe_classes(latents),
        "uniformity": lambda name: probe_uniformity(latents, args.num_points, args.tsne),
        "discrimination": lambda name: probe_discrimination(latents, args.num_points, args.components),
        "diffusability": lambda name: measure_diffusability(latents, diffused, args.num_points),
        "pictures": lambda name: draw_pictures(args, latents, subject, statistics, worker, name),
    }
    found = {}
    for what, name in names.items():
        try:
            outcome = probes[what](name)
        except UserError as error:  # latents that are all alike
            leave_out(args, what, error)
            continue
        write_outcome(args, latents, subject, what, name, outcome)
        found |= {f"{what}/{key}": value for key, value in outcome.values.items()}
    return found


def write_outcome(
    args: argparse.Namespace, latents: Latents, subject: Subject | None, what: str, name: str, outcome: Outcome
) -> None:
    """The table on the terminal, the record and what comes with it."""
    data = latents.data
    has_statistics = subject is not None and subject.has_statistics
    write_files(outcome, output_folder(args), name)
    measurement = Measurement(
        name=name,
        kind="probe",
        values={f"{what}/{key}": value for key, value in outcome.values.items()},
        count=len(data.items),
        subject=description_of(args, subject),
        settings={
            "data": str(Path(args.data)),
            "val_data": args.val_data,
            "fingerprint": data.images.fingerprint(),
            "resolution": data.images.resolution,
            "features": args.features,
            "features_grid": args.features_grid,
            "normalised_with": "the VAE's statistics" if has_statistics else "statistics of these images",
            "seed": args.seed,
            **outcome.settings,
        },
    )
    path = write_measurement(measurement, output_subject(args))
    for key, value in outcome.values.items():
        print(f"{what + '/' + key:<36}{word(value):>10}")
    print(path)


def draw_pictures(
    args: argparse.Namespace,
    latents: Latents,
    subject: Subject | None,
    statistics: LatentStatistics,
    worker: ChunkEncoder,
    name: str,
) -> Outcome:
    """Latents as colours, a map by class, and (of a VAE) the way from one image to another."""
    data, folder = latents.data, output_folder(args)
    chosen = pick(len(data.items), args.num_pictures)
    originals = torch.empty(len(chosen), 3, data.images.resolution, data.images.resolution, dtype=torch.uint8)
    data.images.read_into(data.items[chosen], originals.numpy())
    colours = save_colours(folder / f"{name}-colours.png", originals, latents.values[chosen])
    places = spread(len(data.items), MAP_IMAGES)
    flat = latents.values[places].flatten(1).numpy()
    plane = save_map(folder / f"{name}-map.png", flat, data.labels[places], data.images.class_names)
    if subject is not None:
        between = ways(latents.values[chosen].numpy(), args.steps)
        z = statistics.denormalize(torch.from_numpy(between).flatten(0, 1))
        decoded = chunked(worker, decoder(subject.tokenizer), z)
        save_ways(folder / f"{name}-ways.png", originals, decoded.unflatten(0, between.shape[:2]))
    values = {"variance-in-colours": colours, "variance-in-map": plane}
    return Outcome(values, {"pictures": len(chosen), "map_images": len(places)})


def dry_run(
    args: argparse.Namespace,
    data: ProbeData,
    subject: Subject | None,
    function: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
    worker: ChunkEncoder,
    process: Process,
) -> None:
    """Encode two batches and say what the whole would take."""
    size = min(args.batch_size, 4 * worker.chunk)
    items = data.items[np.arange(size) % len(data.items)]
    images = torch.empty(size, 3, data.images.resolution, data.images.resolution, dtype=torch.uint8)
    data.images.read_into(items, images.numpy())
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        chunked(worker, function, images)
        seconds.append(time.perf_counter() - begin)
    if subject is not None:
        print(f"VAE: {count_parameters(subject.tokenizer)[0]:,} parameters")
    show_plan(data, shape)
    if data.attributes is not None:
        print(f"{len(data.attribute_names)} attributes ({data.kind}), {data.attributes.mean():.1%} positive")
    print(f"{', '.join(args.what)} of {len(data.images.class_names)} classes")
    rate = size / seconds[-1]
    print(
        f"batches of {size}: {seconds[0]:.2f} and {seconds[1]:.2f} s; {rate:.1f} images/s, about "
        f"{len(data.items) / rate / 60:.1f} minutes to encode"
    )
    print(f"peak memory: {peak_memory(process.device)}; nothing was written")


if __name__ == "__main__":
    sys.exit(run(main))
