"""Made-up runs for the tests of report.py: the files that trainings, generate.py and the measurements leave."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from files import write_json
from metrics.record import Measurement, write_measurement

COMMANDS = {"VAE": "train_sendvae.py", "SiT": "train_ldm.py", "VAE and SiT": "train_repae.py"}
UNGUIDED = {"FID": 8.0, "sFID": 5.25, "IS": 110.5, "Precision": 0.741, "Recall": 0.602}


def write_run(folder: Path, sort: str = "SiT", steps: int = 400, **arguments: object) -> Path:
    """A finished training with curves and one grid.

    Args:
        folder: ``exps/NAME``.
        sort: a key of ``COMMANDS``.
        steps: it was trained for, a hundred for each line of ``metrics.jsonl``.
        arguments: entries of ``args``.
    """
    folder.mkdir(parents=True)
    args = {"exp_name": folder.name, "batch_size": 64, "seed": 0, **arguments}
    if sort != "VAE":
        args = {"denoiser": {"model": "SiT-Ti/2"}, "model": "SiT-Ti/2", **args}
    command = [COMMANDS[sort], "--exp-name", folder.name]
    record = {"args": args, "command": command, "versions": {"torch": "2.6"}, "git_commit": "0123456789abcdef"}
    write_json(folder / "args.json", record)
    write_json(folder / "status.json", {"state": "finished", "step": steps, "max_train_steps": steps, "reason": None})
    lines = [{"step": step, "lr": 1e-3, "loss": 100.0 / step} for step in range(100, steps + 1, 100)]
    lines.append({"step": steps, "val/psnr": 30.25})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    speeds = [{"step": line["step"], "seconds_per_step": 0.5, "images_per_second": 128.0} for line in lines[:-1]]
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in speeds))
    write_picture(folder / "samples" / f"{steps:07d}.png")
    return folder


def write_picture(path: Path, width: int = 64, height: int = 32) -> None:
    """Noise, which no encoder makes small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_samples(
    run: Path,
    values: dict[str, float],
    cfg_scale: float = 1.0,
    count: int = 50_000,
    name: str = "generated",
    vae: str = "",
    reference: str = "imagenet256.npz",
    weights: str = "ema",
    **settings: object,
) -> Path:
    """A folder of generated images in a run, without the images, and what was measured of it."""
    folder = run / name
    source = {"train_steps": 400, "weights": weights, "mode": "sde", "num_steps": 250, "heun": False}
    source |= {"cfg_scale": cfg_scale, "guidance_low": 0.0, "guidance_high": 1.0 if cfg_scale == 1 else 0.75}
    source |= settings
    write_picture(folder / "preview.png")
    write_json(folder / "index.json", index_of(count, source | ({"vae": vae} if vae else {})))
    extractor = next((metric for metric in values if metric.startswith("FD-")), "")[3:].replace("/", "-")
    file_name = f"generation-{extractor}" if extractor else "generation"
    measurement = Measurement(
        file_name, "generation", values, count, {"path": str(folder)}, {"path": f"references/{reference}"}
    )
    write_measurement(measurement, folder)
    return folder


def index_of(count: int, source: dict) -> dict:
    """Of a folder of generated images; the report looks at no image."""
    files = {name: {"bytes": 0, "sha256": ""} for name in ("images-00000.npy", "labels.npy")}
    spec = {"format_version": 1, "kind": "images", "shape": [3, 32, 32], "dtype": "uint8", "codec": "raw"}
    return {
        **spec,
        "count": count,
        "rejected": 0,
        "source": source,
        "labels": {"labels.npy": files.pop("labels.npy")},
        "shards": [{"count": count, "files": files}],
        "class_names": ["0"],
    }


def write_reconstruction(
    folder: Path,
    values: dict[str, float],
    count: int = 50_000,
    data: str = "data/imagenet256-val",
    name: str = "reconstruction",
    **settings: object,
) -> None:
    """What evaluate.py reconstruction leaves."""
    settings = {"data": data} | settings
    measurement = Measurement(name, "reconstruction", values, count, {"path": "x"}, settings=settings)
    write_measurement(measurement, folder)


def write_probe(folder: Path, f1: float, data: str = "data/toy", vae: str = "", **values: float) -> None:
    """What probe.py attributes leaves, of the VAE with the checksum ``vae``."""
    found = {"attributes/F1-macro": f1, **{f"attributes/{name}": value for name, value in values.items()}}
    measurement = Measurement(
        "probe-attributes", "probe", found, 800, {"path": "x", "vae_checksum": vae}, settings={"data": data}
    )
    write_measurement(measurement, folder)


def write_preset(
    exps: Path,
    preset: str,
    runs: list[str],
    published: str | None = None,
    changes: tuple[str, ...] = (),
    name: str = "",
) -> Path:
    """What an experiment notes."""
    folder = exps / (name or preset.replace("/", "-"))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "preset.json", {"preset": preset, "published": published, "runs": runs, "changes": changes})
    return folder
