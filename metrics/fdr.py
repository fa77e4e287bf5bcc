"""FDr: Fréchet distances of generated images in several networks' features, each in multiples of real images' own.

The mean over networks of FD(generated, reference) / FD(validation set, reference); FDr6 is that of the six networks of
Representation Fréchet Loss (arXiv 2604.28190, "FDr-6"; github.com/Jiawei-Yang/FD-Loss), where the reference is
ImageNet's training set and 50,000 images are generated.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from errors import UserError
from metrics.arguments import FDR_NETWORKS, network_label
from metrics.features import Extractor
from metrics.frechet import Gaussian, frechet_distance
from metrics.generation import Settings, summarise_reference
from metrics.record import Measurement
from metrics.representations import REPRESENTATIONS
from metrics.sources import ImageSet
from metrics.summary import Needs, summarise
from runtime.processes import Process, agree_on

KIND, SIX = "fdr", "FDr6"
ROUNDING = 1e-9  # a distance below this share of the reference's variance is none


@dataclass(frozen=True)
class Comparison:
    """What is compared with what.

    Attributes:
        samples: the generated images.
        reference: without images where there are only statistics.
        statistics: of the reference, by network; the rest is computed from its images.
        validation: real held-out images; None: the published distances of ImageNet's.
        settings: of the passes; ``metrics`` is ``("fid",)``.
    """

    samples: ImageSet
    reference: ImageSet
    statistics: Mapping[str, Gaussian]
    validation: ImageSet | None
    settings: Settings

    @property
    def sets(self) -> list[ImageSet]:
        """All that images are read of, the samples first."""
        return [each for each in (self.samples, self.reference, self.validation) if each and each.images]

    @property
    def count(self) -> int:
        """Images that are measured."""
        return self.samples.count(self.settings.num_samples)

    @property
    def denominators(self) -> str:
        """``published``, or what they are measured of."""
        return "published" if self.validation is None else str(self.validation.path)


@dataclass(frozen=True)
class Ratio:
    """One network's part: Fréchet distances to the reference of the samples and of the validation set."""

    fd: float
    validation_fd: float
    extractor: Mapping

    @property
    def value(self) -> float:
        return self.fd / self.validation_fd


def measure(comparison: Comparison, extractor: Extractor, process: Process) -> Ratio | None:
    """One network's ratio, rank 0's; all processes call it, in ``runtime.processes.process_group``.

    Raises:
        UserError: the validation set is the reference.
    """
    settings, name, label = comparison.settings, extractor.name, network_label(extractor.name)
    theirs = comparison.statistics.get(name)
    if theirs is None:
        theirs = _gaussian(comparison.reference, extractor, settings, process, f"reference, {label}")
    if comparison.validation is None:
        validation_fd = REPRESENTATIONS[name].validation_fd
    else:
        real = _gaussian(comparison.validation, extractor, settings, process, f"validation, {label}")
        validation_fd = frechet_distance(real, theirs) if process.is_main else 0.0
        if agree_on(lambda: validation_fd <= ROUNDING * np.trace(theirs.cov)):
            raise UserError(
                f"{comparison.validation} does not differ from {comparison.reference}: there is nothing to divide by; "
                "give held-out images that are not in the reference"
            )
    ours = summarise(
        comparison.samples.images,
        comparison.count,
        extractor,
        Needs(pooled=True, spatial=False, scores=False, features=False),
        process,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        description=f"samples, {label}",
    )
    return Ratio(frechet_distance(ours.pooled, theirs), validation_fd, extractor.describe()) if ours else None


def _gaussian(
    images: ImageSet, extractor: Extractor, settings: Settings, process: Process, description: str
) -> Gaussian | None:
    summary = summarise_reference(images, extractor, settings, process, description)
    return summary.pooled if summary else None


def values_of(ratios: Mapping[str, Ratio]) -> dict[str, float]:
    """Their mean, and each by its network's name."""
    values = {f"FDr-{network_label(network)}": ratio.value for network, ratio in ratios.items()}
    return {mean_name(ratios): fmean(values.values())} | values


def mean_name(networks: Collection[str]) -> str:
    """``FDr6`` is of exactly the six."""
    return SIX if set(networks) == set(FDR_NETWORKS) else "FDr"


def measurement(comparison: Comparison, ratios: Mapping[str, Ratio], name: str) -> Measurement:
    """What is written next to the samples."""
    images, validation = comparison.reference.images, comparison.validation
    return Measurement(
        name=name,
        kind=KIND,
        values=values_of(ratios),
        count=comparison.count,
        subject=comparison.samples.describe(),
        reference={
            "path": str(comparison.reference.path),
            "count": len(images) if images is not None else None,
            "fingerprint": images.fingerprint() if images is not None else None,
            "statistics_of_the_file": [network for network in ratios if network in comparison.statistics],
        },
        settings={
            "denominators": comparison.denominators,
            "validation": validation.describe() | {"count": len(validation.images)} if validation else None,
            "networks": {
                network_label(network): {**ratio.extractor, "fd": ratio.fd, "validation_fd": ratio.validation_fd}
                for network, ratio in ratios.items()
            },
        },
    )


def table(ratios: Mapping[str, Ratio]) -> str:
    """A line a network, then the mean."""
    mean, value = next(iter(values_of(ratios).items()))
    rows = [
        (network_label(name), f"{r.fd:.5g}", f"{r.validation_fd:.5g}", f"{r.value:.4g}") for name, r in ratios.items()
    ]
    rows = [("network", "FD", "FD of validation", "ratio"), *rows, (mean, "", "", f"{value:.4g}")]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:<{width}}  {fd:>9}  {real:>16}  {ratio:>9}" for name, fd, real, ratio in rows)
