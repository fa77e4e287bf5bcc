"""Internal guidance: a second output on the way (--guide-depth), trained along, guides in the same pass."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import export_ldm
import generate
import train_ldm
import train_repae
from dataset.toy import main as make_toy
from diffusion.counted_noise import counted_normal
from diffusion.flow import add_noise, velocity
from errors import UserError
from inference.sample_folder import build_sampler, default_folder, load_networks
from inference.sampling import SOLVERS, solve_sde
from inference.trained_ldm import open_trained_ldm
from models.denoisers import denoiser_config
from models.denoisers.base import LEAST_TIME
from runtime.cli import run as exit_code
from tests.ldm_runs import CLASS_NAMES, STEP, random_weights, write_ldm_run
from tests.ldm_runs import flags as sampling_flags
from tests.ldm_steps import CONFIG, accumulate, networks, random_batch, tiny_trainer
from tests.ldm_trainings import flags, write_data
from tests.repae_runs import flags as repae_flags

KINDS = ("SiT", "LightningDiT", "DiTDH", "DDT", "JiT")


def config_of(kind: str, **changes):
    head = {"head_width": 256} if kind in ("DiTDH", "DDT") else {}
    common = {"model": f"{kind}-Ti/2", "latent_channels": 4, "latent_size": 8, "num_classes": 6, "guide_depth": 2}
    return denoiser_config(common | head | changes)


def network_of(kind: str, **changes):
    torch.manual_seed(0)  # of frequencies
    network = config_of(kind, **changes).build().eval()
    random_weights(network, 0)
    return network


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([0.02, 0.4, 0.9]), torch.tensor([0, 5, 6])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ldm_run(tmp_path_factory.mktemp("exps") / "run", guide_depth=2)


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_guide_is_an_output_of_the_hidden_state(kind):
    """Norm, modulation, linear layer and patches written out, in float64."""
    network, (x, t, y) = network_of(kind), inputs()
    prediction, guide = network.with_guide(x, t, y)
    plain, (state,) = network(x, t, y, (2,))
    assert torch.equal(prediction, plain)
    state = state.double()
    embedded = network.t_embedder(1 - t if network.counts_to_data else t)
    condition = network.condition(embedded, y)[:, :1].double()
    if kind == "DDT":
        silu = torch.nn.functional.silu
        state = silu(embedded.double()[:, None] + state)
        condition = silu(state)
    layer = network.guide_layer.double()
    shift, scale = layer.adaLN_modulation[1](condition).chunk(2, -1)
    if kind == "SiT":
        normed = (state - state.mean(-1, keepdim=True)) / (state.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    else:
        normed = state / (state.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm_final.weight
    patches = layer.linear(normed * (1 + scale) + shift)
    output = patches.reshape(3, 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(3, 4, 8, 8)
    if kind == "JiT":  # predicts the data
        expected = (x.double() - output) / t.double().clamp_min(LEAST_TIME)[:, None, None, None]
    else:
        expected = -output if network.counts_to_data else output
    assert expected.std() > 0.05
    torch.testing.assert_close(guide.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_the_same_network_with_and_without(kind):
    """And without it nothing of it is said, or saved."""
    states, next_numbers = [], []  # of an alignment's projectors
    for depth in (0, 2):
        torch.manual_seed(3)
        states.append(config_of(kind, guide_depth=depth).build().state_dict())
        next_numbers.append(torch.randn(2))
    before, after = states
    assert torch.equal(*next_numbers)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    added = after.keys() - before.keys()
    assert added and all(name.startswith("guide_layer.") for name in added)
    assert not any(after[name].any() for name in added if not name.endswith("norm_final.weight"))
    assert "guide_depth" not in config_of(kind, guide_depth=0).to_dict()
    assert config_of(kind).to_dict()["guide_depth"] == 2


def test_compiled_it_is_the_same():
    torch.compiler.reset()
    counters.clear()
    network, given = network_of("SiT"), inputs()
    with torch.no_grad():
        expected = network.with_guide(*given)
        network.compile(backend="eager")
        torch.testing.assert_close(network.with_guide(*given), expected)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # of the blocks, and of both outputs
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("SiT", {"guide_depth": 6}, "SiT-Ti/2 has 6 blocks, and the guide is weaker by some: give 1 to 5"),
        ("SiT", {"guide_depth": -1}, "give 1 to 5"),
        ("SiT", {"guide_depth": 2.5}, "give 1 to 5"),
        ("SiT", {"sprint": True}, "--guide-depth 2 with --sprint: blocks 2 to 5 see a part of the tokens; give 1 to 1"),
        ("SiT", {"class_token_width": 8}, "--guide-depth 2 with --reg-coeff"),
        ("LightningDiT", {"flow_map_blocks": 1}, "--guide-depth 2 with --flow-map-blocks"),
    ],
)
def test_what_it_does_not_go_with(kind, changes, message):
    with pytest.raises(UserError, match=message):
        config_of(kind, **changes)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("align", "coeff"), [((), 1.0), (("repa",), 1.0), (("repa",), 0.5)])
def test_a_step_equals_a_plain_calculation(align, coeff):
    """Its error is added to the network's, times its weight; all gradients are those of the sum."""
    config = denoiser_config(CONFIG.to_dict() | {"guide_depth": 2})
    trainer = tiny_trainer(align=align, config=config, guide_coeff=coeff)
    batch = random_batch(5)
    draws = trainer.draws(0, 0, batch)
    x, t = trainer.normalised(batch, draws), draws.times
    noisy, target = add_noise(x, t, draws.noise, "linear"), velocity(x, t, draws.noise, "linear")
    denoiser = trainer.denoiser
    prediction, states = denoiser(noisy, t, batch.labels, (2, 4))
    guide = denoiser.guide_velocity(noisy, t, batch.labels, states[0])
    errors = [(each - target).square().mean() for each in (prediction, guide)]
    loss = errors[0] + coeff * errors[1]
    if align:
        projected = trainer.alignment["repa"].predict([states[1]])[0]
        cosine = torch.nn.functional.cosine_similarity(projected, batch.features[0].float(), dim=-1)
        loss = loss + 0.5 * (1 - cosine).mean()
    loss.backward()
    wrapped = networks(trainer)
    expected = {name: parameter.grad.clone() for name, parameter in wrapped.named_parameters()}
    wrapped.zero_grad()
    logged = accumulate(trainer, batch, draws)
    assert logged["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert [logged[name].item() for name in ("denoise", "guide")] == pytest.approx([e.item() for e in errors], rel=1e-5)
    for name, parameter in wrapped.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    assert expected["denoiser.guide_layer.linear.weight"].abs().max() > 1e-3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed images and their latents."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("kind", ["SiT", "DDT"])
def test_trained_stopped_and_resumed_it_is_the_same(data, tmp_path, kind):
    common = {"model": f"{kind}-Ti/2", "align": "none", "guide_depth": 2, "checkpointing_steps": 1}
    common |= {"head_width": 256} if kind == "DDT" else {}
    for name, stops in (("halted", (1, 2)), ("straight", (2,))):
        for stop in stops:
            assert exit_code(train_ldm.main, flags(data, tmp_path, name, **common, max_train_steps=stop)) == 0
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("halted", "straight")]
    assert lines[0] == lines[1] and "guide" in json.loads(lines[0].splitlines()[0])
    assert "guided by its output after block 2" in (tmp_path / "straight/log.txt").read_text()
    halted, straight = (open_trained_ldm(tmp_path / name, 2, "ema") for name in ("halted", "straight"))
    assert halted.checksum == straight.checksum
    sample = sampling_flags(tmp_path / "straight", cfg_scale=2, guide="internal", sample_dir=tmp_path / "out")
    assert exit_code(generate.main, sample) == 0


def test_a_run_without_it_does_not_go_on_with_it(data, tmp_path, capsys):
    assert exit_code(train_ldm.main, flags(data, tmp_path, "plain", align="none")) == 0
    again = flags(data, tmp_path, "plain", align="none", guide_depth=2, max_train_steps=4)
    assert exit_code(train_ldm.main, again) == 2
    assert "--guide-depth 0, not 2" in capsys.readouterr().err
    new = flags(data, tmp_path, "new", align="none", guide_depth=2, max_train_steps=4)
    new += ["--continue-train-exp-dir", str(tmp_path / "plain")]
    assert exit_code(train_ldm.main, new) == 2
    assert "guide_depth 0, not 2 (--guide-depth)" in capsys.readouterr().err
    assert exit_code(train_ldm.main, flags(data, tmp_path, "guided", align="none", guide_depth=2)) == 0
    jumps = flags(data, tmp_path, "map", align="none", flow_map_blocks=2, max_train_steps=4)
    assert exit_code(train_ldm.main, [*jumps, "--continue-train-exp-dir", str(tmp_path / "guided")]) == 2
    assert "a flow map continues none of those: give another" in capsys.readouterr().err


def test_its_weight_is_one_unless_said_and_stays(data, tmp_path, capsys):
    common = {"align": "none", "checkpointing_steps": 1}
    assert exit_code(train_ldm.main, flags(data, tmp_path, "plain", **common, guide_coeff=0.5)) == 2
    assert "--guide-coeff is for --guide-depth: add that, or leave it out" in capsys.readouterr().err
    assert exit_code(train_ldm.main, flags(data, tmp_path, "run", **common, guide_depth=2)) == 0
    assert json.loads((tmp_path / "run" / "args.json").read_text())["args"]["guide_coeff"] == 1
    again = flags(data, tmp_path, "run", **common, guide_depth=2, guide_coeff=0.5, max_train_steps=4)
    assert exit_code(train_ldm.main, again) == 2
    assert "was started with --guide-coeff 1.0, not 0.5" in capsys.readouterr().err


def test_end_to_end_with_a_vae(tmp_path):
    make_toy(["--output", str(tmp_path / "images"), "--num-images", "12", "--resolution", "32"])
    argv = repae_flags(tmp_path / "images", tmp_path, "run", guide_depth=2)
    assert exit_code(train_repae.main, argv) == 0
    assert "guide" in (tmp_path / "run/metrics.jsonl").read_text()
    weights = open_trained_ldm(tmp_path / "run", 2, "ema").load_model().state_dict()
    assert weights["guide_layer.linear.weight"].abs().max() > 0


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [None, 3])
def test_against_internal_guidance_written_out(run, channels, monkeypatch):
    """Each Euler step from the formulas: the same latents; and no more passes than there are steps."""
    scale, low, high, steps, count = 1.8, 0.3, 1.0, 6, 4
    guidance = {"cfg_scale": scale, "guidance_low": low, "guidance_high": high, "guidance_channels": channels}
    args = generate.parse_arguments(sampling_flags(run, mode="ode", num_steps=steps, guide="internal", **guidance))
    trained = generate.open_model(args, print)
    found_networks = load_networks(args, trained, trained.load_autoencoder(), generate.this_process())
    items, labels = torch.arange(count), torch.arange(count) % len(CLASS_NAMES)
    passes = []
    found_networks.model.blocks[-1].register_forward_hook(lambda *given: passes.append(1))
    sampler = build_sampler(args, trained, found_networks, generate.this_process())
    found = sampler.latents(items, labels)
    assert len(passes) == steps
    network = open_trained_ldm(run, STEP, "ema").load_model()
    x = counted_normal(0, items, 0, (4, 8, 8)).double()
    with torch.no_grad():
        for k in range(steps):
            t = 1 - k / steps
            times = torch.full((count,), t)
            own, (state,) = network(x.float(), times, labels, (2,))
            weak = network.guide_velocity(x.float(), times, labels, state).double()
            v = own.double()
            if low <= t <= high:
                guided = weak + scale * (v - weak)
                v = guided if channels is None else torch.cat([guided[:, :channels], v[:, channels:]], 1)
            x = x - v / steps
    torch.testing.assert_close(found, x.float(), rtol=1e-5, atol=1e-5)


BOTH = {"guide": "internal", "guide_scale": 1.4, "guide_low": 0.2, "cfg_scale": 2.5, "guidance_high": 0.75}


@pytest.mark.parametrize("guide", ["internal", "run", "path-drop"])
def test_a_guide_and_the_null_class_at_once_written_out(run, tmp_path, guide):
    """The guide sharpens the velocities of class and null class; then the null class guides. Passes are as counted."""
    folder, steps, count = run, 6, 4
    if guide == "run":
        write_ldm_run(tmp_path / "small", seed=7)
    if guide == "path-drop":
        folder = write_ldm_run(tmp_path / "sprint", sprint=True, path_drop=0.1)
    named = f"{tmp_path / 'small'}@{STEP}" if guide == "run" else guide
    flags_ = sampling_flags(folder, mode="ode", num_steps=steps, **BOTH | {"guide": named})
    args = generate.parse_arguments(flags_)
    trained = generate.open_model(args, print)
    found_networks = load_networks(args, trained, trained.load_autoencoder(), generate.this_process())
    items, labels = torch.arange(count), torch.arange(count) % len(CLASS_NAMES)
    images: list[int] = []
    found_networks.model.blocks[2].register_forward_hook(lambda _, given, made: images.append(len(made)))
    sampler = build_sampler(args, trained, found_networks, generate.this_process())
    found = sampler.latents(items, labels)
    own = open_trained_ldm(folder, STEP, "ema").load_model()
    other = trained.guide.load_guide(own)

    def both(x: torch.Tensor, t: float, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        times = torch.full((len(x),), t)
        if guide == "internal":
            return own.with_guide(x, times, y)
        return own(x, times, y)[0], other(x, times, y)[0]

    @torch.no_grad()
    def sharpened(x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
        v, weaker = (each.double() for each in both(x.float(), t, y))
        return weaker + 1.4 * (v - weaker) if t >= 0.2 else v

    x, null = counted_normal(0, items, 0, (4, 8, 8)).double(), torch.full_like(labels, len(CLASS_NAMES))
    for k in range(steps):
        t = 1 - k / steps
        v = sharpened(x, t, labels)
        if t <= 0.75:
            without = sharpened(x, t, null)
            v = without + 2.5 * (v - without)
        x = x - v / steps
    torch.testing.assert_close(found, x.float(), rtol=1e-5, atol=1e-5)
    passes, of_guide = sampler.settings.passes(has_guide=True)
    assert passes == steps + 4  # of times 1, 5/6, … 1/6 four lie below 0.75
    assert of_guide == steps - 1 + 3  # all but 1/6 above 0.2, three of them twice
    assert sum(images) == count * passes


@pytest.mark.parametrize(
    ("flags_", "settings", "name"),
    [
        (BOTH, {}, "internal1.4-0.2-1-cfg2.5-0-0.75"),
        # the guide alone, and the null class alone, are what they are without --guide-scale
        (BOTH | {"cfg_scale": 1}, {"guide_scale": None, "cfg_scale": 1.4, "guidance_low": 0.2}, "internal1.4-0.2-1"),
    ],
)
def test_folder_and_settings_of_both(run, tmp_path, flags_, settings, name):
    argv = sampling_flags(run, sample_dir=tmp_path / "out", **flags_)
    assert generate.main(argv) == 0
    made_by = json.loads((tmp_path / "out" / "index.json").read_text())["source"]
    flags_ = {"guide_scale": 1.4, "guide_low": 0.2, "guide_high": 1.0, "cfg_scale": 2.5, "guidance_high": 0.75}
    expected = flags_ | settings if not settings else settings | {"guide_low": 0.0, "guide_high": 1.0}
    assert {key: made_by[key] for key in expected} == expected and made_by["guide"] == "internal"
    args = generate.parse_arguments(argv[: argv.index("--sample-dir")] + argv[argv.index("--sample-dir") + 2 :])
    folder = default_folder(args, generate.open_model(args, print))
    assert folder.name == f"samples-0000010-sde3-{name}-10-seed0"
    assert generate.main(argv) == 0  # it is complete: nothing is refused
    if settings:
        plain = sampling_flags(run, sample_dir=tmp_path / "plain", guide="internal", cfg_scale=1.4, guidance_low=0.2)
        assert generate.main(plain) == 0
        assert json.loads((tmp_path / "plain" / "index.json").read_text())["source"] == made_by


@pytest.mark.parametrize(
    ("flags_", "said"),
    [
        ({"guide_scale": 1.5, "cfg_scale": 2}, "--guide-scale 1.5 is a guide's: add --guide"),
        ({"sweep": "guide=1.5,2", "cfg_scale": 2, "evaluate": "x"}, "--sweep guide=… is a guide's: add --guide"),
        ({"guide": "internal", "cfg_scale": 2, "guide_low": 0.1}, "--guide-low belongs to --guide-scale; add that, or"),
        ({"guide": "internal", "cfg_scale": 2, "guide_high": 1}, "or give --guidance-high"),
        (BOTH | {"guide_high": 0.1}, "--guide-low 0.2 lies above --guide-high 0.1"),
        (BOTH | {"guide_scale": 1}, "at scale 1 it does not guide; add --guide-scale, e.g. 2"),
        ({"guide": "internal", "cfg_scale": 1}, "at scale 1 it does not guide; add --cfg-scale, e.g. 2"),
    ],
)
def test_what_cannot_be_meant_is_one_line(run, flags_, said, capsys):
    assert exit_code(generate.parse_arguments, sampling_flags(run, **flags_)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_the_null_class_beside_a_guide_must_have_been_trained(tmp_path, capsys):
    folder = write_ldm_run(tmp_path / "run", guide_depth=1, cfg_prob=0.0)
    argv = sampling_flags(folder, sample_dir=tmp_path / "out", **BOTH)
    assert exit_code(generate.main, argv) == 2
    assert "--cfg-scale 2.5: " in (said := capsys.readouterr().err) and said.rstrip().endswith("leave the flag out")
    swept = [*argv, "--sweep", "guide=1.2,1.5", "--evaluate", str(folder), "--cfg-scale", "2.5"]
    assert exit_code(generate.main, swept) == 2
    assert "--cfg-scale 2.5: " in capsys.readouterr().err
    assert exit_code(generate.main, [*argv, "--cfg-scale", "1"]) == 0
    trained = write_ldm_run(tmp_path / "trained")
    argv = sampling_flags(trained, sample_dir=tmp_path / "by", **BOTH | {"guide": f"{folder}@{STEP}"})
    assert exit_code(generate.main, argv) == 2
    assert "without the null class that it would guide too: leave --guide-scale out" in capsys.readouterr().err
    assert exit_code(generate.main, [*argv, "--cfg-scale", "1"]) == 0


def test_times_of_a_null_class_that_does_not_act_are_mentioned(run, tmp_path, capsys):
    common = {"guide": "internal", "guide_scale": 1.4, "guidance_high": 0.7}
    assert exit_code(generate.main, sampling_flags(run, sample_dir=tmp_path / "out", **common)) == 0
    assert "--guidance-high: of the null class, whose --cfg-scale is 1; the guide has" in capsys.readouterr().err
    assert exit_code(generate.main, sampling_flags(run, sample_dir=tmp_path / "both", **common, cfg_scale=2)) == 0
    assert "of the null class" not in capsys.readouterr().err
    argv = sampling_flags(run, sample_dir=tmp_path / "sweep", guide="internal", evaluate=run)
    assert exit_code(generate.main, [*argv, "--sweep", "guide=1.2,1.4", "high=0.5,1"]) == 2
    assert "--sweep high=… is the null class's, whose scale is 1 at every point: add scale=" in capsys.readouterr().err


@pytest.mark.parametrize("sweep", [[], ["--sweep", "guide=1,1.5", "scale=1,2"]])
def test_a_dry_run_takes_two_steps(run, monkeypatch, sweep, capsys):
    """Of networks as large as any, for the passes of as many as are asked for."""
    taken = []
    monkeypatch.setitem(SOLVERS, "sde", lambda *given: (taken.append(given[3].num_steps), solve_sde(*given))[1])
    reference = ["--evaluate", str(run)] if sweep else []
    monkeypatch.setattr(generate, "plan_evaluation", lambda *given: None)
    argv = sampling_flags(run, num_steps=40, **BOTH)
    assert generate.main([*argv, "--dry-run", *sweep, *reference]) == 0
    assert taken == [2]
    assert "(sde, 40 steps)" in capsys.readouterr().out


def test_what_both_would_take(run, tmp_path, capsys):
    write_ldm_run(tmp_path / "small", seed=7)
    for guide, said in (
        ("internal", "12 forward passes an image"),
        (tmp_path / "small", "12 forward passes and 10 of"),
    ):
        argv = sampling_flags(run, mode="ode", num_steps=7, **BOTH | {"guide": guide})
        assert generate.main([*argv, "--dry-run"]) == 0
        assert said in capsys.readouterr().out


def test_a_guide_alone_is_counted_in_its_own_times(run, tmp_path, capsys):
    """By its own scale and interval, or by those in the null class's place."""
    write_ldm_run(tmp_path / "small", seed=7)
    for flags_ in ({"guide_scale": 1.4, "guide_low": 0.2}, {"cfg_scale": 1.4, "guidance_low": 0.2}):
        argv = sampling_flags(run, mode="ode", num_steps=7, guide=tmp_path / "small", **flags_)
        assert generate.main([*argv, "--dry-run"]) == 0
        assert "7 forward passes and 6 of the guide an image" in capsys.readouterr().out


def test_samples_by_it_say_so(run, tmp_path, capsys):
    argv = sampling_flags(run, cfg_scale=2, guide="internal", sample_dir=tmp_path / "out")
    assert generate.main(argv) == 0
    made_by = json.loads((tmp_path / "out" / "index.json").read_text())["source"]
    assert (made_by["guide"], made_by["guide_sha256"]) == ("internal", None)
    args = generate.parse_arguments(sampling_flags(run, cfg_scale=2, guidance_low=0.1, guide="internal"))
    folder = default_folder(args, generate.open_model(args, print))
    assert folder == run / "samples-0000010-sde3-internal2-0.1-1-10-seed0"
    capsys.readouterr()
    assert generate.main([*argv, "--dry-run", "--num-steps", "10"]) == 0
    output = capsys.readouterr().out
    assert "10 forward passes an image" in output
    assert "guide: internal: an output after block 2, in the same pass" in output
    with pytest.raises(SystemExit):
        generate.parse_arguments(sampling_flags(run, cfg_scale=2, guide="internal@3"))
    assert "internal is of the network itself and has no step" in capsys.readouterr().err


def test_without_the_null_class_it_guides_too(tmp_path):
    folder = write_ldm_run(tmp_path / "run", guide_depth=1, cfg_prob=0.0)
    argv = sampling_flags(folder, cfg_scale=2, guide="internal", sample_dir=tmp_path / "out")
    assert exit_code(generate.main, argv) == 0


def test_a_run_that_has_none_is_refused(tmp_path, capsys):
    folder = write_ldm_run(tmp_path / "run")
    argv = sampling_flags(folder, cfg_scale=2, guide="internal", sample_dir=tmp_path / "out")
    assert exit_code(generate.main, argv) == 2
    assert "was trained without --guide-depth; leave the flag out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_exported_it_samples_and_not_to_who_does_not_know_it(run, tmp_path, capsys):
    assert exit_code(export_ldm.main, [str(run), str(tmp_path / "repa"), "--format", "repa"]) == 2
    assert "REPA-E knows no second output (--guide-depth)" in capsys.readouterr().err
    assert export_ldm.main([str(run), str(tmp_path / "out")]) == 0
    model = open_trained_ldm(run, STEP, "ema").load_model()
    read = type(model).from_pretrained(tmp_path / "out" / "transformer")
    x, t, y = inputs()
    found, expected = (network.with_guide(x, t, y % 3) for network in (read, model))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert math.isfinite(found[1].sum().item())
