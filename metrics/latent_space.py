"""A VAE's latents as a cloud of points: how evenly it is filled, how it clusters, its main directions."""

import warnings
from collections.abc import Sequence

import numpy as np
import scipy.linalg
from scipy.stats import gaussian_kde
from sklearn.exceptions import ConvergenceWarning
from sklearn.manifold import TSNE
from sklearn.metrics import adjusted_mutual_info_score
from sklearn.mixture import GaussianMixture

from errors import UserError

MIXTURE_DIMENSIONS = 32  # leading principal components that a mixture is fitted to
MIXTURE_STARTS = 3  # of which the most likely is taken
REGULARISATION = 1e-3  # added to a mixture's variances, of data with unit variance
DENSITY_ROWS = 1024  # points whose density is computed at once
PERPLEXITY = 30.0
PLANE_POINTS = 3  # that a density in the plane needs, at least


class PrincipalComponents:
    """The leading directions of a cloud of points, by the eigenvectors of the smaller of its two Gram matrices.

    Args:
        points: float ``[N, D]``.
        count: directions; fewer where the cloud has fewer.

    Attributes:
        mean: float64 ``[D]``.
        directions: float64 ``[D, K]``, orthonormal; each one's largest entry is positive, which fixes the sign.
        variances: float64 ``[K]``, descending.
        total: variance of the whole cloud.
    """

    def __init__(self, points: np.ndarray, count: int):
        points = np.asarray(points, np.float64)
        self.mean = points.mean(0)
        centred = points - self.mean
        self.total = float(np.square(centred).sum() / len(points))
        wide = centred.shape[0] < centred.shape[1]
        gram = centred @ centred.T if wide else centred.T @ centred
        leading = (max(0, len(gram) - count), len(gram) - 1)
        values, vectors = scipy.linalg.eigh(gram, subset_by_index=leading, overwrite_a=True, check_finite=False)
        noise = max(values[-1], 0.0) * len(gram) * np.finfo(np.float64).eps  # rounding, where the cloud is flat
        order = np.flatnonzero(values > noise)[::-1]
        directions = centred.T @ vectors[:, order] / np.sqrt(values[order]) if wide else vectors[:, order]
        largest = np.abs(directions).argmax(0)
        self.directions = directions * np.sign(directions[largest, np.arange(len(order))])
        self.variances = values[order] / len(points)

    @property
    def explained(self) -> float:
        """Share of the whole variance that lies in these directions."""
        return float(self.variances.sum() / self.total) if self.total else 0.0

    def require(self, count: int) -> None:
        """A :class:`UserError` where the cloud has fewer directions than a measurement needs."""
        if len(self.variances) < count:
            raise UserError(
                f"the latents are constant{' or lie on one line' if count > 1 else ''}: this VAE has collapsed, give "
                "another one"
            )

    def project(self, points: np.ndarray, whiten: bool = False) -> np.ndarray:
        """Float ``[N, D]`` → coordinates float64 ``[N, K]``, of unit variance each if whitened."""
        coordinates = (np.asarray(points, np.float64) - self.mean) @ self.directions
        return coordinates / np.sqrt(self.variances) if whiten else coordinates


def gini_coefficient(values: np.ndarray) -> float:
    """Of non-negative numbers: Σᵢ (2i − n − 1)·xᵢ / (n·Σ x) over the sorted xᵢ; 0 where all are equal, below 1."""
    values = np.sort(np.asarray(values, np.float64))
    count = len(values)
    weights = 2 * np.arange(1, count + 1) - count - 1
    return float(weights @ values / (count * values.sum()))


def densities(points: np.ndarray) -> np.ndarray:
    """Gaussian kernel density estimate at the points it is made of, ``[N, 2]`` → ``[N]``; bandwidth by Scott's rule."""
    estimate = gaussian_kde(points.T)
    parts = [estimate(points[first : first + DENSITY_ROWS].T) for first in range(0, len(points), DENSITY_ROWS)]
    return np.concatenate(parts)


def uniformity(vectors: np.ndarray, seed: int, with_tsne: bool = True) -> dict[str, float]:
    """How unevenly normalised latent vectors fill their space: Gini coefficients, 0 for a perfectly even density.

    ``gini`` is VA-VAE's measure (arXiv 2501.01423, its public latent_vis.py), which Send-VAE takes over: vectors of
    single latent positions are laid out in the plane by t-SNE (perplexity 30), and the densities of a Gaussian KDE at
    these points are compared by their Gini coefficient. ``density-cv`` and ``normalized-entropy`` come from the same
    densities. t-SNE evens out densities by its nature and its layout is one of many; so ``gini-pca`` is given too: the
    same over the vectors' two leading principal components, where nothing is left to an optimiser.

    Args:
        vectors: float ``[N, C]``.
        seed: of t-SNE.
        with_tsne: without, only ``gini-pca`` (N = 10,000 takes minutes).

    Raises:
        UserError: the vectors do not fill a plane.
    """
    plane = PrincipalComponents(vectors, 2)
    plane.require(2)
    values = {"gini-pca": gini_coefficient(densities(plane.project(vectors)))}
    if not with_tsne:
        return values
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    layout = TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed, n_jobs=1)
    density = densities(layout.fit_transform(np.asarray(vectors, np.float32)).astype(np.float64))
    share = density / density.sum()
    return {
        "gini": gini_coefficient(density),
        "density-cv": float(density.std() / density.mean()),
        "normalized-entropy": float(-(share * np.log(share)).sum() / np.log(len(share))),
    } | values


def discrimination(
    train: np.ndarray,
    test: np.ndarray,
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    components: Sequence[int],
    seed: int,
    dimensions: int = MIXTURE_DIMENSIONS,
) -> dict[str, float]:
    """How well the latents of whole images are described by a mixture of Gaussians, and whether its parts are classes.

    Flattened latents are projected onto the leading principal components of the training images and whitened, so that
    neither their scale nor their number of dimensions matters, and mixtures with diagonal covariances are fitted for
    several numbers K of components. For each K, with the K in the name:

    - ``log-likelihood-K``: of test images, nats per dimension;
    - ``gain-K``: that minus the one of a single Gaussian: what clustering explains;
    - ``BIC-K``: of the training images, per image and dimension; smaller is better;
    - ``AMI-K``: adjusted mutual information of component and class over test images, 0 by chance, 1 for a perfect match
      (only where there are several classes).

    Args:
        train, test: float ``[N, D]``.
        train_labels, test_labels: classes, int ``[N]``.
        components: the numbers K.
        seed: of the k-means that a fit begins with.
        dimensions: principal components, at most.

    Raises:
        UserError: the latents are all alike.
    """
    axes = PrincipalComponents(train, min(dimensions, len(train) - 1))
    axes.require(1)
    train, test = axes.project(train, whiten=True), axes.project(test, whiten=True)
    size = train.shape[1]
    single = _mixture(train, 1, seed).score(test) / size
    values = {"log-likelihood-1": single}
    for count in components:
        mixture = _mixture(train, count, seed)
        values[f"log-likelihood-{count}"] = mixture.score(test) / size
        values[f"gain-{count}"] = values[f"log-likelihood-{count}"] - single
        values[f"BIC-{count}"] = mixture.bic(train) / (len(train) * size)
        if len(np.unique(train_labels)) > 1:
            values[f"AMI-{count}"] = adjusted_mutual_info_score(test_labels, mixture.predict(test))
    return {name: float(value) for name, value in values.items()}


def _mixture(points: np.ndarray, count: int, seed: int) -> GaussianMixture:
    mixture = GaussianMixture(
        count, covariance_type="diag", reg_covar=REGULARISATION, n_init=MIXTURE_STARTS, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 100 iterations leave differences far below the figures'
        return mixture.fit(points)


def principal_colours(latents: np.ndarray) -> tuple[np.ndarray, float]:
    """Latents float ``[N, C, h, w]`` as colours, and the share of the variance between positions that these show.

    Red, green and blue are the three leading components over all positions, each stretched from its 1st to its 99th
    percentile over the whole set, so that pictures can be compared: uint8 ``[N, 3, h, w]``.
    """
    count, channels, height, width = latents.shape
    points = latents.transpose(0, 2, 3, 1).reshape(-1, channels)
    components = PrincipalComponents(points, 3)
    colours = components.project(points)
    colours = np.pad(colours, ((0, 0), (0, 3 - colours.shape[1])))
    low, high = np.percentile(colours, (1, 99), axis=0)
    stretched = np.clip((colours - low) / np.maximum(high - low, 1e-12), 0, 1)
    pictures = (255 * stretched).round().astype(np.uint8).reshape(count, height, width, 3).transpose(0, 3, 1, 2)
    return pictures, components.explained


def interpolate(start: np.ndarray, end: np.ndarray, steps: int, spherical: bool = True) -> np.ndarray:
    """``[steps, …]`` from one normalised latent to another: along a great circle, or straight."""
    t = np.linspace(0, 1, steps).reshape(-1, *(1,) * start.ndim)
    radii = np.linalg.norm(start), np.linalg.norm(end)
    cosine = float((start * end).sum() / max(radii[0] * radii[1], 1e-12))
    angle = np.arccos(np.clip(cosine, -1, 1))
    if not spherical or np.sin(angle) < 1e-6:
        return (1 - t) * start + t * end
    direction = (np.sin((1 - t) * angle) * start / radii[0] + np.sin(t * angle) * end / radii[1]) / np.sin(angle)
    return direction * ((1 - t) * radii[0] + t * radii[1])  # the length changes evenly
