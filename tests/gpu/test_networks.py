"""Networks on a GPU: what is the same to the bit there, and in which order numbers lie."""

import copy

import pytest
import torch
from torch import nn

from models.denoisers import denoiser_kind
from models.encoders import build_encoder
from models.precision import hold_products
from models.tokenizers.posterior import ActivatedGroupNorm
from tests.gpu import needs_gpu
from tests.ldm_runs import random_weights

pytestmark = needs_gpu


@pytest.mark.parametrize("enc_type", ["dinov2-vit-s", "efficientnet-lite0"])
def test_features_of_weights_that_are_rounded_once(enc_type):
    encoder = build_encoder(enc_type, 4, random_weights=True).cuda()
    held = copy.deepcopy(encoder)
    hold_products(held, "bf16")
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(held(images), encoder(images))


@pytest.mark.parametrize("model", ["SiT-S/2", "LightningDiT-S/2", "DiTDH-S/2", "DDT-S/2"])
def test_velocities_of_weights_that_are_rounded_once(model):
    network = denoiser_kind(model)(model, 4, 16, num_classes=10).build().eval()
    random_weights(network, 0)
    network.cuda()
    held = copy.deepcopy(network)
    hold_products(held, "bf16")
    x, t, y = torch.randn(8, 4, 16, 16), torch.rand(8), torch.arange(8)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        wanted, found = (each(x.cuda(), t.cuda(), y.cuda())[0] for each in (network, held))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_norm_with_its_activation_answers_in_nhwc(is_compiled):
    """Forwards and backwards, so that neither convolution beside it copies; bf16 against the two layers in float32."""
    torch.manual_seed(0)
    norm = ActivatedGroupNorm(32, 64, eps=1e-6).cuda()
    x = torch.randn(2, 64, 32, 32, device="cuda").to(torch.bfloat16, memory_format=torch.channels_last)
    x.requires_grad_()
    wanted = nn.functional.silu(nn.functional.group_norm(x.float(), 32, eps=1e-6))
    (gradient,) = torch.autograd.grad(wanted.square().sum(), x)
    if is_compiled:
        norm.compile()
    with torch.autocast("cuda", torch.bfloat16):
        found = norm(x)
        (own_gradient,) = torch.autograd.grad(found.float().square().sum(), x)
    assert found.dtype == torch.bfloat16 and found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)
    torch.testing.assert_close(own_gradient, gradient, rtol=0.05, atol=0.05)
