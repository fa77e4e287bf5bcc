"""SRA: one step against a derivation, what the averaged network does in it, and train_ldm.py --align sra as called."""

import json
from argparse import Namespace

import pytest
import torch

from loss.alignment import DENOISER_ALIGNMENTS, DenoiserAlignments, settle_arguments
from loss.alignment.base import DenoiserAlignment
from loss.alignment.sra import SRA
from models.denoisers.config import SiTConfig
from models.denoisers.sit import SiT
from tests.distributed_ldm_step import BATCH, batch_draws
from tests.ldm_steps import accumulate, networks, part_of, random_batch, tiny_trainer
from tests.ldm_trainings import LATENTS, flags, write_data
from tests.sendvae_runs import gradients
from tests.test_train_ldm import metrics, train, train_halted_and_straight
from tests.test_vae_repa import matrix_flops
from training.alignment_cost import denoiser_cost, teacher_cost
from training.method import train_step

ALONE = ("sra",)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def trainer_with_average(**changes):
    """One whose average is another network than the trained one."""
    trainer = tiny_trainer(align=ALONE, **{"ema_decay": 0.5} | changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.ema.module.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trainer


def state_after(denoiser, block, *inputs):
    """By a hook, as no tap has it."""
    hidden = []
    handle = denoiser.blocks[block - 1].register_forward_hook(lambda module, args, output: hidden.append(output))
    velocity, _ = denoiser(*inputs)
    handle.remove()
    return velocity, hidden[0]


@pytest.mark.parametrize("loss", ["smooth-l1", "cosine"])
def test_a_step_equals_a_derivation(loss):
    trainer = trainer_with_average(sra_coeff=0.7, sra_loss=loss)
    twin = networks(tiny_trainer(align=ALONE, ema_decay=0.5))
    batch = random_batch(BATCH)
    draws = trainer.draws(0, 0, batch)
    numbers = torch.rand(BATCH, generator=trainer.draws(0, 0, batch).generator)
    earlier = torch.clamp(draws.times - 0.2 * numbers, min=0.0)
    assert (earlier < draws.times).all()

    mean, std = batch.stored[:, :4].float(), batch.stored[:, 4:].float()
    centre, scale = torch.tensor([0.5, -0.2, 0.1, 0.0]), torch.tensor([1.5, 0.7, 1.0, 2.0])
    x = (mean + std * draws.posterior - centre[:, None, None]) / scale[:, None, None]
    t, t_teacher = (times[:, None, None, None] for times in (draws.times, earlier))
    velocity, h = state_after(twin.denoiser, 2, (1 - t) * x + t * draws.noise, draws.times, batch.labels)
    teacher = trainer.ema.module
    with torch.no_grad():
        noisy = (1 - t_teacher) * x + t_teacher * draws.noise
        _, target = state_after(teacher, 3, noisy, earlier, batch.labels)
    first, second = twin.alignment["sra"].projector[0], twin.alignment["sra"].projector[2]
    hidden = h @ first.weight.T + first.bias
    predicted = (hidden * torch.sigmoid(hidden)) @ second.weight.T + second.bias
    assert (first.weight.shape, second.weight.shape) == ((384, 192), (192, 384))
    distance = (predicted - target).abs()
    lengths = predicted.norm(dim=-1) * target.norm(dim=-1)
    aligned = {
        "smooth-l1": torch.where(distance < 0.05, distance**2 / 0.1, distance - 0.025).mean(),
        "cosine": 1 - ((predicted * target).sum(-1) / lengths).mean(),
    }[loss]
    denoise = ((velocity - (draws.noise - x)) ** 2).mean()
    names = dict(twin.named_parameters())
    grads = dict(zip(names, torch.autograd.grad(denoise + 0.7 * aligned, names.values()), strict=True))

    found = accumulate(trainer, batch, trainer.draws(0, 0, batch))
    assert found["sra"].item() == pytest.approx(aligned.item(), rel=1e-5)
    assert found["loss"].item() == pytest.approx((denoise + 0.7 * aligned).item(), rel=1e-5)
    measured = gradients(networks(trainer))
    largest = max(gradient.abs().max() for gradient in grads.values()).item()
    assert measured.keys() == grads.keys()
    assert max((measured[name] - grads[name]).abs().max().item() for name in grads) < 1e-5 * largest
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_s_times_are_earlier_and_never_below_0():
    alignment = trainer_with_average().alignment["sra"]
    t = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    draws = batch_draws()._replace(generator=torch.Generator().manual_seed(1))
    earlier = alignment.teacher_times(t, draws)
    assert (earlier <= t).all()
    assert (earlier >= (t - 0.2).clamp_min(0)).all()
    # half of a uniform number up to 0.2; where nothing is cut its deviation is 0.2 / √12 / √3200 = 0.001
    late = t > 0.2
    assert (t - earlier)[late].mean().item() == pytest.approx(0.1, abs=0.004)
    assert (earlier[~late] == 0).any()


def test_the_term_reaches_the_blocks_up_to_its_own():
    found = {}
    for weight in (0.0, 1.0):
        trainer = trainer_with_average(sra_coeff=weight)
        accumulate(trainer, random_batch(BATCH), batch_draws())
        found[weight] = gradients(networks(trainer))
    moved = {name for name, gradient in found[1.0].items() if (gradient - found[0.0][name]).abs().max() > 1e-7}
    parts = {".".join(name.split(".")[: 3 if ".blocks." in name else 2]) for name in moved}
    embedders = {f"denoiser.{name}" for name in ("x_embedder", "t_embedder", "y_embedder")}
    assert parts == embedders | {"denoiser.blocks.0", "denoiser.blocks.1", "alignment.sra"}


def test_accumulated_micro_batches_are_the_whole_batch():
    batch, draws = random_batch(BATCH), batch_draws()
    whole, parts = (trainer_with_average(sra_interval=0.0) for _ in range(2))
    accumulate(whole, batch, draws)
    for part in (slice(0, 4), slice(4, 8)):
        accumulate(parts, part_of(batch, part), part_of(draws, part), share=0.5)
    expected, found = gradients(networks(whole)), gradients(networks(parts))
    assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-5


def test_later_states_are_learned():
    trainer = trainer_with_average(learning_rate=4e-3, ema_decay=0.9999)
    losses = [train_step(trainer, step, [random_batch(4)])["sra"].item() for step in range(20)]
    assert losses[-1] < 0.7 * losses[0]


class Recorder(DenoiserAlignment):
    """Keeps what it is given."""

    def __init__(self, needs_features: bool, teacher_taps: tuple[int, ...]):
        super().__init__()
        self.taps, self.teacher_taps, self.needs_features, self.given = (1,), teacher_taps, needs_features, None

    def forward(self, step):
        assert [tuple(state.shape) for state in step.states] == [(BATCH, 16, 192)]
        self.given = [tuple(part.shape) for part in step.features]
        return {}

    def weights(self, terms):
        return {}


def test_each_part_of_a_sum_is_given_what_it_compares_with():
    parts = {
        "vfm": Recorder(True, ()),
        "neither": Recorder(False, ()),
        "average": Recorder(False, (4, 2)),
        "both": Recorder(True, (1,)),
    }
    trainer = tiny_trainer(align=ALONE, ema_decay=0.5)
    networks(trainer).alignment = trainer.alignment = DenoiserAlignments(parts)
    trainer.teacher = trainer.ema.module
    taught, states = [], trainer.teacher.hidden_states
    trainer.teacher.hidden_states = lambda *given: taught.append(given[3]) or states(*given)
    accumulate(trainer, random_batch(BATCH), batch_draws())
    assert taught == [(4, 2), (1,)]
    vfm, state = (BATCH, 16, 12), (BATCH, 16, 192)
    given = {name: part.given for name, part in parts.items()}
    assert given == {"vfm": [vfm], "neither": [], "average": [state, state], "both": [vfm, state]}


def settled(**given: object) -> Namespace:
    args = Namespace(**dict.fromkeys(SRA.DEFAULTS) | given)
    settle_arguments(args, ALONE, {"sra": DENOISER_ALIGNMENTS["sra"]}, "--align")
    return args


@pytest.mark.parametrize(
    ("size", "blocks"), [("Ti", (2, 4)), ("S", (4, 8)), ("B", (4, 8)), ("L", (8, 20)), ("XL", (8, 20))]
)
def test_sizes_have_their_published_blocks(size, blocks):
    args = settled()
    with torch.device("meta"):
        alignment = SRA.from_arguments(args, SiT(SiTConfig(f"SiT-{size}/2", 4, 32, num_classes=1000)), [])
    assert (alignment.taps, alignment.teacher_taps) == (blocks[:1], blocks[1:])
    assert (args.sra_depth, args.sra_teacher_depth) == blocks


@pytest.mark.parametrize(("depth", "blocks"), [(1, (1, 1)), (2, (1, 1)), (13, (4, 8)), (19, (6, 12)), (20, (8, 20))])
def test_any_depth_has_its_blocks(depth, blocks):
    args = settled()
    denoiser = Namespace(depth=depth, width=4, config=Namespace(model="mine"))
    SRA.from_arguments(args, denoiser, [])
    assert (args.sra_depth, args.sra_teacher_depth) == blocks


def test_each_loss_has_its_weight():
    assert (settled().sra_coeff, settled(sra_loss="cosine").sra_coeff) == (0.2, 0.5)
    assert settled(sra_loss="cosine", sra_coeff=0.1).sra_coeff == 0.1


def test_the_averaged_network_costs_its_first_blocks():
    config = SiTConfig("SiT-B/2", 4, 32, num_classes=1000)
    with torch.device("meta"):
        denoiser = SiT(config)
    width, tokens = 768, 256
    block = 2 * (tokens * 12 * width**2 + 2 * tokens**2 * width + 6 * width**2)
    final = 2 * (tokens * 16 * width + 2 * width**2)
    assert teacher_cost(denoiser, (8,)).flops == matrix_flops(config) - 4 * block - final
    assert teacher_cost(denoiser, (8,)).parameters == 0
    assert teacher_cost(denoiser, (12,)).flops == denoiser_cost(denoiser).flops - final


def test_it_trains_without_vfm_and_images_and_resumes_exactly(data, tmp_path, no_vfm_no_images, capsys):
    options = {"align": "sra", "data_dir": None, "vae_latents_name": data / LATENTS}
    train_halted_and_straight(data, tmp_path, **options, gradient_checkpointing=True, enc_type=None)
    args = json.loads((tmp_path / "straight" / "args.json").read_text())["args"]
    expected = {"align": "sra", "sra_coeff": 0.2, "sra_depth": 2, "sra_teacher_depth": 4, "sra_interval": 0.2}
    assert {name: args[name] for name in expected} == expected
    line = metrics(tmp_path / "straight")[0]
    assert line["loss"] == pytest.approx(line["denoise"] + 0.2 * line["sra"], rel=1e-5)
    said = capsys.readouterr().err
    assert "SRA after block 2 with block 4 of the averaged network, up to 0.2 earlier, smooth-l1, weight 0.2" in said
    assert "SRA's averaged network adds 0 parameters" in said


def test_until_it_is_switched_off(data, tmp_path, monkeypatch):
    calls = []
    states = SiT.hidden_states
    monkeypatch.setattr(SiT, "hidden_states", lambda *args: calls.append(1) or states(*args))
    assert train(*flags(data, tmp_path, align="repa+sra", align_until=1)) == 0
    assert len(calls) == 2  # one to count its operations
    lines = metrics(tmp_path / "run")
    assert ["sra" in line for line in lines] == [True, False]


def test_changed_on_resume(data, tmp_path, capsys):
    """The flag that was changed is the one that is named; a weight of 0 may be left out."""
    argv = flags(data, tmp_path, align="sra", enc_type=None, max_train_steps=1)
    assert train(*argv) == 0
    assert train(*argv, "--sra-loss", "cosine") == 2
    assert "--sra-loss smooth-l1, not cosine" in capsys.readouterr().err
    none = flags(data, tmp_path, "none", align="repa", max_train_steps=None)
    assert train(*none, "--align", "repa+sra", "--sra-coeff", "0", "--max-train-steps", "1") == 0
    assert train(*none, "--max-train-steps", "2") == 0
    assert train(*none, "--vae-repa-coeff", "0", "--max-train-steps", "3") == 0


def test_the_teacher_is_the_average_but_not_compiled_with_it():
    trainer = trainer_with_average()
    teacher, average = trainer.teacher, trainer.ema.module
    pairs = list(zip(teacher.state_dict().values(), average.state_dict().values(), strict=True))
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in pairs)
    before = [ours.clone() for ours, _ in pairs]
    train_step(trainer, 0, [random_batch(4)])
    assert any(not torch.equal(old, ours) for old, (ours, _) in zip(before, pairs, strict=True))
    assert all(torch.equal(*pair) for pair in pairs)
    teacher.compile(backend="eager")
    assert teacher.blocks[0]._compiled_call_impl is not None
    assert average.blocks[0]._compiled_call_impl is None


def test_hidden_states_of_another_shape_are_noticed():
    trainer = trainer_with_average()
    trainer.teacher.hidden_states = lambda *given: (torch.zeros(1, 1, 192),)
    with pytest.raises(ValueError, match="hidden states of"):
        accumulate(trainer, random_batch(BATCH), batch_draws())


@pytest.mark.slow
def test_compiled_it_trains_alike(data, tmp_path):
    for name, switch in (("eager", "--no-compile"), ("compiled", "--compile")):
        assert train(*flags(data, tmp_path, name, align="sra", enc_type=None), switch) == 0
    eager, compiled = (metrics(tmp_path / name) for name in ("eager", "compiled"))
    for ours, theirs in zip(eager, compiled, strict=True):
        assert theirs["sra"] == pytest.approx(ours["sra"], rel=1e-4)
