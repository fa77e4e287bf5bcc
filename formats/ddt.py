"""Checkpoints of RAE's DiT^DH and of diffusion-bench's DDT (``formats.sit``): their names, and how they were trained.

::

    stage2_model.pt, ddt-….pt    the averaged weights, alone or as ema
    ep-0000080.pt                model, ema, optimizer, scheduler, epoch, step

In both ``s_embedder`` is that of the blocks before the head, ``x_embedder`` the head's, and the head's blocks follow
the others. diffusion-bench's queries, keys and values are three layers, which are one here, and so are the two of
SwiGLU. Tables of rotary positions are computed here. What neither file says is the same in all their trainings
(:func:`facts_of`).
"""

import math
import re
from collections.abc import Mapping

import torch

from diffusion.flow import settled_shift
from errors import UserError
from formats.lightningdit import is_table
from formats.statistics import FoundStatistics
from models.denoisers.config import HEAD_CHANNELS, DDTConfig, DiTDHConfig, TransformerConfig
from models.denoisers.ddt import LABEL_TOKENS, TIME_TOKENS
from models.denoisers.lightningdit import RotaryPositions
from models.tokenizers.pixels import IMAGE_CHANNELS

State = dict[str, torch.Tensor]

TABLES = {DiTDHConfig: ("enc_feat_rope", "dec_feat_rope"), DDTConfig: ("enc_rope", "dec_rope")}  # blocks', head's
OF_CLASS_TOKEN = "cls_in_proj_enc.weight"  # noqa: S105
READ = {"s_embedder.proj.weight": 4, "x_embedder.proj.weight": 4}  # dimensions
# Beginnings of names, theirs and ours; what is not among them has the same name.
NAMES = {
    "s_embedder.": "x_embedder.",
    "x_embedder.": "head.x_embedder.",
    "s_projector.": "head.projector.",
    "ctx_embedder.embedding_table.": "y_embedder.embedding_table.",
    "ctx_embedder.learnable_tokens": "label_tokens",
    "t_embedder.learnable_tokens": "time_tokens",
    "final_layer.norm.": "final_layer.norm_final.",
    "final_layer.cls_linear.": "final_layer.class_token.",
    "base_final_layer.norm.": "guide_layer.norm_final.",
    "base_final_layer.": "guide_layer.",
    "cls_in_proj_enc.": "class_token_embedder.proj.",
    "cls_in_norm_enc.": "class_token_embedder.norm.",
    "cls_in_proj_dec.": "head.class_token_embedder.proj.",
    "cls_in_norm_dec.": "head.class_token_embedder.norm.",
}
MERGED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.w12": ("mlp.w1", "mlp.w2")}  # ours, and theirs in its order
OTHERS = {"ctx_embedder.proj.": "of text", "t_abs_embedder.": "of MeanFlow"}
OF_GUIDE = "base_final_layer.linear.weight"
GUIDE_DEPTH = 8  # of internal guidance; no tensor tells it, and all public configurations have it
# How diffusion-bench's DDTs on pixels were trained, by what they predict: on latents all predict the velocity.
ON_PIXELS = {"x": {"time_mean": -1.1, "time_std": 0.8}, "v": {"time_mean": -1.94, "time_std": 1.0}}
LEFT_OUT = "repa_projector."  # of a training with REPA: one layer, where this project's has three


def has_wide_head(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether weights are of one of the two."""
    return "s_embedder.proj.weight" in state


def wide_head_config(state: Mapping[str, torch.Tensor], given: str, prediction: str | None = None) -> DiTDHConfig:
    """Which network a state dict in their names belongs to, by names and shapes.

    Args:
        state: tensors by name.
        given: for messages.
        prediction: as the user says, of a DDT on pixels or with internal guidance; no tensor tells it.

    Raises:
        UserError: none that is known here, or it is not said what it predicts.
    """
    kind = DDTConfig if any(key.startswith("ctx_embedder.") for key in state) else DiTDHConfig
    for name, what in OTHERS.items():
        if any(key.startswith(name) for key in state):
            raise UserError(
                f"{given} is a {kind.kind} {what}, which is not known here; give one of classes and velocities"
            )
    if OF_GUIDE in state and (kind is not DDTConfig or OF_CLASS_TOKEN in state):
        token = " and a class token" if OF_CLASS_TOKEN in state else ""
        raise UserError(f"{given} is a {kind.kind} with internal guidance{token}, which is not known here")
    labels = "ctx_embedder" if kind is DDTConfig else "y_embedder"
    tables = [f"{name}.freqs_cos" for name in TABLES[kind]]
    needed = READ | {f"{labels}.embedding_table.weight": 2} | dict.fromkeys(tables, 2)
    needed |= {OF_CLASS_TOKEN: 2} if OF_CLASS_TOKEN in state else {}
    for name, dimensions in needed.items():
        if name not in state:
            raise UserError(f"{given} is not a complete {kind.kind}: it lacks {name}")
        if state[name].ndim != dimensions:
            raise UserError(f"{given}: {name} has {state[name].ndim} dimensions instead of {dimensions}; it is damaged")
    width, channels, patch, _ = state["s_embedder.proj.weight"].shape
    head_width = len(state["x_embedder.proj.weight"])
    numbers = {int(match[1]) for match in (re.match(r"blocks\.(\d+)\.", key) for key in state) if match}
    norms = [state.get(f"blocks.{number}.norm1.weight") for number in numbers]
    depth = sum(norm is not None and norm.shape == (width,) for norm in norms)
    model = kind.name_of(depth, width, patch)
    if model is None or head_width == width or head_width % HEAD_CHANNELS or not head_width:
        raise UserError(
            f"{given}: a {kind.kind} of {depth} blocks of width {width} and a head of width {head_width}, with patch "
            f"{patch}, is none that is known ({kind.sizes_in_words()}; a head of another width that is a multiple of "
            f"{HEAD_CHANNELS})"
        )
    if OF_GUIDE in state and depth <= GUIDE_DEPTH:
        raise UserError(
            f"{given} has internal guidance and {depth} blocks; that it comes after block {GUIDE_DEPTH} is assumed"
        )
    class_token, classes = state.get(OF_CLASS_TOKEN), len(state[f"{labels}.embedding_table.weight"]) - 1
    # the head's table has a row for each token, and one for a class token
    tokens = len(state[tables[1]]) - (class_token is not None)
    grid = math.isqrt(max(0, tokens))
    if grid * grid != tokens or not grid or classes < 1:
        raise UserError(f"{given}: {tokens} tokens and {classes} classes are no {kind.kind}; the file is damaged")
    return kind(
        model=model,
        latent_channels=channels,
        latent_size=grid * patch,
        num_classes=classes,
        qk_norm="blocks.0.attn.q_norm.weight" in state,
        class_token_width=0 if class_token is None else class_token.shape[1],
        head_depth=len(numbers) - depth,
        head_width=head_width,
        prediction=_prediction(kind, channels, OF_GUIDE in state, prediction, given),
        guide_depth=GUIDE_DEPTH if OF_GUIDE in state else 0,
    )


def _prediction(kind: type[DiTDHConfig], channels: int, is_guided: bool, said: str | None, given: str) -> str:
    if is_guided and said is None:
        raise UserError(
            f"{given} is a {kind.kind} with internal guidance and does not say what it predicts: add --prediction x "
            "(RAEv2's) or --prediction v"
        )
    if is_guided:
        return said
    if kind is DDTConfig and channels == IMAGE_CHANNELS:
        if said is None:
            raise UserError(
                f"{given} is a DDT on pixels and does not say what it predicts: add --prediction x (jit-ddt-… and "
                "pixelgen-ddt-…) or --prediction v (pixnerd-ddt-…)"
            )
        return said
    return "v"


def own_names(state: Mapping[str, torch.Tensor], config: DiTDHConfig, given: str) -> State:
    """The network's tensors by the names of ours, layers that are one here put together.

    Raises:
        UserError: two of theirs would have one name of ours.
    """
    renamed: State = {}
    for key, tensor in state.items():
        if key.startswith((LEFT_OUT, *(f"{table}." for table in TABLES[type(config)]))):
            continue
        name = _own_name(key, config.size.depth)
        if name in renamed:
            raise UserError(f"{given}: {key} is there under two names; the file is of another code")
        renamed[name] = tensor
    for key in list(renamed):
        for ours, theirs in MERGED.items():
            if f".{theirs[0]}." in key:
                names = [key.replace(f".{theirs[0]}.", f".{name}.") for name in theirs]
                parts = [renamed[name].float() for name in names if _holds_numbers(renamed.get(name))]
                if len(parts) == len(names) and len({part.shape for part in parts}) == 1:  # else it is incomplete
                    for name in names:
                        del renamed[name]
                    renamed[key.replace(f".{theirs[0]}.", f".{ours}.")] = torch.cat(parts)
    return renamed


def is_of_pixels(config: TransformerConfig) -> bool:
    """Whether it was trained without a VAE."""
    return isinstance(config, DDTConfig) and config.latent_channels == IMAGE_CHANNELS


def facts_of(config: DiTDHConfig) -> dict[str, object]:
    """How all networks of both projects were trained, in the words of our flags."""
    facts = {"path_type": "linear", "prediction": config.prediction, "weighting": "lognormal", "adam_beta2": 0.95}
    if is_of_pixels(config):
        facts |= ON_PIXELS[config.prediction]
    return facts | {"time_shift": settled_shift("auto", config.latent_shape)}


def check_tables(state: Mapping[str, torch.Tensor], config: DiTDHConfig, given: str) -> None:
    """The rotary positions of a file must be those of the network that is built.

    Raises:
        UserError: they are others.
    """
    class_token = min(1, config.class_token_width)
    conditions = TIME_TOKENS + LABEL_TOKENS if isinstance(config, DDTConfig) else 0
    for name, size, after in zip(TABLES[type(config)], (config.size, config.head), (conditions, 0), strict=True):
        rotary = RotaryPositions(size.width // size.heads, config.grid, unplaced=class_token + after)
        for which, ours in (("cos", rotary.cos), ("sin", rotary.sin)):
            table = state.get(f"{name}.freqs_{which}")
            expected = ours.roll(-after, 0)  # theirs has the conditions behind the grid
            expected = expected.repeat_interleave(2, dim=-1)  # and says both channels of a pair
            if table is None or not is_table(table, expected):
                raise UserError(
                    f"{given}: {name}.freqs_{which} is not there or of other rotary positions than those of "
                    f"{config.model}"
                )


def statistics_of(config: Mapping) -> FoundStatistics:
    """How diffusion-bench normalises the latents of an ``AutoencoderKL``, by its configuration: with ``latents_mean``
    and ``latents_std`` as they are, where it has them, else with its shift and scaling factor."""
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (torch.tensor(config[name]).flatten() for name in ("latents_mean", "latents_std"))
        return FoundStatistics(mean, std, None, "latents_mean and latents_std of its configuration, as they are")
    shift, scale = config.get("shift_factor") or 0.0, config["scaling_factor"]
    mean, std = (torch.full((config["latent_channels"],), value) for value in (shift, 1 / scale))
    return FoundStatistics(mean, std, None, f"its configuration's shift {shift} and scale {scale}")


def _holds_numbers(tensor: torch.Tensor | None) -> bool:
    """Whether it is there and may be put together with others."""
    return tensor is not None and tensor.ndim > 0 and tensor.is_floating_point()


def _own_name(key: str, depth: int) -> str:
    key = key.replace("adaln_modulation.", "adaLN_modulation.")
    if match := re.match(r"blocks\.(\d+)\.(.*)", key):
        number = int(match[1])
        return key if number < depth else f"head.blocks.{number - depth}.{match[2]}"
    for theirs, ours in NAMES.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key
