"""Discriminators on a VFM's features, and what they see: heads, singular values, augmentation, whole trainings."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

import export_vae
import train_sendvae
from dataset.toy import main as make_toy
from loss.augmentation import augmented, moved
from loss.vae_objective import load_loss_config
from models.encoders import build_encoder
from models.feature_discriminator import FeatureDiscriminator, Head
from runtime.cli import run
from tests.sendvae_runs import flags, tiny_trainer
from tests.stages import run_stage
from training.method import frozen

VIT, CNN = "timm/vit_tiny_patch16_224", "efficientnet-lite0"
ON_FEATURES = [f"discriminator={CNN}", "discriminator_resolution=64", "discriminator_augment=true"]


def discriminator_of(name: str = VIT, grid: int = 4) -> FeatureDiscriminator:
    torch.manual_seed(0)
    return FeatureDiscriminator(build_encoder(name, grid, random_weights=True))


def images(count: int = 3, side: int = 96) -> torch.Tensor:
    return 2 * torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) - 1


def logits_by_formulas(head: Head, tokens: torch.Tensor) -> torch.Tensor:
    """Of tokens ``[B, N, D]``, in float64: each weight over u·Wv, a ring of tokens, norms over them, two layers and a
    sum."""

    def convolved(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        part = layer.parametrizations.weight[0]
        weight = layer.parametrizations.weight.original.double()
        weight = weight / (part._u.double() @ weight.flatten(1) @ part._v.double())
        reach = weight.shape[-1] // 2
        y = layer.bias.double().expand(*x.shape[:2], -1)
        for place in range(-reach, reach + 1):
            y = y + x.roll(-place, 1) @ weight[:, :, place + reach].T
        return y

    def layer(parts: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        y = convolved(parts[0], x)
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        y = y * parts[1].weight.double() + parts[1].bias.double()
        return torch.where(y > 0, y, 0.2 * y)

    x = layer(head.token, tokens.double())
    return convolved(head.logit, (layer(head.neighbours, x) + x) / math.sqrt(2)).flatten(1)


@torch.no_grad()
@pytest.mark.parametrize("name", [VIT, CNN])
def test_logits_are_those_of_the_formulas(name):
    """A ViT's tokens after its last block, then after each quarter; a CNN's one stage."""
    network = discriminator_of(name)
    encoder, x = network.encoder, images()
    for parameter in network.heads.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    after = {}
    if name == VIT:
        for number, block in enumerate(encoder.network.blocks, 1):
            block.register_forward_hook(lambda *given, n=number: after.__setitem__(n, given[2][:, 1:]))
    found = network(x)
    x = F.interpolate((x + 1) / 2, (64, 64), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (encoder.spec.mean, encoder.spec.std))
    if name == VIT:
        after.clear()
        encoder.network.forward_features((x - mean) / std)
        states = [after[number] for number in (12, 3, 6, 9, 12)]
    else:
        states = [encoder.network((x - mean) / std)[0].flatten(2).transpose(1, 2)]
    expected = [logits_by_formulas(head, state) for head, state in zip(network.heads, states, strict=True)]
    assert found.shape == (3, len(states) * 16)
    assert found.std() > 0.3
    torch.testing.assert_close(found.double(), torch.cat(expected, 1), rtol=1e-4, atol=1e-4)
    alone = network(images()[1:2])  # whatever else is in the batch
    torch.testing.assert_close(alone, found[1:2], rtol=1e-4, atol=1e-4)


def test_only_heads_are_trained_and_saved_and_the_rest_goes_along():
    network = discriminator_of()
    assert all(name.startswith("heads.") for name in network.state_dict().keys() - {"vfm"})
    assert all(parameter.requires_grad for parameter in network.parameters())
    network.to(torch.float64)
    assert network.encoder.mean.dtype == next(network.encoder.network.parameters()).dtype == torch.float64


def test_singular_values_follow_where_it_learns_and_stay_where_it_judges():
    network, x = discriminator_of(), images().requires_grad_()
    layer = network.heads[0].neighbours[0]
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn_like(layer.parametrizations.weight.original))
    before = {name: buffer.clone() for name, buffer in network.heads.named_buffers()}
    with frozen(network):
        judged = network(x)
        gradient = torch.autograd.grad(judged.sum(), x)[0]
    assert gradient.abs().max() > 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.heads.named_buffers())
    for _ in range(60):
        network(x.detach()).sum().backward()
    assert any(not torch.equal(buffer, before[name]) for name, buffer in network.heads.named_buffers())
    largest = torch.linalg.svdvals(layer.parametrizations.weight.original.flatten(1))[0]
    weight = layer.parametrizations.weight.original / largest
    with torch.no_grad(), frozen(network):
        network.heads.eval()
        torch.testing.assert_close(layer.weight, weight, rtol=1e-2, atol=1e-4)
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(parameter.grad is None for parameter in network.encoder.parameters())


def test_singular_values_do_not_depend_on_autocast():
    plain, cast = discriminator_of(), discriminator_of()
    plain(images())
    with torch.autocast("cpu", torch.bfloat16):
        cast(images())
    for (name, buffer), other in zip(plain.heads.named_buffers(), cast.heads.buffers(), strict=True):
        assert torch.equal(buffer, other), name


# --- what it sees -----------------------------------------------------------------------------------------------------


def test_an_image_is_moved_and_recoloured_as_the_formulas_say():
    x = images(6, 16)
    found = augmented(x, torch.Generator().manual_seed(5))
    drawn = torch.rand(5, 6, generator=torch.Generator().manual_seed(5)).double()
    for image, made, (a, b, bright, full, strong) in zip(x.double(), found, drawn.T, strict=True):
        down, right = (int(5 * share) - 2 for share in (a, b))  # an eighth of 16 either way
        expected = torch.zeros(3, 16, 16, dtype=torch.float64)
        for row in range(16):
            for column in range(16):
                if 0 <= row - down < 16 and 0 <= column - right < 16:
                    expected[:, row, column] = image[:, row - down, column - right]
        expected = expected + bright - 0.5
        grey = expected.mean(0)
        expected = grey + 2 * full * (expected - grey)
        mean = expected.mean()
        expected = mean + (0.5 + strong) * (expected - mean)
        torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-5)


def test_draws_cover_what_they_may():
    x = torch.zeros(4000, 1, 16, 16)
    x[:, :, 8, 8] = 1
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(5, len(x), generator=generator)
    down, right = (5 * drawn[:2]).floor().long() - 2
    places = moved(x, down, right)[:, 0].flatten(1).argmax(1)
    counts = torch.stack([places // 16, places % 16]).sub(8).add(2)
    assert counts.min() == 0 and counts.max() == 4
    for axis in counts:
        assert (axis.bincount() / len(x)).sub(0.2).abs().max() < 0.03  # five standard errors


def test_its_gradient_is_the_image_moved_back():
    x = images(4, 16).double().requires_grad_()
    generator = torch.Generator().manual_seed(2)
    made = augmented(x, generator)
    other = torch.randn(made.shape, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((made * other).sum(), x)
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():  # linear in the image, but for a constant
        there, back = (augmented(x + sign * step, torch.Generator().manual_seed(2)) for sign in (1, -1))
    expected = ((there - back).double() * other).sum() / 2
    assert (gradient * step).sum().item() == pytest.approx(expected.item(), rel=1e-4)


# --- in trainings -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    make_toy(["--output", str(folder), "--num-images", "24", "--resolution", "32"])
    return folder


def train(toy: Path, output: Path, name: str, *overrides: str, **changes) -> int:
    words = ["discriminator_update_start=1", "discriminator_start=2", "adaptive_discriminator_weight=true"]
    argv = flags(toy, output, name, **{"resolution": 32, "checkpointing_steps": 1, "max_train_steps": 4} | changes)
    return run(train_sendvae.main, [*argv, "--loss-override", *ON_FEATURES, *words, *overrides])


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_before_it_is_listened_to_and_resumes_to_the_bit(toy, tmp_path):
    for name, stops in (("halted", (2, 3, 4)), ("straight", (4,))):
        for stop in stops:
            assert train(toy, tmp_path, name, max_train_steps=stop) == 0
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("halted", "straight")]
    assert lines[0] == lines[1]
    steps = logged(tmp_path / "straight")
    assert ["discriminator" in step for step in steps] == [False, True, True, True]
    assert ["gan" in step for step in steps] == [False, False, True, True]
    weights = [tmp_path / name / "checkpoints/0000004/discriminator.safetensors" for name in ("halted", "straight")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert weights[0].stat().st_size < 2_000_000  # without the VFM
    assert run(export_vae.main, [str(tmp_path / "straight"), str(tmp_path / "x.pt"), "--format", "repa-e"]) == 0
    assert not (tmp_path / "x-discriminator-ckpt.pt").exists()


def test_it_goes_on_beside_the_same_weights_alone(toy, tmp_path, capsys):
    """Wherever their file lies."""
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    files = [tmp_path / f"{name}.pt" for name in ("one", "copy", "other")]
    for number, file in enumerate(files):
        with torch.no_grad():
            network.conv_stem.weight.add_(0.5 * (number == 2))
        torch.save(network.state_dict(), file)
    assert train(toy, tmp_path, "run", disc_enc_ckpt=files[0], max_train_steps=2) == 0
    assert train(toy, tmp_path, "run", disc_enc_ckpt=files[1], max_train_steps=3) == 0
    assert train(toy, tmp_path, "run", disc_enc_ckpt=files[2], max_train_steps=4) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "discriminator.safetensors does not fit the network" in line
    assert "its heads were trained on the features of another efficientnet-lite0 than the one given" in line


def test_a_dry_run_counts_its_network(toy, tmp_path, capsys):
    assert train(toy, tmp_path, "run", dry_run=True) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "of the discriminator" in line]
    assert line.startswith("VFM efficientnet-lite0 of the discriminator") and line.split()[-1] == "0"  # trained


def test_two_processes_keep_one_discriminator(toy, tmp_path):
    """Its singular values are no buffers that are sent around: all processes follow them alike."""
    argv = flags(toy, tmp_path, "two", resolution=32, batch_size=4, max_train_steps=3, checkpointing_steps=3)
    run_stage("train_sendvae.py", *argv, "--loss-override", *ON_FEATURES, processes=2)
    stage = run_stage("train_sendvae.py", *argv, "--max-train-steps", "4", "--loss-override", *ON_FEATURES, processes=2)
    assert "resum" in stage.stdout + stage.stderr
    assert logged(tmp_path / "two")[-1]["disc_grad_norm"] > 0


@pytest.mark.parametrize("start", [None, 6])
def test_its_learning_rate_begins_where_it_is_told_to_begin(start):
    schedule = {"lr_schedule": "cosine", "warmup_steps": 4, "max_train_steps": 20, "lr_floor": 0.1}
    trainer = tiny_trainer(loss={"discriminator_update_start": start, "discriminator_start": 8}, **schedule)
    args = trainer.args
    for step in range(20):
        rates = trainer.rates(step)
        own = max(0, step - (start or 0))
        expected = own + 1 if own < 4 else 4 * (0.1 + 0.9 * (1 + math.cos(math.pi * (own - 4) / 16)) / 2)
        assert rates["disc_lr"] == pytest.approx(args.disc_learning_rate * expected / 4, rel=1e-6)
        assert start or rates["lr"] / args.vae_learning_rate == rates["disc_lr"] / args.disc_learning_rate


def test_augmentation_is_another_training(toy, tmp_path):
    assert train(toy, tmp_path, "plain", "discriminator_augment=false") == 0
    assert train(toy, tmp_path, "augmented") == 0
    plain, other = logged(tmp_path / "plain"), logged(tmp_path / "augmented")
    assert plain[0]["loss"] == other[0]["loss"]
    assert plain[1]["logits_real"] != other[1]["logits_real"]


NEW = ("discriminator", "discriminator_resolution", "discriminator_augment", "discriminator_update_start")


def test_a_run_that_is_older_than_these_keys_goes_on(toy, tmp_path):
    values = {"resolution": 32, "checkpointing_steps": 1}
    assert run(train_sendvae.main, flags(toy, tmp_path, "old", **values)) == 0
    (manifest,) = (tmp_path / "old/checkpoints").glob("0000002/manifest.json")
    for path in (manifest, tmp_path / "old/args.json"):
        written = json.loads(path.read_text())
        written["args"]["loss"] = {key: value for key, value in written["args"]["loss"].items() if key not in NEW}
        path.write_text(json.dumps(written))
    assert run(train_sendvae.main, flags(toy, tmp_path, "old", **values | {"max_train_steps": 3})) == 0


@pytest.mark.parametrize(
    ("overrides", "changes", "said"),
    [
        (["discriminator=dinov9"], {}, "discriminator of the loss, dinov9"),
        (["discriminator_resolution=72"], {}, "discriminator_resolution 72 is no multiple of 16"),
        (["discriminator_resolution=16"], {}, "that has 2×2 patches or more: take 32"),
        (["discriminator_update_start=3"], {}, "discriminator_update_start 3 is after discriminator_start 2"),
        (["discriminator_update_start=x"], {}, "loss key discriminator_update_start: 'x' is not of type int"),
        ([], {"disc_pretrained_ckpt": "x.pt"}, "--disc-pretrained-ckpt holds a PatchGAN"),
        ([], {"disc_enc_ckpt": "/no/such.pt"}, "--disc-enc-ckpt /no/such.pt: no such file"),
        (
            ["discriminator=patchgan"],
            {"disc_enc_ckpt": "x.pt"},
            "the loss has no VFM as its discriminator; leave it out",
        ),
    ],
)
def test_what_cannot_be_is_one_line(toy, tmp_path, capsys, overrides, changes, said):
    assert train(toy, tmp_path, "run", *overrides, **changes) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert said in line
    assert not (tmp_path / "run/checkpoints").exists()


def test_the_loss_of_rae_is_read():
    config = load_loss_config("configs/l1_lpips_dino_gan.yaml")
    assert (config.discriminator_update_start, config.discriminator_start) == (6 * 2502, 8 * 2502)
    assert config.vfm_of_discriminator == "timm/vit_small_patch8_224.dino"
    assert load_loss_config("configs/l1_lpips_kl_gan.yaml").vfm_of_discriminator is None
    overridden = load_loss_config("configs/l1_lpips_dino_gan.yaml", ["discriminator_update_start=null"])
    assert overridden.discriminator_update_start is None
