"""SPRINT: which tokens are kept, a network against a derivation, train_ldm.py --sprint and generate.py as called."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import export_ldm
import generate
import train_ldm
import train_repae
from dataset.toy import main as make_toy
from diffusion.counted_noise import counted_normal
from diffusion.draws import Draws
from inference.sample_folder import build_sampler, default_folder, load_networks
from inference.trained_ldm import open_trained_ldm
from loss.alignment import DenoiserAlignments
from loss.alignment.base import DenoiserAlignment
from models.denoisers import Denoiser, DenoiserConfig
from models.denoisers.config import TOKEN_GROUPS, LightningDiTConfig, SiTConfig
from models.denoisers.sit import SiT
from models.denoisers.sprint import DENSE, SHORTCUT, Fusion, Route, draw_route, select
from models.denoisers.transformer import Block, Transformer
from tests.distributed_ldm_step import BATCH, batch_draws
from tests.ldm_runs import CLASS_NAMES, STEP, random_weights, write_ldm_run
from tests.ldm_runs import flags as sampling_flags
from tests.ldm_steps import accumulate, networks, part_of, random_batch, tiny_trainer
from tests.ldm_trainings import flags, write_data
from tests.repae_runs import flags as repae_flags
from tests.sendvae_runs import gradients
from tests.test_experiment import commands
from tests.test_generate import images_in, largest_difference
from tests.test_train_ldm import metrics, train, train_halted_and_straight, weights
from tests.test_vae_repa import matrix_flops
from training.alignment_cost import denoiser_cost, training_route
from training.method import train_step

SPRINT = SiTConfig("SiT-Ti/2", 4, 8, 6, sprint=True)  # 4×4 tokens; blocks 2 to 5 are the middle ones
CONFIGS = [
    SPRINT,
    replace(SPRINT, class_token_width=12),
    LightningDiTConfig("LightningDiT-Ti/2", 4, 8, 6, qk_norm=True, sprint=True),
    LightningDiTConfig("LightningDiT-Ti/2", 4, 8, 6, class_token_width=12, sprint=True),
]
FLAGS = {"token_drop": 0.75, "token_drop_until": None, "path_drop": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_ldm_run(tmp_path_factory.mktemp("exps") / "run", sprint=True, path_drop=0.1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(config: DenoiserConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)  # of the mask token
    network = config.build()
    random_weights(network, 0, std=0.1)
    return network.to(dtype).train()


def inputs(config: DenoiserConfig, count: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    network = config.build()
    x = torch.randn(count, *network.state_shape, generator=generator(1), dtype=dtype)
    return x, torch.rand(count, generator=generator(2), dtype=dtype), torch.arange(count) % 7


def tokens_seen(network: Denoiser) -> list[list[int]]:
    """Filled by every forward pass: how many tokens each block is given."""
    seen: list[list[int]] = []

    def note(block: Block, given: tuple, output: torch.Tensor) -> None:
        if block is network.blocks[0]:
            seen.append([])
        seen[-1].append(given[0].shape[1])

    for block in network.blocks:
        block.register_forward_hook(note)
    return seen


# --- which tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("token_drop", "group"), TOKEN_GROUPS.items())
def test_each_square_keeps_as_many_tokens_and_each_token_as_often(token_drop, group):
    side, number = group
    count, grid = 3000, 8
    kept = draw_route(count, grid, token_drop, 0.0, generator()).kept
    assert kept.shape == (count, round(grid**2 * (1 - token_drop)))
    chosen = torch.zeros(count, grid**2).scatter(1, kept, 1.0)
    assert chosen.sum(1).eq(kept.shape[1]).all()  # none twice
    squares = F.avg_pool2d(chosen.unflatten(1, (1, grid, grid)), side, divisor_override=1)
    assert squares.eq(number).all()
    # 3,000 draws of probability p have a deviation of √(p(1 − p) / 3000) ≤ 0.0092; five of them for 64 tokens
    assert (chosen.mean(0) - (1 - token_drop)).abs().max() < 0.046
    pairs = (chosen[:, 0] * chosen[:, grid - 1]).mean()  # in squares of their own: independent
    assert pairs.item() == pytest.approx((1 - token_drop) ** 2, abs=0.046)


def test_a_route_is_a_function_of_the_generator():
    first, second, other = (draw_route(8, 8, 0.75, 0.5, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.kept, second.kept) and torch.equal(first.skipped, second.skipped)
    assert not torch.equal(first.kept, other.kept)
    assert draw_route(8, 8, 0.0, 0.0, generator()) == DENSE
    skipped = draw_route(3000, 2, 0.0, 0.1, generator()).skipped
    assert skipped.float().mean().item() == pytest.approx(0.1, abs=0.028)  # five deviations of 0.0055


@pytest.mark.parametrize(("depth", "middle"), [("Ti", (2, 5)), ("S", (3, 10)), ("XL", (3, 26))])
def test_the_middle_blocks(depth, middle):
    sparse = SiTConfig(f"SiT-{depth}/2", 4, 32, 1000, sprint=True).sparse_blocks
    assert (sparse[0], sparse[-1]) == middle
    assert not SiTConfig(f"SiT-{depth}/2", 4, 32, 1000).sparse_blocks


# --- the network --------------------------------------------------------------------------------------------------


def masked(block: Block, x: torch.Tensor, condition: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """A block on all tokens of which only those of ``kept``, a bool ``[N]``, are attended to."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation(condition)[:, None].chunk(6, -1)
    attention = block.attn
    q, k, v = attention.qkv(block.norm1(x) * (1 + scale) + shift).unflatten(-1, (3, attention.heads, -1)).unbind(2)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if attention.positions is not None:
        q, k = attention.positions(q), attention.positions(k)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    shares = scores.masked_fill(~kept, -torch.inf).softmax(-1)
    x = x + gate * attention.proj(torch.einsum("bhij,bjhd->bihd", shares, v).flatten(2))
    return x + gate_mlp * block.mlp(block.norm2(x) * (1 + scale_mlp) + shift_mlp)


def derived(network: Transformer, x, t, y, route: Route) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Velocity and states after each block, image by image: all tokens go everywhere, behind masks."""
    is_lightning = isinstance(network.config, LightningDiTConfig)
    t = 1 - t if is_lightning else t
    velocities, states, extra = [], {}, min(1, network.class_token_width)
    for number in range(len(x)):
        latent, class_token = network.unpack(x[number : number + 1])
        tokens = network.x_embedder(latent) + network.pos_embed
        if extra:
            tokens = torch.cat([network.class_token_embedder(class_token)[:, None], tokens], 1)
        condition = F.silu(network.t_embedder(t[number : number + 1]) + network.y_embedder(y[number : number + 1]))
        kept = torch.tensor([place < extra or place - extra in route.kept[number] for place in range(tokens.shape[1])])
        for block_number, block in enumerate(network.blocks, start=1):
            if block_number == 2:
                dense = tokens
            if block_number == 6:
                uses_deep = kept & ~route.skipped[number]
                deep = torch.where(uses_deep[:, None], tokens, network.fusion.mask_token)
                tokens = network.fusion.linear(torch.cat([deep, dense], -1))
            tokens = masked(block, tokens, condition, kept if 2 <= block_number <= 5 else torch.ones_like(kept))
            states.setdefault(block_number, []).append(tokens[0, extra:])
        patches, token = network.final_layer(tokens, condition[:, None])
        latent = patches.unflatten(1, (4, 4)).unflatten(-1, (2, 2, 4)).permute(0, 5, 1, 3, 2, 4).reshape(1, 4, 8, 8)
        velocities.append(network.pack(latent, token))
    velocity = torch.cat(velocities)
    return -velocity if is_lightning else velocity, {number: torch.stack(each) for number, each in states.items()}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_network_equals_a_derivation(config):
    """With masks in the place of fewer tokens, in float64; the second image goes without the middle blocks."""
    network = built(config, torch.float64)
    x, t, y = inputs(config, dtype=torch.float64)
    route = draw_route(3, 4, 0.75, 0.0, generator())._replace(skipped=torch.tensor([False, True, False]))
    velocity, states = network(x, t, y, (1, 2, 5, 6), route)
    expected, of_blocks = derived(network, x, t, y, route)
    assert expected.std() > 0.05
    torch.testing.assert_close(velocity, expected, rtol=0, atol=2e-6)  # times and rotary tables are float32
    for state, tap in zip(states, (1, 2, 5, 6), strict=True):
        places = network.places(tap, route)
        assert (places is None) == (tap in (1, 6))
        torch.testing.assert_close(state, select(of_blocks[tap], places), rtol=0, atol=2e-6)


def test_tokens_go_by_rows_there_and_back():
    """As gather and scatter do it, bit for bit, whose deterministic kernels would sort a key for each number."""
    g, used = generator(), []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            used.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    tokens, mask = torch.randn(3, 16, 8, generator=g), torch.randn(8, generator=g)
    places = draw_route(3, 4, 0.75, 0.0, g).kept
    wide = places[..., None].expand(-1, -1, 8)
    weights = torch.randn(3, 16, 8, generator=g)
    fusion = Fusion(8)
    with torch.no_grad():
        fusion.linear.weight.copy_(torch.cat([torch.eye(8), torch.zeros(8, 8)], 1))  # what is deep, as it is
        fusion.linear.bias.zero_()
        fusion.mask_token.copy_(mask)
    results = []
    for by_rows in (True, False):
        x = tokens.clone().requires_grad_()
        with Recorder():
            if by_rows:
                some = select(x, places)
                all_again = fusion(torch.zeros(3, 16, 8), 2 * some, places, None)
            else:
                some = x.gather(1, wide)
                all_again = mask.expand(3, 16, 8).scatter(1, wide, 2 * some)
            (all_again * weights).sum().backward()
        results.append((some.detach(), all_again.detach(), x.grad))
        assert any("scatter" in name or "gather" in name for name in used) == (not by_rows)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("config", CONFIGS)
def test_all_tokens_are_a_route_too(config):
    network, (x, t, y) = built(config), inputs(config)
    whole, _ = network(x, t, y)
    everything = Route(torch.arange(16).expand(3, -1), torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(network(x, t, y, (), everything)[0], whole, rtol=0, atol=1e-5)
    sparse, _ = network(x, t, y, (), draw_route(3, 4, 0.75, 0.0, generator()))
    assert (sparse - whole).abs().max() > 0.01


@pytest.mark.parametrize("config", CONFIGS)
def test_the_shortcut_runs_the_first_and_last_blocks_alone(config):
    network, (x, t, y) = built(config), inputs(config)
    without = Route(skipped=torch.ones(3, dtype=torch.bool))
    expected, _ = network(x, t, y, (), without)
    seen = tokens_seen(network)
    torch.testing.assert_close(network(x, t, y, (), SHORTCUT)[0], expected)
    assert seen == [[16 + min(1, config.class_token_width)] * 2]


def test_gradients_reach_every_parameter_and_checkpointing_changes_none():
    found = []
    for checkpointing in (False, True):
        network, (x, t, y) = built(SPRINT), inputs(SPRINT)
        network.gradient_checkpointing = checkpointing
        network(x, t, y, (), draw_route(3, 4, 0.75, 0.3, generator()))[0].square().mean().backward()
        found.append({name: parameter.grad for name, parameter in network.named_parameters()})
    plain, checkpointed = found
    assert all(gradient.abs().sum() > 0 for name, gradient in plain.items() if not name.startswith("y_embedder"))
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_the_output_s_type_is_that_of_a_block_under_autocast():
    network, (x, t, y) = built(SPRINT), inputs(SPRINT)
    types = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda block, given: types.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        velocity, _ = network(x, t, y, (), draw_route(3, 4, 0.75, 0.3, generator()))
    assert set(types) == {torch.float32}
    plain, _ = network(x, t, y, (), draw_route(3, 4, 0.75, 0.3, generator()))
    torch.testing.assert_close(velocity.float(), plain, rtol=0, atol=0.05 * plain.std().item() * 3)


def test_a_folder_of_weights_keeps_it(tmp_path):
    network, (x, t, y) = built(SPRINT).eval(), inputs(SPRINT)
    network.save_pretrained(tmp_path / "network")
    read = type(network).from_pretrained(tmp_path / "network")
    assert read.config == SPRINT
    assert torch.equal(read(x, t, y)[0], network(x, t, y)[0])
    assert torch.equal(read(x, t, y, (), SHORTCUT)[0], network(x, t, y, (), SHORTCUT)[0])
    assert "sprint" not in SiTConfig("SiT-Ti/2", 4, 8, 6).to_dict()  # as of runs before there was such a thing


def test_its_cost_is_counted():
    """Of XL/1 on 16×16 tokens: blocks, embedders and the last layer, by hand."""
    config = SiTConfig("SiT-XL/1", 32, 16, 1000)
    with torch.device("meta"):
        network, plain = replace(config, sprint=True).build(), config.build()
    width, tokens, some = 1152, 256, 64
    block = {n: 2 * (n * 12 * width**2 + 2 * n**2 * width + 6 * width**2) for n in (tokens, some)}
    saved = 24 * (block[tokens] - block[some])
    fusion = {n: 2 * (tokens + n + 1) * width**2 for n in (tokens, some)}  # dense, deep, and the mask token
    assert denoiser_cost(plain).flops == matrix_flops(config)
    assert denoiser_cost(network).flops == matrix_flops(config) + fusion[tokens]
    sparse = denoiser_cost(network, training_route(network, 0.75))
    assert sparse.flops == matrix_flops(config) - saved + fusion[some]
    assert sparse.flops / denoiser_cost(plain).flops == pytest.approx(0.356, abs=0.001)
    assert sparse.parameters == denoiser_cost(plain).parameters + 2 * width**2 + width
    assert training_route(network, 0.0) is None


# --- a step of training -------------------------------------------------------------------------------------------


def trainer_of(config: DenoiserConfig = SPRINT, **changes):
    return tiny_trainer(config=config, **FLAGS | {"encoder_depth": 3, "ema_decay": 0.5} | changes)


def with_generator(draws: Draws, seed: int = 0) -> Draws:
    return draws._replace(generator=generator(seed))


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_repa_compares_the_tokens_that_are_there(depth):
    trainer, batch = trainer_of(encoder_depth=depth), random_batch(BATCH)
    found = accumulate(trainer, batch, with_generator(batch_draws()))
    draws = with_generator(batch_draws())
    route = draw_route(BATCH, 4, 0.75, 0.1, draws.generator)
    x = trainer.normalised(batch, draws)
    t = draws.times[:, None, None, None]
    noisy = (1 - t) * x + t * draws.noise
    velocity, (state,) = networks(trainer).denoiser(noisy, draws.times, batch.labels, (depth,), route)
    (predicted,) = networks(trainer).alignment["repa"].predict([state])
    (features,) = batch.features
    if depth == 3:
        features = torch.stack([part[kept] for part, kept in zip(features, route.kept, strict=True)])
    assert predicted.shape == features.shape == (BATCH, 4 if depth == 3 else 16, 12)
    expected = 1 - F.cosine_similarity(predicted, features.float(), dim=-1).mean()
    assert found["repa"].item() == pytest.approx(expected.item(), rel=1e-5)
    denoise = (velocity - (draws.noise - x)).square().mean()
    assert found["denoise"].item() == pytest.approx(denoise.item(), rel=1e-5)


def test_sra_s_teacher_sees_all_tokens():
    trainer, batch = trainer_of(align=("sra",), sra_interval=0.0), random_batch(BATCH)
    random_weights(trainer.ema.module, 3)
    seen = tokens_seen(trainer.teacher)
    found = accumulate(trainer, batch, with_generator(batch_draws()))
    assert seen == [[16, 16, 16]]
    draws = with_generator(batch_draws())
    route = draw_route(BATCH, 4, 0.75, 0.1, draws.generator)
    x = trainer.normalised(batch, draws)
    t = draws.times[:, None, None, None]
    noisy = (1 - t) * x + t * draws.noise
    _, (state,) = networks(trainer).denoiser(noisy, draws.times, batch.labels, (2,), route)
    _, (later,) = trainer.ema.module(noisy, draws.times, batch.labels, (3,))
    target = torch.stack([part[kept] for part, kept in zip(later, route.kept, strict=True)])
    distance = (networks(trainer).alignment["sra"].projector(state) - target).abs()
    expected = torch.where(distance < 0.05, distance**2 / 0.1, distance - 0.025).mean()
    assert found["sra"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("align", ["irepa", "vae"])
def test_what_wants_all_tokens_is_refused_in_the_middle_blocks(align, data, tmp_path, capsys):
    depth = {"vae": "vae_repa_depth", "irepa": "encoder_depth"}[align]
    common = {"sprint": True, "align": align, "enc_type": "efficientnet-lite0" if align == "irepa" else None}
    assert train(*flags(data, tmp_path, **common | {depth: 3})) == 2
    said = capsys.readouterr().err
    assert f"--align {align} wants all tokens after block 3" in said
    assert "blocks 2 to 5" in said
    assert not (tmp_path / "run").exists()
    assert train(*flags(data, tmp_path, "first", **common | {depth: 1})) == 0
    assert train(*flags(data, tmp_path, "all", **common | {depth: 3, "token_drop": 0})) == 0


class Places(DenoiserAlignment):
    """Keeps which tokens it is told that its states have."""

    takes_some_tokens = True

    def __init__(self, *taps: int):
        super().__init__()
        self.taps, self.told = taps, None

    def forward(self, step):
        self.told = [None if some is None else some.shape[1] for some in step.places]
        assert [state.shape[1] for state in step.states] == [some or 16 for some in self.told]
        assert step.at_places(torch.zeros(BATCH, 16, 2), len(self.taps) - 1).shape[1] == (self.told[-1] or 16)
        return {}

    def weights(self, terms):
        return {}


def test_each_part_of_a_sum_is_told_the_places_of_its_own_states():
    parts = {"dense": Places(1), "both": Places(6, 2), "middle": Places(5)}
    trainer = trainer_of()
    networks(trainer).alignment = trainer.alignment = DenoiserAlignments(parts)
    accumulate(trainer, random_batch(BATCH), with_generator(batch_draws()))
    assert {name: part.told for name, part in parts.items()} == {"dense": [None], "both": [None, 4], "middle": [4]}


def test_a_class_token_goes_along():
    """With REG: it is in every block, and no state that is aligned has it."""
    config = replace(SPRINT, class_token_width=12)
    trainer = trainer_of(config, align=("repa",), reg_coeff=0.5)
    seen = tokens_seen(networks(trainer).denoiser)
    batch = random_batch(BATCH, config=config)
    found = accumulate(trainer, batch, with_generator(batch_draws(class_token_width=12)))
    assert seen == [[17, 5, 5, 5, 5, 17]]
    assert found.keys() >= {"denoise", "class_token", "repa"}
    gradient = gradients(networks(trainer))["denoiser.class_token_embedder.proj.weight"]
    assert gradient.abs().sum() > 0


def test_the_numbers_of_a_step_are_those_without_it():
    """Its own are drawn after them; a step's route is a function of (seed, step, micro-step)."""
    batch = random_batch(4)
    ours, plain = trainer_of(), tiny_trainer()
    for name, one in ours.draws(3, 1, batch)._asdict().items():
        if name != "generator":
            assert torch.equal(one, plain.draws(3, 1, batch)._asdict()[name]), name
    kept = [ours.route(step, ours.draws(step, part, batch)).kept for step, part in ((3, 1), (3, 1), (3, 0), (4, 1))]
    assert torch.equal(kept[0], kept[1])
    assert not any(torch.equal(kept[0], other) for other in kept[2:])
    assert plain.route(3, plain.draws(3, 1, batch)) is None


def test_accumulated_micro_batches_are_the_whole_batch():
    batch, draws = random_batch(BATCH), batch_draws()
    whole, parts = trainer_of(), trainer_of()
    route = draw_route(BATCH, 4, 0.75, 0.3, generator())
    whole.route = lambda step, draws: route
    accumulate(whole, batch, draws)
    for part in (slice(0, 4), slice(4, 8)):
        parts.route = lambda step, draws, part=part: Route(route.kept[part], route.skipped[part])
        accumulate(parts, part_of(batch, part), part_of(draws, part), share=0.5)
    expected, found = gradients(networks(whole)), gradients(networks(parts))
    assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-5


def test_until_all_tokens_are_seen_again():
    trainer = trainer_of(token_drop_until=2)
    seen = tokens_seen(networks(trainer).denoiser)
    for step in range(3):
        train_step(trainer, step, [random_batch(4)])
    sparse = [16, 4, 4, 4, 4, 16]
    assert seen == [sparse, sparse, [16] * 6]


@pytest.mark.parametrize("config", CONFIGS[::2])
def test_an_image_is_learned(config):
    """From a quarter of the tokens; measured on all of them."""
    trainer = trainer_of(config, align=(), max_train_steps=120, path_drop=0.0)
    batch, noise = random_batch(4), torch.randn(4, 4, 8, 8, generator=generator(5))
    x = trainer.normalised(batch, trainer.draws(0, 0, batch)._replace(posterior=torch.zeros_like(noise)))

    def error() -> float:
        with torch.no_grad():
            velocity, _ = networks(trainer).denoiser((x + noise) / 2, torch.full((4,), 0.5), batch.labels)
        return (velocity - (noise - x)).square().mean().item()

    before = error()
    for step in range(120):
        train_step(trainer, step, [batch])
    print(f"{config.model}: {before:.3f} before, {error():.3f} after 120 steps")
    assert error() < 0.8 * before


# --- train_ldm.py -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["SiT-Ti/2", "LightningDiT-Ti/2"])
def test_it_trains_and_resumes_exactly(data, tmp_path, model, capsys):
    options = {"sprint": True, "model": model, "encoder_depth": 3}
    train_halted_and_straight(data, tmp_path, **options)
    args = json.loads((tmp_path / "straight" / "args.json").read_text())["args"]
    assert {name: args[name] for name in FLAGS} == FLAGS
    assert args["denoiser"]["sprint"] is True
    said = capsys.readouterr().err
    assert (
        "SPRINT: blocks 2 to 5 see 4 of 16 tokens; what they make of an image is dropped with probability 0.1" in said
    )
    assert "GFLOPs a forward pass of training, 52% of the 0.09 with all tokens" in said
    assert train(*flags(data, tmp_path, "halted", **options | {"token_drop": 0.5, "max_train_steps": 5})) == 2
    assert "--token-drop 0.75, not 0.5" in capsys.readouterr().err


def test_a_run_on_all_tokens_continues_it(data, tmp_path, capsys):
    sparse = {"sprint": True, "encoder_depth": 3}
    assert train(*flags(data, tmp_path, "sparse", **sparse)) == 0
    source = {"continue_train_exp_dir": tmp_path / "sparse", "max_train_steps": 4}
    assert train(*flags(data, tmp_path, "dense", **sparse, **source, token_drop=0)) == 0
    assert [line["step"] for line in metrics(tmp_path / "dense")] == [3, 4]
    capsys.readouterr()
    assert train(*flags(data, tmp_path, "other", **source)) == 2
    assert "was trained with sprint True, not False (--sprint)" in capsys.readouterr().err
    assert train(*flags(data, tmp_path, "plain")) == 0
    source["continue_train_exp_dir"] = tmp_path / "plain"
    assert train(*flags(data, tmp_path, "other", **sparse, **source)) == 2
    assert "was trained with sprint False, not True (--sprint)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_drop": 0.5}, "--token-drop is for --sprint"),
        ({"token_drop": 0}, "--token-drop is for --sprint"),
        ({"path_drop": 0.1}, "--path-drop is for --sprint"),
        ({"token_drop_until": 1}, "--token-drop-until is for --sprint"),
        ({"sprint": True, "token_drop": 0, "token_drop_until": 1}, "no token is dropped"),
        ({"sprint": True, "path_drop": 0.1, "cfg_prob": 0}, "--path-drop with --cfg-prob 0"),
        ({"sprint": True, "model": "SiT-Ti/8"}, "take another patch, or leave --sprint out"),
        ({"sprint": True, "model": "SiT-Ti/4", "token_drop": 0.875}, "take one of 0.5, 0.75"),
    ],
)
def test_wrong_usage(data, tmp_path, capsys, changes, message):
    assert train(*flags(data, tmp_path, align="none", **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


DRY = ["--dry-run", "--vae", "f4d4-tiny", "--resolution", "32", "--model", "SiT-Ti/2"]
SPARSE, ALL = [16, 4, 4, 4, 4, 16], [16] * 6


@pytest.fixture
def numbers_of_tokens(monkeypatch):
    """What the blocks are given, one after the other."""
    seen: list[int] = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *given: seen.append(given[1].shape[1]) or forward(*given))
    return seen


def test_a_dry_run_shows_the_step_on_all_tokens(numbers_of_tokens, monkeypatch, capsys):
    """After two with everything, also where the alignment ends before the dropping does."""
    monkeypatch.setattr(train_ldm, "cost_lines", lambda *given: [])
    flags = ["--enc-type", "efficientnet-lite0", "--random-weights", "--encoder-depth", "3", "--align-until", "20"]
    assert train(*DRY, *flags, "--sprint", "--token-drop-until", "40") == 0
    assert numbers_of_tokens == SPARSE + SPARSE + ALL
    output = capsys.readouterr().out
    assert ["repa" in line for line in output.splitlines() if "images at once" in line] == [True, True, False]
    assert "as after step 40: 2 images at once" in output


def test_a_dry_run_takes_no_step_twice(numbers_of_tokens, monkeypatch):
    monkeypatch.setattr(train_ldm, "cost_lines", lambda *given: [])
    assert train(*DRY, "--align", "none", "--sprint", "--token-drop-until", "1") == 0
    assert numbers_of_tokens == SPARSE + ALL


def test_the_search_for_what_fits_drops_none(monkeypatch):
    """Of --micro-batch-size auto: all tokens where a training ends with them, else as it is."""
    found = []

    class Seen(train_ldm.Trial):
        def find(self, args, accelerator):
            args.max_train_steps = 7  # as a search does where a dry run knows no length
            built = [build().args for build in (self.build_largest, self.build)]
            assert all(each.max_train_steps == 7 for each in built)
            found.append([each.token_drop for each in built])

    monkeypatch.setattr(train_ldm, "Trial", Seen)
    for until in ([], ["--token-drop-until", "40"]):
        assert train(*DRY, "--align", "none", "--sprint", *until) == 0
    assert found == [[0.75, 0.75], [0.0, 0.75]]


def test_what_a_run_does_not_reach_is_said(data, tmp_path, capsys):
    options = {"sprint": True, "align": "none", "enc_type": None}
    assert train(*flags(data, tmp_path, **options, token_drop_until=2)) == 0
    assert "all of them after step 2 (which this run of 2 does not reach" in capsys.readouterr().err
    assert train(*flags(data, tmp_path, "reached", **options, token_drop_until=1)) == 0
    said = capsys.readouterr().err
    assert "all of them after step 1; what they make" in said
    assert "GFLOPs a forward pass of training" in said


def test_without_a_null_class_no_path_is_dropped(data, tmp_path):
    assert train(*flags(data, tmp_path, sprint=True, align="none", enc_type=None, cfg_prob=0)) == 0
    assert json.loads((tmp_path / "run" / "args.json").read_text())["args"]["path_drop"] == 0


def test_a_run_that_is_older_than_these_flags_goes_on(data, tmp_path):
    argv = flags(data, tmp_path, align="none", enc_type=None, max_train_steps=None)
    assert train(*argv, "--max-train-steps", "1") == 0
    for path in (tmp_path / "run" / "args.json", tmp_path / "run" / "checkpoints" / "0000001" / "manifest.json"):
        record = json.loads(path.read_text())
        for name in ("sprint", *FLAGS):
            del record["args"][name]
        path.write_text(json.dumps(record))
    assert train(*argv, "--max-train-steps", "2") == 0
    assert open_trained_ldm(tmp_path / "run", None, "ema").path_drop == 0


def test_repa_e_trains_on_some_tokens_and_aligns_its_vae_by_all(tmp_path, numbers_of_tokens):
    make_toy(["--output", str(tmp_path / "images"), "--num-images", "12", "--resolution", "32"])
    common = {"sprint": True, "encoder_depth": 3, "token_drop_until": 1, "gradient_checkpointing": True}
    straight = repae_flags(tmp_path / "images", tmp_path, "straight", **common)
    assert train_repae.run(train_repae.main, straight) == 0
    # of the first step: the VAE's alignment and the denoiser, both recomputed; then no token is dropped any more
    assert numbers_of_tokens[:18] == [16] * 6 + SPARSE + SPARSE
    assert set(numbers_of_tokens[18:]) == {16}
    halted = repae_flags(tmp_path / "images", tmp_path, "halted", **common | {"max_train_steps": 1})
    assert train_repae.run(train_repae.main, halted) == 0
    halted = repae_flags(tmp_path / "images", tmp_path, "halted", **common)
    assert train_repae.run(train_repae.main, halted) == 0
    for name in ("model", "ema", "vae"):
        resumed, whole = (weights(tmp_path / run_name, 2, name) for run_name in ("halted", "straight"))
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)


# --- generate.py --------------------------------------------------------------------------------------------------


def test_against_path_drop_guidance_written_out(run, tmp_path):
    """Each Euler step from the formulas: the same latents."""
    scale, low, high, steps, count = 2.5, 0.1, 0.8, 6, 4
    args = generate.parse_arguments(
        sampling_flags(
            run, mode="ode", num_steps=steps, cfg_scale=scale, guidance_low=low, guidance_high=high, guide="path-drop"
        )
    )
    trained = generate.open_model(args, print)
    job = load_networks(args, trained, trained.load_autoencoder(), generate.this_process())
    items, labels = torch.arange(count), torch.arange(count) % len(CLASS_NAMES)
    found = build_sampler(args, trained, job, generate.this_process()).latents(items, labels)
    network = open_trained_ldm(run, STEP, "ema").load_model()
    x = counted_normal(0, items, 0, (4, 8, 8)).double()
    null = torch.full_like(labels, len(CLASS_NAMES))
    with torch.no_grad():
        for k in range(steps):
            t = 1 - k / steps
            times = torch.full((count,), t)
            own = network(x.float(), times, labels)[0].double()
            other = network(x.float(), times, null, (), SHORTCUT)[0].double()
            v = scale * own - (scale - 1) * other if low <= t <= high else own
            x = x - v / steps
    torch.testing.assert_close(found, x.float(), rtol=1e-5, atol=1e-5)


def test_samples_by_path_drop_say_so(run, tmp_path, capsys):
    argv = sampling_flags(run, cfg_scale=2, guide="path-drop", sample_dir=tmp_path / "out")
    assert generate.main(argv) == 0
    made_by = json.loads((tmp_path / "out" / "index.json").read_text())["source"]
    assert (made_by["guide"], made_by["guide_sha256"]) == ("path-drop", None)
    free = sampling_flags(run, cfg_scale=2, sample_dir=tmp_path / "free")
    assert generate.main(free) == 0
    assert largest_difference(images_in(tmp_path / "out"), images_in(tmp_path / "free")) > 3
    args = generate.parse_arguments(sampling_flags(run, cfg_scale=2, guidance_high=0.75, guide="path-drop"))
    folder = default_folder(args, generate.open_model(args, print))
    assert folder == run / "samples-0000010-sde3-pathdrop2-0-0.75-10-seed0"
    capsys.readouterr()
    assert generate.main([*argv, "--dry-run", "--num-steps", "10"]) == 0
    output = capsys.readouterr().out
    assert "10 forward passes and 10 of the guide an image" in output
    assert "guide: path-drop: blocks of its own, " in output
    with pytest.raises(SystemExit):
        generate.parse_arguments(sampling_flags(run, cfg_scale=2, guide="path-drop@3"))
    assert "path-drop is of the network itself and has no step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "without --sprint"),
        ({"sprint": True, "path_drop": 0.0}, "without --path-drop"),
        ({"sprint": True, "path_drop": 0.1, "cfg_prob": 0.0}, "without the null class"),
    ],
)
def test_runs_that_nothing_of_their_own_can_guide(tmp_path, arguments, reason, capsys):
    folder = write_ldm_run(tmp_path / "run", **arguments)
    argv = sampling_flags(folder, cfg_scale=2, guide="path-drop", sample_dir=tmp_path / "out")
    assert generate.run(generate.main, argv) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_run_s_guide_by_a_folder_of_that_name(run, tmp_path, monkeypatch):
    """A path says that a folder is meant."""
    monkeypatch.chdir(tmp_path)
    write_ldm_run(tmp_path / "path-drop", seed=5)
    args = generate.parse_arguments(sampling_flags(run, cfg_scale=2, guide="./path-drop"))
    assert generate.open_model(args, print).guide.folder.resolve() == tmp_path / "path-drop"


def test_exported_it_samples_and_not_to_who_does_not_know_it(run, tmp_path, capsys):
    assert export_ldm.run(export_ldm.main, [str(run), str(tmp_path / "repa"), "--format", "repa"]) == 2
    assert "REPA-E knows no SPRINT" in capsys.readouterr().err
    assert not (tmp_path / "repa").exists()
    assert export_ldm.main([str(run), str(tmp_path / "out")]) == 0
    read = SiT.from_pretrained(tmp_path / "out" / "transformer")
    x, t, y = inputs(read.config)
    model = open_trained_ldm(run, STEP, "ema").load_model()
    assert torch.equal(read(x, t, y % 3)[0], model(x, t, y % 3)[0])


@pytest.mark.parametrize(("preset", "until", "last", "align"), [
    ("sprint_imagenet256", 350_000, None, "repa"),
    ("one_gpu_imagenet256", 375_000, None, "repa"),
    ("sprint/xl2", 2_000_000, 2_800_000, "none"),
    ("sprint/xl2-repa", 2_000_000, 2_800_000, "repa"),
])  # fmt: skip
def test_its_presets(preset, until, last, align):
    found = commands(preset)
    parsed = train_ldm.parse_arguments(found["ldm"][found["ldm"].index("train_ldm.py") + 1 :])
    assert (parsed.token_drop, parsed.path_drop, parsed.token_drop_until) == (0.75, 0.1, until)
    assert (parsed.max_train_steps, parsed.align) == (last, align)
    assert until < (last or parsed.epochs * 1_281_167 // parsed.batch_size)
    sampled = found["samples"][found["samples"].index("generate.py") + 1 :]
    assert generate.parse_arguments(sampled).guide == "path-drop"
