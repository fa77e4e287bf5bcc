"""iREPA, its halves for other alignments, and alignment weights that change: against derivations in float64."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import train_ldm
import train_sendvae
from diffusion.draws import draw
from loss.alignment import DenoisingStep, TokenGrid
from loss.alignment.irepa import IREPA
from loss.alignment.mapper import MapperAlignment
from models.denoisers.sit import SiT
from models.feature_norm import spatially_standardised
from models.latent_statistics import LatentStatistics
from models.layers import TokenConvolution
from runtime.cli import EXIT_USER_ERROR, run
from tests import ldm_trainings, sendvae_runs
from tests.distributed_ldm_step import BATCH, batch_draws
from tests.ldm_steps import CONFIG, accumulate, networks, random_batch, tiny_trainer
from tests.sendvae_runs import gradients
from tests.test_feature_norm import metrics
from training.alignment_schedule import alignment_factor, settle_alignment_schedule
from training.ldm import LDM

PLAIN = {"loss_cfg_path": "configs/l1_kl.yaml"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return ldm_trainings.write_data(tmp_path_factory.mktemp("data"))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convolved(tokens: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A 3×3 convolution of ``[N, in]`` written out: token by token, neighbour by neighbour, zeros outside."""
    grid = round(len(tokens) ** 0.5)
    result = np.tile(bias, (len(tokens), 1))
    for row in range(grid):
        for column in range(grid):
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    r, c = row + down, column + right
                    if 0 <= r < grid and 0 <= c < grid:
                        result[row * grid + column] += weight[:, :, down + 1, right + 1] @ tokens[r * grid + c]
    return result


def standardised(features: np.ndarray, strength: float) -> np.ndarray:
    """``[N, D]`` of one image."""
    deviation = np.sqrt(((features - features.mean(0)) ** 2).sum(0) / (len(features) - 1))
    return (features - strength * features.mean(0)) / (deviation + 1e-6)


def cosine_loss(tokens: np.ndarray, features: np.ndarray) -> float:
    lengths = np.linalg.norm(tokens, axis=-1) * np.linalg.norm(features, axis=-1)
    return 1 - ((tokens * features).sum(-1) / lengths).mean()


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_the_term_equals_a_derivation_in_float64(strength):
    trainer = tiny_trainer(align=("irepa",), irepa_strength=strength, irepa_coeff=0.7)
    batch, draws = random_batch(BATCH), batch_draws()
    found = accumulate(trainer, batch, draws)
    x = trainer.normalised(batch, draws).double()
    t = draws.times.double()[:, None, None, None]
    noisy = (1 - t) * x + t * draws.noise.double()
    _, (state,) = trainer.denoiser.double()(noisy, t.flatten(), batch.labels, taps=(4,))
    convolution = trainer.alignment["irepa"].double().projectors[0]
    weight, bias = convolution.weight.detach().numpy(), convolution.bias.detach().numpy()
    losses = [
        cosine_loss(convolved(tokens, weight, bias), standardised(features, strength))
        for tokens, features in zip(state.detach().numpy(), batch.features[0].double().numpy(), strict=True)
    ]
    assert found["irepa"].item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["loss"].item() == pytest.approx(found["denoise"].item() + 0.7 * np.mean(losses), rel=1e-5)
    assert all(gradient.abs().sum() > 0 for gradient in gradients(networks(trainer)).values())


def test_what_all_tokens_of_an_image_share_is_taken_away():
    tokens, shared = normal(0, 3, 16, 5), normal(1, 3, 1, 5)
    plain, moved = (spatially_standardised(part) for part in (tokens, 7 * tokens + 100 * shared))
    torch.testing.assert_close(plain, moved, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(plain.mean(1), torch.zeros(3, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(plain.std(1), torch.ones(3, 5), rtol=1e-4, atol=0)
    kept = spatially_standardised(tokens + 100 * shared, strength=0.5)
    assert kept.mean(1).abs().min() > 1


def test_a_convolution_sees_neighbours_and_no_others():
    convolution = TokenConvolution(4, 3)
    tokens = torch.zeros(1, 25, 4)
    centre = convolution(tokens)
    for place in range(25):
        changed = tokens.clone()
        changed[0, place] = 1
        moved = (convolution(changed) - centre)[0].abs().sum(-1) > 1e-6
        near = {(r, c) for r in range(5) for c in range(5) if max(abs(r - place // 5), abs(c - place % 5)) <= 1}
        assert {(index // 5, index % 5) for index in moved.nonzero().flatten().tolist()} == near


def test_the_same_denoiser_whatever_it_is_aligned_with_and_no_loss_without_weight():
    """Switched off, a step is that of an unaligned training; projectors get gradients of 0, which DDP waits for."""
    batch, draws = random_batch(BATCH), batch_draws()
    plain, off = tiny_trainer(align=()), tiny_trainer(align=("irepa",), align_until=1)
    off.denoiser.load_state_dict(plain.denoiser.state_dict())
    found = [
        trainer.backward(trainer.normalised(batch, draws), draws, batch.labels, features, 1.0, True, factor)
        for trainer, features, factor in ((plain, [], 1.0), (off, None, 0.0))
    ]
    assert found[0].keys() == found[1].keys() == {"loss", "denoise"}
    assert torch.equal(found[0]["loss"], found[1]["loss"])
    ours, theirs = gradients(networks(off)), gradients(networks(plain))
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())
    assert all(not gradient.any() for name, gradient in ours.items() if name.startswith("alignment."))


@pytest.mark.parametrize(
    ("schedule", "until", "expected"),
    [
        ("constant", None, [1, 1, 1, 1, 1]),
        ("constant", 4, [1, 1, 0, 0, 0]),
        ("linear", None, [1, 0.75, 0.5, 0.25, 0.125]),
        ("linear", 4, [1, 0.5, 0, 0, 0]),
        ("cosine", None, [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, (1 - math.cos(math.pi / 8)) / 2]),
        ("cosine", 4, [1, 0.5, 0, 0, 0]),
    ],
)
def test_schedules(schedule, until, expected):
    """At steps 0, 2, 4, 6 and 7 of 8."""
    args = tiny_trainer(align_schedule=schedule, align_until=until, max_train_steps=8).args
    settle_alignment_schedule(args)
    assert [alignment_factor(args, step) for step in (0, 2, 4, 6, 7)] == pytest.approx(expected, abs=1e-12)


def test_a_step_is_weighted_by_the_schedule():
    batch = random_batch(BATCH)
    trainer = tiny_trainer(align_schedule="linear", align_until=8)
    for step, factor in ((0, 1.0), (6, 0.25)):
        found, _ = trainer.accumulate(step, 0, batch, 1.0, synchronise=True)
        expected = found["denoise"] + factor * 0.5 * found["repa"]
        torch.testing.assert_close(found["loss"], expected, rtol=1e-6, atol=0)
    found, _ = trainer.accumulate(8, 0, batch, 1.0, synchronise=True)
    assert found.keys() == {"loss", "denoise"}


def test_the_mapper_s_times():
    """Log-normal ones, shifted, scaled into [0, 0.6]."""
    mapped = MapperAlignment([], [], 1.0, "linear", ("lognormal", 3.0), 0.6)
    draws = draw((500, 2, 2, 2), torch.Generator().manual_seed(0), "lognormal")
    latent, statistics = torch.zeros(500, 2, 2, 2), LatentStatistics(2)
    noisy = mapped.noisy(latent, statistics, draws)
    ratio = 3 * draws.times.double().exp()
    expected = 0.6 * ratio / (1 + ratio)
    torch.testing.assert_close((noisy / draws.noise)[:, 0, 0, 0].double(), expected, rtol=1e-4, atol=1e-6)
    plain = MapperAlignment([], [], 1.0, "linear").noisy(latent, statistics, draws._replace(times=draws.dropout))
    assert torch.equal(plain, draws.dropout[:, None, None, None] * draws.noise)


def test_training_with_all_of_it_resumes_exactly(data, tmp_path):
    changes = {"align": "irepa", "align_schedule": "constant", "align_until": 3, "checkpointing_steps": 2}
    argv = ldm_trainings.flags(data, tmp_path, max_train_steps=None, projector_width=None, **changes)
    straight = [a if a != "run" else "straight" for a in argv]
    for words in ([*argv, "--max-train-steps", "2"], *([*a, "--max-train-steps", "5"] for a in (argv, straight))):
        assert run(train_ldm.main, words) == 0
    lines = [metrics(tmp_path / name) for name in ("run", "straight")]
    assert lines[0] == lines[1]
    assert ["irepa" in line for line in lines[0]] == [True, True, True, False, False]
    assert run(train_ldm.main, [*argv, "--max-train-steps", "6", "--align-until", "4"]) == EXIT_USER_ERROR


@pytest.mark.parametrize(
    ("changes", "read"),
    [
        ({"repa_source": "images"}, [{"images"}, set()]),
        ({"repa_source": "features"}, [{"features"}, set()]),
        ({"repa_source": "images", "reg_coeff": 0.03}, [{"images"}, {"images"}]),  # for the class token
    ],
)
def test_once_nothing_is_aligned_nothing_is_read_for_it(data, tmp_path, monkeypatch, changes, read):
    batches, seen = [], LDM.seen

    def watched(self, batch, is_aligned):
        batches.append({name for name in ("images", "features") if getattr(batch, name) is not None})
        return seen(self, batch, is_aligned)

    monkeypatch.setattr(LDM, "seen", watched)
    argv = ldm_trainings.flags(data, tmp_path, align_until=2, max_train_steps=4, val_data_dir=None, **changes)
    assert run(train_ldm.main, argv) == 0
    assert batches == [read[0]] * 2 + [read[1]] * 2


def test_sendvae_with_both_halves_and_other_noise(data, tmp_path, monkeypatch, capsys):
    changes = {"mapper_head": "conv", "feature_norm": "spatial", "align_schedule": "cosine"}
    noise = {"noise_times": "lognormal", "noise_shift": 2.0, "noise_max": 0.8}
    argv = sendvae_runs.flags(data, tmp_path, val_data_dir=data, max_train_steps=None, **changes, **noise, **PLAIN)
    straight = [a if a != "run" else "straight" for a in argv]
    scores, drawn = MapperAlignment.scores, []

    def watched(self, code, statistics, features, draws):
        drawn.extend(draws.times.tolist())
        return scores(self, code, statistics, features, draws)

    monkeypatch.setattr(MapperAlignment, "scores", watched)
    for words in (argv, [*straight[:-2], *straight[-2:]]):
        assert run(train_sendvae.main, [*words, "--max-train-steps", "4", "--checkpointing-steps", "2"]) == 0
    lines = [[line for line in metrics(tmp_path / name) if "loss" in line] for name in ("run", "straight")]
    assert lines[0] == lines[1]
    for line in lines[0]:
        factor = (1 + math.cos(math.pi * (line["step"] - 1) / 4)) / 2
        expected = line["reconstruction"] + 1e-6 * line["kl"] + factor * line["alignment"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics(tmp_path / "run")[-1]["val/constant_cosine"] < 0.9
    assert min(drawn) < 0 < 1 < max(drawn)  # as in training: normal draws, of which log-normal times are made
    grid = sendvae_runs.flags(data, tmp_path, "one", mapper_grid=1, feature_norm="spatial", **PLAIN)
    assert run(train_sendvae.main, grid) == EXIT_USER_ERROR
    assert "--feature-norm spatial compares the tokens of an image" in capsys.readouterr().err


def test_several_vfms_have_a_convolution_each():
    denoiser = SiT(CONFIG)
    alignment = IREPA(denoiser, [TokenGrid("a", 4, 12), TokenGrid("b", 4, 7)], depth=2, weight=0.5, strength=1.0)
    state = torch.randn(2, 16, denoiser.width)
    assert [tuple(part.shape) for part in alignment.predict([state])] == [(2, 16, 12), (2, 16, 7)]
    features = [torch.randn(2, 16, 12), torch.randn(2, 16, 7)]
    terms = alignment(DenoisingStep(None, None, None, None, None, features, [state]))
    assert terms.keys() == {"irepa", "irepa/a", "irepa/b"}
    assert alignment.weights(terms) == {"irepa": 0.5, "irepa/a": 0.0, "irepa/b": 0.0}
