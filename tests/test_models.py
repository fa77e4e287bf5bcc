"""VAE, mapper and PatchGAN: structure by numbers, values against independent float64 implementations."""

import json
import pickle

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from errors import UserError
from formats.discriminator import load_discriminator
from formats.vae import load_tokenizer
from models.discriminator import DiscriminatorPair, PatchDiscriminator
from models.latent_statistics import LatentStatistics
from models.layers import sincos_positions
from models.mapper import Mapper, num_heads
from models.pixels import to_signed, to_uint8
from models.tokenizers import CONFIG_DIR, STATISTICS_FILE, Tokenizer, architecture_names, named_config
from models.tokenizers.kl import KLTokenizer
from models.tokenizers.posterior import Posterior

F16_CHANNELS = {"f16d16": 16, "f16d32": 32, "f16d64": 64}


def on_meta(name: str) -> Tokenizer:
    with torch.device("meta"):
        return load_tokenizer(name, "none")[0]


def tiny(seed: int = 0) -> Tokenizer:
    torch.manual_seed(seed)
    return load_tokenizer("f4d4-tiny", "none")[0]


def random_images(seed: int, batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randint(
        0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


# --- VAE: structure ---------------------------------------------------------------------------------------------------


def test_there_are_seven_architectures_of_kl_autoencoders():
    names = [name for name in architecture_names() if named_config(name)["_class_name"] == "AutoencoderKL"]
    assert names == ["f16d16", "f16d32", "f16d64", "f4d4-tiny", "f8d16", "f8d16-tiny", "f8d4"]


@pytest.mark.parametrize(("name", "parameters"), [("f8d4", 83_653_863), ("f8d16", 83_819_683), ("f16d32", 69_836_067)])
def test_parameter_counts_are_the_published_ones(name, parameters):
    assert sum(p.numel() for p in on_meta(name).parameters()) == parameters


def test_f16_variants_differ_only_in_the_layers_next_to_the_latent():
    shapes = {name: {k: v.shape for k, v in on_meta(name).network.state_dict().items()} for name in F16_CHANNELS}
    for name in ("f16d16", "f16d64"):
        assert shapes[name].keys() == shapes["f16d32"].keys()
        different = {k.rsplit(".", 1)[0] for k in shapes[name] if shapes[name][k] != shapes["f16d32"][k]}
        assert different == {"encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in"}


@pytest.mark.parametrize(
    ("name", "downsampling", "channels", "shape"),
    [
        ("f8d4", 8, 4, (4, 32, 32)),
        ("f16d16", 16, 16, (16, 16, 16)),
        ("f16d32", 16, 32, (32, 16, 16)),
        ("f16d64", 16, 64, (64, 16, 16)),
        ("f4d4-tiny", 4, 4, (4, 64, 64)),
        ("f8d16", 8, 16, (16, 32, 32)),
        ("f8d16-tiny", 8, 16, (16, 32, 32)),
    ],
)
def test_latent_shapes_at_256_pixels_are_what_the_vae_says(name, downsampling, channels, shape):
    vae = on_meta(name)
    posterior = vae.encode(torch.empty(2, 3, 256, 256, dtype=torch.uint8, device="meta"))
    assert (vae.downsampling, vae.latent_channels, vae.latent_shape(256)) == (downsampling, channels, shape)
    assert posterior.mean.shape == posterior.logvar.shape == (2, *shape)
    assert vae.decode(posterior.mean).shape == (2, 3, 256, 256)


def test_a_resolution_that_does_not_fit_the_downsampling_is_a_user_error():
    with pytest.raises(UserError, match="100"):
        on_meta("f16d32").latent_shape(100)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("f8d4", [128, 256, 512, 512]),
        ("f8d16", [128, 256, 512, 512]),
        ("f16d32", [128, 128, 256, 256, 512]),
        ("f4d4-tiny", [16, 32, 64]),
        ("f8d16-tiny", [16, 32, 64, 64]),
    ],
)
def test_level_widths_and_residual_blocks_a_level(name, widths):
    network = on_meta(name).network
    blocks = 1 if name.endswith("tiny") else 2
    assert [level.resnets[0].out_channels for level in network.encoder.down_blocks] == widths
    assert [level.resnets[0].out_channels for level in network.decoder.up_blocks] == widths[::-1]
    assert {len(level.resnets) for level in network.encoder.down_blocks} == {blocks}
    assert {len(level.resnets) for level in network.decoder.up_blocks} == {blocks + 1}  # LDM's decoder has one more


@pytest.mark.parametrize("name", ["f8d4", "f8d16", "f16d16", "f16d32", "f16d64", "f4d4-tiny", "f8d16-tiny"])
def test_attention_stands_in_the_middle_and_for_f16_in_the_level_at_16_by_16(name):
    names = {k.split(".to_q")[0] for k in on_meta(name).network.state_dict() if k.endswith("to_q.weight")}
    expected = {f"{side}.mid_block.attentions.0" for side in ("encoder", "decoder")}
    if name in F16_CHANNELS:
        expected |= {f"encoder.down_blocks.4.attentions.{i}" for i in range(2)}
        expected |= {f"decoder.up_blocks.0.attentions.{i}" for i in range(3)}
    assert names == expected


@pytest.mark.parametrize("name", ["f8d4", "f16d32", "f4d4-tiny"])
def test_norms_are_groups_with_eps_1e_6_and_attention_has_one_head(name):
    modules = list(on_meta(name).network.modules())
    groups = 8 if name == "f4d4-tiny" else 32  # 16 channels cannot be split into 32 groups
    assert {(m.num_groups, m.eps) for m in modules if isinstance(m, torch.nn.GroupNorm)} == {(groups, 1e-6)}
    heads = {m.heads for m in modules if isinstance(m, diffusers.models.attention_processor.Attention)}
    assert heads == {1}


# --- VAE: values ------------------------------------------------------------------------------------------------------


class LDM:
    """The LDM tokenizer, written from its description over a diffusers state dict, in float64."""

    def __init__(self, network: diffusers.AutoencoderKL, groups: int):
        self.state = {k: v.double() for k, v in network.state_dict().items()}
        self.groups = groups

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.state

    def conv(self, x, name, stride=1, padding=None):
        weight = self.state[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, self.state[f"{name}.bias"], stride, padding)

    def norm(self, x, name):
        b, c, h, w = x.shape
        grouped = x.reshape(b, self.groups, -1)
        centred = grouped - grouped.mean(-1, keepdim=True)
        x = (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(b, c, h, w)
        return x * self.state[f"{name}.weight"].view(-1, 1, 1) + self.state[f"{name}.bias"].view(-1, 1, 1)

    def residual(self, x, name):
        h = self.conv(swish(self.norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = self.conv(swish(self.norm(h, f"{name}.norm2")), f"{name}.conv2")
        return h + (self.conv(x, f"{name}.conv_shortcut") if self.has(f"{name}.conv_shortcut") else x)

    def attention(self, x, name):
        b, c, h, w = x.shape
        tokens = self.norm(x, f"{name}.group_norm").reshape(b, c, h * w).transpose(1, 2)
        q, k, v = (
            tokens @ self.state[f"{name}.to_{n}.weight"].T + self.state[f"{name}.to_{n}.bias"] for n in ("q", "k", "v")
        )
        mixed = torch.softmax(q @ k.transpose(1, 2) / c**0.5, dim=-1) @ v
        out = mixed @ self.state[f"{name}.to_out.0.weight"].T + self.state[f"{name}.to_out.0.bias"]
        return x + out.transpose(1, 2).reshape(b, c, h, w)

    def level(self, x, name):
        i = 0
        while self.has(f"{name}.resnets.{i}.conv1"):
            x = self.residual(x, f"{name}.resnets.{i}")
            if self.has(f"{name}.attentions.{i}.to_q"):
                x = self.attention(x, f"{name}.attentions.{i}")
            i += 1
        return x

    def middle(self, x, name):
        x = self.residual(x, f"{name}.resnets.0")
        return self.residual(self.attention(x, f"{name}.attentions.0"), f"{name}.resnets.1")

    def encode(self, x):
        x, i = self.conv(x, "encoder.conv_in"), 0
        while self.has(f"encoder.down_blocks.{i}.resnets.0.conv1"):
            x = self.level(x, f"encoder.down_blocks.{i}")
            if self.has(f"encoder.down_blocks.{i}.downsamplers.0.conv"):
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down_blocks.{i}.downsamplers.0.conv", 2, 0)
            i += 1
        x = self.middle(x, "encoder.mid_block")
        x = self.conv(swish(self.norm(x, "encoder.conv_norm_out")), "encoder.conv_out")
        return self.conv(x, "quant_conv").chunk(2, dim=1)

    def decode(self, z):
        x = self.middle(self.conv(self.conv(z, "post_quant_conv"), "decoder.conv_in"), "decoder.mid_block")
        i = 0
        while self.has(f"decoder.up_blocks.{i}.resnets.0.conv1"):
            x = self.level(x, f"decoder.up_blocks.{i}")
            if self.has(f"decoder.up_blocks.{i}.upsamplers.0.conv"):
                x = x.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
                x = self.conv(x, f"decoder.up_blocks.{i}.upsamplers.0.conv")
            i += 1
        return self.conv(swish(self.norm(x, "decoder.conv_norm_out")), "decoder.conv_out")


def swish(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


@pytest.mark.parametrize("name", ["f8d4", "f16d32", "f4d4-tiny"])
def test_encoder_and_decoder_compute_the_ldm_autoencoder(name):
    config = json.loads((CONFIG_DIR / f"{name}.json").read_text())
    if name != "f4d4-tiny":  # a quarter of the width
        config["block_out_channels"] = [width // 4 for width in config["block_out_channels"]]
    torch.manual_seed(1)
    vae = KLTokenizer(diffusers.AutoencoderKL.from_config(config)).eval()
    for parameter in vae.parameters():  # biases and norms that do something
        torch.nn.init.normal_(parameter, std=0.05) if parameter.ndim == 1 else None
    reference = LDM(vae.network, config["norm_num_groups"])
    images = random_images(2, size=64)
    with torch.no_grad():
        posterior = vae.encode(images)
        mean, logvar = reference.encode(images.double() / 127.5 - 1)
        torch.testing.assert_close(posterior.mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(posterior.logvar.double(), logvar, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vae.decode(mean.float()).double(), reference.decode(mean), rtol=1e-4, atol=1e-5)


def test_images_enter_the_vae_as_x_over_127_5_minus_1():
    levels = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(to_signed(levels).double(), torch.arange(256).double() / 127.5 - 1.0, rtol=0, atol=1e-7)
    assert to_signed(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_to_uint8_inverts_to_signed_on_all_levels():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_signed(levels)), levels)


def test_to_uint8_clamps_and_rounds_and_leaves_its_input():
    images = torch.tensor([-7.0, -1.0, 0.999 / 127.5 - 1, 1.0, 7.0])
    before = images.clone()
    assert to_uint8(images).tolist() == [0, 0, 1, 255, 255]
    assert torch.equal(images, before)


def test_encode_reads_signed_images():
    vae, images = tiny(), random_images(3)
    with torch.no_grad():
        expected = vae.network.encode(torch.from_numpy(np.asarray(images) / np.float32(127.5) - 1)).latent_dist.mean
        torch.testing.assert_close(vae.encode(images).mean, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("raw", "clamped"), [(1000.0, 20.0), (-1000.0, -30.0), (1.5, 1.5)])
def test_logvar_is_clamped(raw, clamped):
    vae = tiny()
    with torch.no_grad():
        vae.network.quant_conv.weight.zero_()
        vae.network.quant_conv.bias[4:] = raw
        logvar = vae.encode(random_images(4)).logvar
    assert logvar.unique().tolist() == [clamped]


def test_a_sample_is_mean_plus_std_times_noise():
    mean, logvar, noise = torch.randn(3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(5)).double()
    expected = mean + torch.sqrt(torch.exp(logvar)) * noise
    torch.testing.assert_close(Posterior(mean, logvar).sample(noise), expected, rtol=1e-12, atol=1e-12)


def test_what_a_cache_stores_is_mean_and_std_and_gives_the_same_samples():
    vae = tiny()
    with torch.no_grad():
        posterior = vae.encode(random_images(11))
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(12))
    stored = posterior.stored()
    assert (stored.shape, stored.shape[1:]) == ((2, 8, 8, 8), vae.stored_shape(32))
    assert KLTokenizer.latent_shape_of(vae.stored_shape(32), vae.architecture) == vae.latent_shape(32)
    assert torch.equal(stored[:, :4], posterior.mode)
    torch.testing.assert_close(stored[:, 4:].double(), (posterior.logvar.double() / 2).exp(), rtol=1e-6, atol=0)
    torch.testing.assert_close(vae.sample(stored, noise), posterior.sample(noise), rtol=1e-6, atol=1e-7)
    assert vae.sample(stored.half(), noise).dtype == torch.float32


def test_other_statistics_leave_the_tokenizer_its_own():
    vae, statistics = tiny(), LatentStatistics(4)
    statistics.load(torch.ones(4), torch.full((4,), 2.0))
    other = vae.with_statistics(statistics)
    assert (other.statistics, other.network, other.checksum()) == (statistics, vae.network, vae.checksum())
    assert vae.statistics.mean.tolist() == [0] * 4
    assert torch.equal(other.state_dict()["statistics.mean"], torch.ones(4))


def test_the_posterior_is_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        vae = tiny()
        posterior = vae.encode(random_images(6))
        assert posterior.mean.dtype == posterior.logvar.dtype == vae.decode(posterior.mean).dtype == torch.float32
        assert posterior.regulariser()["kl"].dtype == posterior.stored().dtype == torch.float32


def test_last_layers_are_the_last_weights_of_decoder_and_encoder():
    vae = tiny()
    parameters = dict(vae.named_parameters())
    assert vae.decoder_last_layer is parameters["network.decoder.conv_out.weight"]
    assert vae.encoder_last_layer is parameters["network.encoder.conv_out.weight"]


# --- VAE: files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    vae = tiny(seed=7)
    vae.statistics.update(torch.tensor([40.0, -3.0, 7.0, 0.1, 100.0, 5.0, 9.0, 0.001, 77.0]).double(), momentum=0.3)
    vae.save(tmp_path / "vae")
    return vae, tmp_path / "vae"


def test_save_then_build_gives_back_every_bit(saved):
    vae, folder = saved
    for arguments in ((str(folder),), ("f4d4-tiny", str(folder))):
        loaded, known = load_tokenizer(*arguments)
        assert known
        assert not loaded.training
        for name, tensor in vae.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


def test_statistics_of_any_size_survive_the_file_bit_for_bit(tmp_path):
    vae = tiny()
    vae.statistics.var.copy_(torch.tensor([1e-7, 1e-3, 1.7, 3e5]))
    vae.save(tmp_path / "vae")
    loaded = load_tokenizer(str(tmp_path / "vae"))[0].statistics
    assert torch.equal(loaded.var, vae.statistics.var)
    assert torch.equal(loaded.std, vae.statistics.std)


def test_the_statistics_file_holds_mean_and_divisor(saved):
    vae, folder = saved
    tensors = load_file(folder / STATISTICS_FILE)
    assert set(tensors) == {"mean", "std", "var"}
    torch.testing.assert_close(tensors["mean"].float(), vae.statistics.mean, rtol=0, atol=0)
    expected = (vae.statistics.var.double() + 1e-4).sqrt()
    torch.testing.assert_close(tensors["std"].double(), expected, rtol=1e-6, atol=0)


def test_diffusers_loads_the_folder_and_decodes_the_same_bits(saved):
    vae, folder = saved
    network = diffusers.AutoencoderKL.from_pretrained(folder, local_files_only=True)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        assert torch.equal(network.decode(z).sample, vae.decode(z))


def test_saving_over_a_folder_replaces_it_whole(saved):
    vae, folder = saved
    (folder / "left_over.txt").write_text("old")
    vae.network.decoder.conv_out.bias.data.fill_(0.25)
    vae.save(folder)
    assert not (folder / "left_over.txt").exists()
    assert load_tokenizer(str(folder))[0].network.decoder.conv_out.bias.tolist() == [0.25] * 3
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing beside it


def test_channels_last_weights_are_saved(tmp_path):
    vae = tiny().to(memory_format=torch.channels_last)
    vae.save(tmp_path / "vae")
    loaded = load_tokenizer(str(tmp_path / "vae"))[0].state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in vae.state_dict().items())


def test_a_diffusers_folder_without_statistics_says_so(saved):
    _, folder = saved
    (folder / STATISTICS_FILE).unlink()
    vae, known = load_tokenizer(str(folder))
    assert not known
    assert vae.statistics.mean.tolist() == [0] * 4


def test_latents_mean_and_std_of_a_diffusers_configuration_are_the_statistics(saved):
    _, folder = saved
    (folder / STATISTICS_FILE).unlink()
    edit_config(folder, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5, 1.5, 2.5, 9.0])
    vae, known = load_tokenizer("f4d4-tiny", str(folder))
    assert known
    assert vae.statistics.mean.tolist() == [1, 2, 3, 4]
    torch.testing.assert_close(vae.statistics.std, torch.tensor([0.5, 1.5, 2.5, 9.0]), rtol=1e-6, atol=0)


def test_statistics_in_a_diffusers_configuration_are_saved_up_to_date(saved):
    _, folder = saved
    edit_config(folder, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5, 1.5, 2.5, 9.0])
    (folder / STATISTICS_FILE).unlink()
    vae, _ = load_tokenizer(str(folder))
    vae.statistics.load(torch.tensor([5.0, 6.0, 7.0, 8.0]), torch.tensor([2.0, 3.0, 4.0, 5.0]))
    vae.save(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["latents_mean"] == [5, 6, 7, 8]
    assert config["latents_std"] == pytest.approx([2, 3, 4, 5], rel=1e-7)


def test_scratch_weights_follow_the_seed_and_have_no_known_statistics():
    torch.manual_seed(9)
    first, known = load_tokenizer("f4d4-tiny", "none")
    assert not known
    assert torch.equal(first.decoder_last_layer, tiny(9).decoder_last_layer)
    assert not torch.equal(first.decoder_last_layer, tiny(10).decoder_last_layer)


def edit_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def drop_a_tensor(folder) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state.pop("decoder.conv_in.weight")
    save_file(state, path)


def truncate(folder) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rename_a_tensor(folder) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({k.replace("decoder.conv_in", "decoder.conv_inn"): v for k, v in state.items()}, path)


BROKEN_FOLDERS = {
    "no weights file": lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(),
    "empty weights file": lambda folder: (folder / "diffusion_pytorch_model.safetensors").write_bytes(b""),
    "truncated weights": truncate,
    "a tensor is missing": drop_a_tensor,
    "a tensor has another name": rename_a_tensor,
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "configuration is not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "configuration is binary": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
    "configuration is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "another class": lambda folder: edit_config(folder, _class_name="VQModel"),
    "another architecture": lambda folder: edit_config(folder, block_out_channels=[16, 32, 32]),
    "a width that 8 groups do not divide": lambda folder: edit_config(folder, block_out_channels=[17, 32, 64]),
    "statistics of other channels": lambda folder: save_file(
        {"mean": torch.zeros(3), "std": torch.ones(3)}, folder / STATISTICS_FILE
    ),
    "statistics without std": lambda folder: save_file({"mean": torch.zeros(4)}, folder / STATISTICS_FILE),
    "statistics truncated": lambda folder: (folder / STATISTICS_FILE).write_bytes(b"1234"),
}


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
@pytest.mark.parametrize("flag", ["--vae", "--vae-ckpt"])
def test_a_broken_folder_is_a_one_line_error_that_names_it(saved, case, flag):
    _, folder = saved
    BROKEN_FOLDERS[case](folder)
    arguments = (str(folder),) if flag == "--vae" else ("f4d4-tiny", str(folder))
    with pytest.raises(UserError) as error:
        load_tokenizer(*arguments)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{flag} {folder}")


@pytest.mark.parametrize(
    ("vae", "checkpoint", "words"),
    [
        ("f8d5", None, ["--vae f8d5", "f8d4"]),
        ("f8d4", None, ["--vae-ckpt"]),
        ("f4d4-tiny", "/no/such/folder", ["--vae-ckpt", "/no/such/folder"]),
        ("f4d4-tiny", __file__, ["--vae-ckpt", __file__]),
        (__file__, None, ["--vae", __file__]),
    ],
)
def test_what_is_not_a_vae_is_a_one_line_error_that_names_the_flag(vae, checkpoint, words):
    with pytest.raises(UserError) as error:
        load_tokenizer(vae, checkpoint)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_weights_of_another_architecture_are_refused_by_name(saved):
    with pytest.raises(UserError, match=r"--vae-ckpt .*than --vae f8d4: block_out_channels.*give --vae f4d4-tiny"):
        load_tokenizer("f8d4", str(saved[1]))


# --- Mapper -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_mapper_gives_one_vfm_wide_token_a_grid_cell(depth):
    mapper = Mapper(4, 8, 4, 48, depth=depth, projector_width=32)
    assert len(mapper.blocks) == depth
    assert mapper(torch.zeros(2, 4, 8, 8)).shape == (2, 16, 48)


@pytest.mark.parametrize(
    ("channels", "size", "grid", "patch"), [(4, 32, 16, 2), (32, 16, 16, 1), (4, 64, 32, 2), (32, 32, 32, 1)]
)
def test_patch_size_makes_the_vfms_grid(channels, size, grid, patch):  # f8 and f16 at 256 px, then at 512 px
    with torch.device("meta"):
        mapper = Mapper(channels, size, grid, 768)
    assert mapper.patch_size == patch
    assert mapper.patch_embed.weight.shape == (768, channels, patch, patch)
    assert mapper(torch.empty(1, channels, size, size, device="meta")).shape == (1, grid * grid, 768)


def test_a_grid_that_does_not_divide_the_latent_is_refused():
    with pytest.raises(ValueError, match="12"):
        Mapper(4, 32, 12, 64)


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1280, 20), (1536, 24), (112, 2)])
def test_heads_are_64_wide_where_that_divides(width, heads):
    assert num_heads(width) == heads


def test_mapper_at_768_has_vit_blocks_and_a_2048_wide_mlp():
    with torch.device("meta"):
        mapper = Mapper(32, 16, 16, 768)
    block = mapper.blocks[0]
    assert (block.attn.num_heads, block.mlp.fc1.out_features) == (12, 4 * 768)
    assert block.attn.qkv.bias is not None
    kinds = [type(layer).__name__ for layer in mapper.projector]
    assert kinds == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]
    assert [layer.weight.shape for layer in mapper.projector[::2]] == [(2048, 768), (2048, 2048), (768, 2048)]
    d, w = 768, 2048
    patch_embed, norms, qkv, proj = 32 * d + d, 4 * d, 3 * d * d + 3 * d, d * d + d
    mlp, projector = 8 * d * d + 5 * d, (d * w + w) + (w * w + w) + (w * d + d)
    assert sum(p.numel() for p in mapper.parameters()) == patch_embed + norms + qkv + proj + mlp + projector


def test_depth_zero_tokens_are_row_major_and_independent():
    torch.manual_seed(11)
    mapper = Mapper(4, 8, 4, 16, depth=0, projector_width=32)
    z = torch.randn(1, 4, 8, 8)
    changed = z.clone()
    changed[:, :, 2:4, 6:8] += 1.0  # row 1, column 3 of the 4×4 grid
    difference = (mapper(changed) - mapper(z)).abs().amax(-1)[0]
    assert difference.nonzero().flatten().tolist() == [1 * 4 + 3]


def test_depth_zero_knows_no_position_and_depth_one_does():
    torch.manual_seed(12)
    z = torch.randn(1, 4, 1, 1).expand(1, 4, 4, 4)
    spread = [Mapper(4, 4, 4, 16, depth=depth, projector_width=32)(z).var(dim=1).max().item() for depth in (0, 1)]
    assert spread[0] < 1e-12
    assert spread[1] > 1e-6


def test_positions_are_constants_outside_checkpoints():
    mapper = Mapper(4, 4, 4, 16)
    assert not any("pos" in name for name in mapper.state_dict())
    assert not any("pos" in name for name, _ in mapper.named_parameters())
    assert torch.equal(mapper.pos_embed[0], sincos_positions(16, 4))


@pytest.mark.parametrize(("width", "grid"), [(16, 3), (768, 16)])
def test_positions_are_sines_and_cosines_of_column_then_row(width, grid):
    quarter = width // 4
    expected = np.zeros((grid * grid, width))
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                angles = [place / 10000 ** (i / quarter) for place in (column, row)]
                for half, angle in enumerate(angles):
                    expected[row * grid + column, 2 * half * quarter + i] = np.sin(angle)
                    expected[row * grid + column, (2 * half + 1) * quarter + i] = np.cos(angle)
    np.testing.assert_allclose(sincos_positions(width, grid).double().numpy(), expected, rtol=0, atol=1e-7)


def test_mapper_computes_a_pre_norm_transformer():
    torch.manual_seed(13)
    mapper = Mapper(4, 8, 4, 128, depth=2, projector_width=32).double()
    for parameter in mapper.parameters():  # biases and norms that do something
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim == 1 else None
    z = torch.randn(2, 4, 8, 8).double()
    p = dict(mapper.named_parameters())
    patches = z.reshape(2, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 16)
    x = patches @ p["patch_embed.weight"].reshape(128, 16).T + p["patch_embed.bias"] + sincos_positions(128, 4).double()
    for i in range(2):

        def linear(x, name, i=i):
            return x @ p[f"blocks.{i}.{name}.weight"].T + p[f"blocks.{i}.{name}.bias"]

        def norm(x, name, i=i):
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
            return x * p[f"blocks.{i}.{name}.weight"] + p[f"blocks.{i}.{name}.bias"]

        q, k, v = linear(norm(x, "norm1"), "attn.qkv").reshape(2, 16, 3, 2, 64).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 8, dim=-1) @ v
        x = x + linear(mixed.transpose(1, 2).reshape(2, 16, 128), "attn.proj")
        hidden = linear(norm(x, "norm2"), "mlp.fc1")
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), "mlp.fc2")
    for i in (0, 2, 4):
        x = (swish(x) if i else x) @ p[f"projector.{i}.weight"].T + p[f"projector.{i}.bias"]
    torch.testing.assert_close(mapper(z), x, rtol=1e-8, atol=1e-8)


def test_mapper_starts_xavier_uniform_with_zero_biases():
    torch.manual_seed(14)
    mapper = Mapper(32, 16, 16, 256, depth=1, projector_width=512)
    for name, parameter in mapper.named_parameters():
        if parameter.ndim == 1:
            assert parameter.unique().tolist() == ([1.0] if "norm" in name and name.endswith("weight") else [0.0]), name
        else:
            fan_out, fan_in = parameter.flatten(1).shape
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.03), name


# --- PatchGAN ---------------------------------------------------------------------------------------------------------


def test_discriminator_has_tamings_keys_and_parameters():
    state = PatchDiscriminator().state_dict()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"main.{i}.{n}" for i in (0, 11) for n in ("weight", "bias")} | {f"main.{i}.weight" for i in (2, 5, 8)}
    assert set(state) == expected | {f"main.{i}.{n}" for i in (3, 6, 9) for n in norm}
    convolutions = [(3, 64, 1), (64, 128, 0), (128, 256, 0), (256, 512, 0), (512, 1, 1)]  # in, out, bias
    count = sum(16 * i * o + o * bias for i, o, bias in convolutions) + 2 * (128 + 256 + 512)
    assert sum(p.numel() for p in PatchDiscriminator().parameters()) == count == 2_765_633


@pytest.mark.parametrize(("size", "side"), [(256, 30), (64, 6), (32, 2), (24, 1)])
def test_discriminator_gives_overlapping_patch_logits(size, side):
    with torch.device("meta"):
        network = PatchDiscriminator()
    assert network(torch.empty(2, 3, size, size, device="meta")).shape == (2, 1, side, side)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_min_resolution_is_the_smallest_that_works(num_layers):
    network = PatchDiscriminator(width=8, num_layers=num_layers)
    smallest = network.min_resolution
    assert network(torch.zeros(2, 3, smallest, smallest)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(torch.zeros(2, 3, smallest - 1, smallest - 1))


def test_discriminator_initialisation():
    torch.manual_seed(15)
    for module in PatchDiscriminator().modules():
        if isinstance(module, torch.nn.Conv2d):
            standard_error = 0.02 / module.weight.numel() ** 0.5
            assert abs(module.weight.mean().item()) < 5 * standard_error
            assert module.weight.std().item() == pytest.approx(0.02, abs=5 * standard_error)
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1.0, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.3)
            assert module.bias.unique().tolist() == [0.0]
            assert (module.eps, module.momentum) == (1e-5, 0.1)


def test_discriminator_computes_convolutions_batch_norms_and_leaky_relus():
    torch.manual_seed(16)
    network = PatchDiscriminator(width=8).double()
    images = torch.randn(3, 3, 32, 32).double()
    state = {k: v.clone() for k, v in network.state_dict().items()}
    x = images
    for i, stride in ((0, 2), (2, 2), (5, 2), (8, 1), (11, 1)):
        x = F.conv2d(x, state[f"main.{i}.weight"], state.get(f"main.{i}.bias"), stride, 1)
        if f"main.{i + 1}.running_mean" in state:  # statistics of this very batch
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
            scale, shift = (state[f"main.{i + 1}.{n}"].view(1, -1, 1, 1) for n in ("weight", "bias"))
            x = (x - mean) / (var + 1e-5).sqrt() * scale + shift
        x = torch.where(x > 0, x, 0.2 * x) if i < 11 else x
    torch.testing.assert_close(network(images), x, rtol=1e-10, atol=1e-12)


def test_real_and_fake_are_normalised_by_their_own_statistics():
    torch.manual_seed(17)
    network = PatchDiscriminator(width=8)
    real, fake = torch.randn(2, 3, 32, 32), 5 + 3 * torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        real_logits, fake_logits = DiscriminatorPair(network)(real, fake)
        assert torch.equal(real_logits, network(real))
        assert torch.equal(fake_logits, network(fake))
        assert not torch.allclose(fake_logits, network(torch.cat([real, fake]))[2:], atol=1e-3)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_discriminator_weights_load_bit_for_bit(tmp_path, suffix):
    source, target = PatchDiscriminator(width=8), PatchDiscriminator(width=8)
    source(5 + torch.randn(2, 3, 32, 32))  # running statistics that are not the initial ones
    path = tmp_path / f"disc{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), path)
    load_discriminator(target, path)
    assert all(torch.equal(source.state_dict()[name], tensor) for name, tensor in target.state_dict().items())


class Opens:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


BAD_DISCRIMINATORS = {
    "no such file": lambda path: None,
    "directory": lambda path: path.mkdir(),
    "text": lambda path: path.write_text("not weights\n"),
    "empty": lambda path: path.write_bytes(b""),
    "list": lambda path: torch.save([1], path),
    "tensor": lambda path: torch.save(torch.zeros(2), path),
    "numbered": lambda path: torch.save({0: torch.zeros(2)}, path),
    "numbers": lambda path: torch.save(dict.fromkeys(PatchDiscriminator(width=8).state_dict(), 1), path),
    "another width": lambda path: torch.save(PatchDiscriminator(width=4).state_dict(), path),
    "more layers": lambda path: torch.save(PatchDiscriminator(width=8, num_layers=4).state_dict(), path),
    "code": lambda path: path.write_bytes(pickle.dumps({"a": Opens(path.parent / "was_run")}, protocol=2)),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", BAD_DISCRIMINATORS)
def test_a_file_without_discriminator_weights_is_a_one_line_error(kind, suffix, tmp_path):
    path = tmp_path / f"disc{suffix}"
    BAD_DISCRIMINATORS[kind](path)
    with pytest.raises(UserError) as error:
        load_discriminator(PatchDiscriminator(width=8), path)
    assert "\n" not in str(error.value)
    assert f"--disc-pretrained-ckpt {path}" in str(error.value)
    assert not (tmp_path / "was_run").exists()
