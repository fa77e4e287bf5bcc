"""Reading other people's files of weights: told apart by their content, nothing unpickled."""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from errors import UserError, one_line
from files import is_out_of_reach, read_safetensors

NESTED_KEYS = ("state_dict", "model")  # where training codes put the weights among other things
SNIFFED_BYTES = 512

# Classes and functions that public training checkpoints (Lightning, latent-diffusion, VA-VAE) hold, too. None
# of them is imported: each name gives an inert placeholder. What is not in this list and not torch's own is refused.
PLACEHOLDER_NAMES = (
    *(
        f"{package}.callbacks.{name}"
        for package in ("pytorch_lightning", "lightning.pytorch")
        for name in (
            "model_checkpoint.ModelCheckpoint",
            "early_stopping.EarlyStopping",
            "lr_monitor.LearningRateMonitor",
            "base.Callback",
            "progress.ProgressBar",
            "progress.tqdm_progress.TQDMProgressBar",
        )
    ),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata", "SCMode", "ValueNode")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Integer", "Float", "String", "Boolean", "Bytes", "Path")),
    *(f"typing.{name}" for name in ("Any", "Dict", "List", "Tuple", "Union", "Optional")),
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "bool", "str", "bytes")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray"),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Int64", "Int32", "Bool")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    "torch.torch_version.TorchVersion",
)
# Dictionaries that are read as plain ones: torch fills no others.
DICTIONARY_NAMES = (
    "collections.defaultdict",
    *(f"{package}.utilities.parsing.AttributeDict" for package in ("pytorch_lightning", "lightning.pytorch")),
    *(f"{package}.utilities.data.AttributeDict" for package in ("lightning_fabric", "lightning.fabric")),
)

# Beginnings of what is not weights, and what to call it.
_OTHER_KINDS = (
    (rb"version https://git-lfs", "a git-LFS pointer: the weights themselves were not downloaded (run git lfs pull)"),
    (rb"\s*(<\?xml[^>]*>\s*)?<(!doctype )?html", "a web page: the download went wrong"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM....\0\0\0\0", "an image"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"GGUF", "a GGUF file"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd", "a compressed archive: unpack it"),
    (rb".{257}ustar", "a tar archive: unpack it, or save it anew with torch.save"),
)
_UNSUPPORTED = re.compile(r"Unsupported global: GLOBAL (\S+)|unsupported GLOBAL (\S+) whose module")


class NotWeightsError(Exception):
    """The file holds no tensors by name; the message is the reason, in a few words."""


class MissingWeightsError(UserError):
    """The file is in none of the places where it is looked for."""


class Placeholder:
    """Stands for an object of a class that is not imported: remembers nothing, does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "Placeholder":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class PlainDict:
    """Making one gives an empty dictionary: a defaultdict's factory and an AttributeDict's methods are not wanted."""

    def __new__(cls, *args: object) -> dict:
        return {}


def read_state_dict(path: str | Path, nested: Sequence[str] = NESTED_KEYS) -> dict[str, torch.Tensor]:
    """Tensors by name from a safetensors file, or from one of ``torch.save``, onto the CPU.

    Args:
        path: of the file.
        nested: a dictionary under one of these keys is taken where there is one; the first goes first.

    Raises:
        NotWeightsError: truncated, of another kind, with code in it, or not a dictionary of tensors.
    """
    state = read_contents(path)
    for key in nested:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return tensors_by_name(state)


def tensors_by_name(state: object) -> dict[str, torch.Tensor]:
    """The same object, if it is a dictionary of tensors by name and not empty.

    Raises:
        NotWeightsError: it is not.
    """
    if not isinstance(state, dict):
        raise NotWeightsError(f"it holds a {type(state).__name__}, not tensors by name")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise NotWeightsError(f"its entry {str(name)[:40]!r} is a {type(tensor).__name__}, not a tensor by name")
        check_plain(name, tensor)
    if not state:
        raise NotWeightsError("it is empty")
    return state


def check_plain(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor without values, or whose values are not simply stored one after the other.

    Raises:
        NotWeightsError: it is on the meta device, sparse, nested, quantised or complex.
    """
    if tensor.is_meta:
        raise NotWeightsError(f"{name} has no values (it was saved from the meta device)")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_complex():
        kind = "quantised" if tensor.is_quantized else "nested" if tensor.is_nested else "sparse"
        kind = "complex" if tensor.is_complex() else kind
        raise NotWeightsError(f"{name} is {kind}; save it as a dense tensor of real numbers")


def check_values(state: Mapping[str, torch.Tensor], network: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that are not numbers to compute with; names and shapes are the caller's.

    Args:
        state: what is to be loaded.
        network: the network's own tensors, on any device: where these are floating point, so must the others be.

    Raises:
        NotWeightsError: integers (quantised weights), NaN or infinite.
    """
    for name, tensor in state.items():
        if name not in network or not network[name].is_floating_point():
            continue
        if not tensor.is_floating_point():
            raise NotWeightsError(f"{name} is of type {tensor.dtype}, not of weights; give unquantised ones")
        if not tensor.float().isfinite().all():  # float8 knows no isfinite
            raise NotWeightsError(f"{name} is not finite everywhere: its training diverged, or it is damaged")


def read_contents(path: str | Path) -> object:
    """Everything in a safetensors file or in one of ``torch.save`` (either layout), on the CPU; nothing is unpickled.

    What the file is says its content, not its name. ``argparse.Namespace``, in which training codes keep their flags,
    comes as itself; objects of :data:`PLACEHOLDER_NAMES` come as :class:`Placeholder`, those of
    :data:`DICTIONARY_NAMES` as dictionaries; any other class or function makes the file refused, and is never run.

    Raises:
        NotWeightsError: no such file, truncated, of another kind, or with code in it.
    """
    path = Path(path)
    try:
        read = _reader(path)
        return read(path)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise NotWeightsError(_reason(error)) from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError, SafetensorError) as error:
        if is_out_of_reach(error):
            raise
        raise NotWeightsError(f"it is truncated or damaged ({one_line(error)})") from error


def _reader(path: Path) -> Callable[[Path], object]:
    """Who reads this file, by its first bytes; what is not a file of weights is named."""
    if path.is_dir():
        raise NotWeightsError("it is a folder")
    if not path.is_file():
        raise NotWeightsError("no such file")
    with path.open("rb") as file:
        head = file.read(SNIFFED_BYTES)
    if not head:
        raise NotWeightsError("it is empty")
    for pattern, kind in _OTHER_KINDS:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            raise NotWeightsError(f"it is {kind}")
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return _read_torch
    if head[4:9] == b"\0\0\0\0{":  # the upper half of the header's length, and the header
        return read_safetensors
    if head[0] == 0x80:  # a pickle's protocol
        return _read_torch
    if _is_text(head):
        raise NotWeightsError("it is text")
    raise NotWeightsError("it is neither a safetensors file nor one of torch.save")


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise NotWeightsError("it is truncated or damaged: the end of the archive is missing; copy it again") from error
    if any(name.endswith(".npy") for name in names):
        raise NotWeightsError("it is a NumPy .npz archive")
    if any(Path(name).name == "constants.pkl" for name in names):
        raise NotWeightsError(
            "it is TorchScript, a program, and not run here; where you trust it, convert it once: "
            f"torch.save(torch.jit.load({path.name!r}, map_location='cpu').state_dict(), 'weights.pt')"
        )
    if not any(Path(name).name == "data.pkl" for name in names):
        raise NotWeightsError("it is a zip archive that torch.save did not write")


def _read_torch(path: Path) -> object:
    known = [(_placeholder(name), name) for name in PLACEHOLDER_NAMES] + [
        (PlainDict, name) for name in DICTIONARY_NAMES
    ]
    # an open file, because torch would go by the name's suffix; a warning tells of pickle protocols that it cannot read
    with (
        path.open("rb") as file,
        torch.serialization.safe_globals([argparse.Namespace, *known]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True)


def _placeholder(name: str) -> type[Placeholder]:
    """One for each name, which torch's messages then tell."""
    module, _, attribute = name.rpartition(".")
    return type(attribute, (Placeholder,), {"__module__": module})


def _is_text(head: bytes) -> bool:
    return not re.search(rb"[\x00-\x08\x0e-\x1f]", head)


def _reason(error: Exception) -> str:
    text = str(error)
    if found := _UNSUPPORTED.search(text):
        return f"it refers to code, {found[1] or found[2]}, which is never run"
    if "magic number" in text or "Unsupported operand" in text or "Unsupported class" in text:
        return "it is a pickle, but not one that torch.save wrote"
    if "Weights only load failed" in text:  # torch's advice follows, of which nothing is wanted
        reason = text.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        return f"it holds what cannot be read without running code ({reason[:200]})"
    return f"it is truncated or damaged ({one_line(error)})"
