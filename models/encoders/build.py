"""Building frozen vision foundation models by their names, with their weights."""

from collections.abc import Sequence

import timm
from torch import nn

from errors import UserError, one_line
from models.encoders.encoder import Encoder
from models.encoders.registry import EncoderSpec, encoder_spec
from models.encoders.weights import find_weights, load_weights


def build_encoder(enc_type: str, grid: int, checkpoint: str | None = None, random_weights: bool = False) -> Encoder:
    """Build a VFM for a ``grid × grid`` token grid.

    Args:
        enc_type: a name of :data:`ENCODERS`, or ``timm/NAME``.
        grid: tokens along a side.
        checkpoint: file with the weights; by default they are looked for (``models.encoders.weights``).
        random_weights: build without weights, to measure sizes and speed.

    Raises:
        UserError: unknown name, a grid that the network cannot give, no weights.
    """
    spec = encoder_spec(enc_type)
    if grid < 1:
        raise UserError(f"--enc-type {enc_type} gives token grids of 1×1 and up, not {grid}×{grid}")
    path = None if random_weights else find_weights(enc_type, spec, checkpoint)  # before a large network is built
    network = _build_network(enc_type, spec, grid)
    if path is not None:
        load_weights(network, enc_type, spec, path)
    return Encoder(spec, grid, network, enc_type)


def _build_network(enc_type: str, spec: EncoderSpec, grid: int) -> nn.Module:
    if not timm.is_model(spec.timm_name.split(".")[0]):
        raise UserError(f"--enc-type {enc_type}: timm {timm.__version__} does not have it; pip install -U timm")
    if spec.kind == "cnn":
        return timm.create_model(spec.timm_name, features_only=True, out_indices=(spec.stage,))
    try:
        return timm.create_model(spec.timm_name, img_size=grid * spec.stride, num_classes=0, **spec.options)
    except (AssertionError, TypeError, ValueError) as error:  # networks of a fixed size; timm/NAME
        raise UserError(
            f"--enc-type {enc_type} cannot give {grid}×{grid} tokens ({one_line(error)}); take the grid of its native "
            f"image, {timm.get_pretrained_cfg(spec.timm_name).input_size[-1] // spec.stride}, or another encoder"
        ) from error


def build_encoders(
    enc_types: Sequence[str], grid: int, checkpoints: str | None = None, random_weights: bool = False
) -> list[Encoder]:
    """Build several VFMs for the same ``grid × grid`` token grid; :func:`build_encoder` says of what.

    Args:
        enc_types: their names, of :func:`encoder_names`.
        grid: tokens along a side.
        checkpoints: ``--enc-ckpt``: the file of a single VFM; of several, one file each, in the same order, separated
            by commas, where an empty entry is looked for.
        random_weights: build without weights.

    Raises:
        UserError: as :func:`build_encoder`, or another number of files than of VFMs.
    """
    files = split_checkpoints(enc_types, checkpoints)
    return [build_encoder(name, grid, file, random_weights) for name, file in zip(enc_types, files, strict=True)]


def split_checkpoints(enc_types: Sequence[str], checkpoints: str | None) -> list[str | None]:
    """The file of each VFM; None where it is to be looked for."""
    if checkpoints is None:
        return [None] * len(enc_types)
    files = [checkpoints] if len(enc_types) == 1 else checkpoints.split(",")
    if len(files) != len(enc_types):
        count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
        raise UserError(
            f"--enc-ckpt {checkpoints} is {count} for the {len(enc_types)} encoders of --enc-type "
            f"{','.join(enc_types)}: give one each, in that order, separated by commas (nothing between two commas: "
            "that one is looked for)"
        )
    return [file.strip() or None for file in files]
