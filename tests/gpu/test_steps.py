"""Training steps on a GPU: nothing synchronises, overflow skips, compiled networks are the same."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.gpu import needs_gpu
from tests.gpu.trainings import NAMES, RECIPES, UNCOMPILED, tiny_training
from training.method import Method, train_step
from training.metrics import MeanMetrics

pytestmark = needs_gpu


@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_does_not_synchronise(name, precision):
    """Only launches kernels, with accumulation, clipping, AdamW, averages, statistics and metrics."""
    assert_no_synchronisation(name, precision)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", [*RECIPES, *UNCOMPILED])
def test_a_step_of_other_recipes_does_not_synchronise(name, precision):
    """Muon, LightningDiT, iREPA, SRA, SPRINT, flow map, internal guidance, RAE, VF loss, equivariance, schedules."""
    assert_no_synchronisation(name, precision)


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_step_does_not_synchronise(name):
    """As trainings run on a GPU unless a flag says otherwise."""
    assert_no_synchronisation(name, "bf16", "--compile")


def assert_no_synchronisation(name: str, precision: str, compiled: str = "--no-compile") -> None:
    """In the third step."""
    training = tiny_training(name, compiled, "--mixed-precision", precision)
    batches, metrics = [training.batch(4), training.batch(4)], MeanMetrics()
    for step in range(2):  # AdamW makes its moments in the first
        metrics.update(train_step(training.method, training.step + step, batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics.update(train_step(training.method, training.step + 2, batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    means, non_finite = metrics.pop()
    assert means["loss"] > 0
    assert not non_finite


@pytest.mark.parametrize("name", NAMES)
def test_fp16_overflow_skips_the_step_and_lowers_the_scale(name):
    """With two or three optimizers and one scaler; the next steps go on."""
    training = tiny_training(name, "--no-compile", "--mixed-precision", "fp16")
    method, batch = training.method, training.batch(4)
    train_step(method, training.step, [batch])
    scaler, before = method.accelerator.scaler, trained_weights(method)
    scaler._scale.fill_(2.0**120)  # of a loss near 1 this is beyond fp16 in every gradient
    values = train_step(method, training.step + 1, [batch])
    assert all(value.item() == 1 for key, value in values.items() if key.endswith("skipped"))
    after = trained_weights(method)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert scaler.get_scale() == 2.0**119
    scaler._scale.fill_(1024.0)
    values = train_step(method, training.step + 2, [batch])
    assert values["skipped"].item() == 0
    assert values["loss"].isfinite()


def trained_weights(method: Method) -> dict[str, torch.Tensor]:
    """Copies of what optimizers change; averages go on following weights that stay."""
    modules = {name: module for name, module in method.modules().items() if module is not None}
    trained = {name: module.named_parameters() for name, module in modules.items() if not name.startswith("ema")}
    return {f"{name}.{key}": p.clone() for name, parameters in trained.items() for key, p in parameters}


@pytest.mark.parametrize("name", [*NAMES, *RECIPES])
def test_compiled_networks_give_the_same_step(name):
    """Losses and gradient norms of a float32 step; no graph breaks, no compilation after the first step."""
    values = {}
    for flag in ("--no-compile", "--compile"):
        torch.compiler.reset()
        counters.clear()
        training = tiny_training(name, flag, "--mixed-precision", "no", "--no-allow-tf32")
        batch = training.batch(4)
        values[flag] = train_step(training.method, training.step, [batch])
        graphs = counters["stats"]["unique_graphs"]
        train_step(training.method, training.step + 1, [batch])  # AdamW's first step is a sign, also of rounding
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["graph_break"]
        assert (graphs > 0) == (flag == "--compile")
        print(f"{name} {flag}: {graphs} graphs")
    for key, eager in values["--no-compile"].items():
        torch.testing.assert_close(
            values["--compile"][key], eager, rtol=2e-3, atol=2e-4, msg=lambda m, k=key: f"{k}: {m}"
        )
