"""The parts of a run: checkpoints, EMA, optimizer step, schedules, metrics, run folder, stop flag."""

import argparse
import copy
import json
import os
import signal

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from dataset.loader import ImageBatch
from diffusion.draws import Stream, draw, seeded_generator
from errors import UserError
from formats.run_folders import status_of
from models.denoisers.config import SiTConfig
from runtime.checkpoint import CheckpointFolder
from runtime.cli import ArgumentParser
from training.arguments import CHANGEABLE, add_schedule_arguments, check_rate_schedule, resolve_max_steps
from training.ema import EMA
from training.method import Method, Phase, frozen, train_step
from training.metrics import MeanMetrics
from training.optimizer import build_adamw, learning_rate, optimizer_step
from training.run import Run, build_accelerator, refuse_changed_arguments
from training.stop import StopFlag


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def saved(tmp_path, *steps: int, **modules) -> CheckpointFolder:
    folder = CheckpointFolder(tmp_path)
    for step in steps:
        folder.save(step, modules or {"model": network(step)}, {"counts": {"step": step}}, {"seed": 0})
    return folder


def test_checkpoint_round_trip_is_exact(tmp_path):
    module = network(1)
    optimizer = build_adamw(module.named_parameters(), (0.9, 0.999), 0.0, 1e-8)
    module(torch.randn(5, 3)).sum().backward()
    optimizer_step(optimizer, 1e-2, 1.0)
    folder = CheckpointFolder(tmp_path)
    folder.save(7, {"model": module}, {"optimizer": optimizer.state_dict()}, {})
    checkpoint = folder.newest_good()
    other = network(2)
    checkpoint.load_module("model", other)
    assert checkpoint.step == 7
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    )
    fresh = build_adamw(other.named_parameters(), (0.9, 0.999), 0.0, 1e-8)
    fresh.load_state_dict(checkpoint.load_state("optimizer"))
    for a, b in zip(optimizer.state_dict()["state"].values(), fresh.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_channels_last_weights_are_saved(tmp_path):
    convolution = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    folder = CheckpointFolder(tmp_path)
    folder.save(1, {"model": convolution}, {}, {})
    other = nn.Conv2d(4, 8, 3)
    folder.newest_good().load_module("model", other)
    assert torch.equal(other.weight, convolution.weight)


def test_going_on_from_an_earlier_step_sets_later_checkpoints_aside(tmp_path):
    """Else the next save would count as old, and be pruned."""
    folder = saved(tmp_path, 10, 20, 30)
    assert folder.set_aside_newer(30) is None
    aside = folder.set_aside_newer(10)
    folder.save(15, {"model": network(15)}, {}, {})
    folder.prune(2)
    assert [checkpoint.step for checkpoint in folder.list()] == [15, 10]
    assert sorted(path.name for path in aside.iterdir()) == ["0000020", "0000030"]


def test_milestones_of_an_abandoned_branch_are_set_aside(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (10, 20):
        folder.keep_milestone(folder.save(step, {"model": network(step)}, {}, {}), ("model",), {})
    folder.prune(1)
    aside = folder.set_aside_newer(10)
    assert aside == tmp_path / "checkpoints" / "abandoned-at-0000010"
    assert [path.name for path in (tmp_path / "milestones").iterdir() if path.name.isdigit()] == ["0000010"]
    assert (tmp_path / "milestones" / aside.name / "0000020" / "model.safetensors").is_file()


@pytest.mark.parametrize("damage", ["truncate", "flip a bit", "remove", "manifest"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, damage):
    folder = saved(tmp_path, 10, 20)
    weights = tmp_path / "checkpoints" / "0000020" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "truncate":
        weights.write_bytes(content[:-1])
    elif damage == "flip a bit":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "remove":
        weights.unlink()
    else:
        weights.with_name("manifest.json").write_text("{")
    messages = []
    assert folder.newest_good(messages.append).step == 10
    assert len(messages) == 1
    assert "0000020" in messages[0]
    with pytest.raises(UserError, match="damaged"):
        folder.at_step(20)


def test_no_intact_checkpoint_is_an_error_rather_than_a_fresh_start(tmp_path):
    folder = saved(tmp_path, 10)
    (tmp_path / "checkpoints" / "0000010" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="intact"):
        folder.newest_good()


def test_an_interrupted_save_is_invisible_and_swept_away(tmp_path):
    folder = saved(tmp_path, 10)
    torn = tmp_path / "checkpoints" / ".0000020.tmp"
    torn.mkdir()
    assert folder.newest_good().step == 10
    folder.prune(keep=2)
    assert not torn.exists()


def test_retention_keeps_the_newest_whole_and_milestones_for_good(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (10, 20, 30, 40):
        checkpoint = folder.save(step, {"model": network(step), "ema": network(-step)}, {}, {"seed": 0})
        if step % 20 == 0:
            folder.keep_milestone(checkpoint, ("ema",), {"seed": 0})
        folder.prune(keep=1)
    assert [checkpoint.step for checkpoint in folder.list()] == [40]
    milestones = sorted((tmp_path / "milestones").iterdir())
    assert [m.name for m in milestones] == ["0000020", "0000040"]
    assert {path.name for path in milestones[0].iterdir()} == {"ema.safetensors", "manifest.json"}


def test_pickled_code_in_a_checkpoint_does_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = saved(tmp_path, 10)
    torch.save({"x": Payload()}, tmp_path / "checkpoints" / "0000010" / "counts.pt")
    with pytest.raises(UserError, match="does not load"):
        folder.list()[0].load_state("counts")
    assert not (tmp_path / "ran").exists()


def test_ema_starts_as_the_copy_and_follows_parameters_and_buffers():
    module = network()
    ema = EMA(module, decay=0.75)
    expected = {name: tensor.double() for name, tensor in module.state_dict().items()}
    for step in range(3):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0)
        module(torch.randn(6, 3))
        ema.update(step)
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = 0.75 * expected[name] + 0.25 * tensor.double()
            else:
                expected[name] = tensor.double()
    for name, tensor in ema.module.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_what_a_module_holds_twice_is_averaged_once():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    torch.nn.init.zeros_(module[0].weight)
    ema = EMA(module, decay=0.75)
    torch.nn.init.ones_(module[0].weight)
    ema.update(0)
    assert torch.equal(ema.module[1].weight, torch.full((2, 2), 0.25))
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())


def test_adamw_step_equals_the_update_rule():
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = build_adamw([("weight", parameter)], (0.9, 0.99), 0.1, 1e-8)
    value, m, v = parameter.detach().double(), torch.zeros(2).double(), torch.zeros(2).double()
    for step in range(1, 4):
        gradient = torch.tensor([3.0, 4.0]).double() * step  # norm 5·step, clipped to 1
        parameter.grad = gradient.float()
        norm, skipped = optimizer_step(optimizer, 0.01 * step, max_grad_norm=1.0)
        assert norm.item() == pytest.approx(5.0 * step)
        assert skipped.item() == 0
        clipped = gradient / (5.0 * step)
        m, v = 0.9 * m + 0.1 * clipped, 0.99 * v + 0.01 * clipped**2
        value = value * (1 - 0.01 * step * 0.1)
        value = value - 0.01 * step * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-6)
        assert parameter.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_changes_neither_weights_nor_moments(bad):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = build_adamw([("weight", parameter)], (0.9, 0.999), 0.1, 1e-8)
    parameter.grad = torch.ones(2)
    optimizer_step(optimizer, 0.1, 1.0)
    weights, state = parameter.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"][0])
    parameter.grad = torch.tensor([1.0, bad])
    _, skipped = optimizer_step(optimizer, 0.1, 1.0)
    assert skipped.item() == 1
    assert torch.equal(parameter, weights)
    assert all(torch.equal(state[key], optimizer.state_dict()["state"][0][key]) for key in state)


def test_fp16_scaler_s_overflow_is_a_skipped_step_and_halves_the_scale():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = build_adamw([("weight", parameter)], (0.9, 0.999), 0.0, 1e-8)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((parameter * torch.tensor([3.0, 4.0])).sum()).backward()
    norm, skipped = optimizer_step(optimizer, 0.1, 10.0, scaler)
    scaler.update()
    assert norm.item() == pytest.approx(5.0)  # unscaled
    assert skipped.item() == 0
    moved = parameter.detach().clone()
    scaler.scale((parameter * 3e38).sum()).backward()
    _, skipped = optimizer_step(optimizer, 0.1, 10.0, scaler)
    scaler.update()
    assert skipped.item() == 1
    assert torch.equal(parameter, moved)
    assert scaler.get_scale() == 2.0


def test_adamw_knows_its_parameters_by_name_and_leaves_frozen_ones_out():
    module = network()
    module[0].requires_grad_(False)
    (group,) = build_adamw(module.named_parameters(), (0.9, 0.999), 0.0, 1e-8).state_dict()["param_groups"]
    assert group["param_names"] == ["1.weight", "1.bias", "2.weight", "2.bias"]


def test_moments_are_laid_out_as_the_parameters_that_they_are_loaded_for():
    """A run may resume with or without --channels-last."""
    before = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    now = nn.Conv2d(4, 8, 3)
    optimizers = [build_adamw(module.named_parameters(), (0.9, 0.999), 0.0, 1e-8) for module in (before, now)]
    images = torch.randn(2, 4, 5, 5)
    before(images).square().sum().backward()
    optimizer_step(optimizers[0], 1e-2, 0.0)
    now.load_state_dict(before.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for module, optimizer in zip((before, now), optimizers, strict=True):
        module(2 * images).square().sum().backward()
        optimizer_step(optimizer, 1e-2, 0.0)
    torch.testing.assert_close(now.weight, before.weight, rtol=1e-5, atol=1e-6)


def test_no_clipping():
    """0 is no clipping, not a gradient of 0; a gradient that is not finite changes nothing all the same."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = build_adamw(
        [("weight", parameter)], (0.0, 0.0), 0.0, 1e3
    )  # this epsilon: the update is about gradient / 1000
    parameter.grad = torch.tensor([3.0, 4.0])
    norm, skipped = optimizer_step(optimizer, 1.0, 0.0)
    assert (norm.item(), skipped.item()) == (5.0, 0.0)
    torch.testing.assert_close(parameter.detach(), torch.tensor([-3.0 / 1003, -4.0 / 1004]))
    before = parameter.detach().clone()
    parameter.grad = torch.tensor([3.0, float("inf")])
    assert optimizer_step(optimizer, 1.0, 0.0)[1].item() == 1.0
    assert torch.equal(parameter, before)


def test_learning_rates():
    assert [learning_rate(1.0, step, 10, "constant", 4) for step in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert learning_rate(2.0, 0, 10, "cosine") == 2.0
    assert learning_rate(2.0, 5, 10, "cosine") == pytest.approx(1.0)
    assert learning_rate(2.0, 10, 10, "cosine") == pytest.approx(0.0)
    held = [learning_rate(2.0, step, 10, "linear", 2, 3, 0.1) for step in (0, 1, 4, 5, 6, 9, 10, 30)]
    assert held == pytest.approx([1.0, 2.0, 2.0, 2.0, 1.64, 0.56, 0.2, 0.2])  # 0.36 a step from step 5 on
    assert learning_rate(2.0, 5, 10, "cosine", floor=0.5) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr-floor 0.1", "--lr-floor: the learning rate stays constant; leave it out, or give --lr-schedule"),
        ("--lr-hold-steps 5", "--lr-hold-steps: the learning rate stays constant"),
        (
            "--lr-schedule linear --warmup-steps 5 --lr-hold-steps 5 --lr-decay-until 10",
            "--lr-decay-until 10: the rate begins to fall at step 10; give more",
        ),
        ("--lr-schedule linear --lr-hold-steps 5 --epochs 2", "--lr-hold-steps 5: in 5 steps the rate would not fall"),
    ],
)
def test_a_fall_that_cannot_be_is_refused(flags, message):
    parser = argparse.ArgumentParser()
    add_schedule_arguments(parser, batch_size=4, epochs=1)
    with pytest.raises(UserError, match=message):
        check_rate_schedule(args := parser.parse_args(flags.split()))
        resolve_max_steps(args, images=10)


def test_metrics_average_over_steps_and_name_non_finite_values():
    metrics = MeanMetrics()
    metrics.update({"a": torch.tensor(1.0), "b": torch.tensor(float("nan"))})
    metrics.update({"a": torch.tensor(3.0), "b": torch.tensor(5.0)})
    metrics.update({"a": torch.tensor(5.0), "c": torch.tensor(7.0)})
    means, bad = metrics.pop()
    assert means == {"a": 3.0, "b": 5.0, "c": 7.0}
    assert bad == {"b": 1}
    assert metrics.pop() == ({}, {})


def test_metrics_continue_from_their_state():
    straight, stopped = MeanMetrics(), MeanMetrics()
    for value in (0.1, 0.7):
        straight.update({"a": torch.tensor(value)})
        stopped.update({"a": torch.tensor(value)})
    resumed = MeanMetrics()
    resumed.load_state_dict(stopped.state_dict(), rank=0, world_size=1, device=torch.device("cpu"))
    for metrics in (straight, resumed):
        metrics.update({"a": torch.tensor(0.3)})
    assert straight.pop() == resumed.pop()


@pytest.mark.parametrize("world_size", [1, 4])
def test_metrics_continue_on_another_number_of_processes(world_size):
    """Two summed a step of 1 and 3, one of them also a NaN; then there is a step of 5."""
    state = {"a": torch.tensor([[[1.0], [1.0], [0.0]], [[3.0], [1.0], [1.0]]], dtype=torch.float64)}
    sums = torch.zeros(3, 1, dtype=torch.float64)
    for rank in range(world_size):
        metrics = MeanMetrics()
        metrics.load_state_dict(state, rank, world_size, torch.device("cpu"))
        metrics.update({"a": torch.tensor(5.0)})
        sums += metrics.state_dict()["a"][0]
    total, finite, non_finite = sums.flatten().tolist()
    assert (total / finite, non_finite) == ((2 + 5) / 2, 1)


def test_generators_are_functions_of_their_counters():
    def numbers(*counters):
        return torch.rand(4, generator=seeded_generator(torch.device("cpu"), *counters)).tolist()

    assert numbers(Stream.TRAINING, 0, 1, 2) == numbers(Stream.TRAINING, 0, 1, 2)
    keys = [(Stream.TRAINING, 0, 1, 2), (Stream.VALIDATION, 0, 1, 2), (Stream.TRAINING, 1, 1, 2),
            (Stream.TRAINING, 0, 2, 1), (Stream.TRAINING, 0, 1, 2, 0)]  # fmt: skip
    assert len({tuple(numbers(*key)) for key in keys}) == len(keys)


@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
def test_a_batch_s_draws_have_their_distributions(weighting):
    draws = draw((5000, 2, 2, 1), torch.Generator().manual_seed(0), weighting)
    assert [tuple(part.shape) for part in draws[:4]] == [(5000, 2, 2, 1), (5000, 2, 2, 1), (5000,), (5000,)]
    normal = {"posterior": True, "noise": True, "times": weighting == "lognormal", "dropout": False}
    for name, part in zip(draws._fields, draws[:4], strict=False):
        mean, std = (0.0, 1.0) if normal[name] else (0.5, 12**-0.5)
        assert part.mean().item() == pytest.approx(mean, abs=0.06), name
        assert part.std().item() == pytest.approx(std, rel=0.05), name
        assert normal[name] or (part.min() >= 0 and part.max() < 1)
    assert not torch.equal(draws.posterior, draws.noise)


class Weighed(Phase):
    """Adds ``share`` times the batch's sum to a gradient, writes down its calls, and keeps the doubled batch."""

    def __init__(self, name: str, calls: list):
        self.name, self.calls, self.gradient = name, calls, 0.0

    def accumulate(self, step, micro_step, batch, share, synchronise):
        self.calls.append((self.name, step, micro_step, synchronise))
        self.gradient += share * batch.images.sum().item()
        return {f"{self.name} sum": batch.images.sum()}, ImageBatch(2 * batch.images, batch.labels)

    def update(self, step, metrics, kept):
        self.calls.append((self.name, step, {name: value.item() for name, value in metrics.items()}, len(kept)))
        return {"skipped": torch.tensor(0.0)}


class TwoPhases(Method):
    def __init__(self, calls: list):
        self.accelerator, self.phases_ = Accelerator(cpu=True), (Weighed("first", calls), Weighed("second", calls))

    @property
    def phases(self):
        return self.phases_


def test_a_step_accumulates_phase_by_phase_and_hands_on_what_was_kept():
    calls: list = []
    method = TwoPhases(calls)
    batches = [ImageBatch(torch.tensor([float(n)]), torch.zeros(1)) for n in (1, 2, 9)]
    metrics = train_step(method, 5, batches)
    accumulated = [[(name, 5, n, n == 2) for n in range(3)] for name in ("first", "second")]
    first = {"first sum": 4.0}
    assert calls == [
        *accumulated[0],
        ("first", 5, first, 3),
        *accumulated[1],
        ("second", 5, first | {"skipped": 0.0, "second sum": 8.0}, 3),
    ]
    assert [phase.gradient for phase in method.phases] == pytest.approx([4.0, 8.0])
    assert {name: value.item() for name, value in metrics.items()} == first | {"second sum": 8.0, "skipped": 0.0}


def test_frozen_modules_take_gradients_again_afterwards():
    module = network()
    with pytest.raises(RuntimeError, match="stop"), frozen(module, None):
        assert not any(parameter.requires_grad for parameter in module.parameters())
        raise RuntimeError("stop")
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_changed_flag_is_refused_by_name_and_steps_may_change(tmp_path):
    old = {"max_train_steps": 10, "seed": 0, "vae_learning_rate": 3e-4}
    refuse_changed_arguments(old, old | {"max_train_steps": 20}, CHANGEABLE, tmp_path)
    with pytest.raises(UserError, match=r"--vae-learning-rate 0.0003, not 0.001"):
        refuse_changed_arguments(old, old | {"vae_learning_rate": 1e-3}, CHANGEABLE, tmp_path)


def test_a_run_older_than_a_flag_resumes(tmp_path):
    """With the flag's default, or where it says nothing (--mapper-head with --align-loss vf); else it is refused."""
    for value in ("mlp", None):
        refuse_changed_arguments({"seed": 0}, {"seed": 0, "mapper_head": value}, CHANGEABLE, tmp_path)
    with pytest.raises(UserError, match="--mapper-head mlp, not conv"):
        refuse_changed_arguments({"seed": 0}, {"seed": 0, "mapper_head": "conv"}, CHANGEABLE, tmp_path)


def test_a_run_older_than_any_flag_was_trained_with_its_default(tmp_path):
    """Of a flag of one's own, too: nobody has to say so anywhere."""
    parser = ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--my-weight", type=float, default=0.5)
    parser.add_argument("--my-path")
    old = {"seed": 3, "output_dir": "exps"}
    for argv in ([], ["--my-weight", "0.5"], ["--my-path", "given"]):  # of what has no default nothing is known
        args = parser.parse_args(["--seed", "3", *argv])
        assert "defaults" not in vars(args)
        refuse_changed_arguments(old, vars(args), CHANGEABLE, tmp_path, args.defaults)
    args = parser.parse_args(["--seed", "3", "--my-weight", "0.7"])
    with pytest.raises(UserError, match=r"--my-weight 0\.5, not 0\.7"):
        refuse_changed_arguments(old, vars(args), CHANGEABLE, tmp_path, args.defaults)
    # made from other people's checkpoints, which do not say it
    refuse_changed_arguments({"seed": 3}, vars(args), CHANGEABLE, tmp_path, args.defaults)


def test_a_run_older_than_a_field_of_its_denoiser_resumes(tmp_path):
    now = SiTConfig("SiT-Ti/2", 4, 8, 3).to_dict()
    older = {name: value for name, value in now.items() if name != "qk_norm"}
    refuse_changed_arguments({"denoiser": older}, {"denoiser": now}, CHANGEABLE, tmp_path)
    for other in ({"qk_norm": True}, {"latent_size": 4}):
        with pytest.raises(UserError, match="a denoiser of another shape"):
            refuse_changed_arguments({"denoiser": older}, {"denoiser": now | other}, CHANGEABLE, tmp_path)
    with pytest.raises(UserError, match="a denoiser of another shape"):
        refuse_changed_arguments({"denoiser": {"model": "U-4"}}, {"denoiser": now}, CHANGEABLE, tmp_path)


def test_held_out_data_may_be_given_later(tmp_path):
    old = {"val_data_dir": None, "max_val_images": 1000, "seed": 0}
    refuse_changed_arguments(old, old | {"val_data_dir": "val", "max_val_images": 50}, CHANGEABLE, tmp_path)


def test_run_folder_truncates_what_is_done_again_and_locks_itself(tmp_path):
    accelerator = Accelerator(cpu=True)
    run = Run(tmp_path / "run", accelerator, {"seed": 0})
    for step in (1, 2, 3):
        run.log_metrics(step, {"loss": 0.5})
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    with pytest.raises(UserError, match="another process"):
        Run(tmp_path / "run", accelerator, {"seed": 0})
    run.start(step=2)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    run.set_status("stopped", 2, 9, "signal 15")
    assert status_of(tmp_path / "run") == {"state": "stopped", "step": 2, "max_train_steps": 9, "reason": "signal 15"}
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert record["args"] == {"seed": 0}
    assert record["versions"]["torch"]
    run.finish()
    Run(tmp_path / "run", accelerator, {"seed": 0}).finish()


@pytest.mark.parametrize(("damage", "told"), [(b"\xff", "1 lines of what it said"), (None, "all of what it said")])
def test_a_damaged_log_of_metrics_is_told(tmp_path, damage, told):
    run = Run(tmp_path / "run", Accelerator(cpu=True), {"seed": 0})
    for step in (1, 2, 3):
        run.log_metrics(step, {"loss": 0.5})
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"" if damage is None else b"".join([lines[0], damage + lines[1][1:], lines[2]]))
    run.start(step=3)
    run.finish()
    assert f"metrics.jsonl was damaged: {told}" in (tmp_path / "run" / "log.txt").read_text()


def test_fp16_on_a_cpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UserError, match="fp16"):
        build_accelerator("fp16")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stop_flag_remembers_a_signal_and_gives_the_handlers_back(number):
    before = signal.getsignal(number)
    flag = StopFlag()
    assert not flag.poll()
    os.kill(os.getpid(), number)
    assert flag.poll()
    assert flag.received == number
    flag.restore()
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"state": 3, "step": 1}', '{"state": "finished"}'])
def test_a_damaged_status_is_one_line(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    run = Run(tmp_path, Accelerator(cpu=True), {"max_train_steps": 5})
    with pytest.raises(UserError, match=r"status.json is damaged .*delete it"):
        run.is_finished(5)
    run.finish()
