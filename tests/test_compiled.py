"""Compiled in place: one graph for equal blocks, no graph breaks, the same numbers. Backend eager: tracing alone."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters

from formats.vae import load_tokenizer
from loss.perceptual import build_lpips
from models.denoisers.config import DDTConfig, DiTDHConfig, JiTConfig, LightningDiTConfig, SiTConfig
from models.denoisers.sit import SiT
from models.denoisers.sprint import SHORTCUT, draw_route
from models.discriminator import PatchDiscriminator
from models.encoders import build_encoder
from models.tokenizers.posterior import ActivatedGroupNorm, activate_in_norm
from tests.ldm_runs import random_weights
from tests.test_flow_map import recording
from training.method import frozen
from training.networks import compile_networks


@pytest.fixture(autouse=True)
def forget_graphs():
    torch.compiler.reset()
    counters.clear()
    donated = torch._functorch.config._config["donated_buffer"]
    before = getattr(donated, "default", None)
    with torch._dynamo.config.patch(), torch._functorch.config.patch():  # what compiling changes is given back
        yield
    if hasattr(donated, "default"):
        donated.default = before
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
    ("config", "count"),
    [
        (SiTConfig("SiT-Ti/2", 4, 8, 6), 2),
        (LightningDiTConfig("LightningDiT-Ti/2", 4, 8, 6, qk_norm=True), 2),
        (DiTDHConfig("DiTDH-Ti/2", 4, 8, 6, head_width=256), 3),
        (DDTConfig("DDT-Ti/2", 4, 8, 6, qk_norm=True, head_width=256), 3),
        (JiTConfig("JiT-Ti/2", 4, 8, 6), 3),
    ],
)
def test_the_blocks_of_a_denoiser_share_a_graph(config, count, checkpointing):
    """One of the block, one of a wide head's or with tokens of the class, and one of the final layer, however deep;
    gradients as without."""
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
    assert graphs() == count
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SiTConfig("SiT-Ti/2", 4, 8, 6, sprint=True), {(2, 16, 192), (2, 4, 192)}),
        (LightningDiTConfig("LightningDiT-Ti/2", 4, 8, 6, sprint=True), {(2, 16, 192), (2, 4, 192)}),
        (
            DiTDHConfig("DiTDH-Ti/2", 4, 8, 6, sprint=True, head_width=256),
            {(2, 16, 192), (2, 4, 192), (2, 16, 256)},
        ),
        (DDTConfig("DDT-Ti/2", 4, 8, 6, sprint=True, head_width=256), {(2, 28, 192), (2, 16, 192), (2, 16, 256)}),
    ],
)
def test_blocks_of_all_tokens_and_of_some_have_a_graph_each(config, expected, checkpointing):
    """For their numbers of tokens, not for any; a wide head's too. Conditions of all tokens are of length 1."""
    torch.manual_seed(0)
    network = config.build().train()
    random_weights(network, 0)
    network.gradient_checkpointing = checkpointing
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 5])
    routes = [draw_route(2, 4, 0.75, 0.5, torch.Generator().manual_seed(seed)) for seed in range(3)]
    plain = [network(x, t, y, (3,), route) for route in routes]
    shapes = set()

    def backend(graph, inputs):
        shapes.update(each.shape for each in inputs if isinstance(each, torch.Tensor) and each.dim() == 3)
        assert all(isinstance(each, torch.Tensor) for each in inputs)  # no number of tokens, of any value
        return graph.forward

    network.compile(backend=backend)
    for route, (velocity, (state,)) in zip(routes, plain, strict=True):
        found, (other,) = network(x, t, y, (3,), route)
        torch.testing.assert_close(found, velocity)
        torch.testing.assert_close(other, state)
        found.square().mean().backward()
    before = graphs()
    assert {shape for shape in shapes if shape[1] > 1} == expected
    assert before == len(expected) + 1  # and the final layer
    network(x, t, y)
    network(x, t, y, (), SHORTCUT)
    assert graphs() == before


@pytest.mark.parametrize(("name", "grid", "side"), [("dinov2-vit-s", 4, 56), ("efficientnet-lite0", 2, 32)])
def test_a_vfm_is_one_graph(name, grid, side):
    """The blocks of a transformer share it; a convolutional network is compiled whole."""
    encoder = build_encoder(name, grid, random_weights=True)
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    plain = encoder(images)
    torch.testing.assert_close(compiled(encoder)(images), plain)
    assert graphs() == 1


@pytest.mark.parametrize(("name", "grid", "side"), [("dinov2-vit-s", 4, 56), ("efficientnet-lite0", 2, 32)])
def test_a_rest_of_another_size_leaves_a_vfm_its_graph(name, grid, side, monkeypatch):
    """One made for batches of any size would serve the training, too, from the first validation on."""
    torch.compiler.reset()
    made: list[bool] = []
    encoder = build_encoder(name, grid, random_weights=True)
    monkeypatch.setattr(encoder, "compile", partial(encoder.compile, backend=recording(made)))
    with torch._dynamo.config.patch(), torch._functorch.config.patch():
        compile_networks(encoder)
        for count in (4, 4, 3, 4, 2, 3, 4):
            encoder(torch.zeros(count, 3, side, side, dtype=torch.uint8))
    torch.compiler.reset()
    assert made == [False] * 3


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


def test_a_graph_may_be_kept_by_a_thread_of_autograds():
    """A backward pass that frees its graph, then one that keeps it, as an adaptive weight does; by another thread."""
    network = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 1))
    network.compile = partial(network.compile, backend="aot_eager")
    compile_networks(network)

    def both() -> list[tuple[torch.Tensor, ...]]:
        parameters = list(network.parameters())
        freed = torch.autograd.grad(network(torch.ones(2, 4)).sum(), parameters)
        loss = network(torch.ones(2, 4)).sum()
        return [freed, *(torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))]

    with ThreadPoolExecutor(1) as other:
        freed, *kept = other.submit(both).result()
    for gradients in kept:
        assert all(torch.equal(one, wanted) for one, wanted in zip(gradients, freed, strict=True))


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_norm_takes_its_activation(precision, order):
    """The same code, reconstruction and gradients to the bit, before anything is compiled, and the same names."""
    torch.manual_seed(0)
    tokenizer, _ = load_tokenizer("f4d4-tiny", "none")
    tokenizer.to(memory_format=order)
    names, images = list(tokenizer.state_dict()), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)

    def results() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            code = tokenizer.encode(images).mode
            made = tokenizer.decode(code)
        return [
            code,
            made,
            *torch.autograd.grad(made.square().sum(), list(tokenizer.network.parameters()), allow_unused=True),
        ]

    plain = results()
    for part in (tokenizer.network.encoder, tokenizer.network.decoder):
        activate_in_norm(part)
        activate_in_norm(part)  # once more is nothing
        assert isinstance(part.conv_norm_out, ActivatedGroupNorm)
        x = torch.randn(2, part.conv_norm_out.num_channels, 8, 8).to(memory_format=order)
        assert part.conv_norm_out(x).is_contiguous(memory_format=order)
    for found, wanted in zip(results(), plain, strict=True):
        assert found is wanted is None or torch.equal(found, wanted)
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
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            images = tokenizer.decode(x)
            torch.compiler.set_stance("force_eager")
            plain = tokenizer.decode(x)
        exact = tokenizer.decode(x)
        torch.compiler.set_stance("default")
    # How far a pixel is off depends on the processor: compiled ones are no further off than eager ones, on average and
    # at the most, and so differ from each other by no more than both are off.
    (error, most), (expected, most_expected) = (
        ((each - exact).square().mean().sqrt().item(), (each - exact).abs().max().item()) for each in (images, plain)
    )
    print(f"bfloat16: {error:.5f} from float32, at most {most:.5f}; eager {expected:.5f}, {most_expected:.5f}")
    assert 0 < error < 1.1 * expected < 0.02
    assert most < 1.5 * most_expected < 0.1
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
