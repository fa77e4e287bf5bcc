"""FDr: the features of its networks written out in float64, its figures from constructed sets, what is refused."""

import copy
import dataclasses
import json
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import evaluate
import metrics.evaluate_fdr as command
import metrics.fdr as fdr
import metrics.generation as generation
import report
from errors import UserError
from metrics.arguments import FDR_NETWORKS, network_label
from metrics.features import Extractor, build_extractor
from metrics.record import Measurement, read_measurements, write_measurement
from metrics.representations import REPRESENTATIONS, Representation
from metrics.sources import open_image_set
from models.weight_files import MissingWeightsError
from runtime.cli import EXIT_USER_ERROR, run
from tests.command_line import argv_of
from tests.image_sets import random_images, write_folder, write_npz, write_packed
from tests.stages import run_stage, two_without_launcher
from tests.test_evaluate_generation import LITE0, distance_of_few

DYNAMIC = {"dynamic_img_size": True, "dynamic_img_pad": True}
SMALL_VIT = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5, **DYNAMIC}
WIDTH = 6  # of TinyNetwork


# --- the features ---


def resizing(before: int, after: int) -> np.ndarray:
    """``[after, before]``: Keys' cubic kernel (a = -0.5), stretched where the image shrinks, cut off at the edges."""
    scale = before / after
    stretch = max(scale, 1.0)
    x = np.abs((np.arange(before) + 0.5 - (np.arange(after)[:, None] + 0.5) * scale) / stretch)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


def input_in_words(images: torch.Tensor, side: int, config: Mapping) -> torch.Tensor:
    """From uint8 ``[B, 3, H, H]`` to the network's input in float64, neither clamped nor rounded between."""
    matrix = torch.from_numpy(resizing(images.shape[-1], side))
    x = matrix @ (images.double() / 255) @ matrix.T
    mean, std = (torch.tensor(config[name], dtype=torch.float64).view(3, 1, 1) for name in ("mean", "std"))
    return (x - mean) / std


def vit_in_words(network: nn.Module, x: torch.Tensor, heads: int) -> torch.Tensor:
    """A ViT's pooled feature in float64, from images of any side, normalised."""
    w = {name: tensor.double() for name, tensor in network.state_dict().items()}
    patch, width = w["patch_embed.proj.weight"].shape[-1], w["pos_embed"].shape[-1]
    grid = -(-x.shape[-1] // patch)
    padded = torch.zeros(len(x), 3, grid * patch, grid * patch, dtype=torch.float64)
    padded[:, :, : x.shape[-2], : x.shape[-1]] = x
    patches = padded.unflatten(3, (grid, patch)).unflatten(2, (grid, patch)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    x = patches.flatten(1, 2) @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    tokens = 1 if "cls_token" in w else 0
    token, positions = w["pos_embed"][0, :tokens], w["pos_embed"][0, tokens:]
    before = round(len(positions) ** 0.5)
    matrix = torch.from_numpy(resizing(before, grid))
    positions = torch.einsum("ai,bj,ijd->abd", matrix, matrix, positions.unflatten(0, (before, before))).flatten(0, 1)
    if tokens:
        x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + torch.cat([token, positions])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        return ((q @ k.mT / (width // heads) ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(F.gelu(linear(x, f"{name}.fc1")), f"{name}.fc2")

    for block in (f"blocks.{number}" for number in range(2)):
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").split(width, dim=-1)
        x = x + linear(attention(q, k, v), f"{block}.attn.proj")
        x = x + mlp(norm(x, f"{block}.norm2"), f"{block}.mlp")
    x = norm(x, "norm")
    if tokens:
        return x[:, 0]
    query = linear(w["attn_pool.latent"].expand(len(x), -1, -1), "attn_pool.q")
    pooled = linear(attention(query, *linear(x, "attn_pool.kv").split(width, dim=-1)), "attn_pool.proj")
    return (pooled + mlp(norm(pooled, "attn_pool.norm"), "attn_pool.mlp"))[:, 0]


def random_network(name: str, **options: object) -> nn.Module:
    """With weights that matter everywhere."""
    torch.manual_seed(0)
    network = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return network


def noise(side: int) -> torch.Tensor:
    """uint8 ``[3, 3, side, side]`` with the hardest edges that there are."""
    images = torch.randint(0, 2, (3, 3, side, side), generator=torch.Generator().manual_seed(1)) * 255
    images[0, :, : side // 2] = 250
    return images.to(torch.uint8)


@pytest.mark.parametrize("side", [28, 32, 42])
@pytest.mark.parametrize("images_side", [32, 64])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_base_patch16_siglip_256", {"class_token": False, "global_pool": "map"}),
    ],
)
def test_a_vit_against_float64(name, options, images_side, side):
    """Padded where 14 does not divide the side, positions resampled, class token or attention pooling."""
    network = random_network(name, **SMALL_VIT, **options)
    images = noise(images_side)
    expected = vit_in_words(network, input_in_words(images, side, network.pretrained_cfg), heads=3)
    with torch.no_grad():
        (found,) = Representation(network, side, torch.float32)(images)
        (rounded,) = Representation(network, side)(images)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rounded.double(), expected, rtol=0.05, atol=0.05)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, found)


def test_a_cnn_against_float64():
    """The mean over space, without the norm that its head has before the classifier."""
    network = random_network("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 16), num_classes=5)
    images = noise(80)
    with torch.no_grad():
        grid = copy.deepcopy(network).double().forward_features(input_in_words(images, 64, network.pretrained_cfg))
        (found,) = Representation(network, 64, torch.float32)(images)
        (rounded,) = Representation(network, 64)(images)
    expected = torch.from_numpy(grid.numpy().sum((2, 3)) / 4)
    assert grid.shape == (3, 16, 2, 2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rounded.double(), expected, rtol=0.05, atol=0.05)
    with torch.no_grad():
        assert (network.forward_head(grid.float(), pre_logits=True) - expected).abs().max() > 0.1


@pytest.mark.parametrize("side", [24, 32])
def test_images_are_resized_and_not_clamped(side):
    """Bicubic resizing overshoots at edges; images that have the side stay as they are."""
    network, images = random_network("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 16)), noise(32)
    seen = []
    network.forward_features = lambda x: seen.append(x) or x
    Representation(network, side)(images)
    expected = input_in_words(images, side, network.pretrained_cfg)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-5, atol=1e-5)
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    pixels = seen[0] * std + mean
    assert (pixels.min() < -0.05 and pixels.max() > 1.05) == (side == 24)


def test_the_table():
    """Widths are timm's; released files are called by network and side."""
    assert tuple(REPRESENTATIONS) == FDR_NETWORKS
    for name, spec in REPRESENTATIONS.items():
        if name == "inception":
            continue
        with torch.device("meta"):
            network = timm.create_model(spec.timm_name, **spec.options)
        assert network.num_features == spec.width
        called = "convnext" if name == "FDr/convnext" else spec.timm_name.replace(".", "_")
        assert spec.statistics == f"{called}_in256_t{spec.side}_stats.npz"


def test_weights_are_found_by_timms_name(tmp_path, monkeypatch):
    """In $VFM_DIR, with the classifier that timm's files have; the features are in bf16 and say so."""
    network = random_network("test_vit")
    save_file(network.state_dict(), tmp_path / "test_vit.r160_in1k.safetensors")
    monkeypatch.setenv("VFM_DIR", str(tmp_path))
    spec = dataclasses.replace(REPRESENTATIONS["FDr/mae"], timm_name="test_vit.r160_in1k", side=100)
    monkeypatch.setitem(REPRESENTATIONS, "FDr/mae", spec)
    extractor, images = build_extractor("FDr/mae"), noise(64)
    assert extractor.name == "FDr/mae" and extractor.precision == "bf16" and extractor.describe()["precision"] == "bf16"
    network = timm.create_model("test_vit", **DYNAMIC).eval()
    network.load_state_dict(build_extractor("timm/test_vit").network.network.state_dict())
    with torch.autocast("cpu", torch.float16):  # of the caller: it does not matter
        found = extractor(images).pooled
    (expected,) = Representation(network, 100)(images)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)  # memory is laid out differently
    (exact,) = Representation(network, 100, torch.float32)(images)
    assert (found - exact).abs().max() > 1e-4
    (tmp_path / "test_vit.r160_in1k.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"--features FDr/mae: .* holds no weights for it"):
        build_extractor("FDr/mae")


# --- the figures ---


class TinyNetwork(nn.Module):
    """In the place of one of the six."""

    def __init__(self, seed: int):
        super().__init__()
        self.layer = nn.Linear(3 * 16, WIDTH)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(seed))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.layer(F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)),)


def tiny_extractor(name: str, *args: object, **kwargs: object) -> Extractor:
    return Extractor(name, TinyNetwork(sum(map(ord, name))), f"{len(name):064}")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the six is a network of its own, with features of WIDTH."""
    monkeypatch.setattr(command, "build_extractor", tiny_extractor)
    for name, spec in REPRESENTATIONS.items():
        monkeypatch.setitem(REPRESENTATIONS, name, dataclasses.replace(spec, width=WIDTH))


def measured(samples: Path, ref: Path, **flags: object) -> Measurement:
    assert evaluate.main(["fdr", *argv_of({"samples": samples, "ref": ref} | flags)]) == 0
    (found,) = read_measurements(open_image_set(samples, "--samples").metrics_folder)
    return found


def features_of(name: str, images: np.ndarray) -> np.ndarray:
    return (
        tiny_extractor(name)(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
        .pooled.double()
        .numpy()
    )


def statistics_of(name: str, images: np.ndarray) -> dict[str, np.ndarray]:
    features = features_of(name, images)
    return {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}


def distance_in_words(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    shift, root = a["mu"] - b["mu"], scipy.linalg.sqrtm(a["sigma"] @ b["sigma"]).real
    return shift @ shift + np.trace(a["sigma"] + b["sigma"] - 2 * root)


def write_statistics(folder: Path, images: np.ndarray, **changes: Mapping[str, np.ndarray] | None) -> Path:
    """As the authors release them; ``changes`` by label, None leaves the file out."""
    folder.mkdir()
    for name, spec in REPRESENTATIONS.items():
        arrays = changes.get(network_label(name), statistics_of(name, images))
        if arrays is not None:
            np.savez(folder / spec.statistics, **arrays)
    return folder


def test_measured_denominators(tiny, tmp_path, capsys):
    """FDr6 is the mean of six ratios, whatever the order of the networks; FDr that of others."""
    sets = {
        name: random_images(count, seed) for seed, (name, count) in enumerate((("a", 30), ("ref", 31), ("val", 29)))
    }
    a, ref, val = (write_packed(tmp_path / name, images) for name, images in sets.items())
    found = measured(a, ref, val=val, batch_size=7, networks="clip,inception,mae,convnext,siglip,dinov2")
    expected = {}
    for name in FDR_NETWORKS:
        ours, theirs, real = (statistics_of(name, images) for images in sets.values())
        expected[f"FDr-{network_label(name)}"] = distance_in_words(ours, theirs) / distance_in_words(real, theirs)
        assert found.settings["networks"][network_label(name)]["fd"] == pytest.approx(distance_in_words(ours, theirs))
    assert next(iter(found.values)) == "FDr6"
    assert found.values == pytest.approx(expected | {"FDr6": sum(expected.values()) / 6}, rel=1e-5)
    assert len({round(value, 3) for value in expected.values()}) == 6
    assert (found.name, found.kind, found.count, found.reference["count"]) == ("fdr", "fdr", 30, 31)
    assert found.settings["denominators"] == str(val) and found.settings["validation"]["count"] == 29
    output = capsys.readouterr().out
    assert "measured, of 29 images" in output and "30 validation images would make a fair ratio" in output
    (a / "metrics" / "fdr.json").unlink()
    two = measured(a, ref, val=val, networks="mae,inception")
    assert two.name == "fdr-mae-inception" and list(two.values) == ["FDr", "FDr-mae", "FDr-inception"]
    assert two.values["FDr"] == pytest.approx((expected["FDr-mae"] + expected["FDr-inception"]) / 2, rel=1e-5)


def test_released_statistics_and_published_denominators(tiny, tmp_path, capsys):
    images, theirs = random_images(9, 0, 256), random_images(20, 1)
    ref = write_statistics(tmp_path / "fid_stats", theirs)
    found = measured(write_npz(tmp_path / "samples.npz", images), ref, num_samples=8)
    expected = {
        f"FDr-{network_label(name)}": distance_in_words(statistics_of(name, images[:8]), statistics_of(name, theirs))
        / published
        for name, published in zip(FDR_NETWORKS, (1.68, 56.87, 14.19, 0.04, 0.60, 5.60), strict=True)
    }
    assert found.values == pytest.approx(expected | {"FDr6": sum(expected.values()) / 6}, rel=1e-5)
    assert found.settings["denominators"] == "published" and found.settings["validation"] is None
    assert found.reference["statistics_of_the_file"] == list(FDR_NETWORKS) and found.count == 8
    output = capsys.readouterr().out
    assert "published" in output and "for 50,000 samples; these are 8" in output
    assert "siglip" in output and "FDr6" in output


def test_an_npz_has_inceptions_statistics(tiny, tmp_path, capsys, monkeypatch):
    """They serve Inception; its images serve the others, which is said."""
    monkeypatch.setattr("metrics.sources.POOLED", WIDTH)
    images, theirs, stored = (random_images(9, seed, 256) for seed in range(3))
    statistics = statistics_of("inception", stored)
    only = tmp_path / "only.npz"
    np.savez(only, **statistics)
    samples = write_npz(tmp_path / "a" / "samples.npz", images)
    assert "Inception's statistics and no images" in refused(capsys, samples=samples, ref=only)
    fid = distance_in_words(statistics_of("inception", images), statistics)
    expected = {"FDr-inception": fid / 1.68}
    assert measured(samples, only, networks="inception", name="x").values == pytest.approx(
        expected | {"FDr": fid / 1.68}, rel=1e-5
    )
    (tmp_path / "a" / "metrics" / "x.json").unlink()
    found = measured(samples, write_npz(tmp_path / "both.npz", theirs, **statistics), networks="inception,clip")
    expected["FDr-clip"] = distance_in_words(statistics_of("FDr/clip", images), statistics_of("FDr/clip", theirs)) / 5.6
    assert {name: found.values[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found.reference["statistics_of_the_file"] == ["inception"]
    assert "inception's are statistics of the file; the others' are of its 9 images" in capsys.readouterr().out
    val = write_npz(tmp_path / "val.npz", theirs, **statistics)  # whose own statistics are of something else
    real = distance_in_words(statistics_of("inception", theirs), statistics)
    found = measured(samples, only, val=val, networks="inception", name=found.name)
    assert found.values["FDr-inception"] == pytest.approx(fid / real, rel=1e-5)


def test_another_reference_replaces_nothing(tiny, tmp_path):
    samples = write_packed(tmp_path / "a", random_images(9, 0, 256))
    for label, seed in (("one", 1), ("two", 2)):
        ref = write_npz(tmp_path / f"{label}.npz", random_images(8, seed, 256))
        assert evaluate.main(["fdr", *argv_of({"samples": samples, "ref": ref})]) == 0
    found = {each.name: Path(each.reference["path"]).stem for each in read_measurements(samples / "metrics")}
    assert found == {"fdr": "one", "fdr-two": "two"}


def test_one_network_at_a_time_and_one_pass(tiny, tmp_path, monkeypatch):
    """What is known of the reference and of the validation set is kept."""
    alive, passes = [], []

    def watched_build(name, *args, **kwargs):
        assert not any(reference() for reference in alive)
        extractor = tiny_extractor(name)
        alive.append(weakref.ref(extractor))
        return extractor

    def watched(summarise):
        return lambda *args, description, **kwargs: (
            passes.append(description) or summarise(*args, description=description, **kwargs)
        )

    monkeypatch.setattr(command, "build_extractor", watched_build)
    for module in (fdr, generation):
        monkeypatch.setattr(module, "summarise", watched(module.summarise))
    a, ref, val = (write_packed(tmp_path / str(seed), random_images(9, seed)) for seed in range(3))
    first = measured(a, ref, val=val, networks="mae,clip").values
    assert len(alive) == 4
    assert passes == [f"{what}, {name}" for name in ("mae", "clip") for what in ("reference", "validation", "samples")]
    assert measured(a, ref, val=val, networks="mae,clip").values == first
    assert passes[6:] == ["samples, mae", "samples, clip"]
    measured(a, ref, val=val, networks="mae,clip", ref_cache=tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 4 and len(passes) == 14


# --- what is refused ---


def refused(capsys: pytest.CaptureFixture, **flags: object) -> str:
    """The one line."""
    capsys.readouterr()
    try:
        code = run(evaluate.main, ["fdr", *argv_of(flags)])
    except SystemExit as stop:
        code = stop.code
    progress, _, error = ("\n" + capsys.readouterr().err[:-1]).rpartition("\n")
    assert code == EXIT_USER_ERROR and all("img/s]" in line for line in progress.splitlines() if line), progress
    return error


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No image may be read."""

    def fail(*args, **kwargs):
        raise AssertionError("an image is read")

    for module in (fdr, generation):
        monkeypatch.setattr(module, "summarise", fail)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"networks": "mae,,clip"}, ("--networks", "empty or given twice")),
        ({"networks": "mae,FDr/mae"}, ("--networks", "given twice")),
        ({"networks": f"mae,{LITE0}", "ref": "large-ref"}, (LITE0, "no FD of real images was published", "--val")),
        ({"num_samples": 10}, ("--num-samples 10", "9 images")),
        ({"num_samples": 1}, ("too few images (1)",)),
        ({"name": "a/b"}, ("--name",)),
        ({"samples": "small"}, ("32 px", "256 px", "--val")),
        ({"samples": "small", "val": "small-val", "ref": "large"}, ("32 px", "--ref", "256")),
        ({"samples": "small", "val": "large", "ref": "small-val"}, ("32 px", "--val", "256")),
        ({"samples": "small", "val": "small-val", "ref": "small-val"}, ("--val", "is the reference")),
        ({"val": "nowhere"}, ("--val", "does not exist")),
        ({"ref": "nowhere"}, ("--ref", "does not exist")),
        ({"samples": "statistics"}, ("holds no images",)),
    ],
)
def test_wrong_usage(tiny, unread, tmp_path, capsys, flags, words):
    write_packed(tmp_path / "large", random_images(9, 0, 256))
    write_packed(tmp_path / "large-ref", random_images(9, 4, 256))
    write_packed(tmp_path / "small", random_images(9, 1))
    write_packed(tmp_path / "small-val", random_images(9, 2))
    write_statistics(tmp_path / "statistics", random_images(9, 3))
    paths = {"samples": "large", "ref": "statistics"} | {
        k: v for k, v in flags.items() if k in ("samples", "ref", "val")
    }
    error = refused(capsys, **(flags | {name: tmp_path / path for name, path in paths.items()}))
    assert all(word in error for word in words), error


SOUND = {"mu": np.zeros(WIDTH), "sigma": np.eye(WIDTH)}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (None, ("no statistics for mae", "jjiaweiyang/FD-Loss", "--networks")),
        (SOUND | {"mu": np.zeros(WIDTH + 1)}, (f"[{WIDTH + 1}]", f"[{WIDTH}]")),
        (SOUND | {"sigma": np.eye(WIDTH + 1)}, (f"[{WIDTH + 1}, {WIDTH + 1}]", f"[{WIDTH}, {WIDTH}]")),
        (SOUND | {"mu": np.full(WIDTH, np.nan)}, ("not finite",)),
        (SOUND | {"sigma": np.triu(np.ones((WIDTH, WIDTH)))}, ("not a covariance",)),
        ({"avg_mu": np.zeros(WIDTH)}, ("mu, sigma", "not readable")),
        (SOUND | {"mu": np.array({})}, ("mu, sigma", "not readable")),
    ],
)
def test_wrong_statistics(tiny, unread, tmp_path, capsys, arrays, words):
    samples = write_packed(tmp_path / "a", random_images(9, 0, 256))
    ref = write_statistics(tmp_path / "fid_stats", random_images(9, 1), mae=arrays)
    error = refused(capsys, samples=samples, ref=ref)
    assert all(word in error for word in words), error
    if arrays is not None:
        file = ref / REPRESENTATIONS["FDr/mae"].statistics
        assert str(file) in error
        file.write_bytes(file.read_bytes()[:60])
        assert "not readable" in refused(capsys, samples=samples, ref=ref)


def test_networks_that_have_no_statistics(tiny, unread, tmp_path, capsys):
    samples = write_packed(tmp_path / "a", random_images(9, 0, 256))
    ref = write_statistics(tmp_path / "fid_stats", random_images(9, 1), clip=None)
    error = refused(capsys, samples=samples, ref=ref, val=samples, networks=f"clip,mae,{LITE0}")
    assert f"no statistics for clip ({REPRESENTATIONS['FDr/clip'].statistics}), {LITE0} (not released)" in error


def test_a_copy_of_the_reference(tiny, tmp_path, capsys):
    """There is nothing to divide by."""
    a, ref = (write_packed(tmp_path / str(seed), random_images(9, seed)) for seed in range(2))
    copy_of_ref = write_folder(tmp_path / "copy", random_images(9, 1))
    error = refused(capsys, samples=a, ref=ref, val=copy_of_ref, networks="mae")
    assert "nothing to divide by" in error and "--val" in error
    assert not (a / "metrics").exists()


def test_all_networks_without_weights_are_named(unread, tmp_path, capsys, monkeypatch):
    """In one line, before an image is read; a damaged file is told apart."""

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr("models.encoders.weights._from_hub", lambda spec: None)
    monkeypatch.setenv("VFM_DIR", str(tmp_path))
    samples = write_packed(tmp_path / "a", random_images(4, 0, 256))
    flags = {"samples": samples, "ref": write_packed(tmp_path / "b", random_images(4, 1, 256))}
    error = refused(capsys, **flags)
    assert all(spec.timm_name in error for spec in REPRESENTATIONS.values()) and "--inception-ckpt" in error
    assert "$VFM_DIR" in error and "--enc-ckpt" not in error
    error = refused(capsys, **flags, val=samples, networks=f"{LITE0},clip,DINOv2")
    assert "no weights for clip (" in error and ", DINOv2: put" in error and LITE0 not in error
    (tmp_path / f"{REPRESENTATIONS['FDr/mae'].timm_name}.safetensors").write_bytes(b"x" * 100)
    assert "--networks FDr/mae: " in refused(capsys, **flags, networks="mae")
    assert "--networks dino is not known" in refused(capsys, **flags, val=samples, networks="dino")


# --- from files to figures ---


def test_dry_run(tiny, unread, tmp_path, capsys, monkeypatch):
    """Random weights where there are none; nothing is written."""

    def without_weights(name, checkpoint=None, random_weights=False):
        if not random_weights:
            raise MissingWeightsError(name)
        return tiny_extractor(name)

    monkeypatch.setattr(command, "build_extractor", without_weights)
    a, ref, val = (write_packed(tmp_path / str(seed), random_images(5 + seed, seed)) for seed in range(3))
    before = sorted(tmp_path.rglob("*"))
    assert evaluate.main(["fdr", *argv_of({"samples": a, "ref": ref, "val": val, "dry_run": True})]) == 0
    output = capsys.readouterr()
    assert "5 images of 32 px" in output.out and "nothing was written" in output.out
    assert all(f"\n{network_label(name)}: 294 parameters, 6 features in float32" in output.out for name in FDR_NETWORKS)
    assert "random weights" in output.err and sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_real_network_on_one_process_and_on_two(tmp_path, capsys):
    """EfficientNet-lite0 with its own weights: ratios of distances of all features, and the same from two processes."""
    sets = [random_images(count, seed) for seed, count in enumerate((14, 12, 13))]
    a, ref, val = (write_packed(tmp_path / str(number), images) for number, images in enumerate(sets))
    flags = {"val": val, "networks": f"{LITE0},efficientnet-lite0-s32"}
    found = measured(a, ref, **flags, batch_size=5)
    for name in (LITE0, "efficientnet-lite0-s32"):
        extractor = build_extractor(name)
        features = [extractor(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).pooled.double().numpy() for x in sets]
        ours, real = (distance_of_few(features[number], features[1]) for number in (0, 2))
        assert found.values[f"FDr-{name}"] == pytest.approx(ours / real, rel=1e-4)
    assert found.values["FDr"] == pytest.approx(sum(list(found.values.values())[1:]) / 2)
    (a / "metrics" / f"{found.name}.json").unlink()
    argv = argv_of({"samples": a, "ref": ref, **flags, "ref_cache": tmp_path / "two", "batch_size": 3})
    answer = run_stage("evaluate.py", "fdr", *argv, processes=2)
    assert answer.stdout.count("written to") == 1
    (two,) = read_measurements(a / "metrics")
    assert two.values == pytest.approx(found.values, rel=1e-4)


@pytest.mark.slow
def test_a_refusal_ends_every_process(tmp_path):
    """Only the first one sees that the validation set is the reference; the other says the same and does not wait."""
    images = random_images(6, 1)
    a, ref, val = (
        write_packed(tmp_path / name, x) for name, x in (("a", images[:4]), ("ref", images), ("val", images))
    )
    argv = argv_of({"samples": a, "ref": ref, "val": val, "networks": LITE0})
    for code, line in two_without_launcher("evaluate.py", "fdr", *argv):
        assert code == EXIT_USER_ERROR
        assert "error: --val" in line


def test_the_report_shows_it(tiny, tmp_path, capsys):
    """In a table of its own, with digits and which way is better; FID stays what it is."""
    sets = [
        write_packed(tmp_path / name, random_images(9, seed)) for seed, name in enumerate(("a", "train", "held-out"))
    ]
    a, ref, val = sets
    fid = Measurement("generation", "generation", {"FID": 12.345}, 9, {"path": str(a)}, {"path": str(ref)})
    values = measured(a, ref, val=val).values
    write_measurement(fid, a)
    capsys.readouterr()
    assert report.main([str(a), "--no-html"]) == 0
    tables = capsys.readouterr().out.split("\n\n")
    (images,) = (table for table in tables if table.startswith("Generated images\n"))
    (ratios,) = (table for table in tables if table.startswith("Generated images, FDr\n"))
    assert "12.35" in images.replace("12.34", "12.35") and "FDr" not in images and "FID" not in ratios
    assert "FDr6 ↓" in ratios and "FDr-siglip ↓" in ratios and "denominators held-out" in ratios
    words = ratios.split()
    assert all(f"{value:.2f}" in words for value in values.values())
    assert report.main([str(a), "--format", "json", "--no-html"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out)["results"] if row["metric"] == "FDr6"]
    assert [row["measured"] for row in rows] == [values["FDr6"]]
