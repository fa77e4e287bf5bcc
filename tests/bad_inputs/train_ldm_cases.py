"""What a user can get wrong with train_ldm.py, and what the one line must say."""

import json
import shutil
from pathlib import Path

import pytest
from torch import nn

from dataset.latents import VAE_NAME
from files import write_json
from loss.alignment import TokenGrid
from runtime.checkpoint import CheckpointFolder
from tests.bad_inputs.case import Case
from tests.latent_caches import save_vae, write_cache
from tests.ldm_steps import CONFIG, tiny_trainer
from tests.ldm_trainings import LATENTS, flags, write_data
from tests.public_sit import PublicSiT, public_args, write_experiment

_made: dict[str, Path] = {}


def shared_data(tmp_path_factory_root: Path) -> Path:
    """One good set of data for all cases, which copy what they spoil."""
    if "data" not in _made or not _made["data"].exists():
        _made["data"] = write_data(tmp_path_factory_root / "good", images=12)  # of every class
    return _made["data"]


def with_flags(spoil=lambda data: None, **changes):
    """A case that differs from a working command in some flags, or in data spoiled before."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        data = tmp_path / "packed"
        shutil.copytree(shared_data(tmp_path.parent), data)
        spoil(data)
        values = {key: value(tmp_path) if callable(value) else value for key, value in changes.items()}
        return flags(data, tmp_path / "exps", **values)

    return prepare


def jumping(**changes):
    """A case of a flow map."""
    return with_flags(**{"align": "none", "flow_map_blocks": 2} | changes)


def with_times(low: str, high: str, **changes):
    """A case with a range of times, which takes two values."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        return [*with_flags(**changes)(tmp_path, monkeypatch), "--vae-repa-times", low, high]

    return prepare


def begun_run(old: dict, **changes):
    """A run that was begun with other flags."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        argv = with_flags(**changes)(tmp_path, monkeypatch)
        folder = tmp_path / "exps" / "run"
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps({"args": {"learning_rate": 1e-3} | old}))
        CheckpointFolder(folder).save(1, {"model": nn.Linear(1, 1)}, {}, {})
        return argv

    return prepare


def cache_of_random_numbers(tmp_path: Path) -> Path:
    folder = tmp_path / "other"
    write_cache(folder, 8, features="efficientnet-lite0", feature_shape=(16, 112))
    shutil.rmtree(folder / VAE_NAME)
    save_vae(folder)
    return folder


def no_latents(data: Path) -> None:
    shutil.rmtree(data / LATENTS)


def unfinished_latents(data: Path) -> None:
    (data / LATENTS / "index.json").unlink()


def cut_shard(data: Path) -> None:
    path = data / LATENTS / "latents-00000.npy"
    path.write_bytes(path.read_bytes()[:-10])


def no_vae(data: Path) -> None:
    shutil.rmtree(data / LATENTS / "vae")


def vae_of_other_channels(data: Path) -> None:
    path = data / LATENTS / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latent_channels": 8}))


def damaged_statistics(data: Path) -> None:
    (data / LATENTS / "latents_stats.safetensors").write_bytes(b"no statistics")


def damaged_vae_weights(data: Path) -> None:
    (data / LATENTS / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")


def continuing(facts: dict | None = None, spoil=lambda run: None, **changes):
    """A new run that continues from step 7 of another one, which was trained with ``facts``."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        folder = tmp_path / "theirs"
        write_source(folder, shared_data(tmp_path.parent), facts or {})
        spoil(folder)
        return with_flags(**({"continue_train_exp_dir": folder, "max_train_steps": 9} | changes))(tmp_path, monkeypatch)

    return prepare


def write_source(folder: Path, data: Path, facts: dict) -> None:
    """A run on that cache, by the flags of ``tests.ldm_trainings``."""
    given = {"encoder_depth": 2, "projector_width": 32, "ema_decay": 0.9}
    method = tiny_trainer(features=[TokenGrid("efficientnet-lite0", 4, 112)], **given)
    arguments = {"denoiser": CONFIG.to_dict(), "align": "repa", "feature_widths": [112], "path_type": "linear"}
    arguments |= given | facts
    modules = {name: module for name, module in method.modules().items() if module is not None}
    CheckpointFolder(folder).save(7, modules, {"optimizer": method.optimizer.state_dict()}, arguments)
    write_json(folder / "args.json", {"args": arguments})
    shutil.copytree(data / LATENTS / "vae", folder / "vae")


def other_statistics(run: Path) -> None:
    save_vae(run, change=lambda tokenizer: tokenizer.statistics.mean.add_(100))


def no_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def foreign(**changes):
    """A new run that is to continue from REPA-E's experiment itself."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        folder = write_experiment(tmp_path / "theirs", *(PublicSiT(seed=seed) for seed in (1, 2)), public_args())
        return with_flags(**({"continue_train_exp_dir": folder} | changes))(tmp_path, monkeypatch)

    return prepare


def foreign_file(tmp_path: Path) -> Path:
    experiment = write_experiment(tmp_path / "theirs", *(PublicSiT(seed=seed) for seed in (1, 2)), public_args())
    return next((experiment / "checkpoints").glob("*.pt"))


CASES = [
    Case("no experiment name", with_flags(exp_name=None), ("--exp-name is needed",)),
    Case("no latents name", with_flags(vae_latents_name=None), ("--vae-latents-name is needed", "cache_latents.py")),
    Case("name without data", with_flags(data_dir=None), ("--vae-latents-name latents", "--data-dir")),
    Case("no such data folder", with_flags(data_dir=lambda p: p / "nowhere"), ("nowhere", "not a packed dataset")),
    Case("no such cache", with_flags(no_latents), ("latents does not exist", "cache_latents.py")),
    Case("unfinished cache", with_flags(unfinished_latents), ("latents is not finished", "cache_latents.py")),
    Case("cut shard", with_flags(cut_shard), ("latents-00000.npy", "bytes")),
    Case("cache without its VAE", with_flags(no_vae), ("config.json",)),
    Case("cache of another VAE", with_flags(vae_of_other_channels), ("posterior means", "8 latent channels")),
    Case("damaged statistics", with_flags(damaged_statistics), ("latents_stats.safetensors cannot be read",)),
    Case("damaged VAE weights", with_flags(damaged_vae_weights), ("vae", "weights do not load")),
    Case("images taken for latents", with_flags(vae_latents_name="./tests"), ("tests is not a latent cache",)),
    Case("no such model", with_flags(model="SiT-XXL/2"), ("--model SiT-XXL/2", "Ti, S, B, L, XL")),
    Case("patch too large", with_flags(model="SiT-Ti/16"), ("--model SiT-Ti/16",)),
    Case("depth beyond the model", with_flags(encoder_depth=7), ("--encoder-depth 7", "blocks 1 to 6")),
    Case("unknown VFM", with_flags(enc_type="resnet"), ("--enc-type resnet", "efficientnet-lite0")),
    Case(
        "features that are not cached",
        with_flags(repa_source="features", enc_type="efficientnet-lite0-s32"),
        ("features/efficientnet-lite0-s32", "--cache-features"),
    ),
    Case(
        "features of one VFM of two are not cached",
        with_flags(repa_source="features", enc_type="efficientnet-lite0,efficientnet-lite0-s32"),
        ("features/efficientnet-lite0-s32", "--cache-features", "--enc-type efficientnet-lite0-s32"),
    ),
    Case(
        "one file for two VFMs",
        with_flags(repa_source="images", enc_type="efficientnet-lite0,efficientnet-lite0-s32", enc_ckpt="vfm.pth"),
        ("--enc-ckpt vfm.pth", "1 file for the 2 encoders", "in that order"),
    ),
    Case(
        "features of another grid",
        with_flags(model="SiT-Ti/4"),
        ("16 tokens of 112", "SiT-Ti/4 needs 4", "--features-grid 2"),
    ),
    Case("an average twice", with_flags(ema_decay="0.9,0.99,0.90"), ("--ema-decay", "the same number twice")),
    Case("no average among others", with_flags(ema_decay="0.9,0"), ("--ema-decay", "0 means no average")),
    Case("an average of no length", with_flags(posthoc_ema="0.05,0.5"), ("--posthoc-ema", "0.2887")),
    Case("snapshots of nothing", with_flags(posthoc_steps=10), ("--posthoc-steps", "--posthoc-ema")),
    Case(
        "snapshots between checkpoints",
        with_flags(posthoc_ema=True, posthoc_steps=15, checkpointing_steps=10),
        ("--posthoc-steps 15", "--checkpointing-steps 10"),
    ),
    Case("no flipped copy", with_flags(hflip=True), ("flipped", "--hflip")),
    Case(
        "no images for REPA",
        with_flags(
            data_dir=None, vae_latents_name=cache_of_random_numbers, repa_source="images", enc_type="efficientnet-lite0"
        ),
        ("--data-dir is needed", "--proj-coeff 0"),
    ),
    Case(
        "cache of other images",
        with_flags(vae_latents_name=cache_of_random_numbers, repa_source="images"),
        ("made from another dataset",),
    ),
    Case("another VAE named", with_flags(vae="f16d32"), ("--vae f16d32 is not the VAE", "latents")),
    Case("fp16 on a CPU", with_flags(mixed_precision="fp16"), ("fp16 needs a CUDA device",)),
    Case("batch larger than an epoch", with_flags(batch_size=64, max_train_steps=None, epochs=1), ("--epochs 1",)),
    Case("batch that does not divide", with_flags(batch_size=5, gradient_accumulation_steps=2), ("batch size 5",)),
    Case("resolution of other images", with_flags(resolution=64, repa_source="images"), ("32 px", "64 px")),
    Case("resolution of another cache", with_flags(resolution=64), ("--resolution 64", "made at 32 px")),
    Case("no such held-out cache", with_flags(val_vae_latents_name="./nowhere"), ("nowhere does not exist",)),
    Case(
        "held-out data beside a path",
        with_flags(vae_latents_name=lambda p: p / "packed" / LATENTS, val_data_dir=lambda p: p / "packed"),
        ("is a path", "--val-vae-latents-name"),
    ),
    Case("held-out of another VAE", with_flags(val_vae_latents_name=cache_of_random_numbers), ("has another VAE",)),
    Case("changed flag on resume", begun_run({"cfg_prob": 0.3}, cfg_prob=0.1), ("--cfg-prob 0.3, not 0.1",)),
    Case("unknown alignment", with_flags(align="vae+rapa"), ("--align vae+rapa", "'rapa' is not known", "repa+vae")),
    Case(
        "VFM weights without REPA", with_flags(align="vae", enc_ckpt="x.pth"), ("--enc-ckpt", "--align vae", "no VFM")
    ),
    Case("weight of REPA without REPA", with_flags(align="none", proj_coeff=0.5), ("--proj-coeff", "--align none")),
    Case(
        "cached features and images",
        with_flags(cached_features="latents", repa_source="images"),
        ("--cached-features", "--repa-source images", "leave one"),
    ),
    Case("source of features without REPA", with_flags(align="vae", repa_source="images"), ("--repa-source", "vae")),
    Case(
        "weight without VAE-REPA",
        with_flags(vae_repa_coeff=0.5),
        ("--vae-repa-coeff belongs to --align vae, not to --align repa",),
    ),
    Case(
        "schedule of nothing", with_flags(align="none", align_schedule="linear"), ("--align-schedule", "--align none")
    ),
    Case("iREPA of one token", with_flags(align="irepa", model="SiT-Ti/8"), ("--align irepa", "smaller patch")),
    Case("depth without VAE-REPA", with_flags(align="none", vae_repa_depth=2), ("--vae-repa-depth", "--align none")),
    Case(
        "times without VAE-REPA",
        with_times("0.1", "0.9"),
        ("--vae-repa-times belongs to --align vae, not to --align repa",),
    ),
    Case(
        "VAE-REPA beyond the model", with_flags(align="vae", vae_repa_depth=7), ("--vae-repa-depth 7", "blocks 1 to 6")
    ),
    Case(
        "SRA beyond the model", with_flags(align="sra", sra_teacher_depth=7), ("--sra-teacher-depth 7", "blocks 1 to 6")
    ),
    Case("SRA without an average", with_flags(align="sra", ema_decay=0), ("--align sra", "--ema-decay 0", "leave")),
    Case(
        "loss without SRA", with_flags(sra_loss="cosine"), ("--sra-loss belongs to --align sra, not to --align repa",)
    ),
    Case("VAE-REPA at block 0", with_flags(align="vae", vae_repa_depth=0), ("--vae-repa-depth", "0")),
    Case(
        "times reversed", with_times("0.8", "0.2", align="vae"), ("--vae-repa-times 0.8 0.2", "lower time comes first")
    ),
    Case("time above 1", with_times("0", "2", align="vae"), ("--vae-repa-times", "[0, 1]")),
    Case("changed alignment on resume", begun_run({"align": "none"}, align="vae"), ("--align none, not vae",)),
    Case("probability above 1", with_flags(cfg_prob=1.5), ("--cfg-prob", "[0, 1]")),
    Case("unknown weighting", with_flags(weighting="logit"), ("--weighting", "lognormal")),
    Case("abbreviated flag", lambda tmp_path, monkeypatch: ["--mod", "SiT-B/2"], ("--mod",)),
    Case("random weights for a real run", with_flags(random_weights=True), ("--random-weights is for --dry-run",)),
    Case("continuing from nothing", with_flags(continue_train_exp_dir="nowhere"), ("nowhere: no such folder", "a run")),
    Case("continuing from no run", with_flags(continue_train_exp_dir="docs"), ("docs is not a run", "args.json")),
    Case(
        "continuing from a text",
        with_flags(continue_train_exp_dir="README.md"),
        ("README.md is a file, and none of weights",),
    ),
    Case(
        "continuing from REPA-E's experiment",
        foreign(),
        ("theirs is not a run of this project", "export_ldm.py", "--format run"),
    ),
    Case(
        "the same, without a name",
        foreign(exp_name=None),
        ("theirs is not a run of this project", "export_ldm.py", "--format run"),
    ),
    Case(
        "continuing from REPA-E's file",
        with_flags(continue_train_exp_dir=foreign_file),
        (".pt is not a run of this project", "export_ldm.py", "--format run"),
    ),
    Case(
        "continuing from a run that has not begun", continuing(spoil=no_checkpoints), ("theirs has no checkpoints yet",)
    ),
    Case("continuing from a VAE's run", continuing({"denoiser": None}), ("theirs holds no diffusion model",)),
    Case("continuing from another step", continuing(resume_step=8), ("step 8", "there are: 7")),
    Case("going on with another model", continuing(model="SiT-S/2"), ("model SiT-Ti/2, not SiT-S/2", "--model")),
    Case("going on with another attention", continuing(qk_norm=True), ("qk_norm False, not True", "--qk-norm")),
    Case(
        "going on with other classes",
        continuing({"denoiser": CONFIG.to_dict() | {"num_classes": 5}}),
        ("num_classes 5, not 6",),
    ),
    Case("going on on another path", continuing(path_type="cosine"), ("--path-type linear, not cosine",)),
    Case(
        "going on with another VFM",
        continuing({"feature_widths": [768]}),
        ("projectors of widths 768", "needs 112", "--proj-coeff 0"),
    ),
    Case("going on at another block", continuing(encoder_depth=4), ("--encoder-depth 2, not 4",)),
    Case("going on with wider projectors", continuing(projector_width=64), ("--projector-width 32, not 64",)),
    Case(
        "going on with another alignment",
        continuing(align="repa+vae"),
        ("trained without VAE-REPA", "no projectors of it", "--align without vae"),
    ),
    Case("a flow map's guidance without one", with_flags(flow_map_cfg_scale=2), ("--flow-map-cfg-scale is for",)),
    Case("a jump's tangent without jumps", with_flags(flow_map_tangent="network"), ("--flow-map-tangent is for",)),
    Case("a flow map that is aligned", with_flags(flow_map_blocks=2), ("with --align repa: give --align none",)),
    Case("every block at the end of a jump", jumping(flow_map_blocks=6), ("--flow-map-blocks 6", "6 blocks", "1 to 5")),
    Case("guidance below 1", jumping(flow_map_cfg_scale=0.5), ("--flow-map-cfg-scale", "at least 1")),
    Case("guidance in words", jumping(flow_map_cfg_scale="some"), ("--flow-map-cfg-scale", "'some' is not a number")),
    Case("guidance without the null class", jumping(flow_map_cfg_scale=2, cfg_prob=0), ("needs the null class",)),
    Case(
        "its interval upside down",
        jumping(flow_map_guidance_low=0.8, flow_map_cfg_scale=2),
        ("--flow-map-guidance-low 0.8 lies above --flow-map-guidance-high 0.7",),
    ),
    Case("one mean for two times", jumping(flow_map_times=0.4), ("--flow-map-times", "expected 2 arguments")),
    Case("times that are no numbers", jumping(flow_map_times=("nan", "1")), ("--flow-map-times", "must be a finite")),
    Case(
        "an interval of no guidance",
        jumping(flow_map_guidance_high=0.5),
        ("--flow-map-guidance-high: no guidance is learned",),
    ),
    Case("jumps of some tokens", jumping(sprint=True), ("--token-drop 0 --path-drop 0",)),
    Case("jumps and directions", jumping(velocity_cosine_coeff=1), ("--velocity-cosine-coeff", "leave one out")),
    Case("going on to where it is", continuing(max_train_steps=7, proj_coeff=0), ("7 steps already", "raise")),
    Case("going on with other statistics", continuing(spoil=other_statistics), ("latent statistics differ",)),
]
