"""Pictures of latents: their principal colours, a map of the images by class, the way from one image to another."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from files import as_os_error, whole_file
from metrics.latent_space import PrincipalComponents, interpolate, principal_colours
from metrics.probes import spread
from runtime.pictures import save_grid

MAP_CLASSES = 20  # at most so many get a colour


def save_colours(path: Path, originals: Tensor, latents: Tensor, columns: int = 8) -> float:
    """Originals above their latents' principal colours, enlarged; returns the share of the variance that these show.

    Args:
        path: the PNG.
        originals: uint8 ``[n, 3, H, W]``.
        latents: float ``[n, C, h, w]``, h dividing H.
        columns: images in a row.
    """
    colours, explained = principal_colours(latents.numpy())
    factor = originals.shape[-1] // latents.shape[-1]
    enlarged = torch.from_numpy(colours).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    columns = min(columns, len(originals))
    whole = len(originals) // columns * columns
    rows = zip(originals[:whole].split(columns), enlarged[:whole].split(columns), strict=True)
    save_grid([row for pair in rows for row in pair], path)
    return explained


def save_map(path: Path, latents: np.ndarray, labels: np.ndarray, class_names: list[str]) -> float:
    """Flattened latents ``[N, D]`` on their two leading principal components, coloured by class ``[N]``.

    Where there are more than 20 classes, the 20 with the most images are shown. Returns the share of the variance that
    lies in the plane. A :class:`errors.UserError` where the latents do not fill a plane.
    """
    present, counts = np.unique(labels, return_counts=True)
    shown = present[np.sort(np.argsort(-counts, kind="stable")[:MAP_CLASSES])]
    kept = np.isin(labels, shown)
    components = PrincipalComponents(latents[kept], 2)
    components.require(2)
    points = components.project(latents[kept])
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")  # without pyplot: no display, no global state
    axes = figure.add_subplot()
    palette = matplotlib.colormaps["tab10" if len(shown) <= 10 else "tab20"]
    for number, label in enumerate(shown):
        own = points[labels[kept] == label]
        name = class_names[label] or "images"
        axes.scatter(*own[:, :2].T, s=8, color=palette(number), alpha=0.7, linewidths=0, label=name)
    axes.set_xlabel(f"first principal component ({components.variances[0] / components.total:.1%} of the variance)")
    axes.set_ylabel(f"second ({components.variances[-1] / components.total:.1%})")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, markerscale=2)
    with whole_file(path) as temporary, as_os_error(temporary):
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return components.explained


def ways(latents: np.ndarray, steps: int) -> np.ndarray:
    """Latents float ``[2n, C, h, w]``, taken in pairs, → float32 ``[n, steps, C, h, w]`` from the one to the other."""
    pairs = zip(latents[::2], latents[1::2], strict=True)
    return np.stack([interpolate(start, end, steps) for start, end in pairs]).astype(np.float32)


def save_ways(path: Path, originals: Tensor, decoded: Tensor) -> None:
    """A row a pair: the first original, what lies between, the other original.

    Args:
        path: the PNG.
        originals: uint8 ``[2n, 3, H, W]``.
        decoded: uint8 ``[n, steps, 3, H, W]``.
    """
    rows = zip(originals[::2], decoded, originals[1::2], strict=True)
    save_grid([torch.cat([start[None], row, end[None]]) for start, row, end in rows], path)


def pick(count: int, wanted: int) -> np.ndarray:
    """An even number of images, evenly spread over a set."""
    places = spread(count, wanted)
    return places[: len(places) // 2 * 2]
