"""Denoisers: noisy latent, time and class → velocity. One file a kind, one line in a registry without torch."""

from collections.abc import Mapping
from typing import Any

from errors import UserError
from models.denoisers.config import DDTConfig, DenoiserConfig, DiTDHConfig, JiTConfig, LightningDiTConfig, SiTConfig

__all__ = ["DENOISERS", "Denoiser", "DenoiserConfig"]

# By what ``--model`` begins with, before the first hyphen: the configuration, which builds the network.
DENOISERS: dict[str, type[DenoiserConfig]] = {
    "SiT": SiTConfig,
    "LightningDiT": LightningDiTConfig,
    "DiTDH": DiTDHConfig,
    "DDT": DDTConfig,
    "JiT": JiTConfig,
}


def denoiser_kind(model: str) -> type[DenoiserConfig]:
    """The configuration's class of a name of ``--model``.

    Raises:
        UserError: it begins with no known kind.
    """
    kind = model.partition("-")[0]
    if kind not in DENOISERS:
        known = "; ".join(config.names for config in DENOISERS.values())
        raise UserError(f"--model {model} is not known; give {known}")
    return DENOISERS[kind]


def denoiser_config(values: Mapping) -> DenoiserConfig:
    """What ``DenoiserConfig.to_dict`` gave.

    Raises:
        KeyError, TypeError: it is something else.
        UserError: a model that is not known here.
    """
    config = denoiser_kind(values["model"]).from_dict(values)
    config.check()
    return config


def __getattr__(name: str) -> Any:
    if name != "Denoiser":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from models.denoisers.base import Denoiser

    return Denoiser
