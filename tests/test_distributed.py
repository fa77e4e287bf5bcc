"""Two real processes (gloo) against one: a step of half the batch each is a step of the whole batch."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.latent_statistics import latent_moments
from models.pixels import to_signed
from tests.distributed_step import BATCH
from tests.ldm_steps import part_of
from tests.photographs import write_class_folders
from tests.sendvae_runs import draws_for, flags, gradients, image_batch, networks, tiny_trainer
from tests.stages import ROOT, TORCHRUN, run_stage


def step_on_two_processes(tmp_path: Path, mode: str) -> list[dict[str, torch.Tensor]]:
    run_stage("tests/distributed_step.py", tmp_path / mode, mode, processes=2)
    return [load_file(tmp_path / f"{mode}-{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    ranks = step_on_two_processes(tmp_path, "plain")
    trainer = tiny_trainer(gan=False)
    _, latent = trainer.backward(0, image_batch(BATCH), draws_for(BATCH), share=1.0, synchronise=True)
    trainer.statistics.update(latent_moments(latent), 0.1)
    expected = {f"model.{name}": g for name, g in gradients(networks(trainer)).items()}
    expected |= {f"statistics.{name}": t for name, t in trainer.statistics.state_dict().items()}
    for tensors in ranks:
        assert tensors.keys() == expected.keys()
        difference = max((tensors[name] - expected[name]).abs().max().item() for name in expected)
        assert difference < 1e-5
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in expected)


@pytest.mark.slow
def test_discriminator_gradients_are_the_mean_of_local_ones(tmp_path):
    """PatchGAN's BatchNorm sees its own process's images, so the reference is computed half by half."""
    ranks = step_on_two_processes(tmp_path, "gan")
    trainer, half = tiny_trainer(loss={"adaptive_discriminator_weight": True}), BATCH // 2
    tokenizer = trainer.tokenizer
    loss, reconstruction_gradient, gan_gradient = 0, 0, 0
    for rank in (0, 1):
        mine = slice(rank * half, (rank + 1) * half)
        x = image_batch(BATCH).images[mine]
        x_hat = tokenizer.decode(tokenizer.encode(x).sample(part_of(draws_for(BATCH), mine).posterior))
        last, l1 = tokenizer.network.decoder.conv_out.weight, (to_signed(x) - x_hat).abs().mean()
        reconstruction_gradient = reconstruction_gradient + torch.autograd.grad(l1, last, retain_graph=True)[0] / 2
        generator = -trainer.discriminator(x_hat).mean()
        gan_gradient = gan_gradient + torch.autograd.grad(generator, last)[0] / 2
        real, fake = trainer.discriminator(to_signed(x)), trainer.discriminator(x_hat.detach())
        loss = loss + 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()) / 2
    loss.backward()
    expected = {f"discriminator.{name}": g for name, g in gradients(trainer.discriminator).items()}
    weight = 0.1 * reconstruction_gradient.norm() / (gan_gradient.norm() + 1e-4)
    for tensors in ranks:
        assert max((tensors[name] - expected[name]).abs().max().item() for name in expected) < 1e-5
        torch.testing.assert_close(tensors["gan_weight"], weight, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_training_on_two_processes_runs_resumes_and_keeps_one_log(tmp_path):
    data = write_class_folders(tmp_path / "images", per_class=4)
    argv = flags(data, tmp_path / "exps", "two", batch_size=4, log_steps=2, val_data_dir=data, checkpointing_steps=2)
    run_stage(*TORCHRUN, "train_sendvae.py", *argv, "--max-train-steps", "2")
    run_stage(*TORCHRUN, "train_sendvae.py", *argv, "--max-train-steps", "4")
    argv = [a if a != "two" else "straight" for a in argv]
    run_stage("train_sendvae.py", *argv, "--max-train-steps", "4", processes=2)  # without the launcher
    runs = [tmp_path / "exps" / name for name in ("two", "straight")]
    last = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-2]) for run in runs]
    assert last[0] == last[1]
    weights = [load_file(run / "checkpoints" / "0000004" / "model.safetensors") for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_wrong_input_on_two_processes_is_one_line(tmp_path):
    argv = flags(tmp_path / "missing", tmp_path / "exps")
    answer = run_stage("train_sendvae.py", *argv, processes=2, check=False)
    assert answer.returncode != 0
    lines = [line for line in answer.stderr.splitlines() if line.startswith("train_sendvae.py: error")]
    assert lines
    assert "missing" in lines[0]


@pytest.mark.slow
def test_the_others_wait_for_the_main_process_longer_than_their_group_would(tmp_path):
    """And it alone verifies the checkpoint."""
    data = write_class_folders(tmp_path / "images", per_class=4)
    argv = flags(data, tmp_path / "exps", batch_size=4, sampling_steps=2)
    run_stage("train_sendvae.py", *argv, "--max-train-steps", "1", processes=2)
    run_stage("tests/slow_main_process.py", *argv, "--max-train-steps", "2", processes=2)
    assert json.loads((tmp_path / "exps" / "run" / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_run_of_two_processes_continues_on_one_with_twice_the_micro_steps(tmp_path):
    data = write_class_folders(tmp_path / "images", per_class=4)
    # the sums of a log line are begun by two processes and ended by one
    argv = flags(data, tmp_path / "exps", batch_size=4, max_train_steps=3, log_steps=3, checkpointing_steps=2)
    run_stage("train_sendvae.py", *argv, "--mixed-precision", "bf16", processes=2)
    folder = tmp_path / "exps" / "run"
    two = json.loads((folder / "metrics.jsonl").read_text())
    changes = "--gradient-accumulation-steps", "2", "--mixed-precision", "no"
    run_stage("train_sendvae.py", *argv, *changes, "--resume-step", "2")
    one = json.loads((folder / "metrics.jsonl").read_text())
    assert one["reconstruction"] != two["reconstruction"]  # another noise, in the last step of three
    assert one["reconstruction"] == pytest.approx(two["reconstruction"], rel=0.02)
    log = (folder / "log.txt").read_text()
    for change in (
        "number of processes 2 before, 1 now: from here on noise is drawn otherwise",
        "--gradient-accumulation-steps 1 before, 2 now: from here on noise is drawn otherwise",
        "--mixed-precision bf16 before, no now: from here on results are rounded otherwise",
    ):
        assert log.count(change) == 1


@pytest.mark.slow
def test_averages_follow_statistics_on_two_processes(tmp_path):
    """Buffers move to other tensors when a module is wrapped; those of a frozen encoder stay what was measured."""
    data = write_class_folders(tmp_path / "images", per_class=4)
    alone = {"align_coeff": 0, "freeze_encoder": True, "vae_ckpt": None, "vae": "pretrained/tiny_vae", "enc_type": None}
    options = alone | {"batch_size": 4, "ema_decay": 0.5, "loss_cfg_path": "configs/l1_kl.yaml"}
    argv = flags(data, tmp_path / "exps", "frozen", **options)
    run_stage("train_sendvae.py", *argv, processes=2)
    found = [
        load_file(folder / "latents_stats.safetensors")
        for folder in (ROOT / "pretrained/tiny_vae", tmp_path / "exps/frozen/vae")
    ]
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())
    moving = flags(data, tmp_path / "exps", "moving", batch_size=4, ema_decay=1e-9, loss_cfg_path="configs/l1_kl.yaml")
    run_stage("train_sendvae.py", *moving, processes=2)
    folder = next((tmp_path / "exps/moving/checkpoints").glob("*2"))
    model, average = (load_file(folder / f"{name}.safetensors") for name in ("model", "ema"))
    for name in ("statistics.mean", "statistics.var"):
        torch.testing.assert_close(average[name], model[name], rtol=1e-6, atol=1e-7)
