"""FD-DINOv2's features against DINOv2 written out in float64, from a file in the layout of the original."""

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

import evaluate
from errors import UserError
from metrics.dinov2 import build_dinov2, resampled_positions
from metrics.features import build_extractor
from metrics.record import read_measurements
from metrics.sources import open_image_set
from models.encoders import build_encoder
from tests.image_sets import random_images, write_packed

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def cubic(distance: np.ndarray) -> np.ndarray:
    """The convolution kernel with a = -0.75, which is torch's."""
    a, x = -0.75, np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def interpolation(side: int, grid: int, factor: float) -> np.ndarray:
    """``[grid, side]``: each new place is 1/factor old ones from the next; beyond the edge the last value goes on."""
    matrix = np.zeros((grid, side))
    for place in range(grid):
        centre = (place + 0.5) / factor - 0.5
        for source in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[place, min(max(source, 0), side - 1)] += cubic(np.array(centre - source))
    return matrix


def positions_in_words(embedding: np.ndarray, grid: int) -> np.ndarray:
    """The historical offset of DINO: as if the new side were 0.1 longer."""
    token, image = embedding[:1], embedding[1:]
    side = round(len(image) ** 0.5)
    matrix = interpolation(side, grid, (grid + 0.1) / side)
    resampled = np.einsum("ai,bj,ijd->abd", matrix, matrix, image.reshape(side, side, -1))
    return np.concatenate([token, resampled.reshape(grid * grid, -1)])


def class_token_in_words(state: dict[str, torch.Tensor], images: torch.Tensor, heads: int) -> torch.Tensor:
    """DINOv2's forward pass in the names of its own files; images of 224 px, normalised."""
    w = {name: tensor.double() for name, tensor in state.items()}
    width = w["cls_token"].shape[-1]
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14).flatten(2).mT
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + torch.from_numpy(positions_in_words(w["pos_embed"][0].numpy(), 16))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for block in (f"blocks.{number}" for number in range(12)):
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(-1, (3, heads, width // heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT / (width // heads) ** 0.5).softmax(-1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.proj") * w[f"{block}.ls1.gamma"]
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2") * w[f"{block}.ls2.gamma"]
    return norm(x, "norm")[:, 0]


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    """Random weights of ViT-S/14 that matter everywhere, with the published 37×37 positions and the mask token."""
    torch.manual_seed(0)
    state = build_encoder("dinov2-vit-s", 37, random_weights=True).network.state_dict()
    for name, tensor in state.items():
        scale = 0.3 if "ls" in name else 0.05
        state[name] = torch.randn(tensor.shape) * scale + (1.0 if "norm" in name and "weight" in name else 0.0)
    state["pos_embed"] = torch.randn(1, 1 + 37**2, 384) * 0.5
    return state | {"mask_token": torch.zeros(1, 384)}


def test_the_class_token_of_the_original(original, tmp_path):
    """Of images at 224 px; a file that is no DINOv2 is named."""
    torch.save(original, tmp_path / "dinov2_vits14_pretrain.pth")
    network = build_dinov2(str(tmp_path / "dinov2_vits14_pretrain.pth"), network="dinov2-vit-s")
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.from_numpy(x).view(3, 1, 1) for x in (MEAN, STD))
    expected = class_token_in_words(original, (images.double() / 255 - mean) / std, heads=6)
    with torch.no_grad():
        found = network(images)[0]
    assert found.shape == (2, 384) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"--features DINOv2: .*other.pth holds no weights for dinov2-vit-l"):
        build_extractor("DINOv2", str(tmp_path / "other.pth"))


def test_missing_weights_are_those_of_the_name_that_was_given(tmp_path, monkeypatch):
    """``--features dinov2-vit-l`` would be another measure."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("models.encoders.weights._from_hub", lambda spec: None)
    with pytest.raises(UserError, match=r"^no weights for --features DINOv2: give the file with --enc-ckpt") as caught:
        build_extractor("DINOv2")
    assert "--features dinov2-vit-l" not in str(caught.value) and "dinov2_vitl14_pretrain.pth" in str(caught.value)


def test_every_command_spells_it_alike(capsys):
    """Also in small letters, which would be taken for a name of ``--enc-type``; the help lists what there is."""
    for words in (["generation", "--samples", "a", "--ref", "b"], ["reconstruction", "--vae", "a", "--data", "b"]):
        assert evaluate.parse_arguments([*words, "--features", "dinov2"]).features == "DINOv2"
        with pytest.raises(SystemExit):
            evaluate.parse_arguments([words[0], "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert "DINOv2: the class token" in said and "FDr/convnext, dinov2, mae, siglip or clip" in said


def test_positions_are_resampled_as_in_the_original_code():
    embedding = torch.randn(1, 1 + 37**2, 5, dtype=torch.float64)
    expected = torch.from_numpy(positions_in_words(embedding[0].numpy(), 16))
    torch.testing.assert_close(resampled_positions(embedding, 16)[0], expected)
    assert resampled_positions(embedding, 37) is embedding


def test_images_are_resized_with_antialiasing(monkeypatch):
    """As PIL resizes them (dgm-eval's way), but for its rounding to 8 bits after each of two passes."""
    network, seen = build_dinov2(random_weights=True, network="dinov2-vit-s"), []
    monkeypatch.setattr(network.network, "forward_features", lambda x: seen.append(x) or torch.zeros(1, 1, 1))
    coarse = np.random.default_rng(0).integers(60, 196, (16, 16, 3), dtype=np.uint8)
    image = np.asarray(PIL.Image.fromarray(coarse).resize((320, 320), PIL.Image.Resampling.BICUBIC))
    expected = np.asarray(PIL.Image.fromarray(image).resize((224, 224), PIL.Image.Resampling.BICUBIC))
    network(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])
    found = seen[0][0].numpy().transpose(1, 2, 0) * STD + MEAN
    difference = np.abs(found * 255 - expected)
    assert difference.max() < 1.5
    assert difference.mean() < 0.4  # of rounding alone: 0.25 to 0.35


@pytest.mark.slow
def test_it_has_a_name_of_its_own(tmp_path, monkeypatch):
    """FD-DINOv2, which is not the FD of the mean of patch tokens."""
    monkeypatch.setattr("metrics.dinov2.NETWORK", "dinov2-vit-s")
    monkeypatch.setattr("metrics.dinov2.build_dinov2.__defaults__", (None, False, "dinov2-vit-s"))
    monkeypatch.setattr(
        "metrics.evaluate_generation.build_extractor", lambda name, *_, **__: build_extractor(name, random_weights=True)
    )
    samples, ref = (write_packed(tmp_path / name, random_images(5, seed)) for seed, name in enumerate("ab"))
    argv = ["generation", "--samples", str(samples), "--ref", str(ref), "--features", "dinov2", "--metrics", "fid,mind"]
    assert evaluate.main(argv) == 0
    (found,) = read_measurements(open_image_set(samples, "--samples").metrics_folder)
    assert list(found.values) == ["FD-DINOv2", "MIND-DINOv2"]
    assert found.name == "generation-DINOv2"
