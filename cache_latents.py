"""Stage 2: a VAE encodes a dataset once; train_ldm.py reads posterior means and deviations.

  python cache_latents.py --data-dir data/imagenet256 --vae exps/sendvae/vae --vae-latents-name latents-sendvae

Makes the folder latents-sendvae in the packed dataset (or any folder, given as a path): latents, latent statistics over
the whole set, a copy of the VAE, and on demand the latents of the mirrored images and VFM features. Any number of
processes work on it, under python, torchrun or accelerate launch; none waits for another. Stopped at any moment, the
same command makes the missing shards, and ends with the same bytes whatever the batch and the number of processes.
Run it again with --hflip, --cache-features or --cache-class-tokens to add these to a complete cache.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from errors import UserError
from files import read_safetensors
from formats.arguments import (
    add_encoder_arguments,
    add_unfinished_argument,
    add_vae_source_arguments,
    add_verify_argument,
)
from formats.run_folders import refuse_unfinished, vae_label
from models.encoders import ENCODERS
from models.tokenizers import architecture_names
from runtime.cli import (
    ArgumentParser,
    add_debug_argument,
    answer_early,
    non_negative_int,
    out_of_memory_means,
    positive_int,
    run,
)
from runtime.repae_flags import default_data_dir

IMAGENET_IMAGES = 1_281_167  # what a dry run without data counts
MAX_DIFFERENCE = 0.02  # of measured latent statistics from the VAE's, above which there is a warning
OUTPUT_FLAG = "--vae-latents-name"
FLAGS = {  # which flag a setting comes from
    "dataset": "--data-dir",
    "vae": "--vae-ckpt",
    "precision": "--mixed-precision or --compile",
    "encoder": "--enc-ckpt",
    "grid": "--features-grid",
    "enc_type": "--enc-type",
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="cache_latents.py", usage="%(prog)s --data-dir DIR --vae DIR [flags]", description=__doc__
    )
    add = parser.add_argument
    add("--data-dir", metavar="DIR", help="packed dataset (default: data, if it is one), a class-folder tree or a zip")
    add(
        "--resolution",
        type=positive_int,
        metavar="PX",
        help="image size, pixels (default: the packed dataset's, or 256)",
    )
    add_vae_source_arguments(parser, default="f16d32")
    add(
        OUTPUT_FLAG,
        metavar="NAME",
        help="folder to make: a name is a folder in the packed --data-dir, anything with a / is a path "
        "(default: latents- and the name of the VAE's run or folder)",
    )
    add("--dtype", choices=("float16", "float32"), default="float16", help="type of what is stored")
    add(
        "--statistics",
        choices=("vae", "measured"),
        default="vae",
        help="what training normalises with: the VAE's latent statistics (where it has none, and always with measured, "
        "those over this dataset)",
    )
    add(
        "--hflip",
        action="store_true",
        help="also encode the mirrored images (twice the size and time; pixels are mirrored when read)",
    )
    add("--cache-features", action="store_true", help="also store VFM features, for small sets (--dry-run: how many)")
    add(
        "--cache-class-tokens",
        action="store_true",
        help="also store the VFM's class token of each image, for train_ldm.py --reg-coeff (2 GB for ImageNet)",
    )
    add_encoder_arguments(parser, default=None)
    add("--features-grid", type=positive_int, metavar="N", help="its tokens along a side (default: resolution / 16)")
    add(
        "--pproc-batch-size",
        "--batch-size",
        type=positive_int,
        default=64,
        metavar="N",
        help="images that a process reads and writes at once, rounded up to the fixed chunks that are encoded; "
        "changes no byte",
    )
    add("--num-workers", type=non_negative_int, default=4, metavar="N", help="reading threads per process")
    add_verify_argument(parser)
    add(
        "--mixed-precision",
        choices=("no", "bf16"),
        default="no",
        help="precision of the networks; a cache is made only once",
    )
    add("--allow-tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 on Ampere and up")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile the networks (default: on CUDA, except in a dry run)",
    )
    add(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="convolution weights in NHWC order (default: on a CPU, and with --compile, where it is faster)",
    )
    add_unfinished_argument(parser)
    add("--dry-run", action="store_true", help="encode two batches; print sizes, bytes, seconds; write nothing")
    add("--random-weights", action="store_true", help="only with --dry-run: build networks without weights")
    add_debug_argument(parser)
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is built."""
    if args.random_weights and not args.dry_run:
        raise UserError("--random-weights is for --dry-run: latents of a random VAE teach nothing")
    if args.random_weights and args.vae in architecture_names():
        args.vae_ckpt = args.vae_ckpt or "none"
    if args.vae_ckpt == "none" and not args.dry_run:
        raise UserError("--vae-ckpt none is for --dry-run: give a trained VAE")
    args.data_dir = args.data_dir or (None if args.dry_run else default_data_dir())
    if not args.dry_run and not args.data_dir:
        raise UserError("--data-dir is needed: a packed dataset (preprocessing.py), a tree of class folders or a zip")
    if needs_vfm(args) and not args.enc_type:
        flag = "--cache-features" if args.cache_features else "--cache-class-tokens"
        raise UserError(f"{flag} needs --enc-type: {', '.join(ENCODERS)}")
    if not needs_vfm(args) and (args.enc_type or args.enc_ckpt or args.features_grid):
        raise UserError(
            "--enc-type, --enc-ckpt and --features-grid belong to --cache-features and --cache-class-tokens; add one"
        )
    if not args.allow_unfinished:
        refuse_unfinished(args.vae, args.vae_ckpt)


def needs_vfm(args: argparse.Namespace) -> bool:
    """Whether something of a VFM is stored."""
    return args.cache_features or args.cache_class_tokens


if __name__ == "__main__":
    answer_early(parse_arguments)

import numpy as np
import torch

from dataset.images import DEFAULT_RESOLUTION, ImageDataset, open_images
from dataset.latents import FLIPPED_NAME, STATISTICS_NAME, class_tokens_name, features_name, latents_folder
from dataset.packing import PackingJob, check_space, given_back_if_refused, sigterm_as_interrupt
from dataset.shards import ShardSpec
from dataset.verification import verify
from formats.vae import load_tokenizer
from inference.latent_cache import (
    Cacher,
    ChunkEncoder,
    MeasuredStatistics,
    Target,
    autocast_for,
    chunk_size,
    features_encoder,
    latents_encoder,
    link_shards,
    linkable_files,
    one_thread_each,
    same_files,
    save_beside,
)
from models.encoders import Encoder, build_encoders, encoder_names
from models.latent_statistics import differences
from models.tokenizers import Tokenizer
from runtime.log import progress_bar
from runtime.measure import count_parameters, peak_memory
from runtime.processes import Process, set_inference_numerics, this_process


@dataclass
class Networks:
    """What encodes.

    Attributes:
        tokenizer: the VAE.
        statistics: where its latent statistics come from; None where it has none.
        keeps_statistics: whether training is to normalise with those, and not with the measured ones.
        encoders: the VFMs of --cache-features and --cache-class-tokens.
    """

    tokenizer: Tokenizer
    statistics: str | None
    keeps_statistics: bool
    encoders: list[Encoder]


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    process = this_process()
    torch.manual_seed(0)  # of the random weights of a dry run
    set_inference_numerics(process, args.mixed_precision, args.allow_tf32)
    images = open_dataset(args, process)
    args.resolution = images.resolution if images is not None else args.resolution or DEFAULT_RESOLUTION
    folder = None if args.dry_run else cache_folder(args)
    networks = build_networks(args, process)
    with (
        out_of_memory_means("free the GPU of other processes, or add --mixed-precision bf16; what is complete is kept"),
        one_thread_each() if process.device.type == "cpu" else nullcontext(1) as threads,
    ):
        if args.dry_run:
            dry_run(args, networks, images, process, threads)
        else:
            targets = build_targets(args, folder, networks, images, process)
            jobs, alone = [target.packing for target in targets], process.world_size == 1
            with sigterm_as_interrupt(), given_back_if_refused(*jobs, alone=alone):
                make_cache(args, folder, networks, images, targets, process, threads)
    return 0


def open_dataset(args: argparse.Namespace, process: Process) -> ImageDataset | None:
    """The images; None in a dry run without them."""
    if not args.data_dir:
        return None
    images = open_images(args.data_dir, args.resolution, default=DEFAULT_RESOLUTION)
    if args.verify:
        verify([images], process.rank, process.world_size)
    return images


def cache_folder(args: argparse.Namespace) -> Path:
    """The folder to make."""
    if args.vae_latents_name is None:
        args.vae_latents_name = f"latents-{vae_label(args.vae_ckpt or args.vae)}"
    folder = latents_folder(args.data_dir, args.vae_latents_name)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{OUTPUT_FLAG} {folder} is a file; give a folder")
    return folder


def build_networks(args: argparse.Namespace, process: Process) -> Networks:
    """VAE and VFM, on the device."""
    if needs_vfm(args):
        args.features_grid = args.features_grid or max(1, args.resolution // 16)
        names = encoder_names(args.enc_type)  # its error comes before a large VAE is read
    tokenizer, statistics = load_tokenizer(args.vae, args.vae_ckpt, args.vae_latents_stats)
    tokenizer.latent_shape(args.resolution)
    encoders = []
    if needs_vfm(args):
        encoders = build_encoders(names, args.features_grid, args.enc_ckpt, args.random_weights)
    if args.compile is None:
        args.compile = process.device.type == "cuda" and not args.dry_run
    if args.channels_last is None:
        args.channels_last = args.compile or process.device.type == "cpu"
    for network in (tokenizer, *encoders):
        network.requires_grad_(False).to(process.device)
        if args.channels_last:
            network.to(memory_format=torch.channels_last)
    if args.compile:
        for network in (tokenizer, *encoders):
            network.compile()
    return Networks(tokenizer, statistics, statistics is not None and args.statistics == "vae", encoders)


def build_targets(
    args: argparse.Namespace, folder: Path, networks: Networks, images: ImageDataset, process: Process
) -> list[Target]:
    """The packed folders of the cache, its latents first."""
    tf32 = process.device.type == "cuda" and args.allow_tf32
    precision = "bf16" if args.mixed_precision == "bf16" else "tf32" if tf32 else "float32"
    common = {
        "dataset": images.fingerprint(),
        "resolution": args.resolution,
        "dtype": args.dtype,
        "precision": precision + (", compiled" if args.compile else ""),  # which moves last bits
    }
    vae, shards = networks.tokenizer, len(images.shard_counts)
    dtype = getattr(torch, latents_dtype(args, vae))
    specs, checksum = build_specs(args, networks), vae.checksum()
    statistics = args.statistics
    if networks.keeps_statistics:
        statistics += f", {vae.statistics.checksum()[:12]}"
    measured: MeasuredStatistics | None = None

    def before_index() -> None:
        save_beside(folder, vae, measured.total(shards), networks.keeps_statistics)

    def packing(part: Path, what: str, settings: dict) -> PackingJob:
        return PackingJob(part, specs[what], common | settings, OUTPUT_FLAG, FLAGS)

    targets = []
    for flipped in (False, True) if args.hflip and not vae.stores_images else (False,):
        settings = {"vae": checksum, "flipped": flipped} | ({} if flipped else {"statistics": statistics})
        if vae.stores_images:  # no number is made
            settings |= dict.fromkeys(("dtype", "precision"), latents_dtype(args, vae))
        job = packing(folder / FLIPPED_NAME if flipped else folder, "latents", settings)
        encode, name = latents_encoder(vae, dtype), "mirrored latents" if flipped else "latents"
        if flipped:
            targets.append(Target(name, job, encode, flipped, images.class_names))
        else:
            measured = MeasuredStatistics(job, vae)
            targets.append(Target(name, job, encode, flipped, images.class_names, before_index, measured.shard))
    for seen in vfm_parts(args, networks):
        encoder = seen.encoder
        settings = {"enc_type": encoder.name, "grid": encoder.grid, "encoder": encoder.checksum()}
        for flipped in (False, True) if args.hflip else (False,):
            job = packing(folder / seen.folder_name(encoder.name, flipped), seen.name, settings | {"flipped": flipped})
            name = f"mirrored {seen.name}" if flipped else seen.name
            targets.append(Target(name, job, seen.encode, flipped, images.class_names, part=seen.part))
    return targets


class VFMPart(NamedTuple):
    """What is stored of a VFM: its patch tokens, or its class token.

    Attributes:
        name: in what is printed.
        encoder: the VFM.
        encode, part: as of a :class:`Target`.
        spec: of an item.
        folder_name: (name of the VFM, whether mirrored) → the sub-folder.
    """

    name: str
    encoder: Encoder
    encode: Callable[[torch.Tensor], torch.Tensor]
    part: int | slice | None
    spec: ShardSpec
    folder_name: Callable[[str, bool], str]


def vfm_parts(args: argparse.Namespace, networks: Networks) -> list[VFMPart]:
    """Of each VFM, with a single pass through it."""
    parts = []
    for encoder in networks.encoders:
        of = f" of {encoder.name}" if len(networks.encoders) > 1 else ""
        encode = features_encoder(encoder, getattr(torch, args.dtype), args.cache_class_tokens)
        if args.cache_features:
            spec = ShardSpec("features", (encoder.grid**2, encoder.embed_dim), args.dtype)
            patches = slice(1, None) if args.cache_class_tokens else None
            parts.append(VFMPart(f"features{of}", encoder, encode, patches, spec, features_name))
        if args.cache_class_tokens:
            spec = ShardSpec("class-tokens", (encoder.embed_dim,), args.dtype)
            parts.append(VFMPart(f"class tokens{of}", encoder, encode, 0, spec, class_tokens_name))
    return parts


def latents_dtype(args: argparse.Namespace, tokenizer: Tokenizer) -> str:
    """Type of the latents' shards: pixels are stored as they are."""
    return "uint8" if tokenizer.stores_images else args.dtype


def build_specs(args: argparse.Namespace, networks: Networks) -> dict[str, ShardSpec]:
    """What an item is, of the latents and of what is stored of each VFM."""
    vae = networks.tokenizer
    latents = ShardSpec("latents", vae.stored_shape(args.resolution), latents_dtype(args, vae))
    return {"latents": latents} | {seen.name: seen.spec for seen in vfm_parts(args, networks)}


def make_cache(
    args: argparse.Namespace,
    folder: Path,
    networks: Networks,
    images: ImageDataset,
    targets: Sequence[Target],
    process: Process,
    threads: int,
) -> None:
    """Make what is missing of this process's shards, complete what is complete, say what came out."""
    complete = [target.packing.begin() for target in targets]
    shards = len(images.shard_counts)
    files, show = None, print if process.is_main else lambda text: None
    if networks.tokenizer.stores_images and not complete[0]:
        files = linkable_files(targets[0], images, show)
    if process.is_main:
        show_plan(folder, targets if files is None else targets[1:], images)
    if files is not None and link_shards(targets[0], files, targets[0].packing.missing(process.share(shards)), show):
        show(f"latents: links to the files of {args.data_dir}, which take no space")
    todo = sorted({number for target in targets for number in target.packing.missing(process.share(shards))})
    if process.is_main:
        if todo and networks.statistics is None:
            print("the VAE has no latent statistics: they are computed over this dataset, by all processes")
        elif todo:
            print(f"the VAE's latent statistics are those of {networks.statistics}")
    count = sum(images.shard_counts[number] for number in todo)
    cacher = Cacher(
        images,
        targets,
        ChunkEncoder(
            process.device,
            chunk_size(args.resolution, process.device),
            threads,
            autocast_for(process.device, args.mixed_precision),
        ),
        batch_size=args.pproc_batch_size,
        num_workers=args.num_workers,
        pin_memory=process.device.type == "cuda",
    )
    begin = time.perf_counter()
    if todo:
        with progress_bar(count, 0, "caching", "img", process.is_main) as progress:
            cacher.run(todo, progress)
    seconds = time.perf_counter() - begin
    if files is not None:
        measure_links(targets[0], images, process)
    completed = [target.finish(shards) for target in targets]
    if completed[0]:
        MeasuredStatistics(targets[0].packing, networks.tokenizer).tidy_up()
    if count:
        print(
            f"process {process.rank} of {process.world_size}: {count} images in {seconds:.1f} s, "
            f"{count / seconds:.1f} images/s"
        )
    if not all(completed):
        if process.is_main:
            print(f"{folder}: this process's shards are complete; whoever comes last completes the cache")
    elif process.is_main or not all(complete):
        report(folder, targets, len(images), networks)


def measure_links(target: Target, images: ImageDataset, process: Process) -> None:
    """The statistics of this process's shards, which nobody has gone through, also of those of a call before."""
    shards = process.share(len(images.shard_counts))
    count = sum(images.shard_counts[number] for number in shards)
    with progress_bar(count, 0, "measuring", "img", process.is_main) as progress:
        for number in shards:
            target.after_shard(number)
            progress.update(images.shard_counts[number])


def show_plan(folder: Path, targets: Sequence[Target], images: ImageDataset) -> None:
    """Bytes needed and free."""
    needed = 0
    for target in targets:
        missing = target.packing.missing(range(len(images.shard_counts)))
        count = sum(images.shard_counts[number] for number in missing)
        needed += count * target.packing.spec.item_bytes
        if count:
            print(describe_bytes(target.name, target.packing.spec, count))
    if needed:
        check_space(folder, needed, "take --dtype float16 (not of pixels), or leave out --hflip or --cache-features")


def describe_bytes(name: str, spec: ShardSpec, count: int) -> str:
    total = count * spec.item_bytes
    shape = " × ".join(str(side) for side in spec.shape)
    return f"{name}: {count} items of {shape} {spec.dtype}, {total} bytes ({total / 1e9:.2f} GB)"


def report(folder: Path, targets: Sequence[Target], count: int, networks: Networks) -> None:
    """What the complete cache is, and how its statistics compare with those the VAE came with."""
    size = sum(target.packing.spec.item_bytes for target in targets) * count
    print(f"{folder} is complete: {count} images, {', '.join(target.name for target in targets)}, {size} bytes")
    if networks.tokenizer.stores_images:
        return
    if networks.statistics is None:
        print("the VAE came without latent statistics; the measured ones are stored with the cache's copy of it")
        return
    expected = networks.tokenizer.statistics.tensors()
    mean, std = differences(read_safetensors(folder / STATISTICS_NAME), expected)
    text = f"the VAE's by at most {100 * mean:.2f} % of a std in the mean and {100 * std:.2f} % in the std"
    if not networks.keeps_statistics:
        print(f"training will normalise with the latent statistics of this dataset; they differ from {text}")
    elif max(mean, std) > MAX_DIFFERENCE:
        print(
            f"WARNING: latent statistics over this dataset differ from {text}; training will normalise with the VAE's; "
            "to take those of this dataset, make the cache with --statistics measured",
            file=sys.stderr,
        )
    else:
        print(f"latent statistics over this dataset differ from {text}")


def dry_run(
    args: argparse.Namespace, networks: Networks, images: ImageDataset | None, process: Process, threads: int
) -> None:
    """Encode two batches and say what the whole would take."""
    count = IMAGENET_IMAGES if images is None else len(images)
    vae = networks.tokenizer
    dtype = getattr(torch, latents_dtype(args, vae))
    specs, encoders = build_specs(args, networks), {"latents": (latents_encoder(vae, dtype), None)}
    encoders |= {seen.name: (seen.encode, seen.part) for seen in vfm_parts(args, networks)}
    chunk = chunk_size(args.resolution, process.device)
    size = -(-min(args.pproc_batch_size, 4 * chunk * threads) // chunk) * chunk
    batch = torch.randint(0, 256, (size, 3, args.resolution, args.resolution), dtype=torch.uint8)
    if images is not None:
        images.read_into(np.arange(size) % len(images), batch.numpy())
    flips = (False, True) if args.hflip else (False,)
    flips_of = {name: flips if name != "latents" or not vae.stores_images else (False,) for name in encoders}
    targets = [
        Target(name, None, encode, flipped, (), part=part)
        for name, (encode, part) in encoders.items()
        for flipped in flips_of[name]
    ]
    worker = ChunkEncoder(process.device, chunk, threads, autocast_for(process.device, args.mixed_precision))
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        worker.start(batch, targets)()
        seconds.append(time.perf_counter() - begin)
    worker.close()
    if not process.is_main:
        return
    for name, network in (("VAE", vae), *((f"VFM {encoder.name}", encoder) for encoder in networks.encoders)):
        print(f"{name}: {count_parameters(network)[0]:,} parameters")
    for name, spec in specs.items():
        for flipped in flips_of[name]:
            print(describe_bytes(f"mirrored {name}" if flipped else name, spec, count))
    if images is not None and vae.stores_images and same_files(specs["latents"], images):
        print(f"latents take no space beside {args.data_dir} on its file system: they are links to its files")
    rate = size / seconds[-1] * process.world_size
    print(
        f"batches of {size} in chunks of {chunk}: {seconds[0]:.2f} and {seconds[1]:.2f} s; {rate:.2f} images/s with "
        f"{process.world_size} processes, about {count / rate / 3600:.2f} hours for {count} images"
    )
    print(f"peak memory: {peak_memory(process.device)}; nothing was written")


if __name__ == "__main__":
    sys.exit(run(main))
