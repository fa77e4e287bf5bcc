"""Muon: its update against a float64 derivation, which parameters it moves, skipping, layouts, resuming."""

import copy

import pytest
import torch
from torch import nn

import training.muon
from training.muon import NEWTON_SCHULZ, Muon, orthogonalised
from training.optimizer import build_adamw, build_muon, optimizer_step

SETTINGS = {"betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-8}


def network(seed: int = 0) -> nn.Sequential:
    """A convolution into pixels' width, one between features, an embedding, a linear map, each with a bias or norm."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3), nn.GroupNorm(4, 16), nn.Flatten(), nn.Linear(16, 9))


def backward(module: nn.Module, scale: float = 1.0) -> None:
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(3))
    module(images * scale).square().mean().backward()


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """The odd quintic, applied to singular values: what five iterations do to UΣVᵀ, whatever its shape."""
    a, b, c = NEWTON_SCHULZ
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / matrix.double().norm()
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return u * values @ v


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalised(matrices)
    assert found.shape == matrices.shape
    for matrix, of_it in zip(matrices, found, strict=True):
        torch.testing.assert_close(of_it.double(), newton_schulz(matrix), rtol=0, atol=1e-4)
    if shape[0] != shape[1]:  # a square one of random numbers has directions that are all but empty
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_directions_that_are_all_but_empty_are_no_worse_in_float32():
    """Singular values over four decades: an eigenvalue of the Gram matrix is then below its rounding errors."""
    scales = torch.logspace(0, -4, 48)[:, None]
    matrix = torch.randn(48, 200, generator=torch.Generator().manual_seed(2)) * scales
    torch.testing.assert_close(orthogonalised(matrix[None])[0].double(), newton_schulz(matrix), rtol=0, atol=1e-5)


def test_three_steps_equal_the_rule_and_adamw_where_there_is_no_matrix():
    module, plain = network(), network()
    optimizer = build_muon(module, **SETTINGS)
    adamw = build_adamw(plain.named_parameters(), **SETTINGS)
    weight = module[1].weight
    value, momentum = weight.detach().double().flatten(1), torch.zeros(16, 108).double()
    for step, rate in enumerate((0.01, 0.02, 0.015)):
        backward(module, 1.0 + step)
        for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
            theirs.grad = mine.grad.clone()
        gradient = weight.grad.double().flatten(1)
        optimizer_step(optimizer, rate, 0.0)
        optimizer_step(adamw, rate, 0.0)
        momentum = 0.95 * momentum + 0.05 * gradient
        update = newton_schulz(0.05 * gradient + 0.95 * momentum)
        value = value * (1 - rate * 0.1) - rate * 0.2 * 108**0.5 * update
        torch.testing.assert_close(weight.detach().double().flatten(1), value, rtol=0, atol=1e-5)
    # the convolution from pixels is moved too (12 x 27), the others are AdamW's
    for name in ("1.bias", "2.weight", "2.bias", "4.bias"):
        assert torch.equal(module.get_parameter(name), plain.get_parameter(name)), name


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has none")
def test_equals_torch_s_own_on_linear_maps():
    """torch's multiplies in bfloat16."""
    torch.manual_seed(0)
    ours = nn.Linear(24, 32, bias=False)
    theirs = copy.deepcopy(ours)
    optimizers = (
        build_muon(ours, **SETTINGS),
        torch.optim.Muon(theirs.parameters(), lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    before = ours.weight.detach().clone()
    for _ in range(3):
        ours.weight.grad = torch.randn(32, 24)
        theirs.weight.grad = ours.weight.grad.clone()
        optimizer_step(optimizers[0], 0.01, 0.0)
        optimizers[1].step()
    moved, difference = (ours.weight - before).norm(), (ours.weight - theirs.weight).norm()
    assert difference < 0.03 * moved


@pytest.mark.parametrize("stacked", [1, 3 * 24 * 24])
def test_what_moves_at_once_changes_nothing(stacked, monkeypatch):
    """Five matrices of one shape, one by one or by three and two, as if all at once."""

    def moved() -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = nn.Sequential(*(nn.Linear(24, 24) for _ in range(5)))
        optimizer = build_muon(module, **SETTINGS)
        for _ in range(2):
            module.zero_grad()
            module(torch.ones(2, 24)).square().sum().backward()
            optimizer_step(optimizer, 0.01, 0.0)
        return list(module.parameters())

    expected = moved()
    calls = []
    monkeypatch.setattr(training.muon, "STACKED", stacked)
    move = Muon._move_equals

    def counted(self: Muon, parameters: list, group: dict) -> None:
        calls.append(len(parameters))
        move(self, parameters, group)

    monkeypatch.setattr(Muon, "_move_equals", counted)
    for value, wanted in zip(moved(), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)
    assert calls == 2 * ([1] * 5 if stacked == 1 else [3, 2])


def test_which_parameters_are_whose():
    module = nn.ModuleDict(
        {"embedding": nn.Embedding(20, 16), "net": network(), "attention": nn.MultiheadAttention(8, 2)}
    )
    module.register_parameter("tokens", nn.Parameter(torch.randn(8, 16)))
    module["net"][4].requires_grad_(False)
    matrices, rest = build_muon(module, **SETTINGS).state_dict()["param_groups"]
    assert matrices["param_names"] == [
        "net.0.weight",
        "net.1.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    assert {"embedding.weight", "tokens"} <= set(rest["param_names"])
    assert not any(name.startswith("net.4.") for name in rest["param_names"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_neither_weights_nor_moments(bad):
    module = network()
    optimizer = build_muon(module, **SETTINGS)
    backward(module)
    optimizer_step(optimizer, 0.01, 1.0)
    weights, state = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    backward(module)
    module[1].weight.grad[0, 0, 0, 0] = bad
    assert optimizer_step(optimizer, 0.01, 1.0)[1].item() == 1
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    for number, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[number][name]) for name, value in entry.items())
    backward(module)
    optimizer_step(optimizer, 0.01, 1.0)
    assert not torch.equal(module[1].weight, weights["1.weight"])  # it goes on


def test_moments_are_saved_and_laid_out_as_the_parameters_they_are_loaded_for():
    """A run may resume with or without --channels-last."""
    before, now = network().to(memory_format=torch.channels_last), network()
    optimizers = [build_muon(module, **SETTINGS) for module in (before, now)]
    backward(before)
    optimizer_step(optimizers[0], 0.01, 1.0)
    now.load_state_dict(before.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for module, optimizer in zip((before, now), optimizers, strict=True):
        backward(module, 2.0)
        optimizer_step(optimizer, 0.01, 1.0)
    for ours, theirs in zip(before.parameters(), now.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
