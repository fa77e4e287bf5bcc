"""Inception: what is taken of torch-fidelity's network, where, and that its file is never unpickled."""

from pathlib import Path

import numpy as np
import pytest
import torch

from errors import UserError
from metrics import inception
from metrics.features import build_extractor
from metrics.inception import build_inception, find_weights
from tests.inception_weights import write_inception_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inception_weights(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="module")
def extractor(weights):
    return build_extractor("inception", str(weights))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def captured(extractor, module: str, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, and input and output of one of torch-fidelity's layers."""
    layer, seen = extractor.network.network.get_submodule(module), {}

    def keep(module, inputs, output):
        seen.update(input=inputs[0], output=output.clone())  # ReLU works in place

    hook = layer.register_forward_hook(keep)
    features = extractor(images)
    hook.remove()
    return features, seen["input"], seen["output"]


def test_spatial_features_are_the_first_branch_of_mixed_6d(extractor, images):
    """Channels 0…6 of the 1×1 branch after BatchNorm and ReLU; row, then column, then channel."""
    features, _, branch = captured(extractor, "Mixed_6d.branch1x1", images)
    assert branch.shape == (2, 192, 17, 17)
    assert features.spatial.shape == (2, 17 * 17 * 7)
    assert features.dims == (2048, 2023, 1008)
    for row, column, channel in ((0, 0, 0), (0, 0, 6), (0, 16, 3), (5, 2, 1), (16, 16, 6)):
        place = (row * 17 + column) * 7 + channel
        assert torch.equal(features.spatial[:, place], branch[:, channel, row, column])
    assert features.spatial.min() == 0 and features.spatial.std() > 0.01
    normed = captured(extractor, "Mixed_6d.branch1x1.bn", images)[2]
    assert normed.min() < 0
    assert torch.equal(branch, normed.clamp_min(0))


def tf1_bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's resize: output pixel i lies at i·scale of the input, in float32, no half-pixel shift."""
    side = image.shape[-1]
    place = np.arange(size, dtype=np.float32) * np.float32(side / size)
    low = np.floor(place).astype(int)
    high, weight = np.minimum(low + 1, side - 1), place - np.floor(place)
    rows = image[:, low] * (1 - weight)[:, None] + image[:, high] * weight[:, None]
    return rows[:, :, low] * (1 - weight) + rows[:, :, high] * weight


@pytest.mark.parametrize("side", [40, 512])
def test_resizing_is_that_of_tensorflow_1(extractor, side):
    images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    _, seen, _ = captured(extractor, "Conv2d_1a_3x3", images)
    expected = (tf1_bilinear(images[0].double().numpy(), 299) - 128) / 128
    np.testing.assert_allclose(seen[0].numpy(), expected, atol=2e-5)


def test_pooled_and_logits_are_torch_fidelitys(extractor, weights, images):
    """Loaded by torch-fidelity itself, which unpickles: this file is our own."""
    theirs = inception.fidelity.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(weights))
    pooled, logits = theirs(images)
    features = extractor(images)
    torch.testing.assert_close(features.pooled, pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.logits, features.pooled @ extractor.network.network.fc.weight.T)
    assert features.pooled.std() > 0.01


def test_float32_whatever_the_caller_does(extractor, images):
    expected = extractor(images).pooled
    extractor.train()
    with torch.autocast("cpu", torch.bfloat16):
        features = extractor(images)
    assert features.pooled.dtype == torch.float32
    assert torch.equal(features.pooled, expected)
    assert not features.pooled.requires_grad


def test_the_file_is_read_without_unpickling(weights, monkeypatch, capsys):
    load, asked = torch.load, []

    def watched(*args, **kwargs):
        asked.append(kwargs.get("weights_only"))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    build_inception(str(weights))
    assert asked and all(asked)
    assert "not the published" in capsys.readouterr().err


def test_places_of_the_weights(weights, tmp_path, monkeypatch):
    """The flag, torch's hub cache, then a download; the error names file, place and address."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert find_weights(str(weights)) == weights

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError) as error:
        find_weights()
    for part in (inception.URL, inception.FILE_NAME, str(tmp_path), "--inception-ckpt", "--features"):
        assert part in str(error.value)
    cached = tmp_path / "checkpoints" / inception.FILE_NAME
    cached.write_bytes(b"")
    assert find_weights() == cached
