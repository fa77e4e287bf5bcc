"""Where a folder keeps its VAE or its discriminator: diffusers folders and pipelines, downloads, our own runs.

``exps/NAME`` is a run: its VAE is ``vae/`` once it is finished, and at any step ``checkpoints/0001000/`` or
``milestones/0001000/``, where the EMA's weights go before those of the last step, as they do in ``vae/``.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from errors import one_line
from files import checksum, is_out_of_reach
from formats.checkpoints import FoundVAE, find_vae, vae_prefixes
from formats.run_folders import ARGUMENTS, MANIFEST, OWN_STATISTICS, Record, Status, is_run, steps
from formats.statistics import discriminator_beside, statistics_in, vae_files
from models.weight_files import NotWeightsError, read_contents
from runtime.checkpoint import Manifest
from schema import MalformedError, read_json

VAE_MODULES = ("vae", "ema", "model")  # of a checkpoint, in the order in which vae/ would hold them
DISCRIMINATOR = "discriminator.safetensors"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"


def locate_vae(path: Path, step: int | None = None) -> Path:
    """The file, diffusers folder or own checkpoint folder that a path means.

    Args:
        path: a file, or a folder of any kind.
        step: of one of our own runs.

    Raises:
        NotWeightsError: there is no VAE at this place.
    """
    path = Path(path)
    if step is not None and not is_run(path):
        raise NotWeightsError(f"it is not a run (it has no {ARGUMENTS}), so that it has no steps")
    if not path.is_dir():
        return path
    if (path / "config.json").is_file() or (path / MANIFEST).is_file():
        return path
    if is_run(path):
        return _of_run(path, step)
    if (path / "vae" / "config.json").is_file():  # a pipeline's folder
        return path / "vae"
    files = vae_files(path)
    if any(file.name.startswith(DIFFUSERS_WEIGHTS) for file in files) or not files:
        raise NotWeightsError("not a diffusers VAE folder: it has no config.json")
    if len(files) > 1:
        raise NotWeightsError(f"it holds several files, {', '.join(file.name for file in files[:3])}: name one of them")
    return files[0]


def locate_discriminator(path: Path, step: int | None = None) -> Path | None:
    """The file with a discriminator that a path means; None where a folder has none."""
    path = Path(path)
    if not path.is_dir():
        return path
    folders = [path] if step is None else []
    folders += [folder for number, folder in sorted(steps(path).items(), reverse=True) if step in (None, number)]
    own = next((folder / DISCRIMINATOR for folder in folders if (folder / DISCRIMINATOR).is_file()), None)
    return own or discriminator_beside(path)


def read_checkpoint(folder: Path) -> tuple[FoundVAE, dict | None]:
    """The VAE in a checkpoint of ours, and its architecture where the checkpoint tells.

    Raises:
        NotWeightsError: damaged, or without a VAE.
    """
    manifest = _json(folder / MANIFEST, Manifest)
    for module in VAE_MODULES:
        file = folder / f"{module}.safetensors"
        if not file.is_file() or not _holds_vae(file):
            continue
        check_file(file, manifest)
        found = find_vae(read_contents(file), str(file))
        own = folder / f"{OWN_STATISTICS}.safetensors"
        if own.is_file():
            check_file(own, manifest)
            found = replace(found, statistics=statistics_in(read_contents(own), str(own)))
        return replace(found, layout=f"{module} of a checkpoint of ours"), manifest["args"].get("vae_config")
    run = folder.parent.parent
    hint = f"; the VAE of its run is {run / 'vae'}" if (run / "vae").is_dir() else ""
    raise NotWeightsError(f"it is a checkpoint without a VAE{hint}")


def check_file(path: Path, manifest: Manifest) -> None:
    """Refuse a file of a checkpoint that is not what was written."""
    entry = manifest["files"].get(path.name)
    if entry is None:
        raise NotWeightsError(f"{MANIFEST} does not list {path.name}: it is damaged, copy it again")
    if checksum(path) != entry:
        raise NotWeightsError(f"{path.name} is not what {MANIFEST} says (size or checksum): damaged, copy it again")


def _of_run(run: Path, step: int | None) -> Path:
    there = steps(run)
    listed = ", ".join(map(str, sorted(there))) or "none"
    if step is not None:
        if step not in there:
            raise NotWeightsError(f"it has no checkpoint of step {step}; there are: {listed}")
        return there[step]
    status = (_json(run / "status.json", Status) if (run / "status.json").is_file() else None) or {}
    arguments = _json(run / ARGUMENTS, Record)["args"]
    is_input = "vae_checksum" in arguments and "vae_config" not in arguments  # the VAE that made a SiT's latents
    if (run / "vae" / "config.json").is_file() and (is_input or status.get("state") == "finished"):
        return run / "vae"
    files = sorted((run / "checkpoints").glob("*.pt"))
    if files:
        raise NotWeightsError(f"it is an experiment of another code: give a checkpoint's file, such as {files[-1]}")
    at = f"{status.get('state', 'not started')} at step {status.get('step', 0)}"
    newest = f", or give a checkpoint, such as {os.path.join(there[max(there)], '')}" if there else ""
    raise NotWeightsError(f"its training has not finished ({at}): run the same command again{newest}")


def _holds_vae(file: Path) -> bool:
    try:
        open(file, "rb").close()  # says what safe_open does not: that it may not be read
        with safe_open(file, "pt") as opened:
            return bool(vae_prefixes(opened.keys()))
    except (OSError, SafetensorError) as error:
        if is_out_of_reach(error):
            raise
        raise NotWeightsError(f"{file.name} is truncated or damaged ({one_line(error)})") from error


def _json(path: Path, kind: Any) -> Any:
    try:
        return read_json(path, kind)
    except (OSError, MalformedError) as error:
        if is_out_of_reach(error):
            raise
        raise NotWeightsError(f"{path.name} is not readable ({one_line(error)})") from error
