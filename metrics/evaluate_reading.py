"""What evaluate.py reading does."""

import argparse
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch

from dataset.images import ImageDataset
from errors import UserError
from inference.latent_cache import ChunkEncoder, autocast_for, chunk_size, one_thread_each
from metrics.encoding import encode_dataset
from metrics.features import build_vfm
from metrics.probe_data import ProbeData, open_probe_data
from metrics.reading import CLEAR, Readers, questions_of
from metrics.record import Measurement, check_name, default_name, write_record
from metrics.sources import ImageSet, open_image_set
from models.encoders import Encoder
from runtime.log import progress_bar
from runtime.processes import Process, set_inference_numerics, this_process

KIND = "reading"


def run(args: argparse.Namespace) -> int:
    process = this_process()
    if process.world_size > 1:
        raise UserError("evaluate.py reading is one process, whatever the number of GPUs: start it with python")
    set_inference_numerics(process, "no", allow_tf32=False)
    check_name(args.name)
    samples = open_image_set(args.samples, "--samples")
    count = samples.count(args.num_samples)
    resolution = samples.images.resolution
    data = open_probe_data(args.data, None, default=resolution, max_images=args.max_images, seed=args.seed)
    if data.images.resolution != resolution:
        raise UserError(f"{samples} has {resolution} px, --data {args.data} {data.images.resolution} px; give the same")
    questions = questions_of(data)
    if not questions:
        raise UserError(f"--data {args.data} has neither several classes nor attributes: there is nothing to read")
    usual = "-".join([KIND, *samples.own_name, args.features]).replace("/", "-")
    name = args.name or default_name(samples.metrics_folder, usual, args.data, data.images.fingerprint)
    encoder = build_vfm(args.features, args.features_grid, args.enc_ckpt).to(process.device)
    asked = asked_classes(samples, data, count)
    if args.dry_run:
        asking = ", ".join(question.name for question in questions)
        print(f"{count} images of {samples.path}; {encoder.name} on {len(data.items)} images of {args.data} ({asking})")
        print(f"would write {name}.json")
        return 0
    encode = encoder_of(args, encoder, resolution, process)
    readers = Readers(encode(data.images, data.items, "real images"), data, questions, process.device)
    values = readers.read(encode(samples.images, np.arange(count), "samples"), asked)
    found = measurement(args, name, samples, data, encoder, values, count)
    path = write_record(found, samples.metrics_folder)
    print(f"{count} images of {samples.path}, read by {encoder.name} as trained on {args.data}:\n{table(values)}")
    print(f"written to {path}")
    return 0


def encoder_of(
    args: argparse.Namespace, encoder: Encoder, resolution: int, process: Process
) -> Callable[[ImageDataset, np.ndarray, str], torch.Tensor]:
    """What turns items of a dataset into flattened patch features ``[n, grid² · D]``."""
    size = encoder.grid**2 * encoder.embed_dim

    def encode(images: ImageDataset, items: np.ndarray, what: str) -> torch.Tensor:
        with one_thread_each() if process.device.type == "cpu" else nullcontext(1) as threads:
            chunk = chunk_size(resolution, process.device)
            worker = ChunkEncoder(process.device, chunk, threads, autocast_for(process.device, "no"))
            with progress_bar(len(items), 0, what, "img", True) as progress:
                features = encode_dataset(
                    images, items, lambda pixels: encoder(pixels).flatten(1), (size,), worker,
                    batch_size=args.batch_size, num_workers=args.num_workers, progress=progress,
                )  # fmt: skip
            worker.close()
        return features

    return encode


def asked_classes(samples: ImageSet, data: ProbeData, count: int) -> list[str] | None:
    """The name of the class that each sample was made as; None where they have none.

    Raises:
        UserError: classes that --data does not know.
    """
    images = samples.images
    if len(images.class_names) < 2:
        return None
    if unknown := sorted(set(images.class_names) - set(data.images.class_names)):
        if len(data.images.class_names) < 2:
            return None
        raise UserError(
            f"{samples} has class {unknown[0]}, which --data does not have; give the data it was trained on"
        )
    return [images.class_names[label] for label in images.labels[:count]]


def measurement(
    args: argparse.Namespace,
    name: str,
    samples: ImageSet,
    data: ProbeData,
    encoder: Encoder,
    values: dict[str, float],
    count: int,
) -> Measurement:
    """What is written next to the samples."""
    return Measurement(
        name=name,
        kind=KIND,
        values=values,
        count=count,
        subject=samples.describe(),
        reference={"path": str(args.data), "count": len(data.items), "fingerprint": data.images.fingerprint()},
        extractor={"name": encoder.name, "weights_sha256": encoder.checksum()},
        settings={"grid": encoder.grid, "seed": args.seed, "clear": CLEAR, "split": data.counts()},
    )


def table(values: dict[str, float]) -> str:
    """A line a question."""
    names = [key.removeprefix("clear-") for key in values if key.startswith("clear-")]
    width = max(map(len, names))
    lines = []
    for name in names:
        asked = f"{values[f'asked-{name}']:6.1%} as asked, " if f"asked-{name}" in values else ""
        clear, held_out = values[f"clear-{name}"], values[f"held-out-{name}"]
        lines.append(
            f"  {name:{width}}  {asked}{clear:6.1%} clear  (of held-out real images {held_out:.1%} read rightly)"
        )
    return "\n".join(lines)
