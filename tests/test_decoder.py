"""The decoder trained alone (--freeze-encoder, --latent-noise): latents stay; and a run's images by it (--decoder)."""

import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import generate
import train_sendvae
from dataset.toy import main as make_toy
from errors import UserError
from formats.vae import load_tokenizer
from inference.decoder import has_same_latents, with_decoder
from inference.sampling import ImageSampler
from inference.trained_ldm import TrainedLDM
from loss.total import total
from models.pixels import to_signed
from models.tokenizers import Tokenizer
from models.tokenizers.base import PlainCode
from models.tokenizers.pixels import PixelTokenizer
from models.tokenizers.rae import RAETokenizer
from reporting.results import sampler_of
from runtime.cli import run
from tests.latent_caches import save_vae
from tests.ldm_runs import flags as sampling_flags
from tests.ldm_runs import random_weights, write_ldm_run
from tests.sendvae_runs import flags, image_batch, networks, random_images, tiny_trainer
from tests.test_experiment import commands, value
from training.loop import train_step
from training.sendvae import AlignedTokenizer

ALONE = {"freeze_encoder": True, "align_coeff": 0, "loss_cfg_path": "configs/l1_kl.yaml"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    make_toy(["--output", str(folder), "--num-images", "24", "--resolution", "32"])
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def trained(toy: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained the decoder of that VAE, with an average and a discriminator."""
    folder = tmp_path_factory.mktemp("exps")
    options = ALONE | {"loss_cfg_path": "configs/l1_kl_gan.yaml", "latent_noise": 0.5, "ema_decay": 0.5}
    assert train(toy, vae, folder, "decoder", max_train_steps=3, val_data_dir=toy, **options) == 0
    return folder / "decoder"


def train(toy: Path, vae: Path, output: Path, name: str, **changes) -> int:
    options = {"vae": vae, "vae_ckpt": None} | (changes if changes.get("align_coeff") else {"enc_type": None} | changes)
    return run(train_sendvae.main, flags(toy, output, name, **options))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- the training -------------------------------------------------------------------------------------------------


def test_latents_and_their_statistics_stay_to_the_bit(vae, trained):
    before, after = (load_tokenizer(str(folder))[0] for folder in (vae, trained / "vae"))
    images = random_images(4)
    codes = [tokenizer.encode(images) for tokenizer in (before, after)]
    assert torch.equal(codes[0].stored(), codes[1].stored())
    assert before.statistics.checksum() == after.statistics.checksum()
    assert before.checksum() != after.checksum()
    old, new = before.network_state(), after.network_state()
    changed = {name for name in new if not torch.equal(old[name], new[name])}
    assert changed == {name for name in new if name.startswith(("decoder.", "post_quant_conv."))}


def test_it_says_how_well_it_reconstructs_and_nothing_of_what_does_not_train(trained):
    lines = metrics(trained)
    assert {"val/psnr", "val_ema/psnr"} <= lines[-1].keys()
    assert all({"reconstruction", "gan", "discriminator"} <= line.keys() for line in lines if "loss" in line)
    assert not any("kl" in line or "alignment" in line for line in lines)


def test_resumed_it_is_the_same(toy, vae, tmp_path):
    options = ALONE | {"latent_noise": 1.0, "ema_decay": 0.9, "checkpointing_steps": 2}
    for name, stops in (("halted", (2, 4)), ("straight", (4,))):
        for stop in stops:
            assert train(toy, vae, tmp_path, name, max_train_steps=stop, **options) == 0
    assert metrics(tmp_path / "halted") == metrics(tmp_path / "straight")
    halted, straight = (load_tokenizer(str(tmp_path / name / "vae"))[0] for name in ("halted", "straight"))
    assert halted.checksum() == straight.checksum()


def test_a_resumed_run_keeps_to_its_flags(toy, trained, vae, capsys):
    options = ALONE | {"loss_cfg_path": "configs/l1_kl_gan.yaml", "ema_decay": 0.5, "val_data_dir": toy}
    assert train(toy, vae, trained.parent, "decoder", max_train_steps=4, latent_noise=0.2, **options) == 2
    assert "--latent-noise 0.5, not 0.2" in capsys.readouterr().err
    whole = options | {"freeze_encoder": None, "latent_noise": 0.5}
    assert train(toy, vae, trained.parent, "decoder", max_train_steps=4, **whole) == 2
    assert "--freeze-encoder True, not False" in capsys.readouterr().err


@pytest.mark.parametrize("alone", [True, False])
def test_a_step_equals_a_plain_calculation(alone):
    """In float64: loss and every gradient; with the encoder there are the posterior's terms and its gradients too."""
    trainer = tiny_trainer(gan=False, align_coeff=0, freeze_encoder=alone, latent_noise=0.7)
    trainer.statistics.load(torch.tensor([0.3, -0.1, 0.2, 0.0]), torch.tensor([0.5, 2.0, 1.5, 0.8]))
    exact = copy.deepcopy(trainer.tokenizer).double()
    batch = image_batch(3)
    draws = trainer.draws(5, 0, batch)
    generator = trainer.draws(5, 0, batch).generator  # in the same state
    sizes = torch.randn(3, 1, 1, 1, generator=generator)
    noise = torch.randn(3, 4, 8, 8, generator=generator)

    images = batch.images.double() / 127.5 - 1
    mean, logvar = exact.network.quant_conv(exact.network.encoder(images)).chunk(2, 1)
    z = mean + (logvar / 2).exp() * draws.posterior
    if alone:
        z = z.detach()
    std = (trainer.statistics.var.double() + 1e-4).sqrt()
    z = z + 0.7 * sizes.abs() * std[:, None, None] * noise
    expected = (exact.network.decoder(exact.network.post_quant_conv(z)) - images).abs().mean()
    if not alone:
        expected = expected + 1e-6 * 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
    expected.backward()

    logged, _ = trainer.backward(5, batch, draws, share=1.0, synchronise=True)
    assert logged["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    found = dict(networks(trainer).tokenizer.named_parameters())
    largest = max(p.grad.abs().max() for p in exact.parameters() if p.grad is not None)
    for name, parameter in exact.named_parameters():
        assert (found[name].grad is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(found[name].grad.double(), parameter.grad, rtol=1e-3, atol=1e-5 * float(largest))


def test_the_size_of_the_noise_is_drawn_for_each_image():
    """|N(0, τ²)| in units of the normalised latent, the same for all positions and channels of an image."""
    tokenizer, _ = load_tokenizer("f4d4-tiny", "none")
    tokenizer.statistics.load(torch.zeros(4), torch.tensor([0.5, 2.0, 1.0, 3.0]))
    aligned = AlignedTokenizer(tokenizer, None, latent_noise=0.6)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(4000, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    noise = (aligned.with_noise(latent, generator) - latent) / tokenizer.statistics.std[:, None, None]
    sizes = noise.std((2, 3))  # [4000, 4] of 64 numbers each
    assert sizes.square().mean().sqrt().item() == pytest.approx(0.6, rel=0.03)
    assert sizes.mean().item() == pytest.approx(0.6 * math.sqrt(2 / math.pi), rel=0.03)
    of_images = noise.flatten(1).std(1)
    assert torch.corrcoef(torch.stack([sizes[:, 0], sizes[:, 3]]))[0, 1] > 0.95
    assert of_images.min() < 0.01 < 1.5 < of_images.max()


def test_the_encoder_answers_as_it_does_in_use():
    """Whatever of it depends on the mode, and is no parameter: it would move the latents."""

    class Normed(Tokenizer):
        downsampling, architecture = 4, {}

        def __init__(self):
            super().__init__(4)
            self.encoder = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.Dropout(0.5))
            self.decoder = nn.ConvTranspose2d(4, 3, 4, 4)

        @classmethod
        def from_architecture(cls, config):
            return cls()

        def encode(self, images):
            return PlainCode(self.encoder(to_signed(images)))

        def decode(self, z):
            return self.decoder(z)

        encoder_last_layer = decoder_last_layer = None

    torch.manual_seed(0)
    tokenizer = Normed().eval()
    before, latent = copy.deepcopy(tokenizer.encoder.state_dict()), tokenizer.encode(random_images(4)).mode
    aligned = AlignedTokenizer(tokenizer, None, keeps_latents=True)
    assert aligned.train() is aligned
    trainer = tiny_trainer(gan=False, align_coeff=0)
    output = aligned(image_batch(4), [], trainer.draws(0, 0, image_batch(4)))
    assert tokenizer.decoder.training
    assert torch.equal(output.latent, latent)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tokenizer.encoder.state_dict().items())
    total({"l1": output.reconstruction.abs().mean()}, {"l1": 1.0}).backward()
    assert tokenizer.decoder.weight.grad is not None
    assert all(parameter.grad is None for parameter in tokenizer.encoder.parameters())


def test_what_does_not_say_which_part_is_its_encoder_is_refused():
    with pytest.raises(UserError, match=r"does not say what of it is the encoder \(encoder_parts\)"):
        AlignedTokenizer(PixelTokenizer(), None, keeps_latents=True)


def test_of_an_rae_the_decoder_may_be_trained():
    rae = RAETokenizer.__new__(RAETokenizer)
    with pytest.raises(UserError, match="train its decoder, with --freeze-encoder --align-coeff 0"):
        rae.check_trainable()
    rae.check_trainable(encoder=False)


def test_it_learns():
    """What noise takes away the decoder puts back: of noisy latents it makes better images than before."""
    trainer = tiny_trainer(
        gan=False, align_coeff=0, freeze_encoder=True, latent_noise=1.0, vae_learning_rate=3e-3, max_grad_norm=0.0
    )
    batch = image_batch(8)  # noise itself cannot be learned: one colour each
    batch = batch._replace(images=batch.images[:, :, :1, :1].expand(-1, -1, 32, 32).contiguous())
    losses = [float(train_step(trainer, step, [batch])["reconstruction"]) for step in range(40)]
    print("first and last:", losses[0], sum(losses[-5:]) / 5)
    assert sum(losses[-5:]) / 5 < 0.9 * losses[0]


# --- images by it -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ldm_run(tmp_path_factory.mktemp("exps") / "run")


@pytest.fixture(scope="module")
def decoder(exp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's VAE with another decoder, and with statistics that are not those of the run."""
    tokenizer, _ = load_tokenizer(str(exp / "vae"))
    random_weights(tokenizer.network.decoder, 3)
    tokenizer.statistics.load(torch.full((4,), 5.0), torch.full((4,), 0.1))
    folder = tmp_path_factory.mktemp("exps") / "better" / "vae"
    tokenizer.save(folder)
    return folder


def sampled(exp: Path, folder: Path | None = None, **changes: object) -> int:
    return run(generate.main, sampling_flags(exp, sample_dir=folder, **changes))


def images_in(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz", allow_pickle=False) as file:
        return file["arr_0"]


def test_the_same_latents_are_decoded_by_it(exp, decoder, tmp_path, monkeypatch):
    """With the run's statistics: those of the other VAE are of no latents here."""
    seen: list[torch.Tensor] = []
    latents = ImageSampler.latents
    monkeypatch.setattr(ImageSampler, "latents", lambda *args: seen.append(latents(*args)) or seen[-1])
    for name, changes in (("own", {}), ("other", {"decoder": decoder})):
        assert sampled(exp, tmp_path / name, **changes) == 0
    own, other = torch.cat(seen[: len(seen) // 2]), torch.cat(seen[len(seen) // 2 :])
    assert torch.equal(own, other)
    tokenizer, (statistics, _) = load_tokenizer(str(decoder))[0], load_tokenizer(str(exp / "vae"))
    with torch.inference_mode():
        images = tokenizer.decode(statistics.statistics.denormalize(other))
    expected = ((images + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(images_in(tmp_path / "other") - expected).max() <= 1
    assert (images_in(tmp_path / "own") != images_in(tmp_path / "other")).mean() > 0.5
    source = json.loads((tmp_path / "other" / "index.json").read_text())["source"]
    assert (source["decoder"], source["decoder_sha256"]) == ("better", tokenizer.checksum())
    assert sampler_of(source) == "SDE, 3 steps, decoded by better"


def test_a_folder_holds_images_of_one_decoder(exp, decoder, tmp_path, capsys):
    assert sampled(exp, tmp_path / "images") == 0
    capsys.readouterr()
    assert sampled(exp, tmp_path / "images", decoder=decoder) == 2
    assert "begun with another --decoder (decoder: None, now better)" in capsys.readouterr().err
    assert sampled(exp, tmp_path / "images") == 0  # as older folders, which do not say, go on too


def test_its_name_is_in_that_of_the_folder(exp, decoder, capsys):
    assert sampled(exp, decoder=decoder, cfg_scale=2) == 0
    assert (exp / "samples-0000010-sde3-decoder-better-cfg2-0-1-10-seed0" / "samples.npz").is_file()


def test_what_knows_other_latents_is_refused(exp, decoder, tmp_path, capsys):
    """Whatever of it makes them others: weights, or what the layers do; and what has no weights at all."""
    tokenizer, _ = load_tokenizer(str(decoder))
    random_weights(tokenizer.network.quant_conv, 4)
    tokenizer.save(tmp_path / "weights")
    shutil.copytree(decoder, tmp_path / "layers")
    config = tmp_path / "layers" / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"relu"'))
    assert '"relu"' in config.read_text()
    others = f"makes other latents than the VAE of {exp}"
    for source, said in (
        (tmp_path / "weights", others),
        (tmp_path / "layers", others),
        ("pixels", "has no weights: give a VAE's folder"),
        ("f16d32", "has no weights: give a VAE's folder"),
        (tmp_path / "nothing", "neither a known architecture"),
    ):
        assert sampled(exp, tmp_path / "images", decoder=source) == 2
        line = capsys.readouterr().err
        assert said in line
        assert line.count("error:") == line.count("--decoder") == 1
        assert "--vae-ckpt" not in line
    assert not (tmp_path / "images").exists()


def test_what_of_an_rae_is_no_weight_of_its_encoder_counts_too():
    """Statistics in its configuration, as encoders are shared; and the size that it decodes to."""

    class Scaled(PixelTokenizer):
        stores_images = False

        def __init__(self, scale: float = 1.0, size: int = 32):
            super().__init__()
            self.scale, self.size = scale, size

        def latent_shape(self, resolution: int) -> tuple[int, int, int]:
            if resolution != self.size:
                raise UserError("decodes to another size")
            return super().latent_shape(resolution)

        def encode(self, images: torch.Tensor) -> PlainCode:
            return PlainCode(self.scale * to_signed(images))

    assert has_same_latents(Scaled(), Scaled(), 32)
    assert not has_same_latents(Scaled(), Scaled(scale=2.0), 32)
    assert not has_same_latents(Scaled(), Scaled(size=64), 32)
    assert not has_same_latents(Scaled(), PixelTokenizer(), 32)


def test_pixels_are_decoded_by_none():
    with pytest.raises(UserError, match="was trained on pixels, which none decodes; leave it out"):
        with_decoder(PixelTokenizer(), "anything", of_run(Path("run")))


def of_run(folder: Path) -> TrainedLDM:
    fields = {"folder": folder, "checkpoint": None, "weights": "ema", "config": None, "path_type": "linear"}
    fields |= {"class_names": [], "resolution": 32, "vae_checksum": "", "statistics_checksum": None, "checksum": ""}
    return TrainedLDM(**fields)


def test_random_networks_have_none(decoder, capsys):
    assert run(generate.main, ["--dry-run", "--model", "SiT-Ti/1", "--decoder", str(decoder)]) == 2
    assert "--decoder and --model exclude each other" in capsys.readouterr().err


def test_from_training_to_images(trained, vae, toy, tmp_path):
    """A trained decoder is one that a run on the latents of its VAE is sampled by."""
    own, _ = load_tokenizer(str(vae))
    other = with_decoder(own, str(trained / "vae"), of_run(tmp_path))
    assert other.statistics is own.statistics
    assert other.checksum() == load_tokenizer(str(trained / "vae"))[0].checksum()


# --- presets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["sendvae_imagenet256", "quickstart"])
def test_its_preset_decodes_the_images_of_another_run_again(source):
    name = source.replace("sendvae", "decoder") if source.startswith("sendvae") else "quickstart_decoder"
    found, theirs = commands(name), commands(source)
    assert set(theirs) - set(found) == {"cache", "ldm"}
    vae = train_sendvae.parse_arguments(found["sendvae"][found["sendvae"].index("train_sendvae.py") + 1 :])
    assert (vae.freeze_encoder, vae.latent_noise, vae.align_coeff) == (True, 0.25, 0)
    assert (vae.vae_ckpt or vae.vae) == f"exps/{source}-vae/vae"
    for flag in ("loss-cfg-path", "batch-size", "data-dir"):
        assert value(found["sendvae"], flag) == value(theirs["sendvae"], flag)
    own = ["--decoder", f"exps/{name}-vae/vae"]
    assert value(found["samples"], "sample-dir") == f"exps/{source}-ldm/{name}"  # where a report finds them
    there = [word.replace(f"{source}-ldm/{name}", f"{source}-ldm/generated") for word in found["samples"]]
    assert [word for word in there if word not in own] == theirs["samples"]
    measured = ("--reference", "ref.npz", "--unguided", "yes") if source.startswith("sendvae") else ()
    found, of_samples = commands(name, *measured), {"reading": "samples"}
    for stage in found:
        if "evaluate" in stage or stage in of_samples:
            made = found[of_samples.get(stage, stage.replace("evaluate", "samples"))]
            assert value(found[stage], "samples") == value(made, "sample-dir")
