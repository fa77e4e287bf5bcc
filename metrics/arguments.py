"""Flags of evaluate.py and of what else measures; needs no torch."""

import argparse
import os
from pathlib import Path

from formats.arguments import add_unfinished_argument, add_vae_source_arguments
from runtime.cli import add_debug_argument, non_negative_int, positive_int

INCEPTION, DINOV2 = "inception", "DINOv2"
FEATURES_FLAG, CHECKPOINT_FLAG = "--features", "--enc-ckpt"
INCEPTION_FLAG = "--inception-ckpt"
FDR_PREFIX = "FDr/"
FDR_NETWORKS = (INCEPTION, *(FDR_PREFIX + name for name in ("convnext", "dinov2", "mae", "siglip", "clip")))
GENERATION_METRICS = ("fid", "sfid", "is", "pr", "kid", "mind")
SWEEP_METRICS = ("fid", "mind")  # by which generate.py --sweep chooses, the default first; metrics.sweep.MEASURES
RECONSTRUCTION_METRICS = ("rfid", "psnr", "ssim", "lpips-alex", "lpips-vgg")
LPIPS_FLAGS = {"alex": "--lpips-alex-ckpt", "vgg": "--lpips-ckpt"}
TRUNK_NAMES = {"alex": "AlexNet", "vgg": "VGG16"}
GENERATION_HELP = "generated images against a reference: FID, sFID, Inception Score, Precision, Recall, KID, MIND"
GENERATION_DESCRIPTION = """Compare generated images with a reference.

  python evaluate.py generation --samples exps/ldm/samples-… --ref VIRTUAL_imagenet256_labeled.npz

Samples and reference are an .npz (arr_0, uint8 [N, H, W, 3]; of a reference also mu, sigma, mu_s, sigma_s, as ADM's
have them), a folder of images, a packed dataset, or what generate.py made. For --metrics fid the reference may be an
.npz of mu and sigma alone, also of another network of --features. Any number of processes share the work. The values go
into metrics/NAME.json: in a packed folder, or next to an .npz. A plain folder of images stays as it is: its values go
into FOLDER.metrics/NAME.json next to it."""
RECONSTRUCTION_HELP = "a VAE on held-out images: rFID, PSNR, SSIM, LPIPS"
RECONSTRUCTION_DESCRIPTION = """Reconstruct held-out images with a VAE and compare.

  python evaluate.py reconstruction --vae exps/sendvae/vae --data data/imagenet256-val
  python evaluate.py reconstruction --vae exps/sendvae/vae --data data/imagenet256-val,data/coco512-val

Writes to the VAE's metrics folder (of DIR/FILE: DIR/metrics): NAME.json, NAME.csv (a row an image) and NAME-worst.png
(originals above their reconstructions, the worst first). Reconstructions are compared as 8-bit images, clamped and
rounded; the reference of rFID are the originals of the very images that are reconstructed. Any number of processes
share the work; neither their number nor the batch changes a value.

Several sets are measured one after the other, each as a command of its own would, and a table follows. Their sides may
differ, and differ from that of the VAE's training."""
FDR_HELP = "generated images against a reference, by six networks at once: FDr6"
FDR_DESCRIPTION = """FDr6 (arXiv 2604.28190): Fréchet distances of generated images, in multiples of real ones'.

  python evaluate.py fdr --samples exps/ldm/samples-… --ref data/fid_stats
  python evaluate.py fdr --samples exps/ldm/samples-… --ref data/imagenet256 --val data/imagenet256-val

The mean over networks of FD(samples, reference) / FD(validation set, reference). --ref is a folder with the authors'
statistics of ImageNet's training set (huggingface.co/jjiaweiyang/FD-Loss, data/fid_stats) or images. Without --val the
denominators are the published ones: they hold for those statistics and 50,000 samples of 256 px alone. All networks'
weights are looked for (in $VFM_DIR and the caches) before the first image is read; then one network after the other
goes over the images. The values go into metrics/NAME.json; interrupted, the same command measures again, but what is
known of --ref and --val is kept. Any number of processes share the work."""
READING_HELP = "what a linear reader finds in generated images: the class asked for, clear attributes"
READING_DESCRIPTION = """Read generated images with linear probes trained on labelled real ones.

  python evaluate.py reading --samples exps/ldm/samples-… --data data/toy --features efficientnet-lite0

--data are real images with classes or attributes (attributes.csv, CelebA, DeepFashion, AwA2). A probe on a VFM's patch
features is fitted to each column, and its accuracy on held-out real images printed. Of the samples: the share whose
class is read as it was asked for, and of each column the share whose value is read as surely as in 99 % of real images.
The values go into metrics/NAME.json, in or next to the samples."""
OTHER_NETWORKS = (
    "DINOv2: the class token of ViT-L/14, for FD-DINOv2; a name of --enc-type: the mean of its patch tokens; "
    "FDr/convnext, dinov2, mae, siglip or clip: those of FDr6, in bf16; or timm/NAME"
)
NAME_HELP = (
    "of the file metrics/NAME.json, which is replaced (default: generation, and --features if given; where that is "
    "there already, against another reference, the reference's name behind it)"
)


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    sets = parser.add_argument_group("what is compared")
    add_samples_arguments(sets)
    sets.add_argument("--ref", type=Path, required=True, metavar="PATH", help=".npz, folder or packed dataset")
    add_metric_arguments(parser.add_argument_group("metrics"))
    output = parser.add_argument_group("output and speed")
    output.add_argument("--name", help=NAME_HELP)
    _add_pass_arguments(output)
    output.add_argument("--seed", type=non_negative_int, default=0, metavar="N", help="seed of KID's and MIND's draws")
    add_debug_argument(output)


def add_fdr_arguments(parser: argparse.ArgumentParser) -> None:
    sets = parser.add_argument_group("what is compared")
    add_samples_arguments(sets)
    sets.add_argument(
        "--ref", type=Path, required=True, metavar="PATH", help="released statistics, .npz, folder or packed dataset"
    )
    sets.add_argument(
        "--val", type=Path, metavar="PATH", help="real held-out images, for the denominators (default: published FDs)"
    )
    group = parser.add_argument_group("networks")
    group.add_argument(
        "--networks",
        type=_networks,
        default=",".join(map(network_label, FDR_NETWORKS)),
        metavar="A,B,…",
        help=f"some of %(default)s (the default: FDr6), or other names of {FEATURES_FLAG}, which need --val",
    )
    _add_inception_argument(group)
    group.add_argument(
        "--ref-cache", type=Path, metavar="DIR", help="keeps the statistics of --ref and --val (default: next to each)"
    )
    output = parser.add_argument_group("output and speed")
    output.add_argument("--name", help="name of the file metrics/NAME.json, which is replaced (default: fdr)")
    _add_pass_arguments(output)
    add_debug_argument(output)


def network_label(features: str) -> str:
    """What ``--networks`` and tables call a network of ``--features``."""
    return features.removeprefix(FDR_PREFIX) if features in FDR_NETWORKS else features


def _networks(text: str) -> list[str]:
    """Names as ``--features`` has them."""
    names = [part.strip() for part in text.split(",")]
    names = [FDR_PREFIX + name if FDR_PREFIX + name in FDR_NETWORKS else _canonical(name) for name in names]
    if "" in names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text}: an entry is empty or given twice; give A,B,…")
    return names


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    sets = parser.add_argument_group("what is read")
    add_samples_arguments(sets)
    sets.add_argument("--data", type=Path, required=True, metavar="DIR", help="real images with classes or attributes")
    sets.add_argument("--max-images", type=positive_int, metavar="N", help="of --data, evenly spread (default: all)")
    reader = parser.add_argument_group("reader")
    reader.add_argument(FEATURES_FLAG, default="dinov2-vit-b", metavar="NAME", help="VFM, a name of --enc-type")
    reader.add_argument("--features-grid", type=positive_int, default=4, metavar="N", help="its tokens along a side")
    reader.add_argument(CHECKPOINT_FLAG, metavar="FILE", help="its weights (default: searched)")
    reader.add_argument(
        "--seed", type=non_negative_int, default=0, metavar="N", help="seed of the split, where --data has none"
    )
    output = parser.add_argument_group("output and speed")
    output.add_argument(
        "--name", help="name of the file metrics/NAME.json (default: reading-FEATURES, of an .npz reading-NPZ-FEATURES)"
    )
    output.add_argument("--batch-size", type=positive_int, default=64, metavar="N", help="images read at once")
    output.add_argument("--num-workers", type=non_negative_int, default=4, metavar="N", help="reading threads")
    output.add_argument("--dry-run", action="store_true", help="say what would be read, by what; write nothing")
    add_debug_argument(output)


def _add_inception_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        INCEPTION_FLAG, metavar="FILE", help="weights-inception-2015-12-05-6726825d.pth (default: torch's hub cache)"
    )


def _add_pass_arguments(group: argparse._ArgumentGroup) -> None:
    """How sets of images are gone through."""
    group.add_argument("--batch-size", type=positive_int, default=64, metavar="N", help="images at once on a process")
    group.add_argument("--num-workers", type=non_negative_int, default=4, metavar="N", help="reading threads")
    group.add_argument(
        "--dry-run", action="store_true", help="two batches, random weights if need be; print sizes; write nothing"
    )


def add_samples_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--samples", type=Path, required=True, metavar="PATH", help=".npz, folder, packed dataset, or run with samples"
    )
    group.add_argument("--num-samples", type=positive_int, metavar="N", help="the first N of them (default: all)")


def _canonical(name: str) -> str:
    return DINOV2 if name.lower() == DINOV2.lower() else name


def add_metric_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags that generate.py has too."""
    group.add_argument(
        "--metrics",
        metavar="A,B,…",
        help=f"some of {', '.join(GENERATION_METRICS)} (default: all that --features allows)",
    )
    group.add_argument(
        FEATURES_FLAG,
        type=_canonical,
        default=INCEPTION,
        metavar="NAME",
        help=f"whose features: inception; {OTHER_NETWORKS}. All but inception give FD-NAME, not FID",
    )
    _add_inception_argument(group)
    group.add_argument(
        CHECKPOINT_FLAG, metavar="FILE", help="weights of another network of --features (default: searched)"
    )
    group.add_argument(
        "--ref-cache",
        type=Path,
        metavar="DIR",
        help="keeps features of the reference (default: REF.features, next to it)",
    )


def add_reconstruction_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is compared")
    add_vae_arguments(group)
    add = group.add_argument
    add(
        "--data",
        "--data-dir",
        type=_sets,
        metavar="A,B,…",
        help="held-out images: packed dataset, class-folder tree or zip; several separated by commas (a text that is a "
        "path as it stands is one set)",
    )
    add("--resolution", type=positive_int, metavar="PX", help="side, pixels (default: a packed dataset's own, or 256)")
    add("--num-images", type=positive_int, metavar="N", help="evenly spread over a set (default: all)")
    add("--sample", action="store_true", help="reconstruct from a sample of the posterior instead of its mean")
    add("--seed", type=non_negative_int, default=0, metavar="N", help="seed of the samples' noise")
    group = parser.add_argument_group("metrics")
    add = group.add_argument
    add(
        "--metrics",
        metavar="A,B,…",
        help=f"some of {', '.join(RECONSTRUCTION_METRICS)} (default: all whose networks have weights)",
    )
    add(
        FEATURES_FLAG,
        type=_canonical,
        metavar="NAME",
        help=f"whose features rFID compares: inception (the default); {OTHER_NETWORKS}. All but inception give "
        "rFD-NAME, not rFID",
    )
    _add_inception_argument(group)
    add(CHECKPOINT_FLAG, metavar="FILE", help="weights of another network of --features (default: searched)")
    for net, flag in LPIPS_FLAGS.items():
        add(flag, metavar="FILE", help=f"torchvision's {TRUNK_NAMES[net]} for LPIPS (default: torch's hub cache)")
    add(
        "--ref-cache",
        type=Path,
        metavar="DIR",
        help="keeps what rFID needs of a whole set's originals (default: SET.features, next to it)",
    )
    group = parser.add_argument_group("output and speed")
    add_output_arguments(group)
    add = group.add_argument
    add(
        "--name",
        help="name of the files that are written or replaced (default: reconstruction, for a VAE in a file "
        "followed by its name; where that exists for other --data, also by theirs); with several sets those after the "
        "first are NAME-DATA",
    )
    add("--worst", type=non_negative_int, default=16, metavar="N", help="images in NAME-worst.png; 0: no such file")
    add("--batch-size", type=positive_int, default=64, metavar="N", help="images read at once; changes no value")
    add("--num-workers", type=non_negative_int, default=4, metavar="N", help="reading threads a process")
    add("--mixed-precision", choices=("no", "bf16"), default="no", help="precision of the VAE")
    add("--allow-tf32", action=argparse.BooleanOptionalAction, default=False, help="TF32 on Ampere and up")
    add("--dry-run", action="store_true", help="two batches; print sizes, seconds and memory; write nothing")
    add_debug_argument(group)


def _sets(text: str) -> list[Path]:
    """``A,B`` → the paths; a text that is itself a path, commas and all, is that path."""
    if not text:
        return []
    parts = [text] if os.path.exists(text) else text.split(",")
    if "" in parts:
        raise argparse.ArgumentTypeError(f"{text}: an entry is empty; give A,B")
    paths = [Path(part) for part in parts]
    if len({path.resolve() for path in paths}) < len(paths):
        raise argparse.ArgumentTypeError(f"{text}: a set is given twice")
    return paths


def add_vae_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The VAE's flags; random weights (``--vae-ckpt none``) are a baseline, drawn from ``--seed``."""
    add_vae_source_arguments(parser, default=None, several=several)
    add_unfinished_argument(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-dir", metavar="DIR", help="write to DIR/metrics (default: next to the VAE: that of its run or folder)"
    )
