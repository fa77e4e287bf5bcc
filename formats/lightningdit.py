"""What LightningDiT's checkpoints say in other words than REPA's (``formats.sit``).

::

    0080000.pt                              model, ema, opt, config (its YAML file); the step is the file's name
    lightningdit-xl-imagenet256-800ep.pt    the averaged weights, alone or as ema

Beside the weights lie the tables of the rotary positions, ``feat_rope.freqs_cos`` and ``feat_rope.freqs_sin``, which
are computed here. Weights are taken as they are: that time runs the other way there is the network's own business.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from errors import UserError
from models.denoisers.config import LightningDiTConfig
from models.denoisers.lightningdit import RotaryPositions

ROTARY = "feat_rope."  # of tensors that are none of the network's
PATH_TYPES = {"Linear": "linear", "GVP": "cosine"}
# What may not be otherwise, by the section and the name in a configuration; a network of other parts is another one.
FIXED = {
    "model": {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "wo_shift": False},
    "data": {"latent_norm": True, "latent_multiplier": 1.0},
}
TOLERANCE = 1e-5  # of the tables: float32's rounding


def is_lightningdit(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether weights are of a LightningDiT rather than of a SiT; its MLP tells."""
    return "blocks.0.mlp.w12.weight" in state


def facts_of(config: Mapping, given: str) -> dict[str, object]:
    """What a configuration says of the network and of its training, in the words of our flags.

    Args:
        config: sections ``model``, ``data``, ``transport``, ``vae``.
        given: for messages.

    Raises:
        UserError: it is of a network or of latents that are not known here.
    """
    sections = {name: section for name, section in config.items() if isinstance(section, Mapping)}
    model, data, transport, vae = (sections.get(name, {}) for name in ("model", "data", "transport", "vae"))
    for section, fixed in FIXED.items():
        for name, only in fixed.items():
            if (value := sections.get(section, {}).get(name, only)) != only:
                raise UserError(f"{given}: its config says {section}.{name} {value}; only {only} is known here")
    path_type, prediction = transport.get("path_type", "Linear"), transport.get("prediction", "velocity")
    facts = {
        "model": model.get("model_type"),
        "qk_norm": model.get("use_qknorm"),
        "encoder_depth": model.get("encoder_depth"),  # of internal guidance
        "num_classes": data.get("num_classes"),
        "resolution": data.get("image_size"),
        "path_type": PATH_TYPES.get(str(path_type), path_type),
        "prediction": "v" if prediction == "velocity" else prediction,
        "weighting": "lognormal" if transport.get("use_lognorm") else "uniform",
        "velocity_cosine_coeff": 1.0 if transport.get("use_cosine_loss") else 0.0,
    }
    if "downsample_ratio" in vae and "in_chans" in model:
        facts["vae"] = f"f{vae['downsample_ratio']}d{model['in_chans']}"
    return {name: value for name, value in facts.items() if value is not None}


def step_of(path: Path) -> int | None:
    """What a checkpoint's name says."""
    return int(path.stem) if path.stem.isdecimal() else None


def is_table(table: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a file's table is the expected one, in the precision that it is kept in."""
    if table.shape != expected.shape or not table.is_floating_point():
        return False
    return torch.allclose(table.float(), expected.to(table.dtype).float(), rtol=0, atol=TOLERANCE)


def check_rotary(state: Mapping[str, torch.Tensor], config: LightningDiTConfig, given: str) -> None:
    """The tables of a file must be those of the network that is built.

    Raises:
        UserError: they are not there, or others.
    """
    rotary = RotaryPositions(config.size.width // config.size.heads, config.grid)
    for name, expected in (("freqs_cos", rotary.cos), ("freqs_sin", rotary.sin)):
        table = state.get(f"{ROTARY}{name}")
        if table is None:
            raise UserError(f"{given} holds no {ROTARY}{name}: a network without rotary positions is not known here")
        expected = expected.repeat_interleave(2, dim=-1)  # theirs says both channels of a pair
        if not is_table(table, expected):
            raise UserError(f"{given}: {ROTARY}{name} is of other rotary positions than those of {config.model}")
