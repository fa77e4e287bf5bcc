"""What a user can get wrong with generate.py, and what the one line must say."""

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
from files import checksum, write_json
from models.denoisers import denoiser_config
from tests.bad_inputs.case import Case
from tests.image_sets import random_images, write_npz
from tests.ldm_runs import STEP, flags, write_ldm_run
from tests.public_sit import PublicSiT, public_args, write_experiment

CHECKPOINT = Path("checkpoints") / f"{STEP:07d}"


def shared_run(tmp_path: Path) -> Path:
    """One run for all cases of a test session."""
    folder = tmp_path.parent / "shared-ldm-run"
    return folder if folder.exists() else write_ldm_run(folder, milestone=True)


def with_flags(**changes: object):
    """A good run, bad flags; callables are given the case's folder."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        values = {key: value(tmp_path) if callable(value) else value for key, value in changes.items()}
        return flags(shared_run(tmp_path), **({"sample_dir": tmp_path / "out"} | values))

    return prepare


def with_run(change: Callable[[Path], object], **changes: object):
    """Good flags, and a run that ``change`` spoils: it must replace files, never write into them, as they are links."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        run = tmp_path / "run"
        shutil.copytree(shared_run(tmp_path), run, copy_function=os.link)
        change(run)
        return flags(run, **({"sample_dir": tmp_path / "out"} | changes))

    return prepare


def begun_with(before: dict, **now: object):
    """A folder that was begun with other flags."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        common = {"sample_dir": tmp_path / "out", "num_steps": 1, "num_fid_samples": 2}
        assert generate.main(flags(shared_run(tmp_path), **(common | before))) == 0
        return flags(shared_run(tmp_path), **(common | now))

    return prepare


def replaced(name: str | Path, content: str | bytes):
    def change(run: Path) -> None:
        (run / name).unlink()
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def status(**values: object):
    return lambda run: write_json(run / "status.json", {"step": 7, "max_train_steps": 10, "reason": None} | values)


def manifest(**changes: object):
    """Replace entries of the arguments; None leaves one out."""

    def change(run: Path) -> None:
        path = run / CHECKPOINT / "manifest.json"
        content = json.loads(path.read_text())
        arguments = content["args"] | changes
        content["args"] = {name: value for name, value in arguments.items() if value is not None}
        write_json(path, content)

    return change


def sit(**changes: object):
    """Replace entries of the denoiser's configuration."""

    def change(run: Path) -> None:
        arguments = json.loads((run / CHECKPOINT / "manifest.json").read_text())["args"]
        manifest(denoiser=arguments["denoiser"] | changes)(run)

    return change


def damaged(*steps: str):
    """Cut the EMA's file short, in checkpoints and milestones."""

    def change(run: Path) -> None:
        for path in run.glob("*/*/ema.safetensors"):
            if path.parent.name in steps:
                content = path.read_bytes()
                path.unlink()
                path.write_bytes(content[:-100])

    return change


def without(*names: str | Path):
    def change(run: Path) -> None:
        for name in names:
            shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()

    return change


def other_vae_weights(run: Path) -> None:
    path = run / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {name: tensor * 1.01 for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(weights, path)


def diverged(run: Path) -> None:
    """Weights that are not finite, with a manifest that fits them."""
    path = run / CHECKPOINT / "ema.safetensors"
    weights = load_file(path)
    weights["final_layer.linear.bias"][0] = torch.nan
    path.unlink()
    save_file(weights, path)
    refresh_checksum(run)


def refresh_checksum(run: Path) -> None:
    path = run / CHECKPOINT / "manifest.json"
    content = json.loads(path.read_text())
    content["files"]["ema.safetensors"] = checksum(path.parent / "ema.safetensors")
    write_json(path, content)


def no_run(tmp_path: Path) -> Path:
    (tmp_path / "plain").mkdir()
    return tmp_path / "plain"


def other_run(step: str = "", **changes: object):
    """What ``--guide`` is given: a second run, differently made."""
    return lambda tmp_path: f"{write_ldm_run(tmp_path / 'other', **({'seed': 5} | changes))}{step}"


def sweeping(*axes: str, **changes: object):
    """A sweep against a reference that fits."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        others = {"evaluate": reference_of(32), "features": "efficientnet-lite0"} | changes
        return [*with_flags(**others)(tmp_path, monkeypatch), "--sweep", *axes]

    return prepare


def file_at(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


def folder_in_use(tmp_path: Path) -> Path:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    return tmp_path / "full"


def patched(values: dict[str, object]):
    """Good flags, and names of modules replaced."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        argv = with_flags()(tmp_path, monkeypatch)
        for name, value in values.items():
            monkeypatch.setattr(name, value)
        return argv

    return prepare


def environment(**variables: str):
    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return with_flags()(tmp_path, monkeypatch)

    return prepare


def foreign(**changes: object):
    """An experiment of REPA in ``theirs``, good flags; callables are given its folder."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        folder = write_experiment(tmp_path / "theirs", PublicSiT(seed=1), PublicSiT(seed=2), public_args())
        values = {"exp_path": folder} | changes
        values = {key: value(folder) if callable(value) else value for key, value in values.items()}
        return flags(folder, **({"sample_dir": tmp_path / "out"} | values))

    return prepare


def shared_run_of(folder: Path) -> Path:
    return shared_run(folder.parent)


def their_file(folder: Path) -> Path:
    return folder / "checkpoints" / "0000007.pt"


def our_file(tmp_path: Path) -> Path:
    return shared_run(tmp_path) / CHECKPOINT / "ema.safetensors"


def reference_of(side: int):
    return lambda tmp_path: write_npz(tmp_path / "ref.npz", random_images(4, 0, side))


SMALLER = denoiser_config({"model": "SiT-Ti/2", "latent_channels": 4, "latent_size": 4, "num_classes": 3}).to_dict()
NEVER_FREE = {"dataset.packing.SHARED_LOCK_SECONDS": 0.0, "dataset.packing._try_lock": lambda descriptor: False}
FULL = namedtuple("usage", "total used free")(10**9, 10**9 - 5, 5)

CASES = [
    Case("no run given", lambda path, _: ["--num-steps", "3"], ("give --exp-path",)),
    Case("a VAE for a run of ours", with_flags(vae="f8d4"), ("--vae is for --model", "says it itself")),
    Case("a VAE's file for a run of ours", with_flags(vae_ckpt="x"), ("--vae-ckpt is for export_ldm.py --format run",)),
    Case("statistics for a run of ours", with_flags(vae_latents_stats="repa"), ("--vae-latents-stats", "itself")),
    Case("a resolution for a run of ours", with_flags(resolution=32), ("--resolution is for --model",)),
    Case("their experiment", foreign(), ("--exp-path", "export_ldm.py", "theirs", "exps/theirs-run --format run")),
    Case("their experiment, with what is needed", foreign(train_steps=7, vae_ckpt="my vae", path_type="linear"),
         ("theirs-run --format run --train-steps 7 --path-type linear --vae-ckpt 'my vae'",)),
    Case("their file", foreign(exp_path=None, ckpt=their_file),
         ("--ckpt", "theirs/checkpoints/0000007.pt exps/0000007-run --format run, and give --exp-path exps/0000007-")),
    Case("their file as a folder", foreign(exp_path=their_file), ("--exp-path", "exps/0000007-run --format run")),
    Case("a run and a file", foreign(ckpt=their_file), ("--ckpt", "export_ldm.py")),
    Case("no such file", with_flags(exp_path=None, ckpt="no.pt"), ("--ckpt no.pt is not a file", "--exp-path")),
    Case("a folder as file", with_flags(exp_path=None, ckpt=shared_run), ("is not a file", "--exp-path")),
    Case("file of our run", with_flags(exp_path=None, ckpt=our_file), ("belongs to a run", "give --exp-path")),
    Case("no such run", with_flags(exp_path=lambda path: path / "none"), ("--exp-path", "no such folder")),
    Case("a folder that is not a run", with_flags(exp_path=no_run), ("no args.json", "train_ldm.py")),
    Case("a VAE's run", with_run(manifest(denoiser=None)), ("manifest.json", "no denoiser", "train_ldm.py")),
    Case("a run without checkpoints", with_run(without("checkpoints", "milestones")), ("no checkpoints",)),
    Case("running", with_run(status(state="running")), ("(running, at step 7 of 10)", "--train-steps", "5, 10")),
    Case("failed", with_run(status(state="failed")), ("not finished (failed",)),
    Case("not started", with_run(without("status.json")), ("not finished (not started)",)),
    Case("status damaged", with_run(replaced("status.json", "{")), ("status.json is damaged", "--train-steps")),
    Case("args.json damaged", with_run(replaced("args.json", "{")), ("args.json is damaged",)),
    Case("no such step", with_flags(train_steps=7), ("--train-steps 7", "there are: 5, 10")),
    Case("model of a milestone", with_flags(train_steps=5, weights="model"), ("--weights model", "there are: 10")),
    Case("no EMA", with_run(without(CHECKPOINT / "ema.safetensors", "milestones")), ("take --weights model",)),
    Case("unknown weights", with_flags(weights="best"), ("--weights", "ema_X", "posthoc_X")),
    Case("no such average", with_flags(weights="ema_0.5"), ("--weights ema_0.5", "take --weights ema or model")),
    Case("no snapshots", with_flags(weights="posthoc_0.1"), ("--weights posthoc_0.1", "take --weights ema or model")),
    Case("step damaged", with_run(damaged("0000010"), train_steps=10), ("--train-steps 10", "damaged", "instead of")),
    Case("all damaged", with_run(damaged("0000010", "0000005")), ("no other checkpoint is intact",)),
    Case("manifest damaged", with_run(replaced(CHECKPOINT / "manifest.json", "{"), train_steps=10), ("not readable",)),
    Case("no path type", with_run(manifest(path_type=None)), ("no path_type",)),
    Case("class names missing", with_run(manifest(class_names=["cat"])), ("names 1 classes", "denoiser with 3")),
    Case("unknown SiT", with_run(sit(model="SiT-Q/2")), ("SiT-Q/2 is not known",)),
    Case("weights of another SiT", with_run(sit(qk_norm=True)), ("ema.safetensors does not fit",)),
    Case("latents of another shape", with_run(sit(latent_channels=8)), ("vae decodes latents (4, 8, 8)", "(8, 8, 8)")),
    Case("no VAE", with_run(without("vae")), ("vae is missing",)),
    Case("VAE folder empty", with_run(without("vae/config.json")), ("run/vae", "not a diffusers", "config.json")),
    Case("no latent statistics", with_run(without("vae/latents_stats.safetensors")), ("no latent statistics",)),
    Case("another VAE", with_run(other_vae_weights), ("other weights than the VAE",)),
    Case("weights that diverged", with_run(diverged), ("image 0 is not finite", "--train-steps")),
    Case("a shift of zero", with_flags(time_shift=0), ("--time-shift", "above 0")),
    Case("jumps of a network that makes none", with_flags(mode="map"), ("--mode map", "without --flow-map-blocks")),
    Case("a guide of jumps", with_run(sit(flow_map_blocks=2), mode="map", guide="@5", cfg_scale=2),
         ("--guide with --mode map",)),
    Case("Heun with jumps", with_flags(heun=True, mode="map"), ("--heun", "--mode ode")),
    Case("Heun with the SDE", with_flags(heun=True), ("--heun", "--mode ode")),
    Case("interval upside down", with_flags(guidance_low=0.8, guidance_high=0.2), ("--guidance-low 0.8", "above")),
    Case("interval beyond 1", with_flags(guidance_high=1.5), ("--guidance-high", "[0, 1]")),
    Case("negative guidance", with_flags(cfg_scale=-1), ("--cfg-scale", "at least 0")),
    Case("no steps", with_flags(num_steps=0), ("--num-steps", "at least 1")),
    Case("no images", with_flags(num_fid_samples=0), ("--num-fid-samples", "at least 1")),
    Case("unknown mode", with_flags(mode="pndm"), ("--mode", "sde", "ode")),
    Case("a flag that belongs to the run", with_flags(path_type="cosine"), ("--path-type",)),
    Case("unknown class", with_flags(classes="cat,bird"), ("--classes bird", "0 to 2", "cat")),
    Case("class out of range", with_flags(classes="3"), ("--classes 3", "0 to 2")),
    Case("class twice", with_flags(classes="dog,1"), ("class 1 twice",)),
    Case("seed too large", with_flags(seed=2**64), ("--seed", "must be less than")),
    Case("more images than numbers", with_flags(num_fid_samples=10**30), ("--num-fid-samples", "must be less than")),
    Case("seed negative", with_flags(seed=-1), ("--seed", "not be negative")),
    Case("output is a file", with_flags(sample_dir=file_at), ("--sample-dir", "is a file")),
    Case("output holds other files", with_flags(sample_dir=folder_in_use), ("thesis.tex", "empty or new")),
    Case("another seed", begun_with({}, seed=1), ("another --seed", "now 1", "--sample-dir")),
    Case("another guidance", begun_with({}, cfg_scale=2), ("another --cfg-scale", "1.0", "2.0")),
    Case("another checkpoint", begun_with({}, train_steps=5), ("another --train-steps", "10", "now 5")),
    Case("other weights", begun_with({}, weights="model"), ("another --weights", "ema")),
    Case("another precision", begun_with({}, mixed_precision="bf16"), ("another --mixed-precision", "now bf16")),
    Case("another number", begun_with({}, num_fid_samples=3), ("another --num-fid-samples",)),
    Case("other classes", begun_with({}, classes="cat"), ("another --classes",)),
    Case("not enough space", patched({"shutil.disk_usage": lambda path: FULL}), ("0.00 GB are free", "--no-npz")),
    Case("folder locked", patched(NEVER_FREE), ("another run is writing", "--sample-dir"), keeps_work=True),
    Case("no reference there", with_flags(evaluate=lambda path: path / "none"), ("--evaluate", "does not exist")),
    Case("a reference of another size", with_flags(evaluate=reference_of(64)), ("have 32 px", "--evaluate", "64 px")),
    Case("too few to evaluate", with_flags(evaluate=reference_of(32), num_fid_samples=3), ("--num-fid-samples", "(3)")),
    Case("metrics of nothing", with_flags(metrics="fid"), ("--metrics", "--evaluate")),
    Case("a guide without guidance", with_flags(guide="@5"), ("--guide", "at scale 1", "--cfg-scale")),
    Case("guided by itself", with_flags(guide="@10", cfg_scale=2), ("@10 is what it would guide", "earlier step")),
    Case("no such guide", with_flags(guide="none", cfg_scale=2), ("--guide none: no such folder",)),
    Case("a guide's step in words", with_flags(guide="run@last", cfg_scale=2), ("--guide", "RUN@STEP", "at least 1")),
    Case("no such step of the guide", with_flags(guide="@7", cfg_scale=2), ("--guide", "@7", "there are: 5, 10")),
    Case("a guide that is not finished", with_flags(guide=other_run(state="running"), cfg_scale=2),
         ("--guide", "not finished (running", "other@STEP", "there are: 10")),
    Case("a guide without weights", with_flags(guide=other_run("@5", milestone=True), weights="model", cfg_scale=2),
         ("--guide", "no checkpoint of that step with --weights model", "there are: 10")),
    Case("a guide of another VAE", with_flags(guide=other_run(vae_checksum="0"), cfg_scale=2), ("another VAE",)),
    Case("a guide with other statistics", with_flags(guide=other_run(statistics_checksum="0"), cfg_scale=2),
         ("--guide", "other statistics")),
    Case("a guide on another path", with_flags(guide=other_run(path_type="cosine"), cfg_scale=2),
         ("on the cosine path, not linear",)),
    Case("a guide of other classes", with_flags(guide=other_run(class_names=["a", "b", "c"]), cfg_scale=2),
         ("has other classes",)),
    Case("a guide for other latents", with_flags(guide=other_run(denoiser=SMALLER), cfg_scale=2),
         ("makes latents (4, 4, 4), not (4, 8, 8)",)),
    Case("a guide for random networks", lambda path, _: ["--model", "SiT-Ti/2", "--dry-run", "--guide", "x"],
         ("--guide and --model exclude each other",)),
    Case("their experiment as a guide", foreign(exp_path=shared_run_of, guide=lambda folder: folder, cfg_scale=2),
         ("--guide", "export_ldm.py", "--format run")),
    Case("another guide", begun_with({"cfg_scale": 2, "guide": "@5"}, cfg_scale=2), ("another --guide", "step 5, now")),
    Case("a sweep of nothing", with_flags(sweep="scale=1,2"), ("--sweep", "add --evaluate")),
    Case("an unknown axis", sweeping("steps=1,2"), ("--sweep", "'steps=1,2': give scale=A,B")),
    Case("an axis without values", sweeping("scale="), ("--sweep", "'scale=': give scale=A,B")),
    Case("an axis of words", sweeping("scale=1,two"), ("--sweep", "'two' is not a number")),
    Case("an interval of a sweep beyond 1", sweeping("scale=2", "high=0.5,1.5"), ("--sweep", "[0, 1]")),
    Case("an axis twice", sweeping("scale=1,2", "scale=3"), ("gives scale= twice",)),
    Case("a sweep of one point", sweeping("scale=1", "high=0.5,1"), ("--sweep: 1 point,", "give more")),
    Case("a sweep of an interval alone", sweeping("high=0.25,0.5"), ("--sweep: 1 point,", "e.g. scale=1,2")),
    Case("channels that are not there", with_flags(cfg_scale=2, guidance_channels=5),
         ("--guidance-channels 5: the latent has 4",)),
    Case("a sweep without points", sweeping("scale=2", "low=0.9", "high=0.5"), ("--sweep: 0 points,", "give more")),
    Case("a sweep by another figure", sweeping("scale=1,2", metrics="kid"), ("--metrics kid", "one of fid")),
    Case("a sweep that only has a guide", sweeping("high=0.5,0.75", guide="@5"), ("--sweep: 1 point,",)),
    Case("a sweep in a run", sweeping("scale=1,2", sample_dir=shared_run), ("is a run or a sample",)),
    Case("no sweep to keep images of", with_flags(keep_images=True), ("--keep-images belongs to --sweep",)),
    Case("a rank too many", environment(RANK="2", WORLD_SIZE="2"), ("RANK=2", "launch.sh")),
]  # fmt: skip
