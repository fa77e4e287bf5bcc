"""Compiled in place: one graph for equal blocks, no graph breaks, the same numbers. Backend eager: tracing alone."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters

from formats.vae import load_tokenizer
from loss.perceptual import build_lpips
from models.denoisers.config import LightningDiTConfig, SiTConfig
from models.denoisers.sit import SiT
from models.discriminator import PatchDiscriminator
from models.encoders import build_encoder
from models.tokenizers.posterior import ActivatedGroupNorm, activate_in_norm
from tests.ldm_runs import random_weights
from training.method import frozen
from training.networks import compile_networks


@pytest.fixture(autouse=True)
def forget_graphs():
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(), torch._functorch.config.patch():  # what compiling changes is given back
        yield
    torch.compiler.reset()


def compiled(network: nn.Module) -> nn.Module:
    network.compile(backend="eager")
    return network


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def test_checkpointed_blocks_under_ddp(tmp_path, monkeypatch):
    """Gradients as without a compiler; of DDP's own one, torch 2.6 refused blocks that are recomputed outside of it."""
    torch.manual_seed(0)
    network = SiT(SiTConfig("SiT-Ti/2", 4, 8, num_classes=6)).train()
    random_weights(network, 0)
    network.gradient_checkpointing = True
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 5])
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network)
        wrapped(x, t, y)[0].square().mean().backward()
        plain = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
        network.zero_grad()
        monkeypatch.setattr(network, "compile", partial(network.compile, backend="aot_eager"))
        compile_networks(network)
        wrapped(x, t, y)[0].square().mean().backward()
    finally:
        dist.destroy_process_group()
    assert not torch._dynamo.config.optimize_ddp  # newer torch does without, but would split blocks
    assert graphs() == 2
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "config", [SiTConfig("SiT-Ti/2", 4, 8, 6), LightningDiTConfig("LightningDiT-Ti/2", 4, 8, 6, qk_norm=True)]
)
def test_the_blocks_of_a_denoiser_share_a_graph(config, checkpointing):
    """One of the block and one of the final layer, however deep; gradients as without."""
    torch.manual_seed(0)
    network = config.build().train()
    random_weights(network, 0)
    network.gradient_checkpointing = checkpointing
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 5])
    results = []
    for net in (network, compiled(network)):
        velocity, (state,) = net(x, t, y, taps=(2,))
        gradients = torch.autograd.grad((velocity.square().mean() + state.mean()), list(net.parameters()))
        results.append((velocity, state, *gradients))
    assert graphs() == 2
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain)


@pytest.mark.parametrize(("name", "grid", "side"), [("dinov2-vit-s", 4, 56), ("efficientnet-lite0", 2, 32)])
def test_a_vfm_is_one_graph(name, grid, side):
    """The blocks of a transformer share it; a convolutional network is compiled whole."""
    encoder = build_encoder(name, grid, random_weights=True)
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    plain = encoder(images)
    torch.testing.assert_close(compiled(encoder)(images), plain)
    assert graphs() == 1


def test_the_judges_of_a_reconstruction_are_one_graph_each():
    """LPIPS; the discriminator has one where it is frozen and one where it is trained."""
    torch.manual_seed(0)
    lpips, discriminator = build_lpips(random_weights=True), PatchDiscriminator(width=8).train()
    real, fake = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64, requires_grad=True)

    def of_lpips() -> list[torch.Tensor]:
        return list(torch.autograd.grad(lpips(real, fake).sum(), fake))

    def of_discriminator() -> list[torch.Tensor]:
        with frozen(discriminator):
            generator = torch.autograd.grad(discriminator(fake).mean(), fake)
        pair = discriminator(real), discriminator(fake.detach())
        return [*generator, *torch.autograd.grad((pair[0] - pair[1]).square().sum(), list(discriminator.parameters()))]

    for network, gradients, expected in ((lpips, of_lpips, 1), (discriminator, of_discriminator, 2)):
        counters.clear()
        plain = gradients()
        compiled(network)
        for other, one in zip(gradients() + gradients(), plain + plain, strict=True):
            torch.testing.assert_close(other, one)
        assert graphs() == expected


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_norm_takes_its_activation(precision):
    """The same reconstruction and gradients to the bit, before anything is compiled, and the same names."""
    torch.manual_seed(0)
    tokenizer, _ = load_tokenizer("f4d4-tiny", "none")
    latents, names = torch.randn(2, 4, 8, 8), list(tokenizer.state_dict())

    def results() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            images = tokenizer.decode(latents)
        return [images, *torch.autograd.grad(images.square().sum(), list(tokenizer.network.decoder.parameters()))]

    plain = results()
    activate_in_norm(tokenizer.network.decoder)
    activate_in_norm(tokenizer.network.decoder)  # once more is nothing
    assert isinstance(tokenizer.network.decoder.conv_norm_out, ActivatedGroupNorm)
    assert all(torch.equal(found, wanted) for found, wanted in zip(results(), plain, strict=True))
    assert list(tokenizer.state_dict()) == names


@pytest.mark.slow
def test_inductor_knows_the_limits_it_is_given():
    """Blocks of a VAE and of a denoiser, forwards and backwards, by Inductor itself; an unknown limit is refused."""
    torch.manual_seed(0)
    tokenizer, _ = load_tokenizer("f4d4-tiny", "none")
    denoiser = SiT(SiTConfig("SiT-Ti/2", 4, 8, num_classes=6)).train()
    random_weights(denoiser, 0)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 5])
    for network, call in ((tokenizer, lambda: tokenizer.decode(x)), (denoiser, lambda: denoiser(x, t, y)[0])):
        parameters = [parameter for name, parameter in network.named_parameters() if "encoder" not in name]
        plain = torch.autograd.grad(call().square().mean(), parameters, allow_unused=True)
        network.compile()
        found = torch.autograd.grad(call().square().mean(), parameters, allow_unused=True)
        for one, other in zip(plain, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)
    with pytest.raises(RuntimeError, match="realize_something"):
        torch.compile(denoiser, options={"realize_something": 1})


def test_residual_blocks_of_a_vae_share_graphs():
    """About one for each width and resolution, in encoder and decoder together."""
    torch.manual_seed(0)
    tokenizer, _ = load_tokenizer("f16d32", "none")
    blocks = [m for m in tokenizer.network.modules() if type(m).__name__ == "ResnetBlock2D"]
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)

    def reconstructed() -> torch.Tensor:
        with torch.no_grad():
            return tokenizer.decode(tokenizer.encode(images).mode)

    plain = reconstructed()
    compiled(tokenizer)
    torch.testing.assert_close(reconstructed(), plain)
    print(f"{graphs()} graphs for {len(blocks)} residual blocks")
    assert graphs() < len(blocks) * 2 / 3
