"""Frozen vision foundation models (VFMs). Names need no torch; the networks are imported when they are asked for."""

from typing import Any

from models.encoders.registry import ENCODERS, EncoderSpec, encoder_names, encoder_spec

__all__ = ["ENCODERS", "Encoder", "EncoderSpec", "build_encoder", "build_encoders", "encoder_names", "encoder_spec"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "Encoder":
        from models.encoders.encoder import Encoder

        return Encoder
    from models.encoders import build

    return getattr(build, name)
