"""What a user can get wrong with train_sendvae.py, and what the one line must say."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from formats.vae import load_tokenizer
from models.discriminator import PatchDiscriminator
from runtime.checkpoint import CheckpointFolder
from tests.bad_inputs.case import Case
from tests.sendvae_runs import flags


def photographs(folder: Path) -> Path:
    """Two classes of two tiny images."""
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def with_flags(**changes):
    """A case that differs from a working command in some flags; callables are given the case's folder."""

    def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        data = photographs(tmp_path / "images")
        values = {key: value(tmp_path) if callable(value) else value for key, value in changes.items()}
        return flags(data, tmp_path / "exps", **values)

    return prepare


def written(name: str, content: str | bytes):
    """A file with this content."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def saved_vae(change=lambda folder: None, vae: str = "f4d4-tiny"):
    """A diffusers folder, changed."""

    def make(folder: Path) -> Path:
        tokenizer, _ = load_tokenizer(vae, "none")
        tokenizer.save(folder / "vae")
        change(folder / "vae")
        return folder / "vae"

    return make


def truncated(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def another_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))


def other_discriminator(folder: Path) -> Path:
    torch.save(PatchDiscriminator(width=8).state_dict(), folder / "disc.pt")
    return folder / "disc.pt"


def vit_of_another_width(folder: Path) -> Path:
    torch.save({"patch_embed.proj.weight": torch.zeros(192, 3, 16, 16)}, folder / "vit.pth")
    return folder / "vit.pth"


def torchscript(folder: Path) -> Path:
    """How OpenAI publishes CLIP: an archive with code."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), folder / "ViT-L-14.pt")
    return folder / "ViT-L-14.pt"


def unfinished_other_run(folder: Path) -> str:
    """A run of this name that was started with another learning rate."""
    run = folder / "exps" / "run"
    run.mkdir(parents=True)
    (run / "args.json").write_text(json.dumps({"args": {"vae_learning_rate": 0.5}}))
    CheckpointFolder(run).save(1, {"model": torch.nn.Linear(1, 1)}, {}, {})
    return "run"


def damaged_checkpoints(folder: Path) -> str:
    (folder / "exps" / "run" / "checkpoints" / "0000002").mkdir(parents=True)
    return "run"


def no_vgg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    return flags(photographs(tmp_path / "images"), tmp_path / "exps", loss_cfg_path="configs/l1_lpips_kl_gan.yaml")


def no_dinov2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.delenv("VFM_DIR", raising=False)
    monkeypatch.setattr("models.encoders.weights.try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr("models.encoders.weights.hub_answers", lambda: False)
    return flags(photographs(tmp_path / "images"), tmp_path / "exps", enc_type="dinov2-vit-s")


def disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("runtime.checkpoint.write_safetensors", full)
    return flags(photographs(tmp_path / "images"), tmp_path / "exps", align_coeff=0)


def unreadable_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    data = photographs(tmp_path / "images")
    (data / "a" / "0.png").write_bytes(b"not an image")
    return flags(data, tmp_path / "exps", align_coeff=0)


def removed_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    data = photographs(tmp_path / "images")
    shutil.rmtree(data)
    data.mkdir()
    return flags(data, tmp_path / "exps")


CASES = [
    Case("no run name", with_flags(exp_name=None), ("--exp-name",)),
    Case("run name is a path", with_flags(exp_name="a/b"), ("--exp-name", "a/b", "--output-dir")),
    Case("no data", with_flags(data_dir=None), ("--data-dir", "preprocessing.py")),
    Case("data missing", with_flags(data_dir="/no/such/folder"), ("/no/such/folder",)),
    Case("data empty", removed_data, ("images",)),
    Case("unreadable image", unreadable_image, ("0.png", "preprocessing.py")),
    Case("held-out data missing", with_flags(val_data_dir="/no/such/folder"), ("/no/such/folder",)),
    Case("unknown flag", with_flags(learning_rat="1"), ("--learning-rat",)),
    Case("abbreviated flag", with_flags(batch="1"), ("--batch",)),
    Case("batch not a number", with_flags(batch_size="many"), ("--batch-size", "many")),
    Case("negative learning rate", with_flags(vae_learning_rate="-1"), ("--vae-learning-rate", "-1")),
    Case("momentum above 1", with_flags(bn_momentum="2"), ("--bn-momentum", "[0, 1]")),
    Case("batch does not divide", with_flags(batch_size=4, gradient_accumulation_steps=3), ("4", "3", "multiple")),
    Case("less than a batch", with_flags(batch_size=64, max_train_steps=None, epochs=1), ("4 images", "64")),
    Case("unknown VAE", with_flags(vae="f3d7"), ("f3d7", "f16d32")),
    Case("architecture without weights", with_flags(vae_ckpt=None), ("f4d4-tiny", "--vae-ckpt none")),
    Case("VAE folder missing", with_flags(vae_ckpt="/no/vae"), ("--vae-ckpt", "/no/vae")),
    Case("VAE checkpoint is a file", with_flags(vae_ckpt=written("vae.pt", "x")), ("vae.pt", "it is text")),
    Case("VAE of another architecture", with_flags(vae="f8d4", vae_ckpt=saved_vae()), ("block_out_channels", "f8d4")),
    Case("VAE weights truncated", with_flags(vae_ckpt=saved_vae(truncated)), ("--vae-ckpt", "do not load")),
    Case("not a VAE's folder", with_flags(vae=saved_vae(another_class), vae_ckpt=None), ("UNet2DModel",)),
    Case("resolution does not fit", with_flags(resolution=42), ("42", "4")),
    Case(
        "too small for LPIPS",
        with_flags(resolution=8, mapper_grid=1, loss_override="discriminator_weight=0", loss_cfg_path=None),
        ("LPIPS", "16 px", "not 8:", "perceptual_weight=0"),
    ),
    Case("too small for the PatchGAN", with_flags(resolution=16, mapper_grid=1), ("24 px", "discriminator_weight=0")),
    Case("grid does not divide", with_flags(mapper_grid=3), ("--mapper-grid 3", "8×8", "1, 2, 4, 8")),
    Case("unknown VFM", with_flags(enc_type="dino9"), ("dino9", "dinov2-vit-b", "efficientnet-lite0")),
    Case("nearly a VFM", with_flags(enc_type="dinov2-vitb"), ("dinov2-vitb", "did you mean dinov2-vit-b")),
    Case(
        "no transformer", with_flags(enc_type="timm/resnet50"), ("timm/resnet50", "ResNet", "no grid of patch tokens")
    ),
    Case("VFM that timm lacks", with_flags(enc_type="timm/vit_nothing"), ("timm/vit_nothing", "has no model")),
    Case(
        "VFM of another size",
        with_flags(enc_type="dinov1-vit-s", enc_ckpt=vit_of_another_width),
        ("vit.pth", "192 wide", "not 384", "another --enc-type"),
    ),
    Case(
        "CLIP as TorchScript", with_flags(enc_type="clip-vit-L", enc_ckpt=torchscript), ("TorchScript", "state_dict()")
    ),
    Case(
        "VFM named twice", with_flags(enc_type="dinov2-vit-b,dinov2-vit-b"), ("--enc-type", "names dinov2-vit-b twice")
    ),
    Case("VFM without weights", no_dinov2, ("--enc-ckpt", "VFM_DIR", "vit_small_patch14_dinov2.lvd142m")),
    Case("VFM file missing", with_flags(enc_ckpt="/no/file.pth"), ("--enc-ckpt", "/no/file.pth")),
    Case("VFM file is text", with_flags(enc_ckpt=written("vfm.pth", "hello")), ("efficientnet-lite0", "vfm.pth")),
    Case("LPIPS without weights", no_vgg, ("--lpips-ckpt", "perceptual_weight")),
    Case("loss file missing", with_flags(loss_cfg_path="/no/loss.yaml"), ("--loss-cfg-path", "/no/loss.yaml")),
    Case("loss file not YAML", with_flags(loss_cfg_path=written("l.yaml", "a: [1")), ("l.yaml", "YAML")),
    Case("unknown loss key", with_flags(loss_cfg_path=written("l.yaml", "l1: 3")), ("l1", "reconstruction_weight")),
    Case("loss override without value", with_flags(loss_override="kl_weight"), ("kl_weight", "KEY=VALUE")),
    Case("discriminator missing", with_flags(disc_pretrained_ckpt="/no/d.pt"), ("--disc-pretrained-ckpt", "/no/d.pt")),
    Case("other discriminator", with_flags(disc_pretrained_ckpt=other_discriminator), ("disc.pt", "PatchGAN")),
    Case("a seed of 65 bits", with_flags(seed=2**64), ("--seed", "must be less than")),
    Case("a moment that keeps nothing new", with_flags(adam_beta1=1), ("--adam-beta1", "must be less than 1")),
    Case("another such moment", with_flags(adam_beta2=1), ("--adam-beta2", "must be less than 1")),
    Case("a batch that no machine holds", with_flags(batch_size=10**9), ("--batch-size", "GB are available")),
    Case("batches ahead that no machine holds", with_flags(prefetch=10**12), ("--prefetch", "GB are available")),
    Case(
        "a random encoder that stays so",
        with_flags(freeze_encoder=True, align_coeff=0),
        ("--freeze-encoder with --vae-ckpt none", "give a trained VAE"),
    ),
    Case(
        "a decoder alone that is aligned", with_flags(freeze_encoder=True), ("--freeze-encoder", "add --align-coeff 0")
    ),
    Case(
        "a decoder alone of a frozen VAE",
        with_flags(freeze_encoder=True, freeze_vae=True),
        ("--freeze-encoder with --freeze-vae",),
    ),
    Case("noise for no decoder", with_flags(latent_noise=0.5, freeze_vae=True), ("--latent-noise with --freeze-vae",)),
    Case("noise below none", with_flags(latent_noise=-1), ("--latent-noise", "-1")),
    Case("nothing to train", with_flags(freeze_vae=True, align_coeff=0), ("--freeze-vae", "--align-coeff")),
    Case("vf on another grid", with_flags(align_loss="vf", mapper_grid=4), ("--mapper-grid 4", "8×8 tokens", "vf")),
    Case("vf with a frozen VAE", with_flags(align_loss="vf", freeze_vae=True), ("--freeze-vae", "--align-loss vf")),
    Case(
        "vf with a mapper",
        with_flags(align_loss="vf", mapper_depth=0),
        ("--mapper-depth belongs to --align-loss cosine, not to --align-loss vf",),
    ),
    Case("vf with noise", with_flags(align_loss="vf", noise_injection=True), ("--noise-injection", "cosine")),
    Case(
        "times of no noise", with_flags(no_noise_injection=True, noise_max=0.5), ("--noise-max", "--no-noise-injection")
    ),
    Case(
        "width of a convolution", with_flags(mapper_head="conv", mapper_width=64), ("--mapper-width", "--mapper-head")
    ),
    Case(
        "until when nothing is aligned", with_flags(align_coeff=0, align_until=5), ("--align-until", "--align-coeff 0")
    ),
    Case("unknown alignment loss", with_flags(align_loss="l2"), ("--align-loss", "cosine", "vf")),
    Case("margin above 1", with_flags(align_loss="vf", vf_distance_margin=2), ("--vf-distance-margin", "[0, 1]")),
    Case("negative weight", with_flags(align_loss="vf", vf_weight=-1), ("--vf-weight", "-1")),
    Case(
        "a weight of no term",
        with_flags(align_loss="equivariance", align_coeff=0.5),
        ("--align-coeff 0.5", "--eq-probability"),
    ),
    Case(
        "until when without a term",
        with_flags(align_loss="equivariance", align_until=5),
        ("--align-until", "equivariance"),
    ),
    Case("scaled to nothing", with_flags(align_loss="equivariance", eq_scale=0), ("--eq-scale 0",)),
    Case(
        "sizes that change, compiled",
        with_flags(align_loss="equivariance", compile=True),
        ("--compile", "equivariance"),
    ),
    Case(
        "scaled too small for the PatchGAN",
        with_flags(align_loss="equivariance", eq_scale=0.5),
        ("24 px", "not 16, as --align-loss equivariance makes them"),
    ),
    Case("scale of no equivariance", with_flags(eq_scale=0.5), ("--eq-scale belongs to --align-loss equivariance",)),
    Case("random weights for real", with_flags(random_weights=True), ("--random-weights", "--dry-run")),
    Case("milestones off the checkpoints", with_flags(milestone_steps=7), ("--milestone-steps 7", "10000")),
    Case("changed flag on resume", with_flags(exp_name=unfinished_other_run), ("--vae-learning-rate 0.5, not 0.0003",)),
    Case("no such checkpoint", with_flags(resume_step=5), ("--resume-step 5",)),
    Case("damaged checkpoints", with_flags(exp_name=damaged_checkpoints), ("checkpoint", "--exp-name")),
    Case("not a run", with_flags(continue_train_exp_dir="configs"), ("--continue-train-exp-dir", "args.json")),
    Case("disk full", disk_full, ("no space left", "model.safetensors"), keeps_work=True),
]
