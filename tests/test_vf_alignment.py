"""VA-VAE's alignment: its losses against plain loops, weight and gradients against plain autograd, and the flags."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import train_sendvae
from loss.alignment import TokenGrid
from loss.alignment.vf import VFAlignment, distance_matrix_loss, marginal_cosine_loss, vf_weight
from runtime.cli import run
from tests.distributed_step import BATCH
from tests.photographs import write_class_folders
from tests.sendvae_runs import RESOLUTION, draws_for, flags, gradients, image_batch, networks, tiny_trainer
from tests.test_distributed import step_on_two_processes
from tests.test_sendvae_step import largest_difference
from training.method import train_step

VALUES = 3 * RESOLUTION**2


def cosine(a: list[float], b: list[float]) -> float:
    dot, norms = sum(x * y for x, y in zip(a, b, strict=True)), [math.sqrt(sum(x * x for x in v)) for v in (a, b)]
    return dot / (norms[0] * norms[1])


@pytest.mark.parametrize(("cosine_margin", "distance_margin"), [(0.5, 0.25), (0.0, 0.0)])
def test_losses_equal_plain_loops_in_float64(cosine_margin, distance_margin):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 6, generator=generator)
    tokens = features + torch.randn(2, 5, 6, generator=generator)
    marginal, pairwise = [], []
    for z, f in zip(tokens.double().tolist(), features.double().tolist(), strict=True):
        for i in range(5):
            marginal.append(max(0.0, 1 - cosine_margin - cosine(z[i], f[i])))
            for j in range(5):
                pairwise.append(max(0.0, abs(cosine(z[i], z[j]) - cosine(f[i], f[j])) - distance_margin))
    assert 0 < sum(value == 0 for value in pairwise) < len(pairwise)
    assert marginal_cosine_loss(tokens, features, cosine_margin).item() == pytest.approx(sum(marginal) / 10, rel=1e-5)
    assert distance_matrix_loss(tokens, features, distance_margin).item() == pytest.approx(sum(pairwise) / 50, rel=1e-5)
    alignment = VFAlignment([nn.Identity()], [TokenGrid("vfm", 1, 6)], 1.0, cosine_margin, distance_margin, 1)
    parts = alignment(tokens, None, [features], None, None)
    assert parts["vf_cosine"].item() == pytest.approx(sum(marginal) / 10, rel=1e-5)
    assert parts["vf_distance"].item() == pytest.approx(sum(pairwise) / 50, rel=1e-5)


def test_losses_are_float32_under_autocast():
    tokens, features = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low = distance_matrix_loss(tokens, features, 0.0)
    assert torch.equal(low, distance_matrix_loss(tokens, features, 0.0))


def test_weight_is_the_ratio_of_norms_in_the_units_of_means_and_bounded():
    fidelity, alignment = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert vf_weight(fidelity, alignment, 10).item() == pytest.approx(50 / (2 + 1e-4) / 10)
    assert vf_weight(fidelity, torch.zeros(2), 10).item() == pytest.approx(50 / 1e-4 / 10)
    assert vf_weight(fidelity * 1e6, torch.zeros(2), 10).item() == pytest.approx(1e8 / 10)


class Perceptual(nn.Module):
    """Stands for LPIPS: one number an image."""

    def forward(self, images: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        return (images.diff(dim=-1) - reconstruction.diff(dim=-1)).square().mean((1, 2, 3), keepdim=True)


def vf_trainer(**options):
    """With a stand-in for LPIPS and the default weight, a tenth of the fidelity's gradient."""
    return tiny_trainer(**({"gan": False, "align_loss": "vf", "perceptual": Perceptual()} | options))


def test_a_step_equals_va_vaes_sums_divided_by_the_values_of_an_image():
    """Its loss written with sums, as it is published: weight, every gradient, and what stays out of it."""
    trainer = vf_trainer()
    trainer.statistics.load(torch.full((4,), 0.7), torch.full((4,), 3.0))  # have no say
    plain = copy.deepcopy(networks(trainer))
    batch, draws = image_batch(4), draws_for(4)
    metrics, _ = trainer.backward(0, batch, draws, share=1.0, synchronise=True)

    x = batch.images.float() / 127.5 - 1
    network = plain.tokenizer.network
    mean, logvar = network.encode(x).latent_dist.parameters.chunk(2, 1)
    logvar = logvar.clamp(-30, 20)
    z = mean + torch.exp(logvar / 2) * draws.posterior
    x_hat = network.decode(z).sample
    projection = plain.alignment.mappers[0].projection.weight[:, :, 0, 0]
    projected = torch.einsum("dc,bchw->bdhw", projection, z).flatten(2)  # [B, D, N]
    features = trainer.encoders[0](batch.images).transpose(1, 2)
    assert projected.shape == features.shape == (4, 112, 64)

    cosines = (projected * features).sum(1) / (projected.norm(dim=1) * features.norm(dim=1))
    unit = [value / value.norm(dim=1, keepdim=True) for value in (projected, features)]
    matrices = [torch.einsum("bci,bcj->bij", value, value) for value in unit]
    vf = torch.relu(0.5 - cosines).mean() + torch.relu((matrices[0] - matrices[1]).abs() - 0.25).mean()
    perceptual = Perceptual()(x, x_hat)  # [B, 1, 1, 1], counted at every value of an image
    summed = ((x - x_hat).abs() + perceptual).sum() / 4
    layer = network.encoder.conv_out.weight
    norms = [torch.autograd.grad(loss, layer, retain_graph=True)[0].norm() for loss in (summed, vf)]
    weight = 0.1 * norms[0] / (norms[1] + 1e-4)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / 4
    loss = (summed + weight.detach() * vf) / VALUES + 1e-6 * kl

    assert metrics["vf_cosine"].item() + metrics["vf_distance"].item() == pytest.approx(vf.item(), rel=1e-5)
    assert metrics["vf_weight"].item() == pytest.approx(weight.item() / VALUES, rel=1e-4)
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    parameters = dict(plain.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
    found = gradients(networks(trainer))
    assert largest_difference(found, expected) < 1e-5 * max(g.abs().max().item() for g in expected.values())


def test_it_reaches_the_encoder_and_the_projection_and_is_a_tenth_of_the_fidelity():
    batch, draws = image_batch(4), draws_for(4)
    aligned, plain = vf_trainer(), vf_trainer(align_coeff=0.0)
    metrics, plain_metrics = (t.backward(0, batch, draws, 1.0, synchronise=True)[0] for t in (aligned, plain))
    assert metrics["reconstruction"] == plain_metrics["reconstruction"]
    both, without = gradients(networks(aligned)), gradients(networks(plain))
    changed = {name.split(".")[2] for name in without if (both[name] - without[name]).abs().max() > 1e-9}
    assert changed == {"encoder", "quant_conv"}
    assert both.keys() - without.keys() == {"alignment.mappers.0.projection.weight"}
    assert both["alignment.mappers.0.projection.weight"].abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in aligned.encoders[0].parameters())
    name = "tokenizer.network.encoder.conv_out.weight"
    x_hat = plain.tokenizer.decode(plain.tokenizer.encode(batch.images).sample(draws.posterior))
    x = batch.images.float() / 127.5 - 1
    fidelity = (x - x_hat).abs().mean() + Perceptual()(x, x_hat).mean()
    expected = torch.autograd.grad(fidelity, plain.tokenizer.network.encoder.conv_out.weight)[0].norm()
    assert (both[name] - without[name]).norm().item() == pytest.approx(0.1 * expected.item(), rel=2e-3)


def test_the_projection_sees_the_latent_itself():
    """Neither the statistics nor the noise of the path have a say."""
    trainer = vf_trainer()
    batch, draws = image_batch(2), draws_for(2)
    alignment, statistics, features = trainer.alignment, trainer.statistics, trainer.features(batch)
    latent = trainer.tokenizer.encode(batch.images).sample(draws.posterior)
    first = alignment(latent, statistics, features, batch.labels, draws)
    statistics.load(torch.full((4,), 3.0), torch.full((4,), 0.1))
    others = draws._replace(times=1 - draws.times, noise=-draws.noise)
    second = alignment(latent, statistics, features, batch.labels, others)
    tokens = alignment.mappers[0](latent)
    expected = marginal_cosine_loss(tokens, features[0]), distance_matrix_loss(tokens, features[0])
    for name, value in zip(("vf_cosine", "vf_distance"), expected, strict=True):
        assert torch.equal(first[name], value)
        assert torch.equal(second[name], value)


def test_a_loss_scale_does_not_change_the_weight():
    trainer = vf_trainer()
    weights = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**16)):
        trainer.accelerator.scaler = scaler
        metrics, _ = trainer.backward(0, image_batch(4), draws_for(4), 1.0, synchronise=True)
        weights.append(metrics["vf_weight"].item())
    trainer.accelerator.scaler = None
    assert weights[1] == pytest.approx(weights[0], rel=1e-5)


def test_vf_loss_falls_on_one_batch():
    options = {"vf_weight": 1.0, "vf_cosine_margin": 0.0, "vf_distance_margin": 0.0, "vae_learning_rate": 2e-3}
    trainer = tiny_trainer(gan=False, align_loss="vf", **options)
    losses = []
    for step in range(12):
        metrics = train_step(trainer, step, [image_batch(4)])
        losses.append(metrics["vf_cosine"].item() + metrics["vf_distance"].item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    ranks = step_on_two_processes(tmp_path, "vf")
    trainer = tiny_trainer(gan=False, align_loss="vf")
    metrics, _ = trainer.backward(0, image_batch(BATCH), draws_for(BATCH), share=1.0, synchronise=True)
    expected = {f"model.{name}": g for name, g in gradients(networks(trainer)).items()}
    for tensors in ranks:
        torch.testing.assert_close(tensors["vf_weight"], metrics["vf_weight"], rtol=1e-4, atol=0)
        assert max((tensors[name] - expected[name]).abs().max().item() for name in expected) < 1e-5
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("images"), per_class=4)


def train(*argv: str) -> int:
    return run(train_sendvae.main, list(argv))


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_resumes_exactly(images, tmp_path, capsys):
    options = {"align_loss": "vf", "vf_weight": 0.2, "vf_cosine_margin": 0, "loss_cfg_path": "configs/l1_kl.yaml"}
    options |= {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "mixed_precision": "bf16"}
    options |= {"val_data_dir": images, "checkpointing_steps": 1, "max_train_steps": None}
    for name, stops in (("halted", (1, 2)), ("straight", (2,))):
        for stop in stops:
            assert train(*flags(images, tmp_path, name, **options), "--max-train-steps", str(stop)) == 0
    assert metrics_of(tmp_path / "halted")[-2] == metrics_of(tmp_path / "straight")[-2]
    for module in ("model", "alignment"):
        files = [tmp_path / run / "checkpoints" / "0000002" / f"{module}.safetensors" for run in ("halted", "straight")]
        halted, straight = map(load_file, files)
        assert halted.keys() == straight.keys()
        assert all(torch.equal(halted[name], straight[name]) for name in straight)
    assert {name: tensor.shape for name, tensor in straight.items()} == {"mappers.0.projection.weight": (112, 4, 1, 1)}
    lines = metrics_of(tmp_path / "straight")
    assert lines[0].keys() >= {"vf_cosine", "vf_distance", "vf_weight"}
    assert lines[0]["skipped"] == 0
    assert -1 <= lines[-1]["val/align_cosine"] <= 1
    args = json.loads((tmp_path / "straight" / "args.json").read_text())["args"]
    settled = ("align_loss", "vf_weight", "vf_cosine_margin", "vf_distance_margin", "mapper_depth", "noise_injection")
    assert [args[name] for name in settled] == ["vf", 0.2, 0.0, 0.25, None, None]
    assert "8×8 tokens of 112" in capsys.readouterr().err


def test_what_older_runs_recorded_of_other_alignments_hinders_nothing(images, tmp_path):
    options = {"loss_cfg_path": "configs/l1_kl.yaml", "mapper_depth": 0}
    assert train(*flags(images, tmp_path, max_train_steps=1, **options)) == 0
    path = tmp_path / "run" / "args.json"
    record = json.loads(path.read_text())
    assert record["args"]["vf_weight"] is None
    record["args"] |= {"vf_weight": 0.1, "vf_cosine_margin": 0.5, "vf_distance_margin": 0.25}
    path.write_text(json.dumps(record))
    assert train(*flags(images, tmp_path, max_train_steps=2, **options)) == 0


def test_a_grid_of_others_is_refused(images, tmp_path, capsys):
    options = {"align_loss": "vf", "mapper_grid": 4, "loss_cfg_path": "configs/l1_kl.yaml"}
    assert train(*flags(images, tmp_path, **options)) == 2
    assert "--mapper-grid 4: --align-loss vf compares on 8×8 tokens: leave the flag out" in capsys.readouterr().err


@pytest.mark.parametrize("zero", ["align_coeff", "vf_weight"])
def test_weight_0_is_plain_fine_tuning(images, tmp_path, monkeypatch, zero):
    monkeypatch.setattr("train_sendvae.build_vfms", lambda *args: pytest.fail("a VFM was built"))
    options = {"align_loss": "vf", zero: 0, "loss_cfg_path": "configs/l1_kl.yaml", "max_train_steps": 1}
    assert train(*flags(images, tmp_path, **options)) == 0
    assert metrics_of(tmp_path / "run")[0].keys() >= {"reconstruction", "kl"}
    assert not any("vf" in name or name == "alignment" for name in metrics_of(tmp_path / "run")[0])


def test_depth_0_trains_an_mlp_without_positions(images, tmp_path):
    options = {"mapper_depth": 0, "noise_injection": None, "loss_cfg_path": "configs/l1_kl.yaml", "max_train_steps": 1}
    assert train(*flags(images, tmp_path, **options), "--no-noise-injection") == 0
    state = load_file(tmp_path / "run" / "checkpoints" / "0000001" / "alignment.safetensors")
    assert {name.rsplit(".", 1)[0] for name in state} == {
        "mappers.0.patch_embed",
        *(f"mappers.0.projector.{number}" for number in (0, 2, 4)),
    }
