"""Pictures of a run as data URIs, scaled so that a page of many stays small."""

import base64
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from metrics.record import metrics_folder
from reporting.results import sampler_of
from reporting.runs import SAMPLES, Run

MOST_PIXELS = 1280  # along the longer side
MOST_BYTES = 400_000  # of a picture as PNG; a larger one becomes a JPEG
SMALL = 700  # smaller pictures are enlarged by a whole factor, so that their pixels can be seen
MOST_EARLIER = 6  # of a run's grids, spread over the training
RECONSTRUCTIONS = "-reconstructions"  # train_repae.py's second grid
OF_A_VAE, OF_A_SIT = "originals above, reconstructions below", "made from noise"
DRAWN = {  # by evaluate.py and probe.py, by the end of the file's name
    "worst": "worst first: originals above, reconstructions below",
    "colours": "images and their latents as colours (three principal components)",
    "map": "latents by class (two principal components)",
    "ways": "from one image to another through the latents",
}


@dataclass(frozen=True)
class Picture:
    """A picture for the page, or why there is none.

    Attributes:
        uri: ``data:…``; empty if the file is damaged.
        width: to show it at, in CSS pixels.
        kind: ``pixels`` that are to stay sharp, or a ``plot`` to show smaller.
        fault: what is wrong with the file.
    """

    uri: str
    width: int
    kind: str = ""
    fault: str = ""


def inline(path: Path, most_pixels: int = MOST_PIXELS, most_bytes: int = MOST_BYTES) -> Picture:
    """Read a picture, scale it down to ``most_pixels``, encode it: as PNG up to ``most_bytes``, as JPEG above."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return Picture("", 0, fault=f"{path.name} is not readable ({type(error).__name__})")
    image.thumbnail((most_pixels, most_pixels), Image.Resampling.LANCZOS)
    factor = max(1, SMALL // max(image.size))
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        if buffer.tell() <= most_bytes:
            break
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(uri, image.width * factor, "pixels" if factor > 1 else "plot" if path.stem.endswith("-map") else "")


def pictures_of(run: Run) -> tuple[list[tuple[Path, str]], list[Path]]:
    """Which pictures a run has.

    Returns:
        ``(path, caption)`` of generated images, the last grid of the training and what the measurements drew; and the
        earlier grids, the last step first.
    """
    found = []
    for samples in run.samples:
        if samples.preview:
            found.append((samples.preview, f"{samples.path.name}: {_how(samples.settings, samples.count)}"))
        found += _drawn(samples.path)
    grids = sorted((run.folder / "samples").glob("*.png"), reverse=True)
    grids = [path for path in grids if not path.stem.endswith(RECONSTRUCTIONS)]
    if grids:
        last = grids[0]
        found.append((last, f"{step_of(last)}: {OF_A_VAE if run.sort == 'VAE' else OF_A_SIT}"))
        second = last.with_name(f"{last.stem}{RECONSTRUCTIONS}.png")
        found += [(second, f"{step_of(last)}: {OF_A_VAE}")] if second.is_file() else []
    return found + (_drawn(run.folder) if run.sort != SAMPLES else []), grids[1:]


def spread(paths: list[Path], most: int = MOST_EARLIER) -> list[Path]:
    """At most so many, evenly spread, the first and the last among them."""
    count = len(paths)
    return paths if count <= most else [paths[round(i * (count - 1) / (most - 1))] for i in range(most)]


def step_of(path: Path) -> str:
    digits = path.stem.rpartition("-")[2]
    return f"step {int(digits):,}" if digits.isdecimal() else path.stem


def _drawn(folder: Path) -> list[tuple[Path, str]]:
    """What evaluate.py and probe.py drew of their measurements."""
    found = []
    for path in sorted(metrics_folder(folder).glob("*.png")):
        name, _, kind = path.stem.rpartition("-")
        found.append((path, f"{name}: {DRAWN[kind]}" if kind in DRAWN else path.stem))
    return found


def _how(made: Mapping[str, object], count: int | None) -> str:
    """How images were made, in words."""
    words = [f"{count:,} images"] if count else []
    if made.get("train_steps") is not None:
        words.append(f"{made.get('weights', '')} of step {made['train_steps']:,}".strip())
    words += filter(None, [sampler_of(made)])
    scale = made.get("cfg_scale")
    if scale is not None:
        by = "" if made.get("guide") is None else f" by {made['guide']}"
        if made.get("guide_scale") is not None:
            by = f", and {made['guide_scale']:g}{by}"
        learned = made.get("learned_guidance")
        given = None if scale == 1 else f"guidance {scale:g}{by}"
        words += filter(None, [given, learned and f"guidance {learned} learned"])
        if given is learned is None:
            words.append("no guidance")
    return ", ".join(words) or "generated images"
