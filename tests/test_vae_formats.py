"""VAEs, discriminators and statistics of other codes: they load, and reproduce what their own code computes.

The sources are written by independent code (``tests/public_vae.py``, diffusers itself), never by our own exporter.
"""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import export_vae
from errors import UserError
from files import checksum
from formats.architecture import fitting_names, infer_config, named_config
from formats.discriminator import load_discriminator
from formats.hub import choose_files, is_hub_name
from formats.layers import to_diffusers, to_ldm
from formats.statistics import read_statistics, repae_tensors, statistics_in
from formats.vae import load_tokenizer, load_vae
from models.discriminator import PatchDiscriminator
from models.latent_statistics import LatentStatistics
from models.pixels import to_signed
from models.tokenizers import Tokenizer
from models.tokenizers.kl import KLTokenizer
from models.weight_files import NotWeightsError
from runtime.cli import run
from tests.public_vae import NARROW, TINY, PublicVAE, random_vae
from tests.vae_files import (
    old_attention,
    prefixed,
    random_diffusers,
    random_discriminator,
    random_moments,
    repae_checkpoint,
    tiny_ldm_state,
    write_lightning,
    write_run,
    write_stable_diffusion,
)

IMAGES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(11))
WIDE = {"multipliers": (1, 1, 2, 2, 4), "attention": (4,)}  # f16


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def assert_reproduces(ours: Tokenizer, theirs: PublicVAE, images: torch.Tensor = IMAGES) -> None:
    """Mean, logvar and decoded images."""
    with torch.no_grad():
        mean, logvar = theirs.encode(to_signed(images))
        posterior = ours.encode(images)
        z = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
        assert mean.std() > 0.1 and theirs.decode(z).std() > 0.1  # or nothing was compared
        assert close(posterior.mean, mean)
        assert close(posterior.logvar, logvar)
        assert close(ours.decode(z), theirs.decode(z))


def same_tensors(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


# --- LDM and what is built on it --------------------------------------------------------------------------------------

WRITERS = {
    "LDM.pt": lambda path, state: torch.save(state, path),
    "LDM, legacy torch.pt": lambda path, state: torch.save(state, path, _use_new_zipfile_serialization=False),
    "LDM.safetensors": lambda path, state: save_file(state, path),
    "LDM under another suffix.bin": lambda path, state: save_file(state, path),
    "with a projection.pt": lambda path, state: torch.save(
        state | {"linear_proj.weight": torch.ones(3, 4, 1, 1)}, path
    ),
    "under state_dict.ckpt": lambda path, state: torch.save({"state_dict": state}, path),
    "Lightning.ckpt": lambda path, state: write_lightning(path, state, random_discriminator().state_dict()),
    "Stable Diffusion.ckpt": write_stable_diffusion,
    "Stable Diffusion.safetensors": write_stable_diffusion,
    "DDP.pt": lambda path, state: torch.save(prefixed(state, "module."), path),
    "REPA-E training.pt": lambda path, state: torch.save(
        repae_checkpoint(state, random_discriminator().state_dict(), *random_moments(4)), path
    ),
}


@pytest.mark.parametrize("file", WRITERS)
def test_ldm_weights_reproduce_their_source(file, tmp_path):
    source = random_vae(3, **TINY)
    WRITERS[file](tmp_path / file, source.state_dict())
    for arguments in (("f4d4-tiny", str(tmp_path / file)), (str(tmp_path / file),)):
        assert_reproduces(load_tokenizer(*arguments)[0], source)


def test_f16_with_attention_in_its_last_level_reproduces_its_source(tmp_path):
    source = random_vae(4, **NARROW)
    torch.save(source.state_dict(), tmp_path / "vae.pt")
    ours = load_tokenizer(str(tmp_path / "vae.pt"))[0]
    assert (ours.latent_channels, ours.downsampling) == (32, 16)
    assert ours.network.config.down_block_types == ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"]
    assert ours.network.config.up_block_types == ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4
    assert_reproduces(ours, source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_into_float32(dtype, tmp_path):
    source = random_vae(3, **TINY).to(dtype)
    torch.save(source.state_dict(), tmp_path / "vae.pt")
    ours = load_tokenizer("f4d4-tiny", str(tmp_path / "vae.pt"))[0]
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.float32}
    assert_reproduces(ours, source.float())


def test_every_parameter_can_be_trained(tmp_path):
    torch.save(tiny_ldm_state(), tmp_path / "vae.pt")
    ours = load_tokenizer("f4d4-tiny", str(tmp_path / "vae.pt"))[0]
    posterior = ours.encode(IMAGES)
    (ours.decode(posterior.mean).square().sum() + posterior.logvar.sum()).backward()
    assert all(p.is_leaf and p.grad is not None for p in ours.parameters())


def test_loading_does_not_depend_on_the_random_state(tmp_path):
    torch.save(tiny_ldm_state(), tmp_path / "vae.pt")
    before = torch.random.get_rng_state()
    load_tokenizer("f4d4-tiny", str(tmp_path / "vae.pt"))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "architecture", "parameters"),
    [
        ("f8d4", {}, 83_653_863),
        ("f16d32", WIDE | {"latent_channels": 32}, 69_836_067),
        ("f16d16", WIDE | {"latent_channels": 16}, None),
        ("f16d64", WIDE | {"latent_channels": 64}, None),
    ],
)
def test_full_sizes_pair_name_by_name_with_the_public_layout(name, architecture, parameters):
    with torch.device("meta"):
        theirs = PublicVAE(**architecture).state_dict()
        ours = diffusers.AutoencoderKL.from_config(named_config(name)).state_dict()
    assert {key: tensor.shape for key, tensor in to_ldm(ours).items()} == {key: t.shape for key, t in theirs.items()}
    assert {key: tensor.shape for key, tensor in to_diffusers(theirs).items()} == {k: t.shape for k, t in ours.items()}
    assert fitting_names(infer_config(to_diffusers(theirs))) == [name]
    if parameters:
        assert sum(tensor.numel() for tensor in theirs.values()) == parameters


@pytest.mark.parametrize("architecture", [TINY, NARROW])
def test_renaming_there_and_back_changes_no_bit(architecture):
    state = random_vae(7, **architecture).state_dict()
    assert same_tensors(to_ldm(to_diffusers(state)), state)


# --- diffusers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> diffusers.AutoencoderKL:
    return random_diffusers(9)


def diffusers_folder(network, folder: Path) -> Path:
    network.save_pretrained(folder / "vae")
    return folder / "vae"


def folder_with_bin(network, folder: Path) -> Path:
    network.save_pretrained(folder / "vae", safe_serialization=False)
    return folder / "vae"


def pipeline_folder(network, folder: Path) -> Path:
    diffusers_folder(network, folder)
    return folder


def one_file(network, folder: Path) -> Path:
    save_file(network.state_dict(), folder / "vae.safetensors")
    return folder / "vae.safetensors"


def old_file(network, folder: Path) -> Path:
    torch.save(old_attention(network.state_dict()), folder / "vae.bin")
    return folder / "vae.bin"


def old_convolutions(network, folder: Path) -> Path:
    state = old_attention(network.state_dict())
    attention = ("query.weight", "key.weight", "value.weight", "proj_attn.weight")
    state = {k: t[:, :, None, None] if ".attentions." in k and k.endswith(attention) else t for k, t in state.items()}
    save_file(state, folder / "vae.safetensors")
    return folder / "vae.safetensors"


def old_folder(network, folder: Path) -> Path:
    network.save_pretrained(folder / "vae")
    save_file(old_attention(network.state_dict()), folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder / "vae"


def fp16_folder(network, folder: Path) -> Path:
    network.save_pretrained(folder / "vae", variant="fp16")
    return folder / "vae"


DIFFUSERS = (diffusers_folder, folder_with_bin, pipeline_folder, one_file, old_file, old_convolutions, old_folder)


@pytest.mark.parametrize("write", [*DIFFUSERS, fp16_folder], ids=lambda write: write.__name__)
def test_diffusers_weights_are_taken_bit_for_bit(write, network, tmp_path):
    path = write(network, tmp_path)
    for arguments in ((str(path),), ("f4d4-tiny", str(path))):
        ours, statistics = load_tokenizer(*arguments)
        assert statistics is None
        assert same_tensors(ours.network.state_dict(), network.state_dict())


def test_without_quantisation_convolutions_as_stable_diffusion_3_has_it(tmp_path):
    network = random_diffusers(1, 16, use_quant_conv=False, use_post_quant_conv=False, block_out_channels=[32, 64, 64])
    save_file(to_ldm(network.state_dict()), tmp_path / "ae.safetensors")
    network.register_to_config(norm_num_groups=32)
    ours = load_tokenizer(str(tmp_path / "ae.safetensors"))[0].network
    assert (ours.config.use_quant_conv, ours.config.use_post_quant_conv) == (False, False)
    assert same_tensors(ours.state_dict(), network.state_dict())


# --- Our own runs -----------------------------------------------------------------------------------------------------


def tiny_autoencoder(seed: int = 8) -> Tokenizer:
    tokenizer = KLTokenizer(random_diffusers(seed))
    mean, var = random_moments(4, seed)
    tokenizer.statistics.mean.copy_(mean)
    tokenizer.statistics.var.copy_(var)
    return tokenizer


@pytest.mark.parametrize("ema", [False, True])
def test_a_run_gives_its_vae_at_any_step(ema, tmp_path):
    tokenizer = tiny_autoencoder()
    start = tokenizer.network.decoder.conv_out.bias.detach().clone()
    run_folder = write_run(tmp_path / "run", tokenizer, ema=ema)
    sources = {run_folder: 20, run_folder / "checkpoints" / "0000010": 10, run_folder / "vae": 20}
    for source, step in sources.items():
        ours, statistics = load_tokenizer("f4d4-tiny", str(source))
        assert torch.equal(ours.network.decoder.conv_out.bias, start + step)
        assert same_tensors(ours.statistics.state_dict(), tokenizer.statistics.state_dict())
        assert str(run_folder) in statistics
    for step in (10, 20):
        ours = load_vae(None, str(run_folder), step=step).tokenizer
        assert torch.equal(ours.network.decoder.conv_out.bias, start + step)


def test_the_average_goes_before_the_last_weights(tmp_path):
    last, averaged = tiny_autoencoder(1), tiny_autoencoder(2)
    run_folder = write_run(tmp_path / "run", last, ema=True)
    place = run_folder / "checkpoints" / "0000020"
    state = averaged.state_dict()
    save_file(state, place / "ema.safetensors")
    with pytest.raises(UserError, match=r"ema\.safetensors is not what manifest\.json says"):
        load_tokenizer(str(place))
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["files"]["ema.safetensors"] = checksum(place / "ema.safetensors")
    (place / "manifest.json").write_text(json.dumps(manifest))
    assert same_tensors(load_tokenizer(str(place))[0].state_dict(), state)


def test_an_unfinished_run_names_its_checkpoints(tmp_path):
    run_folder = write_run(tmp_path / "run", tiny_autoencoder(), state="running")
    with pytest.raises(UserError, match=r"not finished \(running at step 20\).*checkpoints/0000020/"):
        load_tokenizer(str(run_folder))


# --- Statistics -------------------------------------------------------------------------------------------------------

MEAN, VAR = random_moments(4)
STATISTICS = {
    "REPA-E": (
        {"latents_scale": VAR.rsqrt().view(1, 4, 1, 1), "latents_bias": MEAN.view(1, 4, 1, 1)},
        (VAR + 1e-4).sqrt(),
    ),
    "LightningDiT": ({"mean": MEAN.view(1, 4, 1, 1), "std": VAR.sqrt().view(1, 4, 1, 1)}, VAR.sqrt()),
    "ours": ({"mean": MEAN, "std": (VAR + 1e-4).sqrt(), "var": VAR}, (VAR + 1e-4).sqrt()),
    "REPA-E training": (repae_checkpoint({}, None, MEAN, VAR), (VAR + 1e-4).sqrt()),
}


@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_of_each_layout_normalise_as_their_code_does(kind, tmp_path):
    content, std = STATISTICS[kind]
    torch.save(content, tmp_path / "stats.pt")
    torch.save(tiny_ldm_state(), tmp_path / "vae.pt")
    ours, source = load_tokenizer("f4d4-tiny", str(tmp_path / "vae.pt"), str(tmp_path / "stats.pt"))
    assert "stats.pt" in source
    z = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(6))
    expected = (z - MEAN.view(4, 1, 1)) / std.view(4, 1, 1)
    torch.testing.assert_close(ours.statistics.normalize(z), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.statistics.denormalize(expected), z, rtol=1e-6, atol=1e-5)


def test_repae_decodes_the_same_image_to_a_part_in_ten_thousand():
    """Its own way back is z / latents_scale + latents_bias, without the 1e-4 of its BatchNorm."""
    found = LatentStatistics(4)
    found.mean.copy_(MEAN)
    found.var.copy_(VAR)
    z = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(6))
    theirs = z * VAR.sqrt().view(4, 1, 1) + MEAN.view(4, 1, 1)
    difference = (found.denormalize(z) - theirs).abs() / (z.abs() * VAR.sqrt().view(4, 1, 1))
    assert (difference <= 5e-5 / VAR.view(4, 1, 1) * 1.05 + 1e-6).all()
    assert difference.max() < 2e-4


def test_a_repae_checkpoint_brings_the_statistics_of_its_average(tmp_path):
    state = repae_checkpoint(tiny_ldm_state(), random_discriminator().state_dict(), MEAN, VAR)
    torch.save(state, tmp_path / "0400000.pt")
    ours, source = load_tokenizer("f4d4-tiny", str(tmp_path / "0400000.pt"))
    assert torch.equal(ours.statistics.mean, MEAN)
    assert torch.equal(ours.statistics.var, VAR)
    assert "bn of ema" in source


@pytest.mark.parametrize("name", ["vae-latents-stats.pt", "latents_stats.pt", "latents_stats.safetensors"])
def test_statistics_beside_the_vae_are_found(name, tmp_path):
    torch.save(tiny_ldm_state(), tmp_path / "vae.pt")
    torch.save(random_discriminator().state_dict(), tmp_path / "vae-discriminator-ckpt.pt")
    torch.save(STATISTICS["LightningDiT"][0], tmp_path / name)
    for source in ("vae.pt", ""):  # the one VAE's file in its folder
        ours, statistics = load_tokenizer("f4d4-tiny", str(tmp_path / source))
        assert statistics == str(tmp_path / name)
        torch.testing.assert_close(ours.statistics.std, VAR.sqrt(), rtol=1e-6, atol=0)


def test_statistics_of_whoever_else_lies_there_are_not_taken(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.save(tiny_ldm_state(), tmp_path / name)
    for name in ("latents_stats.pt", "b-latents-stats.pt"):
        torch.save(STATISTICS["REPA-E"][0], tmp_path / name)
    assert load_tokenizer("f4d4-tiny", str(tmp_path / "a.pt"))[1] is None
    assert load_tokenizer("f4d4-tiny", str(tmp_path / "b.pt"))[1] == str(tmp_path / "b-latents-stats.pt")


@pytest.mark.parametrize("place", ["", "vae", "checkpoints/0000020", "checkpoints/0000020/model.safetensors"])
def test_statistics_of_a_run_of_ours_are_taken(place, tmp_path):
    source = tiny_autoencoder()
    folder = write_run(tmp_path / "run", source)
    ours, known = load_tokenizer("f4d4-tiny", "none", str(folder / place))
    assert str(folder) in known
    assert torch.equal(ours.statistics.mean, source.statistics.mean)
    assert torch.equal(ours.statistics.var, source.statistics.var)


@pytest.mark.parametrize("inside", ["", "vae"])
def test_statistics_of_a_diffusers_configuration_are_taken(inside, tmp_path):
    """``(z − latents_mean) · scaling_factor / latents_std``."""
    folder = tmp_path / "folder" / inside
    folder.mkdir(parents=True)
    values = {"latents_mean": [0.5, 0.0, -1.0, 2.0], "latents_std": [1.0, 2.0, 3.0, 4.0], "scaling_factor": 0.5}
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"} | values))
    ours, _ = load_tokenizer("f4d4-tiny", "none", str(tmp_path / "folder"))
    assert torch.equal(ours.statistics.mean, torch.tensor(values["latents_mean"]))
    assert (ours.statistics.std - torch.tensor([2.0, 4.0, 6.0, 8.0])).abs().max() < 1e-5


def test_the_flag_goes_before_what_lies_beside(tmp_path):
    torch.save(tiny_ldm_state(), tmp_path / "vae.pt")
    torch.save(STATISTICS["REPA-E"][0], tmp_path / "vae-latents-stats.pt")
    save_file({"mean": MEAN + 1, "std": VAR}, tmp_path / "mine.safetensors")
    ours, _ = load_tokenizer("f4d4-tiny", str(tmp_path / "vae.pt"), str(tmp_path / "mine.safetensors"))
    assert torch.equal(ours.statistics.mean, MEAN + 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"mean": torch.zeros(8), "std": torch.ones(8)}, "8 channels for a VAE with 4"),
        ({"mean": torch.zeros(4), "std": torch.tensor([1.0, 0, 1, 1])}, "std of channel 1 is not positive"),
        ({"mean": torch.tensor([0, 0, float("nan"), 0]), "std": torch.ones(4)}, "mean of channel 2 is not finite"),
        ({"latents_scale": torch.zeros(1, 4, 1, 1), "latents_bias": torch.zeros(4)}, "latents_scale"),
        ({"latents_scale": torch.ones(1, 4, 1, 1)}, "latents_bias is missing"),
        ({"mean": torch.zeros(4, 8, 8), "std": torch.ones(4)}, "not one number a channel"),
        ({"weight": torch.ones(4)}, "no latent statistics"),
    ],
)
def test_wrong_statistics_say_what_is_wrong(content, reason, tmp_path):
    torch.save(content, tmp_path / "stats.pt")
    with pytest.raises(NotWeightsError, match=reason):
        read_statistics(tmp_path / "stats.pt").load_into(LatentStatistics(4))


# --- Discriminators ---------------------------------------------------------------------------------------------------

DISCRIMINATORS = {
    "bare.pt": lambda path, state: torch.save(state, path),
    "bare.safetensors": lambda path, state: save_file(state, path),
    "half.pt": lambda path, state: torch.save({k: t.bfloat16().to(t) for k, t in state.items()}, path),
    "DDP.pt": lambda path, state: torch.save(prefixed(state, "module."), path),
    "Lightning.ckpt": lambda path, state: write_lightning(path, tiny_ldm_state(), state),
    "REPA-E.pt": lambda path, state: torch.save(repae_checkpoint(tiny_ldm_state(), state, MEAN, VAR), path),
}


@pytest.mark.parametrize("file", DISCRIMINATORS)
def test_a_discriminator_gives_the_logits_of_its_source(file, tmp_path):
    source, ours = random_discriminator(), PatchDiscriminator().eval()
    if file.startswith("half"):
        source.load_state_dict({k: t.bfloat16().to(t) for k, t in source.state_dict().items()})
    DISCRIMINATORS[file](tmp_path / file, source.state_dict())
    load_discriminator(ours, tmp_path / file)
    images = to_signed(IMAGES)
    with torch.no_grad():
        assert close(ours(images), source(images))


@pytest.mark.parametrize("place", ["", "checkpoints/0000010", "checkpoints/0000020/discriminator.safetensors"])
def test_a_run_gives_its_discriminator(place, tmp_path):
    run_folder, ours = write_run(tmp_path / "run", tiny_autoencoder()), PatchDiscriminator()
    load_discriminator(ours, run_folder / place)
    assert same_tensors(ours.state_dict(), random_discriminator().state_dict())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensor: tensor.to(torch.int8), "of type torch.int8"),
        (lambda tensor: tensor * torch.inf, "is not finite"),
        (lambda tensor: tensor.to_sparse(), "is sparse"),
    ],
)
def test_a_discriminator_of_no_weights_is_refused(change, reason, tmp_path):
    state = random_discriminator().state_dict()
    torch.save(state | {"main.2.weight": change(state["main.2.weight"])}, tmp_path / "d.pt")
    with pytest.raises(UserError, match=f"main.2.weight.*{reason}"):
        load_discriminator(PatchDiscriminator(), tmp_path / "d.pt")


def test_a_discriminator_with_actnorm_is_refused(tmp_path):
    state = random_discriminator().state_dict()
    state |= {"main.3.loc": torch.zeros(1, 128, 1, 1), "main.3.initialized": torch.tensor(1)}
    torch.save(state, tmp_path / "d.pt")
    with pytest.raises(UserError, match="ActNorm"):
        load_discriminator(PatchDiscriminator(), tmp_path / "d.pt")


# --- The hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, which cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("formats.hub.hub_answers", lambda: False)
    return tmp_path / "hub"


def cached(hub_cache: Path, repository: str) -> Path:
    """The folder of a repository's newest snapshot."""
    base = hub_cache / f"models--{repository.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("0" * 40)
    snapshot = base / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


def test_a_hub_name_is_taken_from_the_cache(hub_cache, network, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    network.save_pretrained(cached(hub_cache, "stabilityai/sd-vae"))
    network.save_pretrained(cached(hub_cache, "someone/pipeline") / "parts" / "vae")
    folder = cached(hub_cache, "REPA-E/e2e")
    torch.save(tiny_ldm_state(), folder / "e2e-400k.pt")
    torch.save(STATISTICS["REPA-E"][0], folder / "e2e-400k-latents-stats.pt")
    for name in ("stabilityai/sd-vae", "someone/pipeline:parts", "someone/pipeline:parts/vae"):
        ours, _ = load_tokenizer("f4d4-tiny", name)
        assert same_tensors(ours.network.state_dict(), network.state_dict())
    assert load_tokenizer("REPA-E/e2e")[1].endswith("e2e-400k-latents-stats.pt")


def test_what_the_cache_lacks_is_downloaded(hub_cache, network, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(repository, allow_patterns=None, local_files_only=False):
        if local_files_only and not asked:
            raise FileNotFoundError
        if local_files_only:  # as the hub's cache: what was downloaded is there
            return str(tmp_path / "downloaded")
        asked.append((repository, allow_patterns))
        network.save_pretrained(tmp_path / "downloaded")
        return str(tmp_path / "downloaded")

    files = ["README.md", "config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"]
    monkeypatch.setattr("formats.hub.hub_answers", lambda: True)
    monkeypatch.setattr("formats.hub.snapshot_download", download)
    monkeypatch.setattr("formats.hub.HfApi.list_repo_files", lambda self, repository: files)
    ours, _ = load_tokenizer("f4d4-tiny", "stabilityai/sd-vae")
    assert asked == [("stabilityai/sd-vae", ["config.json", "diffusion_pytorch_model.safetensors"])]
    assert same_tensors(ours.network.state_dict(), network.state_dict())


@pytest.mark.parametrize(
    ("files", "inside", "chosen"),
    [
        (["vae/config.json", "vae/diffusion_pytorch_model.bin", "unet/x.bin"], "", "vae"),
        (["a/config.json", "a/diffusion_pytorch_model.bin", "config.json"], "a", "a"),
        (["x.pt", "x-latents-stats.pt", "x-discriminator-ckpt.pt", "README.md"], "", None),
    ],
)
def test_only_the_vae_of_a_repository_is_downloaded(files, inside, chosen):
    wanted = [f"{chosen}/config.json", f"{chosen}/diffusion_pytorch_model.bin"] if chosen else files[:3]
    assert choose_files(files, inside) == wanted


def test_several_candidates_in_a_repository_are_listed():
    with pytest.raises(NotWeightsError, match=r"2 files.*a\.pt.*b\.pt"):
        choose_files(["a.pt", "b.pt"])


def test_paths_are_no_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exps").mkdir()
    assert is_hub_name("stabilityai/sd-vae-ft-mse")
    assert is_hub_name("stabilityai/stable-diffusion-2:vae")
    for path in ("exps/missing", "/no/such", "vae", "a/b/c", "./a/b", "../b", "exps"):
        assert not is_hub_name(path)


# --- Out --------------------------------------------------------------------------------------------------------------


def export(*argv: object) -> None:
    assert run(export_vae.main, [str(argument) for argument in argv]) == 0


def repae_trio(folder: Path, seed: int = 3) -> Path:
    folder.mkdir()
    torch.save(tiny_ldm_state(seed), folder / "x.pt")
    torch.save(STATISTICS["REPA-E"][0], folder / "x-latents-stats.pt")
    torch.save(random_discriminator().state_dict(), folder / "x-discriminator-ckpt.pt")
    return folder / "x.pt"


def contents(path: Path) -> dict:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_ldm_to_diffusers_and_back_keeps_every_bit(suffix, tmp_path):
    source = repae_trio(tmp_path / "in")
    export(source, tmp_path / "vae", "--format", "diffusers")
    export(tmp_path / "vae", tmp_path / f"back{suffix}", "--format", "ldm")
    assert same_tensors(contents(tmp_path / f"back{suffix}"), contents(source))
    first, second = (load_tokenizer(str(path))[0] for path in (source, tmp_path / "vae"))
    assert same_tensors(second.state_dict(), first.state_dict())  # statistics too


def test_a_folder_in_float16_is_half_as_large_and_is_read_as_float32(tmp_path, capsys):
    source = repae_trio(tmp_path / "in")
    export(source, tmp_path / "whole", "--format", "diffusers")
    export(source, tmp_path / "half", "--format", "diffusers", "--dtype", "float16")
    whole, half = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("whole", "half"))
    assert same_tensors(half, {name: tensor.half() for name, tensor in whole.items()})
    tokenizer, statistics = load_tokenizer(str(tmp_path / "half"))
    assert statistics is not None
    for name, tensor in tokenizer.network.state_dict().items():
        assert torch.equal(tensor, whole[name].half().float()), name
    statistics = [load_file(tmp_path / name / "latents_stats.safetensors") for name in ("whole", "half")]
    assert same_tensors(*statistics)
    state = tiny_ldm_state(3)
    state["decoder.conv_out.bias"][0] = 1e5
    torch.save(state, tmp_path / "large.pt")
    argv = [tmp_path / "large.pt", tmp_path / "out", "--format", "diffusers", "--dtype", "float16"]
    assert run(export_vae.main, [str(word) for word in argv]) == 2
    assert "decoder.conv_out.bias" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_repae_to_diffusers_and_back_keeps_every_bit_of_the_trio(tmp_path):
    source = repae_trio(tmp_path / "in")
    export(source, tmp_path / "vae", "--format", "diffusers")
    discriminator = ["--disc-pretrained-ckpt", tmp_path / "in" / "x-discriminator-ckpt.pt"]
    export(tmp_path / "vae", tmp_path / "out" / "x.pt", "--format", "repa-e", *discriminator)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["x-discriminator-ckpt.pt", "x-latents-stats.pt", "x.pt"]
    for name in names:
        assert same_tensors(contents(tmp_path / "out" / name), contents(tmp_path / "in" / name)), name


@pytest.mark.parametrize("source", ["x.pt", ""])
def test_the_discriminator_beside_the_vae_is_taken_along(source, tmp_path):
    repae_trio(tmp_path / "in")
    export(tmp_path / "in" / source, tmp_path / "out" / "y.pt", "--format", "repa-e", "--vae", "f4d4-tiny")
    written = contents(tmp_path / "out" / "y-discriminator-ckpt.pt")
    assert same_tensors(written, random_discriminator().state_dict())


def test_the_trio_of_the_hub(hub_cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    repae_trio(tmp_path / "in")
    shutil.copytree(tmp_path / "in", cached(hub_cache, "REPA-E/tiny"), dirs_exist_ok=True)
    export("REPA-E/tiny", tmp_path / "out" / "y.pt", "--format", "repa-e", "--vae", "f4d4-tiny")
    written = contents(tmp_path / "out" / "y-discriminator-ckpt.pt")
    assert same_tensors(written, random_discriminator().state_dict())
    ours = PatchDiscriminator()
    load_discriminator(ours, "REPA-E/tiny")
    assert same_tensors(ours.state_dict(), random_discriminator().state_dict())


def test_statistics_alone_in_the_cache_are_no_vae(hub_cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = cached(hub_cache, "REPA-E/tiny")
    torch.save(STATISTICS["REPA-E"][0], folder / "x-latents-stats.pt")
    for open_it in (load_tokenizer, lambda name: load_discriminator(PatchDiscriminator(), name)):
        with pytest.raises(UserError, match=r"REPA-E/tiny.*it is not in the cache"):
            open_it("REPA-E/tiny")


def test_latents_scale_survives_as_a_variance_bit_for_bit():
    scale = torch.logspace(-4, 4, 20001, dtype=torch.float64).float()
    found = LatentStatistics(len(scale))
    content = {"latents_scale": scale.view(1, -1, 1, 1), "latents_bias": -scale.view(1, -1, 1, 1)}
    statistics_in(content, "x").load_into(found)
    assert same_tensors(repae_tensors(found), content)


@pytest.mark.parametrize("step", [None, 10])
def test_a_run_is_exported_with_its_discriminator(step, tmp_path):
    tokenizer = tiny_autoencoder()
    start = tokenizer.network.decoder.conv_out.bias.detach().clone()
    run_folder = write_run(tmp_path / "run", tokenizer)
    steps = [] if step is None else ["--train-steps", step]
    export(run_folder, tmp_path / "out" / "x.pt", "--format", "repa-e", *steps)
    state = contents(tmp_path / "out" / "x.pt")
    assert torch.equal(state["decoder.conv_out.bias"], start + (step or 20))
    assert same_tensors(contents(tmp_path / "out" / "x-discriminator-ckpt.pt"), random_discriminator().state_dict())
    statistics = contents(tmp_path / "out" / "x-latents-stats.pt")
    assert statistics["latents_bias"].shape == statistics["latents_scale"].shape == (1, 4, 1, 1)
    assert torch.equal(statistics["latents_bias"].flatten(), tokenizer.statistics.mean)
    expected = tokenizer.statistics.var.double() ** -0.5
    torch.testing.assert_close(statistics["latents_scale"].flatten().double(), expected, rtol=1e-7, atol=0)


def test_a_dry_run_writes_nothing_and_files_are_replaced_only_on_demand(tmp_path, capsys):
    source = repae_trio(tmp_path / "in")
    for name, layout in (("vae", "diffusers"), ("x.safetensors", "ldm"), ("x.pt", "repa-e")):
        out = tmp_path / "out" / name
        export(source, out, "--format", layout, "--dry-run")
        assert not (tmp_path / "out").exists() or not out.exists()
        export(source, out, "--format", layout)
        assert run(export_vae.main, [str(source), str(out), "--format", layout]) == 2
        assert "--overwrite" in capsys.readouterr().err
        export(source, out, "--format", layout, "--overwrite")
    assert not list((tmp_path / "out").rglob(".*"))


def test_a_folder_that_holds_other_files_is_not_replaced(tmp_path, capsys):
    source = repae_trio(tmp_path / "in")
    export(source, tmp_path / "vae", "--format", "diffusers")
    (tmp_path / "vae" / "thesis.tex").write_text("precious")
    assert run(export_vae.main, [str(source), str(tmp_path / "vae"), "--format", "diffusers", "--overwrite"]) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "vae" / "thesis.tex").read_text() == "precious"


# --- Inside diffusers -------------------------------------------------------------------------------------------------


def exported(tmp_path: Path, mean: torch.Tensor, std: torch.Tensor) -> tuple[Tokenizer, Path]:
    """A VAE with these statistics, and the folder that it was exported to."""
    torch.save(tiny_ldm_state(), tmp_path / "x.pt")
    torch.save({"mean": mean, "std": std}, tmp_path / "x-latents-stats.pt")
    export(tmp_path / "x.pt", tmp_path / "vae", "--format", "diffusers")
    return load_tokenizer(str(tmp_path / "x.pt"))[0], tmp_path / "vae"


def test_a_diffusers_pipeline_generates_with_the_exported_vae(tmp_path):
    ours, folder = exported(tmp_path, torch.zeros(4), torch.full((4,), 1.7))
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "patch_size": 2}
    transformer = diffusers.DiTTransformer2DModel(in_channels=4, out_channels=4, norm_num_groups=1, **sizes)
    built = diffusers.DiTPipeline(transformer, ours.network, diffusers.DDIMScheduler())
    built.save_pretrained(tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline" / "vae")
    shutil.copytree(folder, tmp_path / "pipeline" / "vae")
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    latents, step = [], pipeline.scheduler.step

    def remember(*args, **kwargs):
        result = step(*args, **kwargs)
        latents.append(result.prev_sample)
        return result

    pipeline.scheduler.step = remember
    generator = torch.Generator().manual_seed(3)
    images = pipeline([1, 7], guidance_scale=1.0, generator=generator, num_inference_steps=3, output_type="pt").images
    assert len(latents) == 3
    with torch.no_grad():
        expected = ours.decode(ours.statistics.denormalize(latents[-1])) / 2 + 0.5
    assert expected.std() > 0.05
    if not isinstance(images, torch.Tensor):  # older diffusers'
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert (images - expected.clamp(0, 1)).abs().max() < 1e-5
    with torch.no_grad():
        mean = pipeline.vae.encode(to_signed(IMAGES)).latent_dist.mean
        assert torch.equal(mean, ours.encode(IMAGES).mean)
        ours_normalised = ours.statistics.normalize(mean)
    torch.testing.assert_close(mean * pipeline.vae.config.scaling_factor, ours_normalised, rtol=1e-5, atol=1e-6)


def test_the_configuration_says_per_channel_statistics_as_pipelines_read_them(tmp_path):
    mean, std = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([0.5, 1.0, 2.0, 4.0])
    ours, folder = exported(tmp_path, mean, std)
    config = diffusers.AutoencoderKL.from_pretrained(folder).config
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    their_mean, their_std = (torch.tensor(config[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
    decoded = z * their_std / config.scaling_factor + their_mean  # Stable Diffusion XL's way to the decoder
    torch.testing.assert_close(decoded, ours.statistics.denormalize(z), rtol=1e-5, atol=1e-5)
    # all channels together, as pipelines with scalars see them, have mean 0 and variance 1
    samples = torch.randn(4, 100_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    samples = (samples * std[:, None] + mean[:, None] - config.shift_factor) * config.scaling_factor
    assert abs(samples.mean().item()) < 0.01
    assert abs(samples.var().item() - 1) < 0.01


def test_the_configuration_alone_brings_the_statistics_back(tmp_path):
    ours, folder = exported(tmp_path, torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([0.5, 1.0, 2.0, 4.0]))
    (folder / "latents_stats.safetensors").unlink()
    again, source = load_tokenizer(str(folder))
    assert "config.json" in source
    torch.testing.assert_close(again.statistics.mean, ours.statistics.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again.statistics.std, ours.statistics.std, rtol=1e-6, atol=1e-6)


def test_statistics_that_hardly_differ_are_one_number(tmp_path):
    _, folder = exported(tmp_path, torch.full((4,), 0.25), torch.tensor([2.0, 2.0, 2.0005, 1.9995]))
    config = json.loads((folder / "config.json").read_text())
    assert config["latents_mean"] is None
    assert config["latents_std"] is None
    assert config["shift_factor"] == pytest.approx(0.25)
    assert config["scaling_factor"] == pytest.approx(0.5, rel=1e-4)


def test_a_vae_without_statistics_keeps_its_scaling_factor(tmp_path, network):
    network.save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.18215}))
    export(tmp_path / "in", tmp_path / "out", "--format", "diffusers")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["scaling_factor"] == 0.18215
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
