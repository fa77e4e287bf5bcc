"""The one reader of other people's files: by content, with reasons, and without running anything."""

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.weight_files import NotWeightsError, Placeholder, read_contents, read_state_dict
from tests.foreign_classes import foreign_classes

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, -2]), "h": torch.ones(3).bfloat16()}


class Runs:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_legacy(state: object, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x"])
@pytest.mark.parametrize("write", [save_file, torch.save, write_legacy])
def test_what_a_file_is_says_its_content_and_not_its_name(write, name, tmp_path):
    write(STATE, tmp_path / name)
    state = read_state_dict(tmp_path / name)
    assert set(state) == set(STATE)
    assert all(torch.equal(state[key], tensor) and state[key].dtype == tensor.dtype for key, tensor in STATE.items())


@pytest.mark.parametrize("write", [torch.save, write_legacy])
def test_lightning_objects_become_placeholders_and_flags_stay(write, tmp_path):
    names = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "omegaconf.listconfig.ListConfig")
    with foreign_classes(*names) as (callback, listed):
        config = listed()
        config.content = [1, defaultdict(dict, {"x": 3})]
        write(
            {
                "state_dict": OrderedDict(STATE),
                "callbacks": {callback: {"best_model_score": np.float64(0.25), "best_model_path": "x.ckpt"}},
                "hyper_parameters": {"widths": config, "table": defaultdict(list, {"rows": [1, 2]})},
                "args": argparse.Namespace(vae="f8d4", steps=[1]),
            },
            tmp_path / "x.ckpt",
        )
    contents = read_contents(tmp_path / "x.ckpt")
    assert contents["args"] == argparse.Namespace(vae="f8d4", steps=[1])
    ((callback, values),) = contents["callbacks"].items()
    assert issubclass(callback, Placeholder)
    assert values["best_model_path"] == "x.ckpt"
    assert isinstance(values["best_model_score"], Placeholder)
    assert isinstance(contents["hyper_parameters"]["widths"], Placeholder)
    assert vars(contents["hyper_parameters"]["widths"]) == {}
    assert contents["hyper_parameters"]["table"] == {"rows": [1, 2]}
    assert torch.equal(read_state_dict(tmp_path / "x.ckpt")["a.weight"], STATE["a.weight"])


@pytest.mark.parametrize("write", [torch.save, write_legacy])
@pytest.mark.parametrize(
    "name", ["pytorch_lightning.utilities.parsing.AttributeDict", "lightning.fabric.utilities.data.AttributeDict"]
)
def test_dictionaries_of_lightning_become_plain_ones(name, write, tmp_path):
    with foreign_classes(name, base=dict) as (attributes,):
        flags = attributes(rate=1e-4, nested=attributes(widths=[1, 2]), nothing=attributes())
        write({"state_dict": STATE, "hyper_parameters": flags}, tmp_path / "x.ckpt")
    found = read_contents(tmp_path / "x.ckpt")["hyper_parameters"]
    assert found == {"rate": 1e-4, "nested": {"widths": [1, 2]}, "nothing": {}}
    assert {type(found), type(found["nested"]), type(found["nothing"])} == {dict}


def test_the_version_of_torch_is_no_code(tmp_path):
    torch.save({"state_dict": STATE, "torch": torch.torch_version.TorchVersion("2.6.0")}, tmp_path / "x.ckpt")
    assert torch.equal(read_state_dict(tmp_path / "x.ckpt")["b"], STATE["b"])


def test_a_whole_file_that_needs_code_is_not_called_damaged(tmp_path):
    """A list of a class that torch fills nothing into."""
    with foreign_classes("omegaconf.listconfig.ListConfig", base=list) as (listed,):
        torch.save({"state_dict": STATE, "x": listed([1, 2])}, tmp_path / "x.ckpt")
    with pytest.raises(NotWeightsError, match="cannot be read without running code") as error:
        read_contents(tmp_path / "x.ckpt")
    assert "damaged" not in str(error.value)
    assert "omegaconf.listconfig.ListConfig" in str(error.value)


def test_only_for_the_time_of_reading(tmp_path):
    before = set(map(str, torch.serialization.get_safe_globals()))
    torch.save(STATE, tmp_path / "x.pt")
    read_contents(tmp_path / "x.pt")
    with pytest.raises(NotWeightsError):
        read_contents(tmp_path / "missing.pt")
    assert set(map(str, torch.serialization.get_safe_globals())) == before


@pytest.mark.parametrize(
    "write",
    [torch.save, write_legacy, lambda o, path: path.write_bytes(pickle.dumps(o, 2))],
    ids=["zip", "legacy", "pickle"],
)
def test_code_is_named_and_not_run(write, tmp_path):
    write({"state_dict": {}, "x": Runs(tmp_path / "was_run")}, tmp_path / "x.pt")
    with pytest.raises(NotWeightsError, match=r"it refers to code, posix\.mkdir, which is never run"):
        read_contents(tmp_path / "x.pt")
    assert not (tmp_path / "was_run").exists()


def test_an_unknown_class_of_lightning_is_refused_by_name(tmp_path):
    with foreign_classes("pytorch_lightning.evil.Gadget") as (gadget,):
        torch.save({"state_dict": STATE, "x": gadget()}, tmp_path / "x.ckpt")
    with pytest.raises(NotWeightsError, match=r"pytorch_lightning\.evil\.Gadget"):
        read_contents(tmp_path / "x.ckpt")


def half(write):
    def write_half(path: Path) -> None:
        write({"w": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return write_half


def plain_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")


def npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3))


def script(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


NOT_WEIGHTS = {
    "empty": (lambda path: path.touch(), "empty"),
    "folder": (lambda path: path.mkdir(), "folder"),
    "missing": (lambda path: None, "no such file"),
    "text": (lambda path: path.write_text("hello\n"), "text"),
    "JSON": (lambda path: path.write_text('{"a": 1, "b": {"c": 2}}'), "text"),
    "HTML": (lambda path: path.write_text("\n<!DOCTYPE html><html></html>"), "web page"),
    "LFS pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
        "git-LFS",
    ),
    "PNG": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20)), "image"),
    "JPEG": (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(20)), "image"),
    "npz": (npz, "npz"),
    "npy": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"), "NumPy array"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(20)), "unpack"),
    "zip": (plain_zip, "torch.save did not write"),
    "TorchScript": (script, "TorchScript"),
    "a module": (lambda path: torch.save(torch.nn.Linear(1, 1), path), r"torch\.nn\.modules\.linear\.Linear"),
    "noise": (lambda path: path.write_bytes(bytes(range(1, 200))), "neither"),
    "half a zip": (half(torch.save), "truncated"),
    "half a legacy file": (half(write_legacy), "truncated"),
    "half a safetensors file": (half(save_file), "truncated"),
    "a pickle of numbers": (lambda path: path.write_bytes(pickle.dumps({"a": 1}, 2)), "torch.save"),
    "a pickle of protocol 5": (lambda path: path.write_bytes(pickle.dumps({"a": 1}, 5)), "torch.save"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", NOT_WEIGHTS)
def test_other_files_are_named_for_what_they_are(kind, suffix, tmp_path):
    write, reason = NOT_WEIGHTS[kind]
    write(tmp_path / f"x{suffix}")
    with pytest.raises(NotWeightsError, match=reason) as error:
        read_contents(tmp_path / f"x{suffix}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("contents", [{}, [STATE], {"a": 1}, {0: torch.ones(1)}, {"state_dict": {}}, torch.ones(2)])
def test_what_holds_no_tensors_by_name_is_no_state_dict(contents, tmp_path):
    torch.save(contents, tmp_path / "x.pt")
    with pytest.raises(NotWeightsError):
        read_state_dict(tmp_path / "x.pt")
