"""Each public layout of a VFM's weights, written by plain code, loads and reproduces its source's tokens."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from errors import UserError
from models.encoders import ENCODERS, build_encoder
from tests import vit_layouts as layouts
from tests.vit_layouts import PlainViT

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5,) * 3, (0.5,) * 3)

DINOV2 = PlainViT(patch=14, layer_scale=True)
REGISTERS = replace(DINOV2, registers=4)
GIANT = replace(DINOV2, mlp="swiglu", hidden=170)  # int(32 · 2 · 8/3)
DINOV3 = PlainViT(positions="rope", registers=4, layer_scale=True, eps=1e-5, qkv_bias=False)
PLAIN, DEEP = PlainViT(), PlainViT(depth=16)
WITHOUT_CLASS = PlainViT(patch=14, cls=False, positions="patches")
SIGLIP = PlainViT(cls=False, positions="patches")
CLIP_VIT = PlainViT(patch=14, heads=4, eps=1e-5, pre_norm=True, mlp="quick_gelu")
MOCO_S = PlainViT(heads=4)

# name, source, constants, whether the final norm is applied (REPA: not for MAE and CLIP), writers of files
CASES = [
    ("dinov2-vit-b", DINOV2, IMAGENET, True, [layouts.dinov2, layouts.dino, layouts.dinov2_training]),
    ("dinov2-vit-g", GIANT, IMAGENET, True, [layouts.dinov2_giant, layouts.dino]),
    ("dinov2reg-vit-l", REGISTERS, IMAGENET, True, [layouts.dinov2, layouts.timm_dinov2_registers]),
    ("dinov3-vit-b", DINOV3, IMAGENET, True, [layouts.dinov3, layouts.timm_dinov3]),
    ("dinov1-vit-b", PLAIN, IMAGENET, True, [layouts.dino, layouts.dinov1_teacher]),
    ("clip-vit-L", CLIP_VIT, CLIP, False, [layouts.openai_clip, layouts.open_clip_training, layouts.timm_clip]),
    ("siglip2-vit-b", SIGLIP, HALF, True, [layouts.open_clip_timm_tower, layouts.dino]),
    ("mae-vit-l", PLAIN, IMAGENET, False, [layouts.mae, layouts.dino]),
    ("jepa-vit-h", WITHOUT_CLASS, IMAGENET, True, [layouts.ijepa, layouts.dino]),
    ("mocov3-vit-l", DEEP, IMAGENET, True, [layouts.mocov3, layouts.dino]),
]


def shrink(monkeypatch, enc_type: str, vit: PlainViT) -> None:
    """Make the table's row a network of another size; what kind of network it is stays."""
    sizes = {"embed_dim": vit.width, "depth": vit.depth, "num_heads": vit.heads}
    spec = ENCODERS[enc_type]
    monkeypatch.setitem(ENCODERS, enc_type, replace(spec, embed_dim=vit.width, options={**spec.options, **sizes}))


def save(content: dict, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path


def images_of(size: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def prepared(images: torch.Tensor, constants: tuple, size: int) -> torch.Tensor:
    """REPA's way: [0, 1], mean and std, bicubic without antialiasing where the size is another one."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in constants)
    x = (images / 255.0 - mean) / std
    return x if x.shape[-1] == size else F.interpolate(x, size, mode="bicubic")


@pytest.mark.parametrize(("enc_type", "vit", "constants", "final_norm", "writers"), CASES, ids=[c[0] for c in CASES])
def test_every_layout_reproduces_its_source(enc_type, vit, constants, final_norm, writers, monkeypatch, tmp_path):
    shrink(monkeypatch, enc_type, vit)
    weights, images = vit.weights(seed=2), images_of(64)
    with torch.no_grad():
        expected = vit.tokens(weights, prepared(images, constants, vit.grid * vit.patch), final_norm)
        other = vit.tokens(weights, prepared(images, constants, vit.grid * vit.patch), not final_norm)
    for writer in writers:
        content = writer(weights)
        flat = all(isinstance(value, torch.Tensor) for value in content.values())
        for suffix in (".pth", ".safetensors") if flat else (".pth",):
            encoder = build_encoder(enc_type, vit.grid, str(save(content, tmp_path / f"{writer.__name__}{suffix}")))
            tokens = encoder(images)
            assert tokens.shape == (2, vit.grid**2, vit.width)
            torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
            assert (tokens - other).abs().max() > 0.1
            assert encoder.network.num_prefix_tokens == vit.cls + vit.registers
            assert not tokens.requires_grad
            assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_half_precision_is_loaded_as_float32(monkeypatch, tmp_path):
    shrink(monkeypatch, "clip-vit-L", CLIP_VIT)
    weights = {name: tensor.half().float() for name, tensor in CLIP_VIT.weights(seed=3).items()}
    content = {name: tensor.half() for name, tensor in layouts.openai_clip(weights).items()}
    encoder = build_encoder("clip-vit-L", 3, str(save(content, tmp_path / "clip.pt")))
    images = images_of(42)
    expected = CLIP_VIT.tokens(weights, prepared(images, CLIP, 42), final_norm=False)
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)


# --- positions --------------------------------------------------------------------------------------------------------


def antialiased_matrix(size: int, new_size: int) -> torch.Tensor:
    """Keys' cubic (a = -0.5), stretched by the scale where it shrinks, weights divided by their sum at the borders."""
    scale = size / new_size
    stretch = max(scale, 1.0)

    def kernel(x: float) -> float:
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    matrix = torch.zeros(new_size, size, dtype=torch.float64)
    for row in range(new_size):
        centre = (row + 0.5) * scale
        for column in range(size):
            matrix[row, column] = kernel((column + 0.5 - centre) / stretch)
    return matrix / matrix.sum(1, keepdim=True)


@pytest.mark.parametrize("grid", [3, 8])
@pytest.mark.parametrize(
    ("enc_type", "vit", "writer"),
    [
        ("dinov2-vit-b", replace(DINOV2, grid=5), layouts.dinov2),
        ("dinov2reg-vit-b", replace(REGISTERS, grid=5), layouts.dinov2),
        ("mocov3-vit-b", replace(PLAIN, grid=5), layouts.mocov3),
        ("jepa-vit-h", replace(WITHOUT_CLASS, grid=5), layouts.ijepa),
        ("clip-vit-L", replace(CLIP_VIT, grid=5), layouts.openai_clip),
    ],
)
def test_positions_are_resampled_bicubically_with_antialiasing(enc_type, vit, writer, grid, monkeypatch, tmp_path):
    """As REPA and REPA-E do with timm's resample_abs_pos_embed."""
    shrink(monkeypatch, enc_type, vit)
    weights, images = vit.weights(seed=4), images_of(64, batch=1)
    path = save(writer(weights), tmp_path / "file.pth")
    first = len(weights["pos"]) - 25  # the class token's
    table = weights["pos"][first:].double().view(5, 5, -1)
    matrix = antialiased_matrix(5, grid)
    resampled = torch.einsum("ij,jkd,lk->ild", matrix, table, matrix).flatten(0, 1).float()
    moved = weights | {"pos": torch.cat([weights["pos"][:first], resampled])}
    final_norm = ENCODERS[enc_type].final_norm
    constants = CLIP if enc_type.startswith("clip") else IMAGENET
    expected = replace(vit, grid=grid).tokens(moved, prepared(images, constants, grid * vit.patch), final_norm)
    encoder = build_encoder(enc_type, grid, str(path))
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-4)


def test_rotary_positions_follow_the_grid(monkeypatch, tmp_path):
    shrink(monkeypatch, "dinov3-vit-s", DINOV3)
    weights, images = DINOV3.weights(seed=5), images_of(96, batch=1)
    encoder = build_encoder("dinov3-vit-s", 6, str(save(layouts.dinov3(weights), tmp_path / "file.pth")))
    expected = replace(DINOV3, grid=6).tokens(weights, prepared(images, IMAGENET, 96), final_norm=True)
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)


# --- files that do not fit --------------------------------------------------------------------------------------------


def refusal(enc_type: str, content: dict, path: Path) -> str:
    with pytest.raises(UserError) as error:
        build_encoder(enc_type, 3, str(save(content, path)))
    message = str(error.value)
    assert "\n" not in message
    assert f"--enc-type {enc_type}: {path} holds no weights for" in message
    return message


def test_another_size_is_said_in_numbers(monkeypatch, tmp_path):
    shrink(monkeypatch, "dinov2-vit-b", DINOV2)
    other = replace(DINOV2, width=48)
    message = refusal("dinov2-vit-b", layouts.dinov2(other.weights(0)), tmp_path / "a.pth")
    assert "its tokens are 48 wide and its patches 14 px, not 32 and 14" in message
    message = refusal("dinov2-vit-b", layouts.dino(PLAIN.weights(0)), tmp_path / "b.pth")
    assert "patches 16 px, not 32 and 14" in message


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    shrink(monkeypatch, "dinov2-vit-b", DINOV2)
    complete = layouts.dinov2(DINOV2.weights(0))
    for name in ("norm.weight", "pos_embed", "blocks.1.ls2.gamma"):
        content = {key: tensor for key, tensor in complete.items() if key != name}
        assert name in refusal("dinov2-vit-b", content, tmp_path / "missing.pth")
    shrink(monkeypatch, "clip-vit-L", CLIP_VIT)
    content = layouts.openai_clip(CLIP_VIT.weights(0))
    text = {key: tensor for key, tensor in content.items() if not key.startswith("visual.")}
    assert "Missing key" in refusal("clip-vit-L", text, tmp_path / "text.pth")
    longer = complete | {"blocks.2.ls1.gamma": torch.ones(32)}
    assert "Unexpected key" in refusal("dinov2-vit-b", longer, tmp_path / "longer.pth")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("pos_embed", lambda tensor: torch.ones(()), "pos_embed has 0 dimensions instead of 3"),
        ("patch_embed.proj.weight", lambda tensor: torch.ones(5), "patch_embed.proj.weight has 1 dimensions"),
        ("norm.weight", lambda tensor: tensor.to(torch.int8), "norm.weight is of type torch.int8"),
        ("norm.weight", lambda tensor: tensor * torch.nan, "norm.weight is not finite"),
        ("norm.weight", lambda tensor: tensor.to_sparse(), "norm.weight is sparse"),
    ],
)
def test_tensors_that_are_no_weights(name, change, reason, monkeypatch, tmp_path):
    shrink(monkeypatch, "dinov2-vit-b", DINOV2)
    complete = layouts.dinov2(DINOV2.weights(0))
    assert reason in refusal("dinov2-vit-b", complete | {name: change(complete[name])}, tmp_path / "spoiled.pth")


def test_positions_of_clip_without_dimensions(monkeypatch, tmp_path):
    shrink(monkeypatch, "clip-vit-L", CLIP_VIT)
    content = layouts.openai_clip(CLIP_VIT.weights(0)) | {"visual.positional_embedding": torch.ones(())}
    assert "positional_embedding has 0 dimensions" in refusal("clip-vit-L", content, tmp_path / "spoiled.pth")


def test_biases_that_timm_lacks_are_not_dropped(monkeypatch, tmp_path):
    shrink(monkeypatch, "dinov3-vit-b", DINOV3)
    content = layouts.dinov3(DINOV3.weights(0))
    content["blocks.1.attn.qkv.bias"][3] = 0.5
    assert "blocks.1.attn.qkv.bias is not zero" in refusal("dinov3-vit-b", content, tmp_path / "biased.pth")
    content["blocks.1.attn.qkv.bias_mask"][3] = 0.0  # a key's bias, which the mask takes away
    build_encoder("dinov3-vit-b", 3, str(save(content, tmp_path / "masked.pth")))


def test_the_layout_of_transformers_is_named(monkeypatch, tmp_path):
    shrink(monkeypatch, "dinov2-vit-b", DINOV2)
    content = {"embeddings.cls_token": torch.zeros(1, 1, 32), "encoder.layer.0.norm1.weight": torch.zeros(32)}
    assert "layout of transformers" in refusal("dinov2-vit-b", content, tmp_path / "hf.pth")


def test_torchscript_is_refused_with_the_way_to_convert_it(monkeypatch, tmp_path):
    shrink(monkeypatch, "clip-vit-L", CLIP_VIT)
    path = tmp_path / "ViT-L-14.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with pytest.raises(UserError, match=r"TorchScript.*torch\.jit\.load\('ViT-L-14\.pt'.*state_dict\(\)"):
        build_encoder("clip-vit-L", 3, str(path))
