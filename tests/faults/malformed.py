"""Files that say something else than their readers need: real ones, a place of which was replaced or damaged.

A subject is a file of JSON or YAML and what reads it, as the scripts do. A mutation survives where the reader goes on,
or says in one line what is wrong.
"""

import contextlib
import io
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import yaml
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import preprocessing
import report
import runtime.experiment
from dataset.images import open_images
from dataset.latents import LatentDataset
from dataset.packing import PackingJob
from dataset.shards import ShardSpec, read_records
from formats.vae import load_tokenizer
from inference.trained_ldm import open_trained_ldm
from loss.vae_objective import load_loss_config
from metrics.published import load_published
from metrics.record import Measurement, write_measurement
from models.denoisers.config import SiTConfig
from models.denoisers.sit import SiT
from runtime.checkpoint import CheckpointFolder
from runtime.cli import run
from runtime.stage_process import ROOT
from tests.faults.bench import Bench, Trial
from tests.latent_caches import save_vae, write_cache
from tests.ldm_runs import write_ldm_run
from tests.photographs import write_class_folders
from tests.report_runs import write_reconstruction, write_run, write_samples
from training.run import Run, _truncate

SECONDS = 60  # that a reader may take; most take a hundredth of one


@dataclass(frozen=True)
class Subject:
    """A file and its reader.

    Attributes:
        name: what kind of file it is, and who reads it.
        make: writes what there is to read into a folder; returns the file.
        read: reads it as a script does.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]


def trials(bench: Bench, quick: bool) -> Iterator[Trial]:
    """Mutations of every subject."""
    for subject in SUBJECTS:
        folder = bench.folder / "malformed" / subject.name.replace(" ", "-")
        folder.mkdir(parents=True)
        path = subject.make(folder)
        for number, problem in enumerate(outcomes(subject, path, 5 if quick else 180)):
            problems = [] if problem is None else [problem]
            yield Trial("malformed files", subject.name, f"mutation {number}", lambda found=problems: found)
        shutil.rmtree(folder)


def outcomes(subject: Subject, path: Path, count: int) -> list[str | None]:
    """What became of so many mutations: None, or what went wrong; always the same ones."""
    original, found = path.read_bytes(), []

    @hypothesis.seed(0)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mutations(original, path.suffix == ".yaml"))
    def mutate(data: bytes) -> None:
        found.append(survives(subject, path, data))

    mutate()
    return found


def survives(subject: Subject, path: Path, data: bytes) -> str | None:
    """Put other data into the file and read it: None, or what went wrong."""
    before = path.read_bytes()
    path.write_bytes(data)
    errors = io.StringIO()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            code = run(lambda argv: subject.read(path) and 0, [])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        path.write_bytes(before)
    lines = errors.getvalue().splitlines()
    said = [line for line in lines if ": error: " in line or ": training failed: " in line]
    return None if code == 0 or (code == 2 and len(said) == 1 and lines[-1] == said[0]) else f"exit {code}: {lines}"


def _too_long(number, frame) -> None:
    raise TimeoutError(f"still reading after {SECONDS} s")


# what is replaced


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "..", "/", "a\nb", "\x1b[31m", "train", "\ud800", "é" * 300, 2**63, -(2**200), 1e308])
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def mutations(draw: Callable, data: bytes, is_yaml: bool = False) -> bytes:
    """Other data: a value replaced or removed, or bytes flipped, cut out, put in, cut off."""
    if draw(st.integers(0, 3)):
        content = yaml.safe_load(data) if is_yaml else json.loads(data)
        place, key = draw(st.sampled_from(list(_places(content)) or [(None, None)]))
        if place is None or draw(st.integers(0, 30)) == 0:
            content = draw(VALUES)
        elif draw(st.integers(0, 3)) == 0:
            del place[key]
        elif isinstance(place, dict) and draw(st.integers(0, 5)) == 0:
            place[draw(st.text(max_size=6))] = place.pop(key)
        else:
            place[key] = draw(VALUES)
        return _dumped(content, is_yaml)
    first = draw(st.integers(0, len(data) - 1))
    last = min(len(data), first + draw(st.integers(0, 40)))
    put_in = draw(st.binary(max_size=4) | st.sampled_from([b"[" * 5000, b"\xff", b'"', b"}", b"\n\n", b"9" * 5000]))
    return draw(st.sampled_from([data[:first] + put_in + data[last:], data[:first]]))


def _dumped(content: Any, is_yaml: bool) -> bytes:
    if is_yaml:
        return yaml.safe_dump(content).encode(errors="replace")
    return json.dumps(content).encode()


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Each container and key of a tree."""
    for key, value in list(content.items() if isinstance(content, dict) else enumerate(content)):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


# the subjects


def _images(folder: Path, codec: str = "raw") -> Path:
    tree = write_class_folders(folder / "tree")
    argv = ["--imagenet-path", str(tree), "--output-path", str(folder / "set"), "--resolution", "32"]
    preprocessing.main([*argv, "--shard-size", "20", "--num-workers", "1", "--codec", codec])
    return folder / "set" / "index.json"


def _read_images(index: Path) -> None:
    images = open_images(index.parent)
    images.read_into(range(len(images)), np.empty((len(images), 3, images.resolution, images.resolution), np.uint8))


def _settings(folder: Path) -> Path:
    job = PackingJob(folder / "set", ShardSpec("latents", (2,), "float32"), {"dataset": "x", "size": [1, 2]})
    job.begin()
    return folder / "set" / "settings.json"


def _begin_again(path: Path) -> None:
    PackingJob(path.parent, ShardSpec("latents", (2,), "float32"), {"dataset": "x", "size": [1, 2]}).begin()


def _record(folder: Path) -> Path:
    spec = ShardSpec("latents", (2,), "float32")
    job = PackingJob(folder / "set", spec, {})
    job.begin()
    with job.shard(0) as writer:
        writer.create(3)
        with writer:
            sizes = [writer.put(slot, np.zeros(2, np.float32)) for slot in range(3)]
        writer.finish(sizes, [0, 1, 0], [("a", "b")])
    return folder / "set" / spec.record_name(0)


def _read_record(path: Path) -> None:
    job = PackingJob(path.parent, ShardSpec("latents", (2,), "float32"), {})
    before = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    try:
        read_records(path.parent, job.spec)
        job.finish(1, ["a", "b"])
    finally:  # unfinished again
        for file in path.parent.iterdir():
            if file not in before:
                file.unlink()
        for file, data in before.items():
            file.write_bytes(data)


def _cache(part: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_cache(folder / "cache", hflip=True, features="vfm")
        return folder / "cache" / part

    return make


def _read_cache(path: Path) -> None:
    folder = next(parent for parent in path.parents if parent.name == "cache")
    for limit in (None, 0):
        latents = LatentDataset(folder, hflip=True, features=["vfm"], memory_limit=limit, show_progress=False)
        items = np.arange(min(len(latents), 64))
        layout = latents.layout
        out = {name: np.zeros((len(items), *shape), str(dtype)[6:]) for name, (shape, dtype) in layout.items()}
        latents.read_arrays(items, items % 2 == 0, out)


def _ldm_run(part: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        arguments = {"lr_schedule": "cosine", "warmup_steps": 2, "max_train_steps": 10, "seed": 0, "resume_step": 0}
        return write_ldm_run(folder / "run", milestone=True, **arguments) / part

    return make


def _sample(path: Path) -> None:
    folder = next(parent for parent in path.parents if parent.name == "run")
    trained = open_trained_ldm(folder, None, "ema")
    trained.load_model()
    trained.load_autoencoder()


def _resume(path: Path) -> None:
    folder = next(parent for parent in path.parents if parent.name == "run")
    arguments = {"lr_schedule": "cosine", "warmup_steps": 2, "max_train_steps": 20, "seed": 0, "resume_step": 0}
    this_run = Run(folder, Accelerator(cpu=True), arguments)
    try:
        checkpoint = this_run.checkpoint(0)
        this_run.is_finished(checkpoint.step if checkpoint else 0)
    finally:
        this_run.finish()


def _vae_checkpoint(folder: Path) -> Path:
    """A checkpoint with a VAE in it, of a run that has not finished."""
    tokenizer, _ = load_tokenizer(str(save_vae(folder / "other")), "none")
    arguments = {"vae_config": tokenizer.architecture}
    checkpoint = CheckpointFolder(folder / "run").save(10, {"vae": tokenizer}, {}, arguments)
    (folder / "run" / "args.json").write_text(json.dumps({"args": arguments}))
    return checkpoint.folder / "manifest.json"


def _denoiser(folder: Path) -> Path:
    SiT(SiTConfig("SiT-Ti/2", 4, 4, 3)).save_pretrained(folder / "denoiser")
    return folder / "denoiser" / "config.json"


def _report_on(part: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for seed in (0, 1):
            name = f"mine-seed{seed}"
            write_samples(write_run(folder / f"{name}-ldm"), {"FID": 8.0 + seed, "IS": 100.0}, vae="v")
            write_run(folder / f"{name}-vae", sort="VAE", seed=seed)
            write_reconstruction(folder / f"{name}-vae", {"PSNR": 27.0, "rFID": 0.3 + seed})
            probe = Measurement(
                "probe-celeba", "probe", {"attributes/F1-macro": 0.5}, 8, {"path": name}, settings={"data": "celeba"}
            )
            write_measurement(probe, folder / f"{name}-vae")
            (folder / name).mkdir()
            record = {
                "preset": "table2/depth1",
                "published": None,
                "runs": [f"{name}-vae", f"{name}-ldm"],
                "changes": [],
            }
            (folder / name / "preset.json").write_text(json.dumps(record))
        return folder / part

    return make


def _read_report(path: Path) -> None:
    root = next(parent for parent in path.parents if (parent / "mine-seed0").is_dir())
    page = root / "report.html"
    report.main([*(str(root / f"mine-seed{seed}") for seed in (0, 1)), "--html", str(page)])
    page.unlink()


def _preset(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        shutil.copytree(ROOT / "configs" / "experiments", folder / "experiments")
        return folder / "experiments" / f"{name}.yaml"

    return make


def _resolve(path: Path) -> None:
    presets = next(parent for parent in path.parents if parent.name == "experiments")
    before, runtime.experiment.PRESETS = runtime.experiment.PRESETS, presets
    try:
        name = str(path.relative_to(presets).with_suffix(""))
        given = [] if name.startswith("miniature") else ["--images", "x"]
        runtime.experiment.resolve_all(name, "exps", given)
    finally:
        runtime.experiment.PRESETS = before


def _stamps(folder: Path) -> Path:
    (folder / "experiment.json").write_text(json.dumps({"toy": ["python", "x.py"], "cache": ["y"]}))
    return folder / "experiment.json"


def _copied(source: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return Path(shutil.copy(ROOT / source, folder))

    return make


def _line(folder: Path) -> Path:
    """One line of metrics.jsonl alone, which a resume cuts off or keeps."""
    path = folder / "metrics.jsonl"
    path.write_text(json.dumps({"step": 5, "loss": 0.5, "val/psnr": 20}) + "\n")
    return path


def _published(path: Path) -> None:
    load_published.cache_clear()
    try:
        load_published(path)
    finally:
        load_published.cache_clear()


SUBJECTS = [
    Subject("index.json of images", _images, _read_images),
    Subject("index.json of PNGs", lambda folder: _images(folder, "png"), _read_images),
    Subject("settings.json", _settings, _begin_again),
    Subject("record of a shard", _record, _read_record),
    Subject("index.json of latents", _cache("index.json"), _read_cache),
    Subject("index.json of mirrored latents", _cache("flipped/index.json"), _read_cache),
    Subject("index.json of features", _cache("features/vfm/index.json"), _read_cache),
    Subject("config.json of a cache's VAE", _cache("vae/config.json"), _read_cache),
    Subject("args.json, sampling", _ldm_run("args.json"), _sample),
    Subject("args.json, resuming", _ldm_run("args.json"), _resume),
    Subject("status.json, sampling", _ldm_run("status.json"), _sample),
    Subject("status.json, resuming", _ldm_run("status.json"), _resume),
    Subject("manifest.json, sampling", _ldm_run("checkpoints/0000010/manifest.json"), _sample),
    Subject("manifest.json, resuming", _ldm_run("checkpoints/0000010/manifest.json"), _resume),
    Subject("manifest.json of a VAE", _vae_checkpoint, lambda path: load_tokenizer(str(path.parent))),
    Subject("config.json of a run's VAE", _ldm_run("vae/config.json"), _sample),
    Subject("config.json of a denoiser", _denoiser, lambda path: SiT.from_pretrained(path.parent)),
    Subject("args.json, report", _report_on("mine-seed0-ldm/args.json"), _read_report),
    Subject("status.json, report", _report_on("mine-seed0-vae/status.json"), _read_report),
    Subject("preset.json, report", _report_on("mine-seed0/preset.json"), _read_report),
    Subject("index.json of samples, report", _report_on("mine-seed0-ldm/generated/index.json"), _read_report),
    Subject("generation.json, report", _report_on("mine-seed0-ldm/generated/metrics/generation.json"), _read_report),
    Subject("probe-celeba.json, report", _report_on("mine-seed1-vae/metrics/probe-celeba.json"), _read_report),
    Subject("metrics.jsonl, resuming", _line, lambda path: _truncate(path, 10)),
    Subject("preset", _preset("table2/depth1"), _resolve),
    Subject(
        "preset that others are based on",
        _preset("sendvae_imagenet256"),
        lambda path: _resolve(path.with_name("ablation.yaml")),
    ),
    Subject("study", _preset("miniature"), _resolve),
    Subject("experiment.json", _stamps, lambda path: runtime.experiment._read_stamps(path.parent)),
    Subject("loss configuration", _copied("configs/l1_lpips_kl_gan.yaml"), load_loss_config),
    Subject("published.yaml", _copied("configs/published.yaml"), _published),
]
