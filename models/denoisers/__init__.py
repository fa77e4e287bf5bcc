"""Denoisers: noisy latent, time and class → velocity. One file a kind, one line in the registry."""

from collections.abc import Mapping

from errors import UserError
from models.denoisers.base import Denoiser, DenoiserConfig
from models.denoisers.sit import SiT

__all__ = ["DENOISERS", "Denoiser", "DenoiserConfig", "build_denoiser", "denoiser_config", "denoiser_kind"]

DENOISERS: dict[str, type[Denoiser]] = {"SiT": SiT}  # by what ``--model`` begins with, before the first hyphen


def denoiser_kind(model: str) -> type[Denoiser]:
    """The class of a name of ``--model``.

    Raises:
        UserError: it begins with no known kind.
    """
    kind = model.partition("-")[0]
    if kind not in DENOISERS:
        known = "; ".join(cls.names for cls in DENOISERS.values())
        raise UserError(f"--model {model} is not known; give {known}")
    return DENOISERS[kind]


def denoiser_config(values: Mapping) -> DenoiserConfig:
    """What ``DenoiserConfig.to_dict`` gave.

    Raises:
        KeyError, TypeError: it is something else.
        UserError: a model that is not known here.
    """
    config = denoiser_kind(values["model"]).Config.from_dict(values)
    config.check()
    return config


def build_denoiser(config: DenoiserConfig) -> Denoiser:
    """The network, its weights random."""
    return denoiser_kind(config.model)(config)
