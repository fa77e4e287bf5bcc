"""Per-channel mean and variance of a VAE's latents: the one owner of how latents are normalised."""

import hashlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

EPSILON = 1e-4  # added to the variance, both ways (REPA-E's BatchNorm)


class LatentStatistics(nn.Module):
    """Running statistics used as constants: a BatchNorm in eval mode without affine parameters.

    Gradient passes through :meth:`normalize` as a plain scaling. The statistics follow the data through
    :meth:`update`, called once a step with the moments of the whole global batch.

    Args:
        channels: C of the latent.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    @property
    def std(self) -> torch.Tensor:
        """What latents are divided by, ``sqrt(var + 1e-4)``, ``[C]``."""
        return (self.var + EPSILON).sqrt()

    def normalize(self, z: torch.Tensor) -> torch.Tensor:
        """Latent ``[B, C, h, w]`` → zero mean and unit variance a channel, in float32."""
        return (z.float() - self.mean[:, None, None]) / self.std[:, None, None]

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`normalize`."""
        return z.float() * self.std[:, None, None] + self.mean[:, None, None]

    @torch.no_grad()
    def update(self, moments: torch.Tensor, momentum: float) -> None:
        """Move towards a batch as BatchNorm does: ``running = (1 - momentum)·running + momentum·batch``.

        A batch with a non-finite value, or of no latents, changes nothing; finding out costs no synchronisation.

        Args:
            moments: what :func:`latent_moments` returns, summed over micro-batches and processes.
            momentum: weight of the batch; 1 replaces the statistics.
        """
        mean, var = mean_and_variance(moments)
        _, _, count = _split(moments)
        weight = torch.where(moments.isfinite().all() & (count > 0), momentum, 0.0).to(self.mean)
        for buffer, batch in ((self.mean, mean), (self.var, var)):
            buffer.lerp_(torch.nan_to_num(batch.to(buffer), 0.0, 0.0, 0.0), weight)

    def load(self, mean: torch.Tensor, std: torch.Tensor, var: torch.Tensor | None = None) -> None:
        """Take statistics, each ``[C]``: std as :attr:`std` defines it; var, where given, makes them bit-exact."""
        self.mean.copy_(mean)
        self.var.copy_((std.double().square() - EPSILON).clamp_min(0) if var is None else var)

    def checksum(self) -> str:
        """SHA-256 of the numbers."""
        digest = hashlib.sha256()
        for _, tensor in sorted(self.tensors().items()):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What :meth:`load` takes, float32 on the CPU."""
        return {"mean": self.mean.cpu(), "std": self.std.cpu(), "var": self.var.cpu()}


def differences(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """Largest difference of a channel's mean, and of its standard deviation, in standard deviations of ``theirs``.

    Args:
        ours, theirs: as :meth:`LatentStatistics.tensors`.
    """
    mean = (ours["mean"] - theirs["mean"]).abs() / theirs["std"]
    std = (ours["std"] / theirs["std"] - 1).abs()
    return mean.max().item(), std.max().item()


def difference(a: LatentStatistics, b: LatentStatistics) -> float:
    """The larger of :func:`differences`."""
    return max(differences(a.tensors(), b.tensors()))


def normalize_by_batch(z: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Latent ``[B, C, h, w]`` → normalised by a batch's own mean and biased variance, as a BatchNorm in training mode.

    Args:
        z: some of the batch's latents.
        moments: what :func:`latent_moments` returns, summed over the whole global batch.
    """
    total, squares, count = _split(moments)
    mean = total / count
    std = ((squares / count - mean.square()).clamp_min(0) + EPSILON).sqrt()
    return (z.float() - mean.float()[:, None, None]) / std.float()[:, None, None]


def standardised(z: torch.Tensor) -> torch.Tensor:
    """Latent ``[B, C, h, w]`` → normalised by its own mean and biased variance, which the gradient passes through."""
    return F.batch_norm(z.float(), None, None, training=True, eps=EPSILON)


@torch.no_grad()
def latent_moments(z: torch.Tensor) -> torch.Tensor:
    """Additive moments of a latent batch ``[B, C, h, w]``: float64 ``[2C + 1]``, (sums, sums of squares, count)."""
    z = z.detach().double()
    count = torch.full((1,), z.numel() / z.shape[1], dtype=torch.float64, device=z.device)
    return torch.cat([z.sum((0, 2, 3)), z.square().sum((0, 2, 3)), count])


def mean_and_variance(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Additive moments → (mean, unbiased variance), each float64 ``[C]``."""
    total, squares, count = _split(moments)
    mean = total / count
    var = (squares - mean * total).clamp_min(0) / (count - 1).clamp_min(1)
    return mean, var


def _split(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums ``[C]``, sums of squares ``[C]``, count ``[1]``."""
    return moments.tensor_split((moments.numel() // 2, moments.numel() - 1))
