"""Internal guidance's own checkpoints (arXiv 2512.24176): SiT and LightningDiT with a second output, read as runs."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import generate
import train_ldm
from diffusion.counted_noise import counted_normal
from formats.sit import read_sit
from formats.vae import load_tokenizer
from models.denoisers.config import LightningDiTConfig, SiTConfig
from runtime.cli import run
from tests.command_line import argv_of
from tests.foreign_runs import assert_refused, export
from tests.latent_caches import save_vae
from tests.ldm_trainings import LATENTS, write_data
from tests.ldm_trainings import flags as ldm_flags
from tests.public_lightningdit import parameters, public_config, public_state, public_velocity
from tests.public_lightningdit import write_experiment as write_lightningdit
from tests.public_sit import PublicSiT, public_args, write_experiment

DEPTH = 2
OURS = {"final_layer_xr.linear.weight": "guide_layer.linear.weight"}


@pytest.fixture(autouse=True)
def depth_of_small_networks(monkeypatch):
    monkeypatch.setattr("formats.sit.GUIDE_DEPTH", DEPTH)  # of six blocks


def probe() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    return x, torch.tensor([0.02, 0.5, 0.9]), torch.tensor([0, 4, 6])


@torch.no_grad()
def test_a_sit_has_both_velocities_and_goes_on_training(tmp_path, capsys):
    """From their experiment: weights, moments of the second output too, the weight of its error; then one step more."""
    data = write_data(tmp_path / "data")
    model, ema = (PublicSiT(dims=(), encoder_depth=DEPTH, is_guided=True, seed=seed) for seed in (1, 2))
    folder = write_experiment(tmp_path / "theirs", model, ema, public_args(enc_type=None, encoder_depth=8))
    checkpoint = read_sit(folder / "checkpoints" / "0000007.pt", "SOURCE")
    assert checkpoint.config == SiTConfig("SiT-Ti/2", 4, 8, 6, guide_depth=DEPTH)
    assert checkpoint.step == 7
    x, t, y = probe()
    for name, public in (("model", model), ("ema", ema)):
        network = checkpoint.config.build().eval()
        network.load_state_dict(checkpoint.weights[name].denoiser)
        expected, (guide,) = public.eval()(x, t, y)
        for found, other in zip(network.with_guide(x, t, y), (expected, guide), strict=True):
            assert other.std() > 0.1
            assert (found - other).abs().max() < 1e-5
    moments, state = checkpoint.moments, checkpoint.optimizer["state"]
    numbers = [name for name, _ in model.named_parameters()]
    for theirs, ours in OURS.items():
        assert torch.equal(moments[ours]["exp_avg"], state[numbers.index(theirs)]["exp_avg"])
    vae = data / LATENTS / "vae"
    assert export(folder, tmp_path / "run", vae_ckpt=vae, vae_latents_stats=vae / "latents_stats.safetensors") == 0
    assert "does not say after which block its guide comes; taking block 2" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "run/checkpoints/0000007/manifest.json").read_text())["args"]
    assert (manifest["denoiser"]["guide_depth"], manifest["guide_coeff"]) == (DEPTH, 0.5)
    renamed = folder / "checkpoints" / "step-7.pt"  # as its training names them
    (folder / "checkpoints" / "0000007.pt").rename(renamed)
    assert export(folder, tmp_path / "again", vae_ckpt=vae, vae_latents_stats=vae / "latents_stats.safetensors") == 0
    assert (tmp_path / "again/checkpoints/0000007").is_dir()
    recipe = {"align": "none", "enc_type": None, "encoder_depth": None, "projector_width": None, "max_train_steps": 8}
    recipe |= {"guide_depth": DEPTH, "guide_coeff": 0.5, "continue_train_exp_dir": tmp_path / "run"}
    with torch.enable_grad():
        assert run(train_ldm.main, ldm_flags(data, tmp_path, "more", **recipe)) == 0
        assert run(train_ldm.main, ldm_flags(data, tmp_path, "other", **recipe | {"guide_coeff": None})) == 0
    logs = [(tmp_path / name / "log.txt").read_text() for name in ("more", "other")]
    said = "its second output was trained with --guide-coeff 0.5, here it is 1"
    assert [said in log for log in logs] == [False, True]
    logged = json.loads((tmp_path / "more/metrics.jsonl").read_text().splitlines()[-1])
    assert logged["loss"] == pytest.approx(logged["denoise"] + 0.5 * logged["guide"], rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("is_bare", [False, True])
def test_a_lightningdit_has_both_velocities(tmp_path, is_bare):
    """Its configuration says the block; of bare weights it is the usual one."""
    public = public_state(is_guided=True, seed=2)
    depth = DEPTH if is_bare else 3
    if is_bare:
        torch.save({"ema": public}, tmp_path / "released.pt")
        path = tmp_path / "released.pt"
    else:
        folder, _ = write_lightningdit(tmp_path / "a", public, public, public_config(model_encoder_depth=3))
        path = folder / "checkpoints" / "0000007.pt"
    checkpoint = read_sit(path, "SOURCE")
    assert checkpoint.config == replace(LightningDiTConfig("LightningDiT-Ti/2", 4, 8, 6), guide_depth=depth)
    network = checkpoint.config.build().eval()
    network.load_state_dict(checkpoint.weights["ema"].denoiser)
    x, t, y = probe()
    for found, guide in zip(network.with_guide(x, t, y), (None, depth), strict=True):
        expected = -public_velocity(public, x, 1 - t, y, guide)  # time runs the other way there
        assert expected.std() > 0.1
        assert (found - expected).abs().max() < 1e-5


STEPS, SHIFT, GUIDE, SCALE, BEGIN = 6, 0.3, 1.4, 1.45, 0.19  # as in their configuration, fewer steps


@torch.no_grad()
def test_images_are_those_of_their_sampler_with_both_guidances(tmp_path):
    """The second output sharpens the velocities of class and null class at all times; then the null class guides."""
    public = public_state(is_guided=True, seed=2)
    torch.save({"ema": public}, tmp_path / "released.pt")
    vae = save_vae(tmp_path)
    tokenizer, _ = load_tokenizer(str(vae))
    mean, std = torch.tensor([0.5, -0.2, 0.1, 0.0]), torch.tensor([1.5, 0.7, 1.0, 2.0])
    statistics = {"mean": mean.view(1, 4, 1, 1), "std": std.view(1, 4, 1, 1)}
    torch.save(statistics, tmp_path / "stats.pt")
    flags = {"vae_ckpt": vae, "vae_latents_stats": tmp_path / "stats.pt"}
    assert export(tmp_path / "released.pt", tmp_path / "run", **flags) == 0
    labels = torch.arange(4)
    times = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    times = SHIFT * times / (1 + (SHIFT - 1) * times)
    x = counted_normal(3, torch.arange(4), 0, (4, 8, 8)).double()
    for now, then in pairwise(times):

        def sharpened(y: torch.Tensor, now=now, x=x) -> torch.Tensor:
            t = now.float().expand(len(y))
            own, guide = (public_velocity(public, x.float(), t, y, depth).double() for depth in (None, DEPTH))
            return own + (GUIDE - 1) * (own - guide)

        v = sharpened(labels)
        if now >= BEGIN:
            without = sharpened(torch.full_like(labels, 6))
            v = without + SCALE * (v - without)
        x = x + (then - now) * v
    pixels = 127.5 * (tokenizer.network.decode(x.float() * statistics["std"] + statistics["mean"]).sample + 1)
    expected = pixels.round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)
    sampling = {
        "exp_path": tmp_path / "run", "mode": "ode", "num_steps": STEPS, "time_shift": 1 / SHIFT, "seed": 3,
        "num_fid_samples": 4, "label_sampling": "equal", "guide": "internal", "guide_scale": GUIDE,
        "cfg_scale": SCALE, "guidance_high": 1 - BEGIN,
    }  # fmt: skip

    def sampled(folder: Path, **changes: object) -> np.ndarray:
        assert generate.main(argv_of(sampling | {"sample_dir": folder} | changes)) == 0
        with np.load(folder / "samples.npz", allow_pickle=False) as file:
            return file["arr_0"].astype(int)

    assert expected.std() > 20
    assert np.abs(sampled(tmp_path / "both") - expected).max() <= 1
    for name, change in {
        "one": {"guide_scale": None},
        "late": {"guide_low": 0.5},
        "long": {"guidance_high": 1},
    }.items():
        assert np.abs(sampled(tmp_path / name, **change) - expected).max() > 3, name


def test_a_block_that_there_is_not_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("formats.sit.GUIDE_DEPTH", 8)
    said = "has internal guidance after block 8 and 6 blocks"
    assert_refused(PublicSiT(dims=(), is_guided=True).state_dict(), said, tmp_path, capsys)
    assert_refused(public_state(is_guided=True), said, tmp_path, capsys)
    assert all(name in parameters(public_state(is_guided=True)) for name in OURS)
