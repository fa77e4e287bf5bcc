"""Every script that writes, on inputs so small that a run takes about a second."""

from collections.abc import Callable, Mapping
from pathlib import Path

import cache_latents
import evaluate
import export_ldm
import export_vae
import generate
import preprocessing
import probe
import report
import train_ldm
import train_repae
import train_sendvae
from tests import latent_caches, ldm_runs, ldm_trainings, repae_runs, report_runs, sendvae_runs
from tests.command_line import argv_of
from tests.faults.bench import Command
from tests.faults.forked import Script, run_forked
from tests.image_sets import random_images, write_npz
from tests.public_sit import PublicSiT, public_args, write_experiment

ROOT = Path(__file__).resolve().parents[2]
LOSS = ROOT / "configs" / "l1_kl_gan.yaml"
# Checkpoints, milestones and pictures are due in the middle and at the end, and an old checkpoint is deleted.
TRAINING = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "milestone_steps": 2,
    "sampling_steps": 2,
    "val_steps": 2,
    "keep_checkpoints": 1,
    "verify": True,
    "num_workers": 0,
}
SCRIPTS = {
    module.__name__: module
    for module in (
        cache_latents,
        evaluate,
        export_ldm,
        export_vae,
        generate,
        preprocessing,
        probe,
        report,
        train_ldm,
        train_repae,
        train_sendvae,
    )
}


def write_inputs(folder: Path) -> Path:
    """What the commands read; in forks, because it takes networks."""
    folder.mkdir(parents=True)
    steps: dict[str, Callable[[], object]] = {
        "data": lambda: ldm_trainings.write_data(folder / "data", images=20),
        "png": lambda: preprocessing.main([*_packing(folder / "data" / "images", folder / "png"), "--codec", "png"]),
        "ldm": lambda: ldm_runs.write_ldm_run(folder / "ldm", milestone=True),
        "theirs": lambda: write_experiment(folder / "theirs", PublicSiT(seed=1), PublicSiT(seed=2), public_args()),
        "npz": lambda: [write_npz(folder / f"{name}.npz", random_images(12, seed)) for seed, name in enumerate("ab")],
        "runs": lambda: _write_runs(folder / "runs"),
    }
    for name, step in steps.items():
        run_forked(step, folder, folder.with_name(f"{folder.name}-{name}.txt"))
    return folder


def commands(inputs: Path) -> dict[str, Command]:
    """All of them, by name."""
    images, packed, vae = inputs / "data" / "images", inputs / "data" / "packed", inputs / "ldm" / "vae"
    cached = ldm_trainings.LATENTS
    features = {"cache_features": True, "enc_type": "efficientnet-lite0", "features_grid": 4}
    features |= {"hflip": True, "verify": True}
    samples = {"sample_dir": "out", "num_steps": 2, "preview": 4}
    reference = {"ref": inputs / "b.npz", "ref_cache": "kept", "features": "efficientnet-lite0"}
    reconstruction = {"data": packed, "vae": vae, "num_workers": 0, "metrics": "psnr,ssim", "output_dir": "out"}
    probed = {"vae": vae, "data": packed, "num_workers": 0, "output_dir": "out"}
    probed |= {"num_points": 10, "num_pictures": 3, "steps": 2}
    found = [
        _command("preprocessing raw", *_packing(images, "out"), "--shard-size", "7"),
        _command("preprocessing png", *_packing(images, "out"), "--shard-size", "7", "--codec", "png"),
        _command("train_sendvae", *sendvae_runs.flags(
            packed, "exps", loss_cfg_path=LOSS, val_data_dir=packed, mapper_grid=2, ema_decay=0.9, **TRAINING)),
        _command("cache_latents", *latent_caches.flags(packed, vae, "./out", **features)),
        _command("train_ldm", *ldm_trainings.flags(packed, "exps", val_vae_latents_name=packed / cached, **TRAINING)),
        _command("train_repae", *repae_runs.flags(
            packed, "exps", loss_cfg_path=LOSS, val_data_dir=packed, **TRAINING)),
        _command("generate", *ldm_runs.flags(inputs / "ldm", **samples)),
        _command("evaluate generation", "generation", *argv_of({"samples": "a.npz"} | reference),
                 copies={"a.npz": inputs / "a.npz"}),
        _command("evaluate reconstruction", "reconstruction", *argv_of(reconstruction)),
        _command("export_vae diffusers", vae, "out/vae", "--format", "diffusers", "--overwrite"),
        _command("export_vae ldm", vae, "out/vae.safetensors", "--format", "ldm", "--overwrite"),
        _command("export_vae repa-e", vae, "out/vae.pt", "--format", "repa-e", "--overwrite"),
        _command("export_ldm diffusers", inputs / "ldm", "out", "--overwrite"),
        _command("export_ldm repa", inputs / "ldm", "out", "--format", "repa", "--overwrite"),
        _command("export_ldm run", inputs / "theirs", "out", "--format", "run", "--overwrite", "--vae-ckpt", vae),
        _command("probe", "uniformity", "pictures", *argv_of(probed), "--no-tsne"),
        _command("report", inputs / "runs" / "*", "--html", "report.html"),
    ]  # fmt: skip
    return {command.name: command for command in found}


def _command(name: str, *words: object, copies: Mapping[str, Path] | None = None) -> Command:
    """The first word of its name is the script's."""
    module = name.split()[0]
    script = Script(SCRIPTS[module].main, tuple(map(str, words)), f"{module}.py")
    return Command(name, script, copies or {})


def _packing(images: Path, output: Path | str) -> list[str]:
    flags = {"imagenet_path": images, "output_path": output, "resolution": 32, "num_workers": 1}
    return argv_of(flags)


def _write_runs(folder: Path) -> None:
    run = report_runs.write_run(folder / "ldm")
    report_runs.write_samples(run, report_runs.UNGUIDED)
    report_runs.write_reconstruction(report_runs.write_run(folder / "vae", "VAE"), {"PSNR": 20.0})
