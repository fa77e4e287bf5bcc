"""Reading other people's files of weights: tensors by name, nothing unpickled."""

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

NESTED_KEYS = ("state_dict", "model")  # where training codes put the weights beside other things


class NotWeightsError(Exception):
    """The file holds no tensors by name; the message is the reason, in a few words."""


def read_state_dict(path: str | Path, nested: Sequence[str] = NESTED_KEYS) -> dict[str, torch.Tensor]:
    """Read a .safetensors file, or a file of ``torch.save`` with ``weights_only=True``, onto the CPU.

    Args:
        path: of the file.
        nested: a dictionary under one of these keys is taken where there is one; the first goes first.

    Raises:
        NotWeightsError: truncated, of another kind, with code in it, or not a dictionary of tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        raise NotWeightsError(one_line(error)) from error
    for key in nested:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise NotWeightsError(f"it holds a {type(state).__name__}, not tensors by name")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise NotWeightsError(f"its entry {str(name)[:40]!r} is a {type(tensor).__name__}, not a tensor by name")
    if not state:
        raise NotWeightsError("it is empty")
    return state


def weights_checksum(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in the order of the names; wherever the tensors lie."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def one_line(error: Exception) -> str:
    """An exception's text on one line, without what exceeds 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
