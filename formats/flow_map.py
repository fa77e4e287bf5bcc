"""Checkpoints of Decoupled MeanFlow (arXiv 2510.24474): a SiT under REPA's names, and what says how it jumps.

Its code calls the model ``DMFT-…`` and counts the blocks before those that are told where a jump ends (``dmf_depth``).
The weights of its loss, ``logvar_linear``, are left out here, as projectors are of what samples.
"""

from collections.abc import Collection, Mapping
from typing import Any

from errors import UserError
from models.denoisers.config import TransformerConfig

LOG_VARIANCE = "logvar_linear."
THEIR_MODEL, THEIR_DEPTH = "DMFT-", "dmf_depth"
THEIR_GUIDANCE = ("g_type", "omega", "g_min", "g_max")


def learned_guidance(arguments: Mapping[str, Any]) -> str | None:
    """By the flags of a training, ``2.5 on [0, 0.7]``: what its jumps have learned; None: none."""
    scale = arguments.get("flow_map_cfg_scale")
    if scale in (None, 1):
        return None
    low, high = (arguments[f"flow_map_guidance_{end}"] for end in ("low", "high"))
    return f"{scale:g}" + ("" if (low, high) == (0, 1) else f" on [{low:g}, {high:g}]")


def learned_by_theirs(facts: Mapping[str, object]) -> dict[str, float]:
    """What their flags say of learned guidance, in this project's flags; empty: of none."""
    kind, strength, low, high = (facts.get(name) for name in THEIR_GUIDANCE)
    if kind != "mg" or not isinstance(strength, int | float) or not 0 < strength < 1:
        return {}
    ends = {
        "flow_map_guidance_low": 0.0 if low is None else low,
        "flow_map_guidance_high": 1.0 if high is None else high,
    }
    return {"flow_map_cfg_scale": round(1 / (1 - strength), 6)} | ends


def own_model(name: object) -> object:
    """A model's name, theirs as that of the SiT that it is."""
    return f"SiT-{name.removeprefix(THEIR_MODEL)}" if str(name).startswith(THEIR_MODEL) else name


def flow_map_config(
    config: TransformerConfig, names: Collection[str], facts: Mapping[str, object], told: int | None, given: str
) -> TransformerConfig:
    """The network with the blocks that are told where a jump ends; as it is where nothing speaks of any.

    Args:
        config: of the network by its tensors.
        names: of all tensors.
        facts: what the flags of its training say.
        told: the user's ``--flow-map-blocks``, or None.
        given: for messages.

    Raises:
        UserError: the number of blocks is not known, is said twice, or does not fit.
    """
    before = facts.get(THEIR_DEPTH)
    said = None if before is None else config.size.depth - before
    if None not in (said, told) and said != told:
        raise UserError(f"--flow-map-blocks {told}: {given} has {said}, as its args say; leave the flag out")
    if said is not None and said < 1:
        raise UserError(
            f"{given}: its args say {THEIR_DEPTH} {before}, of {config.size.depth} blocks: none is left that is told "
            "where a jump ends"
        )
    blocks = told if said is None else said
    if blocks is None and any(name.startswith(LOG_VARIANCE) for name in names):
        raise UserError(
            f"{given} was trained to jump and does not say how: add --flow-map-blocks with the number of its last "
            "blocks that are told where a jump ends (of the public ones 8)"
        )
    try:
        return config if blocks is None else config.with_flow_map(blocks)
    except UserError as error:
        raise UserError(f"{given}: {str(error).removeprefix('--')}") from error
