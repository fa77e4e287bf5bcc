"""A SiT and a VAE of random weights at their real sizes: for a dry run of sampling before there is a training."""

from dataclasses import dataclass, field
from pathlib import Path

from dataset.images import DEFAULT_RESOLUTION
from formats.vae import build_autoencoder
from inference.foreign_ldm import DEFAULT_PATH_TYPE
from models.denoisers.sit import SiT, SiTConfig
from models.tokenizers.kl import Autoencoder
from training.dry_run import DEFAULT_VAE, NUM_CLASSES


@dataclass(frozen=True)
class UntrainedLDM:
    """What ``generate.py --dry-run`` asks of ``inference.trained_ldm.TrainedLDM``, of networks that nobody trained.

    Attributes:
        config: of the SiT.
        resolution: side of the images in pixels.
        path_type: of the interpolant.
        folder, label, weights, class_names: as of a trained one; they say that it is none.
    """

    config: SiTConfig
    resolution: int
    path_type: str
    _autoencoder: Autoencoder = field(repr=False)
    folder: Path = Path()
    label: str = "none"
    weights: str = "random"

    @property
    def class_names(self) -> list[str]:
        return [str(number) for number in range(self.config.num_classes)]

    def load_model(self) -> SiT:
        """The SiT in eval mode, on the CPU."""
        return SiT(self.config).eval().requires_grad_(False)

    def load_autoencoder(self) -> Autoencoder:
        return self._autoencoder.requires_grad_(False)


def open_untrained_ldm(model: str, vae: str | None, resolution: int | None, path_type: str | None) -> UntrainedLDM:
    """Networks of these sizes; every None is the default of the training scripts.

    Args:
        model: of the SiT, e.g. ``SiT-XL/1``.
        vae: an architecture's name, or a VAE in any form.
        resolution: side of the images in pixels.
        path_type: of the interpolant.

    Raises:
        UserError: no such network, or sizes that do not fit each other.
    """
    resolution = resolution or DEFAULT_RESOLUTION
    autoencoder, _ = build_autoencoder(vae or DEFAULT_VAE, "none")
    channels, side, _ = autoencoder.latent_shape(resolution)
    config = SiTConfig(model=model, latent_channels=channels, latent_size=side, num_classes=NUM_CLASSES)
    config.check()
    return UntrainedLDM(config, resolution, path_type or DEFAULT_PATH_TYPE, autoencoder)
