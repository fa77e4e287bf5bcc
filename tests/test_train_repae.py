"""train_repae.py as a user calls it: results, what later stages make of them, dry run; really killed and resumed."""

import json
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import cache_latents
import generate
import train_ldm
import train_repae
from dataset.toy import main as make_toy
from formats.vae import load_tokenizer
from inference.trained_ldm import open_trained_ldm
from models.denoisers.config import SiTConfig
from models.denoisers.sit import SiT
from models.tokenizers import Tokenizer
from preprocessing import main as preprocess
from runtime.cli import run
from tests import ldm_trainings
from tests.photographs import write_class_folders
from tests.repae_runs import flags
from tests.stages import Stage, run_stage
from tests.test_resume import kill_when

# REPA-E's README, section 3
PUBLISHED = """
    --max-train-steps=400000 --report-to="wandb" --allow-tf32 --mixed-precision="fp16" --seed=0 --data-dir="data"
    --output-dir="exps" --batch-size=256 --path-type="linear" --prediction="v" --weighting="uniform"
    --model="SiT-XL/2" --checkpointing-steps=50000 --loss-cfg-path="configs/l1_lpips_kl_gan.yaml" --vae="f8d4"
    --vae-ckpt="pretrained/sdvae/sdvae-f8d4.pt"
    --disc-pretrained-ckpt="pretrained/sdvae/sdvae-f8d4-discriminator-ckpt.pt" --enc-type="dinov2-vit-b"
    --proj-coeff=0.5 --encoder-depth=8 --vae-align-proj-coeff=1.5 --bn-momentum=0.1
    --exp-name="sit-xl-dinov2-b-enc8-repae-sdvae-0.5-1.5-400k"
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    make_toy(["--output", str(folder / "images"), "--num-images", "24", "--resolution", "32"])
    packed = ["--imagenet-path", str(folder / "images"), "--output-path", str(folder / "packed"), "--resolution", "32"]
    preprocess(packed)
    return folder / "packed"


def train(*argv: str) -> int:
    return run(train_repae.main, list(argv))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, step: int, name: str, place: str = "checkpoints") -> dict[str, torch.Tensor]:
    return load_file(folder / place / f"{step:07d}" / f"{name}.safetensors")


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory) -> Path:
    """Four steps, with milestones at 2 and 4; the whole checkpoint is that of step 4."""
    output = tmp_path_factory.mktemp("exps")
    argv = flags(
        toy, output, "run", val_data_dir=toy, max_train_steps=4, checkpointing_steps=2, milestone_steps=2,
        keep_checkpoints=1, log_steps=2, val_steps=4, vae_learning_rate=1e-2,
    )  # fmt: skip
    assert train(*argv) == 0
    before = (output / "run" / "metrics.jsonl").read_bytes()
    assert train(*argv) == 0  # finished: nothing is done again
    assert (output / "run" / "metrics.jsonl").read_bytes() == before
    return output / "run"


def test_a_run_leaves_everything_it_promises(finished):
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [2, 4, 4]
    assert lines[0]["loss"] == pytest.approx(lines[0]["denoise"] + 0.5 * lines[0]["repa"], rel=1e-5)
    weights_of_terms = {"reconstruction": 1.0, "kl": 1e-6, "gan": 0.1, "alignment": 1.5}
    vae_loss = sum(weight * lines[0][name] for name, weight in weights_of_terms.items())
    assert lines[0]["vae_loss"] == pytest.approx(vae_loss, rel=1e-5)
    assert lines[2].keys() == {"step", "val/psnr", "val/l1", "val/denoise", "val_ema/denoise"}
    assert json.loads((finished / "status.json").read_text())["state"] == "finished"
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["0000004"]
    assert {path.stem for path in (finished / "checkpoints" / "0000004").glob("*.safetensors")} == {
        "model", "ema", "alignment", "vae", "statistics_ema", "discriminator",
    }  # fmt: skip
    network = SiT(SiTConfig("SiT-Ti/2", 4, 8, num_classes=6)).state_dict()
    assert weights(finished, 4, "model").keys() == weights(finished, 4, "ema").keys() == network.keys()
    projector = {f"repa.projectors.0.{layer}.{part}" for layer in (0, 2, 4) for part in ("weight", "bias")}
    assert weights(finished, 4, "alignment").keys() == projector
    assert sorted(path.name for path in (finished / "milestones" / "0000002").iterdir()) == [
        "ema.safetensors", "manifest.json", "statistics_ema.safetensors", "vae.safetensors",
    ]  # fmt: skip
    assert Image.open(finished / "samples" / "0000004.png").size == (8 * 98 - 2, 4 * 98 - 2)
    assert Image.open(finished / "samples" / "0000004-reconstructions.png").size == (8 * 98 - 2, 2 * 98 - 2)


def test_the_tuned_vae_has_the_weights_as_trained_and_the_statistics_of_the_average(finished):
    tuned, known = load_tokenizer(str(finished / "vae"))
    assert known
    trained, average = weights(finished, 4, "vae"), weights(finished, 4, "statistics_ema")
    for name, tensor in tuned.network.state_dict().items():
        assert torch.equal(tensor, trained[f"network.{name}"])
    for name in ("mean", "var"):
        assert torch.equal(tuned.statistics.state_dict()[name], average[name])
        assert not torch.equal(average[name], trained[f"statistics.{name}"])
    manifest = json.loads((finished / "checkpoints" / "0000004" / "manifest.json").read_text())
    assert manifest["args"]["vae_checksum"] == tuned.checksum()
    assert manifest["args"]["statistics_checksum"] == tuned.statistics.checksum()


@pytest.mark.parametrize(("step", "name"), [(2, "ema"), (4, "ema"), (4, "model")])
def test_every_checkpoint_is_sampled_with_its_own_vae(finished, step, name):
    trained = open_trained_ldm(finished, step, name)
    tokenizer = trained.load_autoencoder()
    place = "milestones" if step == 2 else "checkpoints"
    expected = weights(finished, step, "vae", place)
    assert torch.equal(tokenizer.decoder_last_layer, expected["network.decoder.conv_out.weight"])
    mean = expected["statistics.mean"] if name == "model" else weights(finished, step, "statistics_ema", place)["mean"]
    assert torch.equal(tokenizer.statistics.mean, mean)
    assert tokenizer.checksum() == trained.vae_checksum
    last = weights(finished, 4, "vae")["network.decoder.conv_out.weight"]
    assert torch.equal(tokenizer.decoder_last_layer, last) == (step == 4)


def test_generate_samples_the_run(finished, tmp_path):
    argv = ["--exp-path", str(finished), "--num-fid-samples", "6", "--num-steps", "2", "--mode", "ode"]
    assert run(generate.main, [*argv, "--sample-dir", str(tmp_path / "last"), "--cfg-scale", "2"]) == 0
    images = np.load(tmp_path / "last" / "samples.npz", allow_pickle=False)["arr_0"]
    assert images.shape == (6, 32, 32, 3)
    assert images.std() > 1
    assert run(generate.main, [*argv, "--sample-dir", str(tmp_path / "early"), "--train-steps", "2"]) == 0
    early = np.load(tmp_path / "early" / "samples.npz", allow_pickle=False)["arr_0"]
    assert not np.array_equal(images, early)


def test_a_damaged_vae_of_a_checkpoint_is_named(finished, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(finished, copied)
    path = copied / "checkpoints" / "0000004" / "vae.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (copied / "milestones" / "0000004" / "manifest.json").unlink()
    code = run(generate.main, ["--exp-path", str(copied), "--num-fid-samples", "2", "--num-steps", "2"])
    assert code == 2
    assert "vae.safetensors" in capsys.readouterr().err


@pytest.fixture(scope="module")
def latents(finished, toy, tmp_path_factory) -> Path:
    """A cache made with the tuned VAE."""
    folder = tmp_path_factory.mktemp("caches") / "latents"
    argv = ["--data-dir", str(toy), "--vae", str(finished / "vae"), "--vae-latents-name", str(folder)]
    assert run(cache_latents.main, [*argv, "--num-workers", "0"]) == 0
    return folder


def test_train_ldm_goes_on_with_the_tuned_vae(finished, toy, latents, tmp_path):
    argv = ldm_trainings.flags(toy, tmp_path, "ldm", vae_latents_name=latents)
    assert run(train_ldm.main, argv) == 0
    ours, theirs = (load_tokenizer(str(run_ / "vae"))[0] for run_ in (finished, tmp_path / "ldm"))
    assert ours.checksum() == theirs.checksum()
    assert torch.equal(ours.statistics.mean, theirs.statistics.mean)


def test_train_ldm_goes_on_with_the_denoiser_too(finished, toy, latents, tmp_path):
    """Weights, average, projectors and AdamW's moments; a rate of 0 leaves all weights as they were."""
    source = {"vae_latents_name": latents, "continue_train_exp_dir": finished, "max_train_steps": 5}
    assert run(train_ldm.main, ldm_trainings.flags(toy, tmp_path, "ldm", learning_rate=0, **source)) == 0
    for name in ("model", "ema", "alignment"):
        before, after = weights(finished, 4, name), weights(tmp_path / "ldm", 5, name)
        assert before.keys() == after.keys()
        for key in before:
            torch.testing.assert_close(after[key], before[key] if name != "ema" else averaged(finished, key))
    args = json.loads((tmp_path / "ldm" / "args.json").read_text())["args"]
    assert args["continued_from"] == {"checkpoint": str(finished / "checkpoints" / "0000004"), "step": 4}
    assert metrics(tmp_path / "ldm")[-1]["step"] == 5
    moments = [
        torch.load(folder / "checkpoints" / step / "optimizer.pt", weights_only=True)["state"]
        for folder, step in ((finished, "0000004"), (tmp_path / "ldm", "0000005"))
    ]
    assert moments[0].keys() == moments[1].keys()
    assert {(moments[0][n]["step"].item(), moments[1][n]["step"].item()) for n in moments[0]} == {(4, 5)}
    other = ldm_trainings.flags(toy, tmp_path, "wider", projector_width=64, **source)
    assert run(train_ldm.main, other) == 2


def averaged(run_: Path, key: str) -> torch.Tensor:
    """The average one step after the last, of weights that stay."""
    return 0.9 * weights(run_, 4, "ema")[key] + 0.1 * weights(run_, 4, "model")[key]


def test_training_starts_from_the_vae_s_statistics_or_measures_them(finished, toy, tmp_path):
    """With a momentum of 0 the statistics are still those of the start."""
    argv = {"bn_momentum": 0, "max_train_steps": 1, "loss_cfg_path": "configs/l1_kl.yaml"}
    assert train(*flags(toy, tmp_path, "tuned", vae_ckpt=finished / "vae", **argv)) == 0
    assert train(*flags(toy, tmp_path, "scratch", **argv)) == 0
    before = load_tokenizer(str(finished / "vae"))[0].statistics
    for name in ("vae", "statistics_ema"):
        after = {key.removeprefix("statistics."): t for key, t in weights(tmp_path / "tuned", 1, name).items()}
        assert torch.equal(after["mean"], before.mean)
        measured = {key.removeprefix("statistics."): t for key, t in weights(tmp_path / "scratch", 1, name).items()}
        assert (measured["mean"] != 0).all()
        assert (measured["var"] != 1).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"path_type": "cosine", "weighting": "lognormal", "qk_norm": True, "hflip": True},
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
        {"ema_decay": 0, "grid_cfg_scale": 1, "gradient_accumulation_steps": 2, "loss_cfg_path": "configs/l1_kl.yaml"},
        {"proj_coeff": 0, "vae_align_proj_coeff": 0},
        {"enc_type": "efficientnet-lite0,efficientnet-lite0-s32"},
    ],
)
def test_switches_train_and_are_sampled(toy, tmp_path, changes):
    assert train(*flags(toy, tmp_path, "run", **changes)) == 0
    last = metrics(tmp_path / "run")[-1]
    assert all(np.isfinite(value) for value in last.values())
    assert last["skipped"] == last["vae_skipped"] == 0
    several = [last[f"alignment/{name}"] for name in changes.get("enc_type", "").split(",") if name]
    assert not several or last["alignment"] == pytest.approx(sum(several) / 2, rel=1e-5)
    trained = open_trained_ldm(tmp_path / "run", None, "ema" if "ema_decay" not in changes else "model")
    assert isinstance(trained.load_autoencoder(), Tokenizer)


def test_gradient_checkpointing_and_pictures_change_no_bit(toy, tmp_path):
    assert train(*flags(toy, tmp_path, "plain")) == 0
    often = {"gradient_checkpointing": True, "sampling_steps": 1, "val_data_dir": toy, "max_val_images": 4}
    assert train(*flags(toy, tmp_path, "often", **often)) == 0
    for name in ("model", "ema", "alignment", "vae", "discriminator"):
        plain, often = (weights(tmp_path / run_name, 2, name) for run_name in ("plain", "often"))
        assert all(torch.equal(plain[key], often[key]) for key in plain)


def test_dry_run_needs_no_data_and_leaves_nothing(tmp_path, capsys):
    argv = ["--dry-run", "--random-weights", "--vae", "f4d4-tiny", "--vae-ckpt", "none", "--resolution", "32"]
    argv += ["--enc-type", "efficientnet-lite0", "--model", "SiT-Ti/2", "--encoder-depth", "2"]
    argv += ["--loss-cfg-path", "configs/l1_kl_gan.yaml", "--output-dir", str(tmp_path)]
    assert train(*argv) == 0
    out = capsys.readouterr().out
    assert "681,911" in out
    assert "SiT-Ti/2" in out
    assert "step 2:" in out
    assert "peak memory" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"encoder_depth": 7}, {"model": "SiT-Ti/8", "resolution": 48}, {"enc_type": "x"}])
def test_a_command_that_is_refused_claims_no_folder(toy, tmp_path, changes):
    assert train(*flags(toy, tmp_path, "run", **changes)) == 2
    assert not list(tmp_path.iterdir())


def test_published_command_line_is_understood():
    args = train_repae.parse_arguments(shlex.split(PUBLISHED))
    assert (args.vae_align_proj_coeff, args.proj_coeff, args.bn_momentum, args.encoder_depth) == (1.5, 0.5, 0.1, 8)
    assert (args.batch_size, args.max_train_steps, args.checkpointing_steps) == (256, 400_000, 50_000)
    assert (args.model, args.vae, args.mixed_precision, args.allow_tf32) == ("SiT-XL/2", "f8d4", "fp16", True)
    defaults = train_repae.parse_arguments(["--data-dir", "data", "--exp-name", "x"])
    for name in ("learning_rate", "vae_learning_rate", "disc_learning_rate"):
        assert getattr(args, name) == 1e-4
    for name in ("model", "vae", "proj_coeff", "vae_align_proj_coeff", "bn_momentum", "encoder_depth", "batch_size"):
        assert getattr(args, name) == getattr(defaults, name)
    assert args.ema_decay == 0.9999


# 24 images in batches of 4: the second epoch begins within the resumed part; log lines straddle checkpoints
KILLED = {
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_workers": 2,
    "max_train_steps": 12,
    "checkpointing_steps": 5,
    "log_steps": 3,
    "sampling_steps": 7,
    "val_steps": 5,
    "max_val_images": 8,
    "grid_cfg_scale": 1,
    "cfg_prob": 0.2,
    "weighting": "lognormal",
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("photographs") / "images", per_class=8)


@pytest.fixture(scope="module")
def straight(photographs) -> Path:
    assert start(photographs, "straight").wait() == 0
    return photographs.parent / "exps" / "straight"


def start(data: Path, name: str, anew: bool = False, **changes) -> Stage:
    argv = flags(data, data.parent / "exps", name, **(KILLED | {"val_data_dir": data} | changes))
    return Stage("train_repae.py", *argv, anew=anew)


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    for name in ("model", "ema", "alignment", "vae", "discriminator", "statistics_ema"):
        x, y = (weights(folder, 12, name) for folder in (a, b))
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key], y[key]) for key in x), name
    for name in ("optimizer", "vae_optimizer", "disc_optimizer"):
        x, y = (torch.load(run_ / "checkpoints" / "0000012" / f"{name}.pt", weights_only=True) for run_ in (a, b))
        assert x["param_groups"] == y["param_groups"]
        for index in x["state"]:
            assert all(torch.equal(x["state"][index][key], y["state"][index][key]) for key in x["state"][index]), name
    for name in ("vae/diffusion_pytorch_model.safetensors", "vae/latents_stats.safetensors", "samples/0000012.png"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.slow
def test_sigkill_and_the_same_command_give_the_same_run(photographs, straight):
    process = start(photographs, "killed")
    folder = photographs.parent / "exps" / "killed"
    code = kill_when(process, folder / "samples" / "0000007-reconstructions.png", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert [path.name for path in sorted((folder / "checkpoints").glob("[0-9]*"))] == ["0000005"]
    assert not (folder / "vae").exists()
    assert start(photographs, "killed", anew=True).wait() == 0  # with another seed of Python's hashes, too
    assert_same_run(straight, folder)


@pytest.mark.slow
def test_sigterm_saves_stops_and_resumes_exactly(photographs, straight):
    process = start(photographs, "stopped", num_workers=0)
    folder = photographs.parent / "exps" / "stopped"
    code = kill_when(process, folder / "samples" / "0000007-reconstructions.png", signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "stopped"
    assert 7 <= status["step"] < 12
    assert start(photographs, "stopped").wait() == 0
    assert_same_run(straight, folder)


@pytest.mark.slow
def test_training_on_two_processes_resumes_exactly(photographs, tmp_path):
    argv = flags(photographs, tmp_path, "two", val_data_dir=photographs, max_val_images=4)
    run_stage("train_repae.py", *argv, "--max-train-steps", "1", processes=2)
    run_stage("train_repae.py", *argv, "--max-train-steps", "2", processes=2)
    run_stage("train_repae.py", *[a if a != "two" else "straight" for a in argv], "--max-train-steps", "2", processes=2)
    logs = [metrics(tmp_path / name)[-1] for name in ("two", "straight")]
    assert logs[0] == logs[1]
    for name in ("ema", "vae", "statistics_ema"):
        two, straight = (weights(tmp_path / run_name, 2, name) for run_name in ("two", "straight"))
        assert all(torch.equal(two[key], straight[key]) for key in two)
