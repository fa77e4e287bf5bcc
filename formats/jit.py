"""Checkpoints of JiT (arXiv 2511.13720; ``formats.sit``): a transformer on pixels that predicts the image.

::

    checkpoint-last.pth    model, model_ema1, model_ema2, optimizer, epoch, args (an argparse.Namespace)

Tensors have the names of ours behind ``net.``; of the two averages the first is the one that samples. Their noise has a
standard deviation of ``noise_scale`` beside images in [-1, 1], 1 at 256 and 2 at 512 px. Here noise is always of 1, and
images are divided instead: the first layer takes the factor, and the last gives it back.
"""

import math
import re
from collections.abc import Mapping

import torch

from errors import UserError
from models.denoisers.config import JiTConfig
from models.denoisers.jit import CLASS_TOKENS
from models.latent_statistics import LatentStatistics
from models.tokenizers.pixels import IMAGE_CHANNELS

State = dict[str, torch.Tensor]

PREFIX = "net."
PATCHES, BOTTLENECK = "x_embedder.proj1.weight", "x_embedder.proj2.weight"
AVERAGE, TRAINED = "model_ema1", "model"
READ = {PATCHES: 4, BOTTLENECK: 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2}  # dimensions
# theirs → ours; of P_mean the time runs the other way
FLAGS = {
    **{"model": "model", "class_num": "num_classes", "img_size": "resolution", "label_drop_prob": "cfg_prob"},
    **{"P_std": "time_std", "noise_scale": "noise_scale"},
}
OF_ALL = {"path_type": "linear", "prediction": "x", "weighting": "lognormal", "adam_beta2": 0.95}  # bare weights too


def is_jit(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether weights are of a JiT; its patch embedding tells."""
    return PATCHES in state


def weight_sets(contents: Mapping) -> dict[str, Mapping] | None:
    """The averaged weights and those as trained, where a file has them under their names."""
    if AVERAGE not in contents:
        return None
    names = {"ema": AVERAGE, "model": TRAINED}
    return {ours: contents.get(theirs) for ours, theirs in names.items()}


def facts_of(args: Mapping) -> dict[str, object]:
    """What the flags of a training say, in the words of ours; empty: they are not JiT's."""
    if "P_mean" not in args:
        return {}
    facts = {ours: args[theirs] for theirs, ours in FLAGS.items() if args.get(theirs) is not None}
    mean = args["P_mean"]
    facts["time_mean"] = -mean if isinstance(mean, int | float) else mean
    return facts | OF_ALL


def jit_config(state: Mapping[str, torch.Tensor], given: str) -> JiTConfig:
    """Which network a state dict belongs to, by names and shapes.

    Raises:
        UserError: none that is known here.
    """
    for name, dimensions in READ.items():
        if name not in state:
            raise UserError(f"{given} is not a complete JiT: it lacks {name}")
        if state[name].ndim != dimensions:
            raise UserError(f"{given}: {name} has {state[name].ndim} dimensions instead of {dimensions}; it is damaged")
    bottleneck, channels, patch, _ = state[PATCHES].shape
    width, tokens = len(state[BOTTLENECK]), state["pos_embed"].shape[1]
    numbers = [int(match[1]) for match in (re.match(r"blocks\.(\d+)\.", key) for key in state) if match]
    depth, grid = 1 + max(numbers, default=-1), math.isqrt(tokens)
    model = JiTConfig.name_of(depth, width, patch)
    if model is None:
        raise UserError(
            f"{given}: a JiT of {depth} blocks of width {width} with patch {patch} is none that is known "
            f"({JiTConfig.sizes_in_words()})"
        )
    if grid * grid != tokens or not grid:
        raise UserError(f"{given}: pos_embed has {tokens} tokens, which is not a square")
    config = JiTConfig(
        model=model,
        latent_channels=channels,
        latent_size=grid * patch,
        num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
    )
    if channels != IMAGE_CHANNELS:
        raise UserError(f"{given}: a {model} on {channels} channels is not known here; give one on the 3 of images")
    if bottleneck != config.bottleneck or "in_context_posemb" not in state:
        raise UserError(
            f"{given}: a {model} with a bottleneck of {bottleneck} channels"
            + ("" if "in_context_posemb" in state else " and without tokens of the class")
            + f" is not known here; give one of {config.bottleneck} and with {CLASS_TOKENS} tokens"
        )
    return config


def noise_scale(facts: Mapping[str, object], config: JiTConfig, given: str) -> float:
    """The standard deviation of their noise; where no flag says it, as in their commands: the resolution over 256.

    Raises:
        UserError: it is no number above 0.
    """
    scale = facts.get("noise_scale", max(1.0, config.latent_size / 256))
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise UserError(f"{given}: its args say noise_scale {scale!r}, which is no number above 0")
    return float(scale)


def own_tensors(state: Mapping[str, torch.Tensor], scale: float) -> State:
    """Weights of a network whose images are divided by ``scale``; the same for 1."""
    if scale == 1:
        return dict(state)
    factors = {PATCHES: scale} | dict.fromkeys(("final_layer.linear.weight", "final_layer.linear.bias"), 1 / scale)
    return {key: tensor * factors[key] if key in factors else tensor for key, tensor in state.items()}


def statistics_of(channels: int, scale: float) -> LatentStatistics:
    """Pixels in [-1, 1], divided by ``scale``."""
    statistics = LatentStatistics(channels)
    statistics.load(torch.zeros(channels), torch.full((channels,), scale))
    return statistics
