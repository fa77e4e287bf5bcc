"""VAE-REPA: its loss, one step against a derivation, who gets gradient, and train_ldm.py --align as a user calls it."""

import json
from argparse import Namespace

import pytest
import torch
from accelerate import Accelerator

import generate
from inference.trained_ldm import open_trained_ldm
from loss.alignment import TokenGrid, parse_sum
from loss.alignment.repa import REPA
from loss.alignment.vae_repa import VAEREPA, latent_alignment_error, latent_alignment_loss
from models.denoisers.config import SiTConfig
from models.denoisers.sit import SiT
from runtime.cli import run
from tests.distributed_ldm_step import BATCH, batch_draws
from tests.ldm_steps import CONFIG, accumulate, networks, part_of, random_batch, tiny_trainer
from tests.ldm_trainings import LATENTS, flags, write_data
from tests.sendvae_runs import gradients
from tests.test_train_ldm import metrics, train, weights
from training.alignment_cost import alignment_cost, alignment_cost_lines, denoiser_cost
from training.ldm import AlignedDenoiser
from training.method import train_step
from training.networks import build_aligned_denoiser

BOTH = ("repa", "vae")
ALONE = ("vae",)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def test_loss_equals_plain_loops_in_float64():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(3, 2, 4, 4, generator=generator)
    latent = predicted + 0.08 * torch.randn(3, 2, 4, 4, generator=generator)  # on both sides of beta
    expected = []
    for sample in range(3):
        errors = []
        for p, z in zip(predicted[sample].flatten().tolist(), latent[sample].flatten().tolist(), strict=True):
            d = abs(p - z)
            errors.append(d * d / 0.1 if d < 0.05 else d - 0.025)
        expected.append(sum(errors) / len(errors))
    torch.testing.assert_close(latent_alignment_error(predicted, latent), torch.tensor(expected), rtol=1e-5, atol=1e-7)
    t = torch.tensor([0.2, 0.5, 0.9])
    found = latent_alignment_loss(predicted, latent, t, 0.2, 0.5)
    assert found.item() == pytest.approx((expected[0] + expected[1]) / 3, rel=1e-5)
    assert latent_alignment_loss(predicted, latent, t).item() == pytest.approx(sum(expected) / 3, rel=1e-5)


def derived_loss(twin: AlignedDenoiser, batch, draws, coeff: float) -> dict[str, torch.Tensor]:
    """Denoising plus VAE-REPA from the description: the projector and the patches written out."""
    model, projector = twin.denoiser, twin.alignment["vae"].projector
    mean, std = batch.stored[:, :4].float(), batch.stored[:, 4:].float()
    centre, scale = torch.tensor([0.5, -0.2, 0.1, 0.0]), torch.tensor([1.5, 0.7, 1.0, 2.0])
    x = (mean + std * draws.posterior - centre[:, None, None]) / scale[:, None, None]
    t = draws.times[:, None, None, None]
    hidden = []
    handle = model.blocks[1].register_forward_hook(lambda module, args, output: hidden.append(output))
    velocity, _ = model((1 - t) * x + t * draws.noise, draws.times, batch.labels)
    handle.remove()
    h = hidden[0]
    for number in (0, 2, 4, 6, 8):
        layer = projector[number]
        h = h @ layer.weight.T + layer.bias
        h = h if number == 8 else h * torch.sigmoid(h)
    predicted = torch.zeros_like(x)
    for token in range(16):
        row, column = 2 * (token // 4), 2 * (token % 4)
        patch = h[:, token].reshape(-1, 2, 2, 4)  # row, column, channel
        predicted[:, :, row : row + 2, column : column + 2] = patch.permute(0, 3, 1, 2)
    distance = (predicted - x).abs()
    aligned = torch.where(distance < 0.05, distance**2 / 0.1, distance - 0.025).mean()
    denoise = ((velocity - (draws.noise - x)) ** 2).mean()
    return {"loss": denoise + coeff * aligned, "denoise": denoise, "vae_repa": aligned}


def test_a_step_equals_a_derivation():
    """Losses, gradients, and the weights after clipping and AdamW."""
    trainer = tiny_trainer(align=ALONE, vae_repa_coeff=0.7)
    twin = networks(tiny_trainer(align=ALONE))
    batch = random_batch(BATCH)
    draws = trainer.draws(0, 0, batch)
    expected = derived_loss(twin, batch, draws, 0.7)
    names = dict(twin.named_parameters())
    grads = dict(zip(names, torch.autograd.grad(expected["loss"], names.values()), strict=True))

    accumulate(trainer, batch, draws)
    found = gradients(networks(trainer))
    assert found.keys() == grads.keys()
    largest = max(gradient.abs().max() for gradient in grads.values()).item()
    assert max((found[name] - grads[name]).abs().max().item() for name in grads) < 1e-5 * largest
    trainer.optimizer.zero_grad()

    rate, norm = trainer.args.learning_rate, torch.stack([gradient.norm() for gradient in grads.values()]).norm()
    step_metrics = train_step(trainer, 0, [batch])
    for name, value in expected.items():
        assert step_metrics[name].item() == pytest.approx(value.item(), rel=1e-5)
    assert step_metrics["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    for name, parameter in networks(trainer).named_parameters():
        gradient = grads[name] * min(1.0, 1.0 / (norm.item() + 1e-6))
        moved = names[name] - rate * gradient / (gradient.abs() + 1e-8)  # AdamW's first step: m/√v = sign
        certain = gradient.abs() > 1e-6  # elsewhere the sign is rounding
        torch.testing.assert_close(parameter[certain], moved[certain], rtol=0, atol=1e-5)


def touched(**flags: object) -> set[str]:
    """Parts of the SiT and of both alignments that get gradient; the denoising term is left out."""
    trainer = tiny_trainer(align=BOTH, **flags)
    batch, draws = random_batch(BATCH), batch_draws()
    accumulate(trainer, batch, draws)
    with_term = gradients(networks(trainer))
    plain = tiny_trainer(align=BOTH, proj_coeff=0.0, vae_repa_coeff=0.0)
    accumulate(plain, batch, draws)
    without = gradients(networks(plain))
    differing = {name for name in with_term if (with_term[name] - without[name]).abs().max() > 1e-7}
    whole = {name.removeprefix("denoiser.").removeprefix("alignment.") for name in differing}
    return {".".join(name.split(".")[: 2 if name.startswith(("blocks", *BOTH)) else 1]) for name in whole}


def test_each_term_reaches_the_blocks_up_to_its_own_and_its_own_projector():
    embedders = {"x_embedder", "t_embedder", "y_embedder"}
    first = {f"blocks.{number}" for number in range(4)}
    assert touched(proj_coeff=0.0, vae_repa_coeff=1.0) == embedders | {"blocks.0", "blocks.1", "vae.projector"}
    assert touched(proj_coeff=1.0, vae_repa_coeff=0.0) == embedders | first | {"repa.projectors"}
    both = touched(proj_coeff=1.0, vae_repa_coeff=1.0)
    assert both == embedders | first | {"repa.projectors", "vae.projector"}
    assert touched(proj_coeff=0.0, vae_repa_coeff=0.0) == set()


def test_no_time_in_range_aligns_nothing():
    draws = batch_draws()
    assert touched(proj_coeff=0.0, vae_repa_coeff=1.0, vae_repa_times=(2.0, 3.0)) == set()
    trainer = tiny_trainer(align=ALONE, vae_repa_times=(0.0, 0.5))
    whole = tiny_trainer(align=ALONE)
    batch = random_batch(BATCH)
    early = draws.times <= 0.5
    assert 0 < early.sum() < BATCH
    part = accumulate(trainer, batch, draws)["vae_repa"]
    alone = accumulate(whole, part_of(batch, early), part_of(draws, early))["vae_repa"]
    assert part.item() == pytest.approx(alone.item() * early.sum().item() / BATCH, rel=1e-5)


def test_accumulated_micro_batches_are_the_whole_batch():
    batch, draws = random_batch(BATCH), batch_draws()
    whole, parts = (tiny_trainer(align=BOTH, vae_repa_times=(0.1, 0.6)) for _ in range(2))
    accumulate(whole, batch, draws)
    for part in (slice(0, 4), slice(4, 8)):
        accumulate(parts, part_of(batch, part), part_of(draws, part), share=0.5)
    expected, found = gradients(networks(whole)), gradients(networks(parts))
    assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-5


def test_what_can_be_predicted_is_learned():
    """One latent for every image."""
    trainer = tiny_trainer(align=ALONE, learning_rate=4e-3)
    batch = random_batch(4)
    batch.stored[:] = torch.cat([torch.ones(4, 4, 8, 8), torch.zeros(4, 4, 8, 8)], 1)
    losses = [train_step(trainer, step, [batch])["vae_repa"].item() for step in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_one_seed_gives_one_network_whatever_it_is_aligned_with():
    flags = {"enc_type": "efficientnet-lite0", "encoder_depth": 4, "projector_width": 16, "proj_coeff": 0.5}
    flags |= {"vae_repa_depth": 2, "vae_repa_width": 24, "vae_repa_times": (0.0, 1.0), "vae_repa_coeff": 1.0}
    args = Namespace(seed=3, gradient_checkpointing=False, **flags)
    built = {}
    for align in ("none", "repa", "vae", "repa+vae"):
        built[align] = build_aligned_denoiser(args, CONFIG, parse_sum(align), Accelerator(cpu=True))
    base = built["none"][0].state_dict()
    for denoiser, _ in built.values():
        state = denoiser.state_dict()
        assert state.keys() == base.keys()
        assert all(torch.equal(state[name], base[name]) for name in base)
    states = {align: alignment.state_dict() for align, (_, alignment) in built.items()}
    assert states["none"] == {}
    first = "repa.projectors.0.0.weight"
    assert torch.equal(states["repa"][first], states["repa+vae"][first])
    assert states["vae"]["vae.projector.8.weight"].shape == (16, 24)
    assert states["vae"]["vae.projector.0.bias"].abs().max() == 0


def test_a_denoiser_s_config_says_nothing_of_alignments():
    expected = {"model": "SiT-Ti/2", "latent_channels": 4, "latent_size": 8, "num_classes": 6, "qk_norm": False}
    assert networks(tiny_trainer(align=BOTH)).denoiser.config.to_dict() == expected


@pytest.mark.parametrize(
    ("align", "terms"), [("vae", {"denoise", "vae_repa"}), ("none", {"denoise"}), ("proj-coeff 0", {"denoise"})]
)
def test_without_repa_no_vfm_is_loaded_and_no_image_is_opened(data, tmp_path, no_vfm_no_images, align, terms):
    choice = {"proj_coeff": 0} if align == "proj-coeff 0" else {"align": align}
    argv = flags(data, tmp_path, data_dir=None, vae_latents_name=data / LATENTS, enc_type="dinov2-vit-l", **choice)
    assert train(*argv) == 0
    line = metrics(tmp_path / "run")[0]
    assert line.keys() >= terms
    assert not {"repa", "vae_repa"} - terms & line.keys()
    if "vae_repa" in terms:
        assert line["loss"] == pytest.approx(line["denoise"] + line["vae_repa"], rel=1e-5)
    assert train(*flags(data, tmp_path, "dry", data_dir=None, vae_latents_name=None, dry_run=True, **choice)) == 0


def test_with_repa_the_refusal_above_is_heard(data, tmp_path, no_vfm_no_images):
    with pytest.raises(pytest.fail.Exception, match="a VFM was built, or an image opened"):
        train(*flags(data, tmp_path, repa_source="images"))


def test_args_say_what_was_done(data, tmp_path, capsys):
    argv = flags(data, tmp_path, align="repa+vae", vae_repa_coeff=0.25, proj_coeff=None, max_train_steps=1)
    assert train(*argv, "--vae-repa-times", "0.1", "0.8") == 0
    args = json.loads((tmp_path / "run" / "args.json").read_text())["args"]
    expected = {"align": "repa+vae", "proj_coeff": 0.5, "vae_repa_coeff": 0.25, "vae_repa_times": [0.1, 0.8]}
    expected |= {"vae_repa_depth": 2, "vae_repa_width": 384}
    assert {name: args[name] for name in expected} == expected
    assert args["feature_widths"] == [112]
    line = metrics(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(line["denoise"] + 0.5 * line["repa"] + 0.25 * line["vae_repa"], rel=1e-5)
    assert "VAE-REPA after block 2, times 0.1 to 0.8, weight 0.25" in capsys.readouterr().err


def test_a_run_resumes_exactly_and_generate_reads_it(data, tmp_path):
    options = {"align": "repa+vae", "vae_repa_depth": 3, "checkpointing_steps": 2, "gradient_checkpointing": True}
    options |= {"max_train_steps": None}
    for name, stops in (("halted", (2, 4)), ("straight", (4,))):
        for stop in stops:
            assert train(*flags(data, tmp_path, name, **options), "--max-train-steps", str(stop)) == 0
    assert metrics(tmp_path / "halted") == metrics(tmp_path / "straight")
    stored = {}
    for name in ("model", "ema", "alignment"):
        resumed, stored[name] = (weights(tmp_path / run_name, 4, name) for run_name in ("halted", "straight"))
        assert resumed.keys() == stored[name].keys()
        assert all(torch.equal(resumed[key], stored[name][key]) for key in resumed)
    layers = {f"{part}.{layer}" for layer in (0, 2, 4) for part in ("repa.projectors.0", "vae.projector")}
    layers |= {"vae.projector.6", "vae.projector.8"}
    assert stored["alignment"].keys() == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert stored["model"].keys() == stored["ema"].keys() == SiT(CONFIG).state_dict().keys()

    model = open_trained_ldm(tmp_path / "straight", None, "ema").load_model()
    assert model.state_dict().keys() == stored["ema"].keys()
    assert all(torch.equal(tensor, stored["ema"][key]) for key, tensor in model.state_dict().items())
    argv = ["--exp-path", str(tmp_path / "straight"), "--num-fid-samples", "2", "--num-steps", "2"]
    assert run(generate.main, [*argv, "--sample-dir", str(tmp_path / "generated")]) == 0


def test_a_run_whose_arguments_do_not_know_a_flag_yet_goes_on(data, tmp_path):
    argv = flags(data, tmp_path, max_train_steps=None)
    assert train(*argv, "--max-train-steps", "2") == 0
    path = tmp_path / "run" / "args.json"
    record = json.loads(path.read_text())
    record["args"] = {k: v for k, v in record["args"].items() if k != "align" and not k.startswith("vae_repa")}
    path.write_text(json.dumps(record))
    assert train(*argv, "--max-train-steps", "3") == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 3


def settled() -> Namespace:
    """VAE-REPA's flags where none is given."""
    return Namespace(**VAEREPA.DEFAULTS)


def matrix_flops(config: SiTConfig) -> int:
    """Forward pass of one image, counted by hand: two for each multiply-add of a linear layer or of attention."""
    width, depth, tokens = config.size.width, config.size.depth, config.grid**2
    values = config.patch_size**2 * config.latent_channels
    block = tokens * 12 * width**2 + 2 * tokens**2 * width + 6 * width**2
    rest = tokens * 2 * values * width + 2 * width**2 + (256 * width + width**2)
    return 2 * (depth * block + rest)


@pytest.mark.parametrize(("model", "depth", "share"), [("SiT-B/2", 2, 9.2), ("SiT-XL/2", 8, 4.0)])
def test_cost_is_that_of_counting_by_hand(model, depth, share):
    config = SiTConfig(model, 4, 32, num_classes=1000)
    width = config.size.width
    with torch.device("meta"):
        denoiser = SiT(config)
        parts = (
            REPA(denoiser, [TokenGrid("vfm", 16, 768)], 8, 2048, 0.5),
            VAEREPA(denoiser, depth, 2 * width, (0.0, 1.0), 1.0),
        )
    assert denoiser_cost(denoiser).flops == matrix_flops(config)
    added = {part.title: alignment_cost(part, denoiser) for part in parts}
    weights_of = {
        "REPA": width * 2048 + 2048**2 + 2048 * 768,
        "VAE-REPA": 2 * width**2 + 3 * (2 * width) ** 2 + 2 * width * 16,
    }
    assert {name: cost.flops for name, cost in added.items()} == {
        name: 2 * 256 * count for name, count in weights_of.items()
    }
    biases = {"REPA": 2 * 2048 + 768, "VAE-REPA": 4 * 2 * width + 16}
    assert {name: cost.parameters for name, cost in added.items()} == {
        name: count + biases[name] for name, count in weights_of.items()
    }
    lines = alignment_cost_lines(settled(), config, ["vae"], ())
    assert any(line.startswith("VAE-REPA adds") and f"+{share}%" in line and "4 %" in line for line in lines)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_dry_run_prints_the_cost_of_the_alignment(precision, capsys):
    argv = ["--dry-run", "--model", "SiT-Ti/2", "--vae", "f4d4-tiny", "--resolution", "32", "--align", "repa+vae"]
    argv += ["--enc-type", "efficientnet-lite0", "--random-weights", "--encoder-depth", "3"]
    assert train(*argv, "--mixed-precision", precision) == 0
    out = capsys.readouterr().out
    assert "SiT-Ti/2 alone: " in out
    assert "REPA adds " in out
    # a bias a channel in the place of each normalisation's scale and shift
    published, channels = 2_958_848, 19_728
    assert f"VFM efficientnet-lite0 (frozen) adds {published - channels:,} parameters" in out
    assert "vae_repa " in out


@pytest.mark.parametrize(("size", "depth"), [("Ti", 2), ("S", 2), ("B", 2), ("L", 8), ("XL", 8)])
def test_sizes_have_their_published_depths(size, depth):
    args = settled()
    with torch.device("meta"):
        denoiser = SiT(SiTConfig(f"SiT-{size}/2", 4, 32, num_classes=1000))
        alignment = VAEREPA.from_arguments(args, denoiser, [])
    assert alignment.taps == (depth,)
    assert (args.vae_repa_depth, args.vae_repa_width) == (depth, 2 * denoiser.width)
