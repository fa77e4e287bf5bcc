"""A denoiser and a VAE of random weights at their real sizes: for a dry run of sampling before there is a training."""

from dataclasses import dataclass, field
from pathlib import Path

from dataset.images import DEFAULT_RESOLUTION
from diffusion.flow import PATH_TYPES
from formats.vae import load_tokenizer
from models.denoisers import Denoiser, DenoiserConfig, denoiser_config
from models.tokenizers import Tokenizer
from runtime import DEFAULT_VAE, NUM_CLASSES


@dataclass(frozen=True)
class UntrainedLDM:
    """What ``generate.py --dry-run`` asks of ``inference.trained_ldm.TrainedLDM``, of networks that nobody trained.

    Attributes:
        config: of the denoiser.
        resolution: side of the images in pixels.
        path_type: of the interpolant.
        folder, label, weights, time_shift, guide, class_names: as of a trained one; they say that it is none.
    """

    config: DenoiserConfig
    resolution: int
    path_type: str
    _autoencoder: Tokenizer = field(repr=False)
    folder: Path = Path()
    label: str = "none"
    weights: str = "random"
    time_shift: float = 1.0
    guide: None = None

    @property
    def class_names(self) -> list[str]:
        return [str(number) for number in range(self.config.num_classes)]

    def load_model(self) -> Denoiser:
        """The denoiser in eval mode, on the CPU."""
        return self.config.build().eval().requires_grad_(False)

    def load_autoencoder(self) -> Tokenizer:
        return self._autoencoder.requires_grad_(False)


def open_untrained_ldm(model: str, vae: str | None, resolution: int | None, path_type: str | None) -> UntrainedLDM:
    """Networks of these sizes; every None is the default of the training scripts.

    Args:
        model: of the denoiser, e.g. ``SiT-XL/1``.
        vae: an architecture's name, or a VAE in any form.
        resolution: side of the images in pixels.
        path_type: of the interpolant.

    Raises:
        UserError: no such network, or sizes that do not fit each other.
    """
    resolution = resolution or DEFAULT_RESOLUTION
    tokenizer, _ = load_tokenizer(vae or DEFAULT_VAE, "none")
    channels, side, _ = tokenizer.latent_shape(resolution)
    sizes = {"latent_channels": channels, "latent_size": side, "num_classes": NUM_CLASSES}
    config = denoiser_config({"model": model} | sizes)
    return UntrainedLDM(config, resolution, path_type or PATH_TYPES[0], tokenizer)
