"""What a user can get wrong with export_ldm.py, and what the one line must say."""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from formats.vae import load_tokenizer
from tests.bad_inputs.case import Case
from tests.bad_inputs.export_vae_cases import pickled_code
from tests.bad_inputs.generate_cases import replaced, shared_run, without
from tests.command_line import argv_of
from tests.latent_caches import save_vae
from tests.public_sit import PublicSiT, public_args, write_experiment


def exporting(prepare_out: Callable[[Path], object] = lambda out: None, *flags: str, run: str | None = None):
    """A good run (or ``run``), a folder ``out`` that is prepared, flags."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        prepare_out(tmp_path / "out")
        return [run or str(shared_run(tmp_path)), str(tmp_path / "out"), *flags]

    return prepare


def thesis(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("")


def another_index(out: Path) -> None:
    out.mkdir()
    (out / "model_index.json").write_text("{}")


def earlier_export(out: Path) -> None:
    out.mkdir()
    (out / "model_index.json").write_text('{"exported_from": "ldm"}')


def below_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "thesis.txt").write_text("")
    return [str(shared_run(tmp_path)), str(tmp_path / "thesis.txt" / "out")]


def too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return [str(shared_run(tmp_path)), str(tmp_path / ("x" * 300))]


def foreign(spoil: Callable[[Path], object] = lambda folder: None, source: str = "", **changes: object):
    """An experiment of REPA in ``theirs``, something spoiled, good flags; callables are given the case's folder.

    Args:
        spoil: is given the folder.
        source: a path in it that is given instead.
        changes: flags to replace, add, or leave out (None).
    """

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        shared = tmp_path.parent / "shared-foreign"
        if not shared.exists():
            write_experiment(shared, PublicSiT(seed=1), PublicSiT(seed=2), public_args())
            save_vae(shared)
        folder = tmp_path / "theirs"
        shutil.copytree(shared, folder)
        spoil(folder)
        values = {"format": "run", "vae_ckpt": folder / "vae"}
        values |= {key: value(folder) if callable(value) else value for key, value in changes.items()}
        return [str(folder / source), str(tmp_path / "out"), *argv_of(values)]

    return prepare


def bare(make: Callable[[], object], **changes: object):
    """The same with a file of what ``make`` returns."""
    return foreign(lambda folder: torch.save(make(), folder / "file.pt"), source="file.pt", **changes)


def ours(*parts: str):
    """A run of ours, or something in it, where one of theirs is wanted."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        return [str(shared_run(tmp_path).joinpath(*parts)), str(tmp_path / "out"), "--format", "run"]

    return prepare


def their_facts(**changes: object):
    return lambda folder: (folder / "args.json").write_text(json.dumps(public_args(**changes)))


def cut(folder: Path) -> None:
    path = folder / "checkpoints" / "0000007.pt"
    path.write_bytes(path.read_bytes()[:-3000])


def weights() -> dict:
    return PublicSiT().state_dict()


def batch_norm(var: torch.Tensor) -> dict:
    return {"ema": weights() | {"bn.running_mean": torch.zeros(len(var)), "bn.running_var": var}}


def vae_weights() -> dict:
    return load_tokenizer("f4d4-tiny", "none")[0].network.state_dict()


def file_of_ones(folder: Path) -> Path:
    torch.save({"ones": torch.ones(4)}, folder / "ones.pt")
    return folder / "ones.pt"


def renamed_blocks() -> dict:
    """A SiT of 7 blocks."""
    state = weights()
    return state | {key.replace("blocks.5.", "blocks.6."): state[key] for key in state if key.startswith("blocks.5.")}


def variance_too() -> dict:
    state = weights()
    return state | {
        key: torch.cat([state[key]] * 2) for key in ("final_layer.linear.weight", "final_layer.linear.bias")
    }


CASES = [
    Case("a VAE beside its own", exporting(lambda out: None, "--vae-ckpt", "x"), ("--vae-ckpt", "SOURCE", "leave")),
    Case("a path beside its own", exporting(lambda out: None, "--path-type", "linear"), ("--path-type is for",)),
    Case("no run", lambda tmp_path, monkeypatch: [], ("SOURCE, OUT",)),
    Case("not a run", exporting(run="docs"), ("SOURCE docs is not a run",)),
    Case("no such step", exporting(lambda out: None, "--train-steps", "3"), ("--train-steps 3", "there are: 5, 10")),
    Case("a file", exporting(lambda out: out.write_text("")), ("out is a file",)),
    Case("below a file", below_a_file, ("thesis.txt", "file", "folder")),
    Case("too long a name", too_long, ("name is too long",)),
    Case("other files", exporting(thesis, "--overwrite"), ("holds other files", "new folder")),
    Case("another's folder", exporting(another_index, "--overwrite"), ("holds other files", "new folder")),
    Case("an earlier export", exporting(earlier_export), ("holds an export", "--overwrite")),
    Case("theirs as a folder", foreign(format="diffusers"),
         ("export_ldm.py", "theirs exps/theirs-run --format run --vae-ckpt", "give SOURCE exps/theirs-run")),
    Case("theirs as theirs", foreign(format="repa", train_steps=7), ("exps/theirs-run --format run --train-steps 7",)),
    Case("their file as a folder", bare(weights, format="diffusers"), ("file.pt exps/file-run --format run",)),
    Case("a run as a run", ours(), ("is a run of this project already", "leave out --format run")),
    Case("a run's file as a run", ours("checkpoints", "0000010", "ema.safetensors"), ("belongs to a run", "SOURCE")),
    Case("nothing as a run", foreign(source="none"), ("SOURCE", "none: no such file or folder")),
    Case("a folder as a run", foreign(source="vae"), ("vae has no checkpoints/*.pt", "or a file")),
    Case("one of two weights", foreign(weights="model"), ("--weights model", "a run holds both")),
    Case("code", foreign(lambda folder: pickled_code(folder / "file.pt"), source="file.pt"), ("not readable",)),
    Case("no VAE", foreign(vae_ckpt=None), ("--vae-ckpt is needed", "SOURCE")),
    Case("a VAE that is gone", foreign(their_facts(vae_ckpt="gone.pt"), vae_ckpt=None),
         ("--vae-ckpt is needed", "gone.pt, which is not here")),
    Case("a depth beyond the blocks", bare(lambda: {"ema": weights(), "args": Namespace(encoder_depth=9)}),
         ("file.pt", "encoder-depth 9", "blocks 1 to 6")),
    Case("a fact that is none", bare(lambda: {"ema": weights(), "args": Namespace(cfg_prob=[0.1])}),
         ("file.pt", "cfg_prob list, which is neither number nor text")),
    Case("no null class", bare(lambda: {"ema": weights(), "args": Namespace(cfg_prob=0)}), ("no null class",)),
    Case("a VAE as SiT", bare(vae_weights), ("holds a VAE",)),
    Case("optimizer only", bare(lambda: {"opt": {"state": {}}, "steps": 3}), ("holds no weights, but opt, steps",)),
    Case("a list", bare(lambda: [1]), ("holds a list",)),
    Case("no tensor in ema", bare(lambda: {"ema": weights() | {"step": 3}}), ("'step' is a int, not a tensor",)),
    Case("a number as name", bare(lambda: {"ema": weights() | {7: torch.ones(1)}}), ("'7'", "not a tensor by name")),
    Case("a bias of 0 dimensions", bare(lambda: weights() | {"final_layer.linear.bias": torch.ones(())}),
         ("final_layer.linear.bias has 0 dimensions",)),
    Case("a projector's bias of 0 dimensions", bare(lambda: weights() | {"projectors.0.4.bias": torch.ones(())}),
         ("projectors.0.4.bias has 0 dimensions",)),
    Case("positions of 0 dimensions", bare(lambda: weights() | {"pos_embed": torch.ones(())}),
         ("pos_embed has 0 dimensions",)),
    Case("sparse weights", bare(lambda: {"ema": weights() | {"pos_embed": torch.ones(1, 16, 192).to_sparse()}}),
         ("pos_embed is sparse",)),
    Case("a depth of text", bare(lambda: {"ema": weights(), "args": Namespace(encoder_depth="8")}),
         ("encoder_depth '8'", "not a whole number")),
    Case("int8 weights", bare(lambda: {key: value.to(torch.int8) for key, value in weights().items()}),
         ("torch.int8", "unquantised")),
    Case("NaN weights", bare(lambda: weights() | {"final_layer.linear.bias": torch.full((16,), torch.nan)}),
         ("final_layer.linear.bias is not finite",)),
    Case("BatchNorm of other channels", bare(lambda: batch_norm(torch.ones(32))), ("bn", "32 channels")),
    Case("BatchNorm of zeros", bare(lambda: batch_norm(torch.zeros(4))), ("bn", "0 in every channel")),
    Case("BatchNorm of NaN", bare(lambda: batch_norm(torch.full((4,), torch.nan))), ("bn", "not finite")),
    Case("another network", bare(lambda: {"a.weight": torch.ones(2)}), ("holds no SiT", "a.weight")),
    Case("unknown depth", bare(renamed_blocks), ("7 blocks of width 192", "XL 28 × 1152")),
    Case("unknown width", bare(lambda: weights() | {"x_embedder.proj.weight": torch.ones(200, 4, 2, 2)}),
         ("6 blocks of width 200",)),
    Case("a learned variance", bare(variance_too), ("predicts a variance too",)),
    Case("half a SiT", bare(lambda: {key: value for key, value in weights().items() if "fc2" not in key}),
         ("not a complete SiT-Ti/2", "lacks blocks.0.mlp.fc2.weight")),
    Case("bare weights without a VAE", bare(weights, vae_ckpt=None),
         ("--vae-ckpt is needed", "sd-vae-ft-ema")),
    Case("a step of a file", bare(weights, train_steps=7), ("--train-steps", "SOURCE", "file.pt is one itself")),
    Case("their checkpoint cut", foreign(cut), ("0000007.pt", "not readable")),
    Case("their step missing", foreign(train_steps=8), ("step 8", "there are: 7")),
    Case("no args.json beside", foreign(without("args.json")), ("no args.json", "copy it")),
    Case("args.json cut", foreign(replaced("args.json", "{")), ("args.json is not readable",)),
    Case("args.json of another", foreign(their_facts(path_type="cosine")), ("args.json says path_type cosine",)),
    Case("no statistics in the file", foreign(vae_latents_stats=file_of_ones), ("--vae-latents-stats", "mean and std")),
    Case("another path", foreign(path_type="cosine"),
         ("--path-type cosine", "trained on the linear path")),
    Case("another resolution", foreign(resolution=64), ("--resolution is 64 px", "32 px")),
    Case("VAE of other channels", foreign(vae="f16d16", vae_ckpt="none"), ("4 channels", "decodes 16", "--vae-ckpt")),
]  # fmt: skip
