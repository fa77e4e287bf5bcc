"""What probe.py measures of a data set's latents, one function each; they return values and what these depend on."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.attributes import TEST, TRAIN, VALIDATION
from diffusion.counted_noise import counted_integers
from errors import UserError
from files import write_atomically
from metrics.latent_space import PLANE_POINTS, discrimination, uniformity
from metrics.probe_data import ProbeData
from metrics.probing import (
    PENALTIES,
    ProbeFeatures,
    attribute_scores,
    choose_probe,
    class_scores,
    each_attribute,
    standardisation,
)
from runtime.log import progress_bar

IMAGES_PER_COMPONENT = 10  # of a mixture, at least
CHANCE_CLASSES = 100  # up to so many classes, a mixture with as many components is fitted too


@dataclass(frozen=True)
class Latents:
    """A data set's latents.

    Attributes:
        values: float32 ``[N, C, h, w]``, normalised per channel, on the CPU.
        data: the images that they are of, in the same order.
        device: where probes are fitted.
        seed: of everything that is drawn.
    """

    values: Tensor
    data: ProbeData
    device: torch.device
    seed: int


@dataclass(frozen=True)
class Outcome:
    """``values`` by name (None: undefined), ``settings`` they depend on, and ``files`` to write next to the record."""

    values: dict[str, float | None]
    settings: dict = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


def probe_attributes(latents: Latents) -> Outcome:
    """A linear probe of all binary attributes on the flattened latent."""
    data = latents.data
    check_attributes(data)
    scores, settings = _probe(latents, torch.from_numpy(data.attributes), len(data.attribute_names), "attributes")
    targets = data.attributes[data.part(TEST)]
    values = attribute_scores(scores, targets)
    values["positives"] = float(targets.mean())
    table = _attribute_table(data.attribute_names, scores, targets)
    settings |= {"attributes": len(data.attribute_names), "attributes_of": data.kind, "threshold": 0.5}
    settings["attributes_in_test"] = int(targets.any(0).sum())
    return Outcome(values, settings, {".csv": table})


def probe_classes(latents: Latents) -> Outcome:
    """A linear probe (softmax) of the class on the flattened latent."""
    data = latents.data
    classes = len(data.images.class_names)
    check_classes(data)
    scores, settings = _probe(latents, torch.from_numpy(data.labels), classes, "classes")
    labels = data.labels[data.part(TEST)]
    values = class_scores(scores, labels)
    values["most-frequent"] = float(np.bincount(labels).max() / len(labels))  # what a constant answer would reach
    return Outcome(values, settings | {"classes": classes})


def probe_uniformity(latents: Latents, points: int, with_tsne: bool = True) -> Outcome:
    """Evenness of the latent vectors at one random position of each of ``points`` images, as VA-VAE samples them."""
    check_points(latents.data, points)
    vectors = one_vector_an_image(latents, points)
    values = uniformity(vectors.numpy(), latents.seed, with_tsne)
    return Outcome(values, {"points": len(vectors), "channels": vectors.shape[1]})


def one_vector_an_image(latents: Latents, points: int) -> Tensor:
    """The latent vectors at one random position of each of ``points`` images, ``[≤ points, C]``."""
    places = spread(len(latents.values), points)
    height, width = latents.values.shape[2:]
    numbers = torch.from_numpy(latents.data.items[places])
    positions = counted_integers(latents.seed, numbers, height * width)
    return latents.values[places].flatten(2)[torch.arange(len(places)), :, positions]


def probe_discrimination(latents: Latents, points: int, components: Sequence[int] | None) -> Outcome:
    """Fit of Gaussian mixtures to the flattened latents, see :func:`metrics.latent_space.discrimination`."""
    data = latents.data
    train, test, components = plan_mixtures(data, points, components)
    flat = latents.values.flatten(1).numpy()
    values = discrimination(flat[train], flat[test], data.labels[train], data.labels[test], components, latents.seed)
    return Outcome(values, {"train_images": len(train), "test_images": len(test), "components": list(components)})


def check_attributes(data: ProbeData) -> None:
    """Refuse data whose attributes cannot be probed."""
    if data.attributes is None:
        raise UserError("--data has no attributes; give a folder with attributes.csv, CelebA, DeepFashion or AwA2")
    if not data.attributes[data.part(TEST)].any():
        raise UserError("no image of the test set has any attribute: there is nothing to find; give more images")


def check_classes(data: ProbeData) -> None:
    """Refuse data whose classes cannot be probed."""
    if len(np.unique(data.labels)) < 2:
        raise UserError("the images of --data are all of one class; class probing needs class folders or labels")


def check_points(data: ProbeData, points: int) -> None:
    """Refuse fewer images than uniformity is defined for."""
    if points < PLANE_POINTS:
        raise UserError(f"--num-points {points}: uniformity needs at least {PLANE_POINTS}")
    if len(data.items) < PLANE_POINTS:
        raise UserError(f"uniformity needs at least {PLANE_POINTS} images, there are {len(data.items)}; give more")


def plan_mixtures(
    data: ProbeData, points: int, components: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Places of the training and test images that mixtures are fitted to, and the numbers of components.

    Raises:
        UserError: too few images.
    """
    train, test = (places[spread(len(places), points)] for places in (data.part(TRAIN), data.part(TEST)))
    if components is None:
        classes = len(np.unique(data.labels))
        wanted = {10, 50, 100} | ({classes} if 1 < classes <= CHANCE_CLASSES else set())
        components = sorted(count for count in wanted if count * IMAGES_PER_COMPONENT <= len(train))
    elif max(components) > len(train):
        raise UserError(
            f"--components {max(components)}: there are {len(train)} training images; give fewer components"
        )
    if not components or len(test) < 2:
        raise UserError(f"a mixture cannot be fitted to {len(train)} training images; give more images")
    return train, test, list(components)


def spread(available: int, wanted: int) -> np.ndarray:
    """Up to ``wanted`` numbers of 0…available − 1, evenly spread."""
    return np.linspace(0, available - 1, min(wanted, available)).round().astype(np.int64)


def _probe(latents: Latents, targets: Tensor, outputs: int, name: str) -> tuple[np.ndarray, dict]:
    """Logits of the test images ``[n, outputs]``, and how the probe was chosen."""
    data, flat = latents.data, latents.values.flatten(1)
    parts = {code: data.part(code) for code in (TRAIN, VALIDATION, TEST)}
    mean, scale = standardisation(flat, parts[TRAIN])
    train, validation, test = (ProbeFeatures(flat, places, mean, scale, latents.device) for places in parts.values())
    with progress_bar(len(PENALTIES), 0, f"probing {name}", "fit", True) as progress:
        chosen = choose_probe(
            train,
            targets[parts[TRAIN]],
            validation,
            targets[parts[VALIDATION]],
            outputs,
            after_each=progress.update,
        )
    settings = {
        "penalty": chosen.penalty,
        "validation_losses": {str(penalty): loss for penalty, loss in chosen.losses.items()},
        "dimensions": flat.shape[1],
        "split": data.counts(),
        "split_as_given": data.splits_as_given,
    }
    return chosen.probe.scores(test).numpy(), settings


def _attribute_table(names: Sequence[str], scores: np.ndarray, targets: np.ndarray) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("attribute", "test images that have it", "F1", "average precision"))
    for name, count, f1, precision in zip(names, targets.sum(0), *each_attribute(scores, targets), strict=True):
        writer.writerow((name, count, f"{f1:.4f}", f"{precision:.4f}"))
    return text.getvalue().encode()


def write_files(outcome: Outcome, folder: Path, name: str) -> None:
    """Write the outcome's files as ``NAME`` with their endings."""
    for ending, content in outcome.files.items():
        write_atomically(folder / f"{name}{ending}", content)
