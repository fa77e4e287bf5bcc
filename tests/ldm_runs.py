"""A finished train_ldm.py run for tests, without the training: SiT-Ti/2 on the latents of f4d4-tiny, random weights.

``python -m tests.ldm_runs FOLDER`` writes one.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from files import write_json
from formats.vae import load_tokenizer
from loss.alignment import DenoiserAlignments, TokenGrid
from loss.alignment.repa import REPA
from models.denoisers import denoiser_config
from runtime.checkpoint import CheckpointFolder
from tests.command_line import argv_of

RESOLUTION = 32
CLASS_NAMES = ["cat", "dog", "fish"]
STEP = 10


def random_weights(module: nn.Module, seed: int, std: float = 0.06) -> None:
    """Draw all parameters anew: those that start at zero would make a velocity of zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std, generator=generator)


def write_ldm_run(
    folder: Path,
    path_type: str = "linear",
    state: str = "finished",
    milestone: bool = False,
    seed: int = 0,
    model: str = "SiT-Ti/2",
    sprint: bool = False,
    guide_depth: int = 0,
    **changes: object,
) -> Path:
    """Write a run with a checkpoint of step 10.

    Args:
        folder: ``exps/NAME``.
        path_type: of the interpolant.
        state: what status.json says.
        milestone: also keep a milestone of step 5, the EMA alone, of other weights.
        seed: of the weights.
        model: of the denoiser.
        sprint: whether it has SPRINT's middle blocks.
        guide_depth: block of an output on the way.
        changes: entries of the manifest's ``args`` to replace, None to leave out.
    """
    torch.manual_seed(0)
    tokenizer, _ = load_tokenizer("f4d4-tiny", "none")
    tokenizer.statistics.load(torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([0.5, 1.5, 1.0, 0.8]))
    tokenizer.save(folder / "vae")
    config = denoiser_config(
        {
            **{"model": model, "latent_channels": 4, "latent_size": RESOLUTION // 4},
            **{"num_classes": len(CLASS_NAMES), "sprint": sprint, "guide_depth": guide_depth},
        }
    )
    trained, ema = config.build(), config.build()
    repa = REPA(trained, [TokenGrid("vfm", trained.grid, 16)], depth=2, width=32, weight=0.5)
    modules = {"model": trained, "alignment": DenoiserAlignments({"repa": repa}), "ema": ema}
    arguments = {
        "denoiser": config.to_dict(),
        "align": "repa",
        "enc_type": "vfm",
        "feature_widths": [16],
        "encoder_depth": 2,
        "projector_width": 32,
        "path_type": path_type,
        "class_names": CLASS_NAMES,
        "resolution": RESOLUTION,
        "vae_checksum": tokenizer.checksum(),
        "statistics_checksum": tokenizer.statistics.checksum(),
    } | changes
    arguments = {name: value for name, value in arguments.items() if value is not None}
    checkpoints = CheckpointFolder(folder)
    if milestone:
        draw_weights(modules, seed + 10)
        early = checkpoints.save(STEP // 2, modules, {}, arguments)
        checkpoints.keep_milestone(early, ("ema",), arguments)
    draw_weights(modules, seed)
    checkpoints.save(STEP, modules, {"optimizer": {}}, arguments)
    checkpoints.prune(1)
    write_json(folder / "args.json", {"args": arguments})
    write_json(folder / "status.json", {"state": state, "step": STEP, "max_train_steps": STEP, "reason": None})
    return folder


def draw_weights(modules: dict[str, nn.Module], seed: int) -> None:
    for offset, name in enumerate(("model", "ema", "alignment"), start=1):
        random_weights(modules[name], seed + offset)


def flags(run: Path, **changes: object) -> list[str]:
    """Flags of a tiny generate.py; ``changes`` replace or add (True: a bare flag, None: leave out)."""
    values = {"exp_path": run, "num_steps": 3, "num_fid_samples": 10, "pproc_batch_size": 4, "shard_size": 5} | changes
    return argv_of(values)


if __name__ == "__main__":
    write_ldm_run(Path(sys.argv[1]))
