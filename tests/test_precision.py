"""Frozen weights are rounded once to what autocast would round them to in every call: the same to the bit."""

import copy
from types import SimpleNamespace

import pytest
import timm.layers
import torch
from torch import nn

import generate
import inference.sample_folder
from inference.sample_folder import build_sampler, load_networks
from models.denoisers import denoiser_kind
from models.encoders import build_encoder
from models.precision import AUTOCAST, hold_products
from tests.command_line import argv_of
from tests.ldm_runs import write_ldm_run
from training.networks import build_vfms

PRECISIONS = pytest.mark.parametrize("mixed_precision", list(AUTOCAST))


def randomize(network: nn.Module) -> nn.Module:
    """Whatever starts at nothing, does something."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim == 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return network


def held(network: nn.Module, mixed_precision: str) -> nn.Module:
    other = copy.deepcopy(network)
    hold_products(other, mixed_precision)
    return other


@PRECISIONS
@pytest.mark.parametrize("enc_type", ["dinov2reg-vit-s", "dinov3-vit-s", "efficientnet-lite0"])
def test_features_are_the_same_to_the_bit(enc_type, mixed_precision):
    encoder = randomize(build_encoder(enc_type, 4, random_weights=True))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    rounded = held(encoder, mixed_precision)
    with torch.autocast("cpu", AUTOCAST[mixed_precision]):
        assert torch.equal(rounded(images, class_token=True), encoder(images, class_token=True))
    kinds = [weight.dtype for weight in rounded.parameters()]
    assert kinds.count(AUTOCAST[mixed_precision]) > len(kinds) / 2


@pytest.mark.parametrize(
    ("model", "options"),
    [("SiT-Ti/2", {"qk_norm": True}), ("LightningDiT-Ti/2", {}), ("SiT-Ti/2", {"class_token_width": 12})],
)
def test_velocities_are_the_same_to_the_bit(model, options):
    network = randomize(denoiser_kind(model)(model, 4, 8, num_classes=10, **options).build().eval())
    x = network.pack(torch.randn(3, 4, 8, 8), torch.randn(3, network.class_token_width))
    t, y = torch.rand(3), torch.tensor([0, 3, 10])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted, found = (each(x, t, y)[0] for each in (network, held(network, "bf16")))
    assert torch.equal(found, wanted) and wanted.std() > 0.01


def test_samples_are_the_same_to_the_bit(tmp_path, monkeypatch):
    """generate.py --mixed-precision bf16, guided by an earlier step, against weights that are rounded in every call."""
    run = write_ldm_run(tmp_path / "run", milestone=True)
    flags = {"exp_path": run, "guide": "@5", "cfg_scale": 1.5, "num_steps": 3, "mixed_precision": "bf16"}
    found = latents(flags)
    monkeypatch.setattr(inference.sample_folder, "hold_products", lambda network, mixed_precision: None)
    assert torch.equal(found, latents(flags))
    assert not torch.equal(found, latents(flags | {"mixed_precision": "no"}))


def latents(flags: dict) -> torch.Tensor:
    args, process = generate.parse_arguments(argv_of(flags)), generate.this_process()
    trained = generate.open_model(args, print)
    sampler = build_sampler(args, trained, load_networks(args, trained, trained.load_autoencoder(), process), process)
    return sampler.latents(torch.arange(3), torch.arange(3))


@PRECISIONS
def test_a_training_holds_its_vfms_so(mixed_precision):
    args = SimpleNamespace(enc_type="efficientnet-lite0", enc_ckpt=None, random_weights=True, channels_last=False)
    for precision, kind in ((mixed_precision, AUTOCAST[mixed_precision]), ("no", torch.float32)):
        accelerator = SimpleNamespace(is_local_main_process=True, device=torch.device("cpu"), mixed_precision=precision)
        (encoder,) = build_vfms(args, 2, accelerator)
        assert {module.weight.dtype for module in encoder.modules() if type(module) is nn.Conv2d} == {kind}


def test_what_autocast_leaves_alone_stays():
    network = held(denoiser_kind("SiT-Ti/2")("SiT-Ti/2", 4, 8, num_classes=10).build(), "bf16")
    kinds = {name: weight.dtype for name, weight in network.named_parameters()}
    assert kinds["y_embedder.embedding_table.weight"] == torch.float32
    assert kinds["blocks.0.attn.qkv.weight"] == kinds["x_embedder.proj.bias"] == torch.bfloat16
    normalised = held(timm.layers.StdConv2dSame(3, 8, 3), "bf16")  # does more with its weight than multiply by it
    assert normalised.weight.dtype == torch.float32
    hold_products(None, "bf16")
    linear = nn.Linear(2, 2)
    hold_products(linear, "no")
    assert linear.weight.dtype == torch.float32
