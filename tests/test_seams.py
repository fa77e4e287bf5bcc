"""The four seams: the classes of docs/extending.md, each through the real scripts, resumed bit for bit."""

import argparse
import json
import re
import shutil
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cache_latents
import diffusion
import evaluate
import generate
import inference
import train_ldm
import train_repae
import train_sendvae
from dataset.toy import main as make_toy
from diffusion.draws import TIMES
from diffusion.flow import training_times
from diffusion.samplers import GRIDS
from errors import UserError
from inference.sampling import SOLVERS
from loss.alignment import DENOISER_ALIGNMENTS, TOKENIZER_ALIGNMENTS
from loss.alignment.base import DenoiserAlignment, TokenizerAlignment
from loss.alignment.sums import DenoiserAlignments, build_denoiser_alignment
from models.denoisers import DENOISERS
from models.tokenizers import TOKENIZERS, tokenizer_kind
from runtime.cli import run
from tests.command_line import argv_of
from tests.distributed_ldm_step import batch_draws, config_of
from tests.ldm_steps import accumulate, networks, part_of, random_batch, tiny_trainer
from training import arguments
from training.ldm import checked
from training.optimizer import BUILDERS, build_optimizer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
# the page's files
BLOCKS = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL))
# package, registry, line, import of each row of its table
ROWS = re.findall(r"^\|.*?\| `(\S+)`, `(\S+)` \| `(.*?)` \| `?(.*?)`? \|", PAGE.read_text(), re.MULTILINE)
REGISTRIES = (TOKENIZER_ALIGNMENTS, DENOISER_ALIGNMENTS, TOKENIZERS, DENOISERS)
COMMON = {"batch_size": 4, "num_workers": 0, "log_steps": 1, "max_val_images": 4, "val_steps": 1}


@pytest.fixture(scope="module", autouse=True)
def extended():
    """Run the page's code; the registries are as before afterwards."""
    before = [dict(registry) for registry in REGISTRIES]
    assert len(BLOCKS) == len(ROWS) == 4
    modules = {path.removesuffix(".py").replace("/", "."): code for path, code in BLOCKS.items()}
    for name, code in modules.items():
        module = sys.modules[name] = types.ModuleType(name)
        exec(compile(code, str(PAGE), "exec"), vars(module))  # noqa: S102
    for package, registry, line, imported in ROWS:
        scope = dict(vars(import_module(package)))
        if imported != "none":
            exec(imported, scope)  # noqa: S102
        scope[registry].update(eval(f"{{{line}}}", scope))  # noqa: S307
    for registry, old in zip(REGISTRIES, before, strict=True):
        assert len(registry) == len(old) + 1
    yield
    for registry, old in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(old)
    for name in modules:
        del sys.modules[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("seams")
    assert make_toy(["--output", str(path / "images"), "--num-images", "24", "--resolution", "32"]) == 0
    return path


def script(main, **flags) -> None:
    assert run(main, argv_of(flags)) == 0


def train(main, folder: Path, name: str, **flags) -> Path:
    """Two steps, once in one go and once resumed after the first: the same bits. Gives the run's folder."""
    flags = COMMON | {"output_dir": folder, "checkpointing_steps": 1, "sampling_steps": 2} | flags
    script(main, **flags | {"exp_name": f"{name}-straight", "max_train_steps": 2})
    for steps in (1, 2):
        script(main, **flags | {"exp_name": name, "max_train_steps": steps})
    runs = folder / f"{name}-straight", folder / name
    states = [{p.name: load_file(p) for p in (r / "checkpoints/0000002").glob("*.safetensors")} for r in runs]
    assert states[0].keys() == states[1].keys()
    for file, tensors in states[0].items():
        assert tensors.keys() == states[1][file].keys()
        assert all(torch.equal(tensor, states[1][file][key]) for key, tensor in tensors.items()), file
    assert (runs[0] / "metrics.jsonl").read_text() == (runs[1] / "metrics.jsonl").read_text()
    return runs[1]


def checkpoint(run_folder: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run_folder / f"checkpoints/{step:07d}/{name}.safetensors")


def records(run_folder: Path) -> dict:
    merged = {}
    for line in (run_folder / "metrics.jsonl").read_text().splitlines():
        merged |= json.loads(line)
    return merged


def vae_flags(folder: Path, **flags) -> dict:
    images = folder / "images"
    common = {"data_dir": images, "val_data_dir": images, "resolution": 32, "loss_cfg_path": "configs/l1_kl_gan.yaml"}
    return common | {"vae_ckpt": "none", "enc_type": "efficientnet-lite0"} | flags


@pytest.fixture(scope="module")
def tokenizer_run(folder):
    """The new tokenizer, trained with a GAN and an average, aligned by the new alignment."""
    flags = vae_flags(folder, vae="PatchTokenizer", align_loss="mse", mse_weight=0.25, ema_decay=0.5)
    return train(train_sendvae.main, folder, "tokenizer", **flags)


def test_an_alignment_of_a_vae_trains_with_it(folder, tokenizer_run):
    """Its head moves, its term is logged and weighted, and it is not part of the tokenizer's weights."""
    before, after = (checkpoint(tokenizer_run, step, "alignment") for step in (1, 2))
    assert before.keys() == {"heads.0.weight", "heads.0.bias"}
    assert not any(torch.equal(before[key], after[key]) for key in before)
    logged = records(tokenizer_run)
    expected = logged["reconstruction"] + 0.1 * logged["gan"] + 0.25 * logged["mse"]
    assert logged["loss"] == pytest.approx(expected, rel=1e-6)
    assert not any("head" in key for key in checkpoint(tokenizer_run, 2, "model"))


def test_a_new_alignment_serves_a_known_vae(folder):
    run_folder = train(train_sendvae.main, folder, "known-vae", **vae_flags(folder, vae="f4d4-tiny", align_loss="mse"))
    assert {"mse", "kl"} <= records(run_folder).keys()


def test_a_tokenizer_is_cached_and_evaluated(folder, tokenizer_run):
    """By its folder alone, in every script; a known alignment takes it too."""
    vae = tokenizer_run / "vae"
    assert json.loads((vae / "config.json").read_text()) == {"_class_name": "PatchTokenizer"}
    evaluation = folder / "evaluation"
    flags = {"data": folder / "images", "resolution": 32, "vae": vae, "metrics": "psnr,ssim", "output_dir": evaluation}
    assert run(evaluate.main, ["reconstruction", *argv_of(flags)]) == 0
    (record,) = (evaluation / "metrics").glob("*.json")
    assert json.loads(record.read_text())["values"]["PSNR"] > 0
    script(train_sendvae.main, **COMMON | vae_flags(folder, vae=vae, vae_ckpt=None, mapper_grid=2, output_dir=folder,
           exp_name="known-alignment", max_train_steps=1))  # fmt: skip
    assert 0 < records(folder / "known-alignment")["val/align_cosine"] < 1


@pytest.fixture(scope="module")
def cache(folder, tokenizer_run):
    name = folder / "latents"
    images = {"data_dir": folder / "images", "resolution": 32}
    script(cache_latents.main, **images, vae=tokenizer_run / "vae", vae_latents_name=name, num_workers=0)
    return name


def test_a_denoiser_and_its_alignment_train_sample_and_evaluate(folder, cache):
    """On the new tokenizer's latents, with REPA beside the new alignment."""
    flags = {"data_dir": folder / "images", "resolution": 32, "vae_latents_name": cache, "val_vae_latents_name": cache}
    flags |= {"model": "Conv-4", "conv_width": 16, "align": "repa+mean", "mean_coeff": 0.2, "encoder_depth": 3}
    flags |= {"enc_type": "efficientnet-lite0", "projector_width": 16, "grid_steps": 2}
    run_folder = train(train_ldm.main, folder, "denoiser", **flags)
    assert {"mean.head.weight", "repa.projectors.0.0.weight"} <= checkpoint(run_folder, 2, "alignment").keys()
    model, average = (checkpoint(run_folder, 2, name) for name in ("model", "ema"))
    assert model.keys() == average.keys()
    assert not any("head.weight" in key and "mean" in key for key in model)
    logged = records(run_folder)
    assert logged["loss"] == pytest.approx(logged["denoise"] + 0.5 * logged["repa"] + 0.2 * logged["mean"], rel=1e-6)

    samples = folder / "samples"
    sampling = {"exp_path": run_folder, "num_fid_samples": 6, "num_steps": 2, "mode": "ode", "sample_dir": samples}
    script(generate.main, **sampling, cfg_scale=1.5, preview=0)
    measured = {"samples": samples, "ref": folder / "images", "features": "efficientnet-lite0", "metrics": "fid"}
    assert run(evaluate.main, ["generation", *argv_of(measured)]) == 0
    (record,) = (samples / "metrics").glob("generation*.json")
    assert json.loads(record.read_text())["values"]


def test_a_run_goes_on_with_another_alignment(folder, cache):
    """Moments and weights are taken over by name; what is new is refused rather than begun at random."""
    flags = {"data_dir": folder / "images", "resolution": 32, "vae_latents_name": cache, "model": "Conv-2"}
    flags |= COMMON | {"output_dir": folder, "grid_steps": 2}
    script(train_ldm.main, **flags, align="mean", exp_name="first", max_train_steps=2)
    goes_on = {"continue_train_exp_dir": folder / "first", "max_train_steps": 3}
    script(train_ldm.main, **flags, align="none", exp_name="second", **goes_on)
    assert json.loads((folder / "second/args.json").read_text())["args"]["continued_from"]["step"] == 2
    script(train_ldm.main, **flags, align="mean", exp_name="third", **goes_on)
    assert run(train_ldm.main, argv_of(flags | {"align": "repa", "exp_name": "fourth"} | goes_on)) == 2


class Repulsion(DenoiserAlignment):
    """Without a VFM, parameters, title and ``predict``, and with random numbers of its own."""

    taps = (1,)

    @classmethod
    def weight_of(cls, args):
        return 0.5

    @classmethod
    def from_arguments(cls, args, denoiser, features):
        return cls()

    def forward(self, step):
        flat = step.states[0].float().flatten(1)
        chosen = torch.rand(flat.shape, generator=step.draws.generator, device=flat.device) < 0.5
        return {"repulsion": -torch.pdist(flat * chosen).mean() / flat.shape[1]}

    def weights(self, terms):
        return {"repulsion": 0.5}


def test_an_alignment_without_parameters_and_with_numbers_of_its_own(folder, cache, monkeypatch):
    """Resumed bit for bit; its costs are told; a run that was trained without it goes on with it."""
    monkeypatch.setitem(DENOISER_ALIGNMENTS, "repulsion", Repulsion)
    flags = {"data_dir": folder / "images", "resolution": 32, "vae_latents_name": cache, "grid_steps": 2}
    run_folder = train(train_ldm.main, folder, "repulsion", **flags, model="SiT-Ti/2", align="repulsion")
    logged = records(run_folder)
    assert logged["loss"] == pytest.approx(logged["denoise"] + 0.5 * logged["repulsion"], rel=1e-6)
    assert logged["repulsion"] < 0
    assert "Repulsion adds 0 parameters" in (run_folder / "log.txt").read_text()
    common = COMMON | flags | {"model": "Conv-2", "output_dir": folder}
    script(train_ldm.main, **common, align="none", exp_name="plain", max_train_steps=1)
    script(train_ldm.main, **common, align="repulsion", exp_name="joined", max_train_steps=2,
           continue_train_exp_dir=folder / "plain")  # fmt: skip
    assert "repulsion" in records(folder / "joined")


class Contrast(DenoiserAlignment):
    """Contrastive flow matching (arXiv 2506.05350): velocities keep away from another image's. It sees no block."""

    taps = ()

    def forward(self, step):
        distance = (step.velocity - step.target).square().mean()
        return {"near": distance, "far": (step.velocity - step.target.roll(1, 0)).square().mean()}

    def weights(self, terms):
        return {"near": 0.0, "far": -0.05}


@pytest.mark.parametrize("token", [0, 12])
def test_an_alignment_may_see_velocities(token):
    """Predicted and true ones, of the latent alone where a class token goes with it."""
    config = config_of("SiT-Ti/2", token)
    trainer, plain = (tiny_trainer(align=(), config=config, reg_coeff=0.5) for _ in range(2))
    networks(trainer).alignment = trainer.alignment = DenoiserAlignments({"contrast": Contrast()})
    batch, draws = random_batch(4, config=config), part_of(batch_draws(class_token_width=token), slice(4))
    found, without = accumulate(trainer, batch, draws), accumulate(plain, batch, draws)
    assert found["near"].item() == pytest.approx(found["denoise"].item(), rel=1e-6)
    assert found["denoise"].item() == without["denoise"].item()
    assert found["loss"].item() == pytest.approx((without["loss"] - 0.05 * found["far"]).item(), rel=1e-6)
    assert found["far"] > found["near"]


class Turned(TokenizerAlignment):
    """EQ-VAE's idea: the turned latent is decoded to the turned image."""

    needs_features = False
    turns = 1

    @classmethod
    def from_arguments(cls, args, latent_shape, features):
        return cls()

    def forward(self, latent, statistics, features, labels, draws):
        return {}

    def view(self, latent, images, draws):
        return latent.rot90(self.turns, (2, 3)), images.rot90(self.turns, (2, 3))

    def weights(self, terms, fidelity, tokenizer, gradient):
        return {}


def test_an_alignment_may_turn_what_is_decoded(folder, monkeypatch, capsys):
    """A VAE whose convolutions do not see the turn reconstructs alike; one that is turned alone does not."""
    monkeypatch.setitem(TOKENIZER_ALIGNMENTS, "turned", Turned)
    flags = vae_flags(folder, vae="f4d4-tiny", align_loss="turned", enc_type=None)
    run_folder = train(train_sendvae.main, folder, "turned", **flags)
    first = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[0])
    monkeypatch.setattr(Turned, "view", lambda self, latent, images, draws: (latent.flip(3), images))
    script(train_sendvae.main, **COMMON | flags, output_dir=folder, exp_name="amiss", max_train_steps=1)
    amiss = json.loads((folder / "amiss" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["reconstruction"] != amiss["reconstruction"]
    for flag, value in (("feature_norm", "channel"), ("cached_features", "latents"), ("enc_ckpt", "none.pt")):
        capsys.readouterr()
        assert run(train_sendvae.main, argv_of(flags | {flag: value, "exp_name": "x", "output_dir": folder})) == 2
        assert f"--{flag.replace('_', '-')} with --align-loss turned" in capsys.readouterr().err


def test_names_that_flags_choose_from_have_what_they_name(monkeypatch):
    assert set(inference.MODES) == set(SOLVERS) == set(GRIDS)
    assert set(arguments.OPTIMIZERS) == set(BUILDERS)
    assert set(diffusion.WEIGHTINGS) == set(TIMES)
    with pytest.raises(ValueError, match="weighting"):
        training_times(torch.zeros(1), "beta")


def test_an_optimizer_that_would_not_skip_a_step_is_refused(monkeypatch):
    args, module = (
        argparse.Namespace(adam_beta1=0.9, adam_beta2=0.9, adam_weight_decay=0, adam_epsilon=1e-8),
        small_conv(),
    )
    for build, message in (
        (lambda module, *options: torch.optim.SGD(module.named_parameters(), 0.1), "does not skip a step"),
        (lambda module, *options: torch.optim.AdamW(module.parameters(), fused=True), "named parameters"),
    ):
        monkeypatch.setitem(BUILDERS, "mine", build)
        with pytest.raises(ValueError, match=message):
            build_optimizer(args, module, "mine")


def test_end_to_end_training_takes_both(folder):
    """REPA-E's step with the new tokenizer and the new denoiser."""
    flags = vae_flags(folder, vae="PatchTokenizer", model="Conv-3", encoder_depth=2, projector_width=16, grid_steps=2)
    run_folder = train(train_repae.main, folder, "together", **flags)
    assert {"alignment", "repa", "vae_loss", "val_ema/denoise"} <= records(run_folder).keys()


NAMED = {"exp_name": "x", "data_dir": "x", "vae_latents_name": "x"}


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (train_sendvae.main, {"exp_name": "x", "data_dir": "x", "mse_weight": 1}, "--mse-weight belongs to"),
        (train_ldm.main, NAMED | {"mean_coeff": 1}, "--mean-coeff belongs to --align mean"),
        (train_ldm.main, NAMED | {"align": "repa+x"}, f"give {', '.join(DENOISER_ALIGNMENTS)}, mean"),
        (train_ldm.main, {"model": "Conv-x", "dry_run": True, "align": "none"}, "give Conv-DEPTH"),
        (train_ldm.main, {"model": "U-4", "dry_run": True, "align": "none"}, "Conv-DEPTH"),
        (train_ldm.main, NAMED | {"conv_width": 16}, "--conv-width belongs to --model Conv-DEPTH, not to SiT-XL/1"),
        (train_repae.main, {"exp_name": "x", "data_dir": "x", "model": "Conv-3", "qk_norm": True}, "--qk-norm belongs"),
    ],
)  # fmt: skip
def test_flags_of_parts_that_were_not_chosen(capsys, main, flags, message):
    assert run(main, argv_of(flags)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def small_conv():
    return DENOISERS["Conv"](model="Conv-2", latent_channels=4, latent_size=8, num_classes=3).build()


@pytest.mark.parametrize(
    "spoil",
    [lambda v, states: v, lambda v, states: (v[:, :1], states), lambda v, states: (v, [x[:, :1] for x in states])],
)
def test_a_denoiser_s_output_of_another_shape_is_noticed(spoil):
    """A velocity of one channel would be broadcast, and two of a batch unpacked."""
    network = small_conv()
    noisy, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64)
    assert checked(network(noisy, t, y, (1,)), network, noisy, (1,))[0].shape == noisy.shape
    with pytest.raises(ValueError, match="ConvNet"):
        checked(spoil(*network(noisy, t, y, (1,))), network, noisy, (1,))


def test_a_block_that_there_is_not_is_named(monkeypatch):
    mean = DENOISER_ALIGNMENTS["mean"]
    monkeypatch.setattr(mean, "from_arguments", classmethod(lambda cls, args, denoiser, features: cls(denoiser, 1.0)))
    network = small_conv()
    args = argparse.Namespace(mean_coeff=1.0)
    assert build_denoiser_alignment(args, ["mean"], network, ()).taps == (1,)
    del network.blocks[0:]
    with pytest.raises(UserError, match="--align mean sees block 1, but Conv-2 has blocks 1 to 0"):
        build_denoiser_alignment(args, ["mean"], network, ())
    with pytest.raises(ValueError, match="--align mean: its weight is None"):
        build_denoiser_alignment(argparse.Namespace(mean_coeff=None), ["mean"], network, ())


def test_a_denoiser_of_one_s_own_is_saved_and_loaded(tmp_path):
    network = small_conv()
    network.save_pretrained(tmp_path / "transformer")
    loaded = type(network).from_pretrained(tmp_path / "transformer")
    assert loaded.config == network.config
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), loaded.parameters(), strict=True))


def test_what_would_be_ignored_or_lost_is_refused(folder, tmp_path, capsys, monkeypatch):
    conv = {"model": "Conv-2", "align": "none", "dry_run": True, "gradient_checkpointing": True}
    assert run(train_ldm.main, argv_of(conv)) == 2
    assert "Conv-2 cannot recompute its activations" in capsys.readouterr().err
    (tmp_path / "mine.json").write_text(json.dumps({"_class_name": "PatchTokenizer"}))
    (tmp_path / "other.json").write_text(json.dumps({"_class_name": "Other"}))
    monkeypatch.setattr("models.tokenizers.CONFIG_DIR", tmp_path)
    mine = {"vae": "mine", "vae_ckpt": "none", "dry_run": True}
    assert run(train_sendvae.main, argv_of(vae_flags(folder, **mine, exp_name="x"))) == 0
    assert run(train_sendvae.main, argv_of(vae_flags(folder, vae="other", exp_name="x"))) == 2
    assert "configs/vae/other.json says _class_name Other; there are AutoencoderKL" in capsys.readouterr().err
    kind = tokenizer_kind("PatchTokenizer")
    monkeypatch.setattr(kind, "architecture", {"_class_name": "Patch"})
    assert run(train_sendvae.main, argv_of(vae_flags(folder, vae="PatchTokenizer", exp_name="x"))) == 2
    assert "_class_name Patch, by which nothing would find it" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_followed_literally_in_a_copy(tmp_path):
    """Its files and its lines, in a tree of their own: the linter, the house's rules and the scripts take them."""
    tree = tmp_path / "tree"
    left_out = shutil.ignore_patterns(".*", "exps", "data", "wandb", "__pycache__")
    shutil.copytree(PAGE.parents[1], tree, ignore=left_out)
    for path, code in BLOCKS.items():
        (tree / path).write_text(f'"""Of the page."""\n\n{code}')
    for package, registry, line, imported in ROWS:
        init = tree / package.replace(".", "/") / "__init__.py"
        text = init.read_text()
        end = text.index("\n}", text.index(f"\n{registry}: "))
        text = f"{text[:end]}\n    {line}{text[end:]}"
        if imported != "none":
            lines = text.splitlines(keepends=True)
            place = next(n for n, each in enumerate(lines) if each.startswith(f"from {package}."))
            while lines[place].rstrip()[-1] in "(,":  # an import of several lines
                place += 1
            lines.insert(place + 1, f"{imported}\n")
            text = "".join(lines)
        init.write_text(text)

    def answer(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=tree, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    answer("-m", "ruff", "check", ".")
    answer("-m", "ruff", "format", "--check", ".")
    answer("-m", "pytest", "-q", "-n", "0", "tests/test_house.py")
    assert "--mean-coeff" in answer("train_ldm.py", "--help")
    small = ["--dry-run", "--resolution", "32", "--random-weights", "--enc-type", "efficientnet-lite0"]
    vae = [*small, "--vae-ckpt", "none", "--loss-cfg-path", "configs/l1_kl.yaml"]
    answer("train_sendvae.py", *vae, "--vae", "PatchTokenizer", "--align-loss", "mse")
    answer("train_ldm.py", *small, "--vae", "f4d4-tiny", "--model", "Conv-2", "--align", "mean")
