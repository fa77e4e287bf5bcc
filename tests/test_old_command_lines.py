"""REPA-E's command lines: each works as it stands, or one line says what to give instead."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cache_latents
import generate
import preprocessing
import save_vae_weights
import train_ldm
import train_repae
from dataset.images import open_images
from dataset.toy import main as make_toy
from errors import UserError
from loss.vae_objective import VAELossConfig, VAEObjective, load_loss_config
from runtime import repae_flags
from runtime.cli import run
from tests.ldm_runs import write_ldm_run
from tests.ldm_trainings import flags as ldm_flags
from tests.ldm_trainings import write_data
from tests.public_sit import PublicSiT, public_args, write_experiment
from tests.vae_files import random_discriminator, random_moments, repae_checkpoint, tiny_ldm_state

ROOT = Path(__file__).resolve().parents[1]

# What follows the scripts' names in REPA-E's README.
PREPROCESSING = "--imagenet-path images"
TRAIN_REPAE = (
    "--max-train-steps=400000 --report-to=wandb --allow-tf32 --mixed-precision=fp16 --seed=0 --data-dir=data "
    "--output-dir=exps --batch-size=256 --path-type=linear --prediction=v --weighting=uniform --model=SiT-XL/2 "
    "--checkpointing-steps=50000 --loss-cfg-path=configs/l1_lpips_kl_gan.yaml --vae=f8d4 "
    "--vae-ckpt=pretrained/sdvae/sdvae-f8d4.pt "
    "--disc-pretrained-ckpt=pretrained/sdvae/sdvae-f8d4-discriminator-ckpt.pt --enc-type=dinov2-vit-b "
    "--proj-coeff=0.5 --encoder-depth=8 --vae-align-proj-coeff=1.5 --bn-momentum=0.1 "
    "--exp-name=sit-xl-dinov2-b-enc8-repae-sdvae-0.5-1.5-400k"
)
SAVE_VAE_WEIGHTS = "--repae-ckpt pretrained/sit-repae-vavae/checkpoints/0400000.pt --vae-name e2e-vavae --save-dir exps"
CACHE_LATENTS = (
    "--vae-arch=f16d32 --vae-ckpt-path=pretrained/e2e-vavae/e2e-vavae-400k.pt --vae-latents-name=e2e-vavae "
    "--pproc-batch-size=128"
)
TRAIN_LDM = (
    "--max-train-steps=4000000 --report-to=wandb --allow-tf32 --mixed-precision=fp16 --seed=0 --data-dir=data "
    "--batch-size=256 --path-type=linear --prediction=v --weighting=uniform --model=SiT-XL/1 "
    "--checkpointing-steps=50000 --vae=f16d32 --vae-ckpt=pretrained/e2e-vavae/e2e-vavae-400k.pt "
    "--vae-latents-name=e2e-vavae --learning-rate=1e-4 --enc-type=dinov2-vit-b --proj-coeff=0.5 --encoder-depth=8 "
    "--output-dir=exps --exp-name=sit-xl-1-dinov2-b-enc8-ldm-only-e2e-vavae-0.5-4m"
)
GENERATE = (
    "--num-fid-samples 50000 --path-type linear --mode sde --num-steps 250 --cfg-scale 1.0 --guidance-high 1.0 "
    "--guidance-low 0.0 --exp-path pretrained/sit-ldm-e2e-vavae --train-steps 4000000"
)

# Every other flag of its scripts, as a user might spell it out.
OTHERS_OF_TRAINING = (
    "--logging-dir logs --sampling-steps 10000 --resume-step 0 --wandb-history-path history --num-classes 1000 "
    "--no-qk-norm --fused-attn --compile --resolution 256 --epochs 1400 --gradient-accumulation-steps 1 "
    "--adam-beta1 0.9 --adam-beta2 0.999 --adam-weight-decay 0. --adam-epsilon 1e-08 --max-grad-norm 1.0 "
    "--num-workers 4 --cfg-prob 0.1"
)
ALL_FLAGS = [
    (preprocessing.parse_args, f"{PREPROCESSING} --output-path data --resolution 256 --num-workers 16 --max-images 9"),
    (train_repae.parse_arguments, f"{TRAIN_REPAE} {OTHERS_OF_TRAINING} --vae-learning-rate 1e-4"),
    (train_repae.parse_arguments, f"{TRAIN_REPAE} --disc-learning-rate 1e-4 --continue-train-exp-dir exps/x"),
    (save_vae_weights.parse_arguments, SAVE_VAE_WEIGHTS),
    (cache_latents.parse_arguments, f"{CACHE_LATENTS} --data-dir data --output-dir data"),
    (train_ldm.parse_arguments, f"{TRAIN_LDM} {OTHERS_OF_TRAINING} --continue-train-exp-dir exps/x"),
    (generate.parse_arguments, f"{GENERATE} --tf32 --no-heun --global-seed 0 --pproc-batch-size 256"),
    (generate.parse_arguments, f"{GENERATE} --no-tf32 --sample-dir samples"),
]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    repae_flags._say_once.cache_clear()
    return tmp_path


@pytest.mark.parametrize(("parse", "words"), ALL_FLAGS)
def test_every_flag_is_understood_and_leaves_no_trace(parse, words, here):
    args = parse(words.split())
    assert not [name for name in vars(args) if name.startswith("repae_flag")]


@pytest.mark.parametrize(
    ("parse", "words", "extra"),
    [
        (train_repae.parse_arguments, TRAIN_REPAE, "--logging-dir logs --fused-attn --num-classes=1000"),
        (train_ldm.parse_arguments, TRAIN_LDM, "--logging-dir logs --fused-attn --num-classes=1000"),
        (generate.parse_arguments, GENERATE, "--tf32 --no-heun"),
        (cache_latents.parse_arguments, f"{CACHE_LATENTS} --data-dir x", "--output-dir ./x/"),
    ],
)
def test_what_is_done_here_anyway_changes_nothing(parse, words, extra, here):
    assert parse([*words.split(), *extra.split()]) == parse(words.split())


def test_other_names_of_our_flags():
    assert not generate.parse_arguments([*GENERATE.split(), "--no-tf32"]).allow_tf32
    assert generate.parse_arguments([*GENERATE.split(), "--mode", "ode", "--heun"]).heun


@pytest.mark.parametrize(
    ("main", "words", "expected"),
    [
        (train_repae.main, f"{TRAIN_REPAE} --no-fused-attn", ("--no-fused-attn: ", "leave it out")),
        (train_ldm.main, f"{TRAIN_LDM} --no-fused-attn", ("--no-fused-attn: ", "leave it out")),
        (train_ldm.main, f"{TRAIN_LDM} --num-classes many", ("--num-classes", "many")),
        (cache_latents.main, f"{CACHE_LATENTS} --output-dir big/disk", ("--vae-latents-name big/disk/e2e-vavae",)),
        (train_repae.main, TRAIN_REPAE.replace("--data-dir=data ", ""), ("--data-dir is needed",)),
        (cache_latents.main, CACHE_LATENTS, ("--data-dir is needed",)),
    ],
)
def test_what_would_mean_something_else_is_answered_in_one_line(main, words, expected, here, capsys):
    try:
        code = run(main, words.split())
    except SystemExit as exit_:  # argparse
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert all(part in error for part in expected)
    assert not list(here.iterdir())


def test_help_hides_them(capsys):
    with pytest.raises(SystemExit):
        train_ldm.parse_arguments(["--help"])
    shown = capsys.readouterr().out
    assert "--vae-latents-name" in shown
    assert not [flag for flag in ("--fused-attn", "--num-classes", "--vae-ckpt ", "SUPPRESS") if flag in shown]


def test_a_note_says_what_is_not_read_once_and_on_one_process(here, monkeypatch, capsys):
    for rank in ("1", "0", "0"):
        monkeypatch.setenv("RANK", rank)
        train_ldm.parse_arguments(TRAIN_LDM.split())
    note = capsys.readouterr().err
    assert note.count("\n") == 1
    assert note.startswith("train_ldm.py: note: --vae-ckpt pretrained/e2e-vavae/e2e-vavae-400k.pt is not read")


def test_preprocessing_packs_into_data(here):
    make_toy(["--output", "images", "--num-images", "6", "--resolution", "32"])
    assert preprocessing.main(PREPROCESSING.split()) == 0
    images = open_images("data")
    assert (len(images), images.resolution) == (6, 256)


def test_without_data_dir_the_packed_folder_data_is_read(here):
    """And no other: a folder of that name with something else in it is not trained on by mistake."""
    commands = [
        (train_repae.parse_arguments, TRAIN_REPAE.replace("--data-dir=data ", "")),
        (cache_latents.parse_arguments, CACHE_LATENTS),
    ]
    (here / "data" / "class").mkdir(parents=True)
    for parse, words in commands:
        with pytest.raises(UserError, match="--data-dir is needed"):
            parse(words.split())
    (here / "data" / "index.json").write_text("{}")
    for parse, words in (*commands, (train_ldm.parse_arguments, TRAIN_LDM.replace("--data-dir=data ", ""))):
        assert parse(words.split()).data_dir == "data"
    latents_elsewhere = [*TRAIN_LDM.replace("--data-dir=data ", "").split(), "--vae-latents-name", "./latents"]
    assert train_ldm.parse_arguments(latents_elsewhere).data_dir is None


def test_caching_and_training_of_a_denoiser(here, capsys):
    """Their flags at a tiny size, in the folder that their defaults mean."""
    packed = write_data(here, images=8)
    (here / "data").symlink_to(packed)
    words = "--vae-arch f4d4-tiny --vae-ckpt-path vae --vae-latents-name theirs --pproc-batch-size 128"
    vae = next(path.parent for path in here.rglob("config.json") if packed not in path.parents)
    words = words.replace(" vae ", f" {vae} ")
    assert cache_latents.main([*words.split(), "--output-dir", "data"]) == 0
    assert (packed / "theirs" / "index.json").is_file()

    argv = ldm_flags(None, "exps", vae_latents_name="theirs", max_train_steps=1)
    old = ["--vae-ckpt", str(vae), "--num-classes", "1000", "--fused-attn", "--logging-dir", "logs"]
    assert train_ldm.main([*argv, *old]) == 0
    assert "--num-classes 1000 is not read" in capsys.readouterr().err
    args = json.loads(Path("exps/run/args.json").read_text())["args"]
    assert not {"vae_ckpt", "num_classes", "fused_attn", "logging_dir"} & args.keys()
    assert train_ldm.main(argv) == 0  # the same run


def test_sampling_a_run(here):
    exp_path = write_ldm_run(here / "exps" / "run")
    words = GENERATE.replace("50000", "4").replace("250", "2").replace("pretrained/sit-ldm-e2e-vavae", str(exp_path))
    argv = [*words.replace("4000000", "10").split(), "--tf32", "--no-heun", "--sample-dir", "samples"]
    assert generate.main(argv) == 0
    assert Path("samples/samples.npz").is_file()
    with pytest.raises(UserError, match=r"--path-type cosine: .* was trained on linear; leave it out"):
        generate.main([*argv, "--path-type", "cosine"])


def test_sampling_a_checkpoint_of_theirs_names_the_way(here):
    folder = here / "pretrained" / "sit-ldm-e2e-vavae"
    write_experiment(folder, PublicSiT(), PublicSiT(seed=1), public_args(), steps=4_000_000)
    command = (
        r"export_ldm.py pretrained/sit-ldm-e2e-vavae (\S+) --format run --train-steps 4000000 --path-type linear"
        r".* --exp-path \1$"
    )
    with pytest.raises(UserError, match=command):
        generate.main(GENERATE.split())


def test_a_vae_is_taken_out_of_their_checkpoint(here, capsys):
    source = here / "pretrained" / "sit-repae-vavae" / "checkpoints" / "0400000.pt"
    source.parent.mkdir(parents=True)
    mean, var = random_moments(4)
    vae, discriminator = tiny_ldm_state(), random_discriminator().state_dict()
    torch.save(repae_checkpoint(vae, discriminator, mean, var), source)
    assert save_vae_weights.main(SAVE_VAE_WEIGHTS.split()) == 0
    assert "export_vae.py pretrained/sit-repae-vavae/checkpoints/0400000.pt exps/e2e-vavae/e2e-vavae.pt" in (
        capsys.readouterr().out
    )

    names = ("", "-latents-stats", "-discriminator-ckpt")
    saved = {name: torch.load(f"exps/e2e-vavae/e2e-vavae{name}.pt", weights_only=True) for name in names}
    assert all(torch.equal(saved[""][name], tensor) for name, tensor in vae.items())
    assert torch.equal(saved["-latents-stats"]["latents_bias"], mean.view(1, 4, 1, 1))
    assert all(torch.equal(saved["-discriminator-ckpt"][name], tensor) for name, tensor in discriminator.items())
    with pytest.raises(UserError, match="--overwrite"):
        save_vae_weights.main(SAVE_VAE_WEIGHTS.split())
    assert save_vae_weights.main([*SAVE_VAE_WEIGHTS.split(), "--overwrite"]) == 0


def test_train_ldm_only_is_train_ldm(here):
    command = [sys.executable, ROOT / "train_ldm_only.py", *TRAIN_LDM.split(), "--no-fused-attn"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("train_ldm.py: error: --no-fused-attn: ")


# --- keys of the loss's file ------------------------------------------------------------------------------------------


def test_keys_of_the_losses_file(here):
    Path("loss.yaml").write_text(
        "model: {vq_model: {quantize_mode: vae}}\nlosses: {quantizer_weight: 1.0, logvar_init: 0.0, proj_coef: 0, "
        "lecam_regularization_weight: 0.1, lecam_ema_decay: 0.9}\n"
    )
    config = load_loss_config("loss.yaml")
    assert config == VAELossConfig(lecam_regularization_weight=0.1, lecam_ema_decay=0.9)
    assert VAEObjective(config, torch.nn.Identity()).lecam.decay == 0.9


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("logvar_init: 0.5", ("logvar_init 0.5", "exp(logvar_init)", "reconstruction_weight")),
        ("logvar_init: none", ("logvar_init", "none")),
        ("proj_coef: 0.5", ("proj_coef 0.5", "--vae-align-proj-coeff", "--align-coeff")),
        ("lecam_ema_decay: 1.5", ("lecam_ema_decay", "[0, 1]")),
    ],
)
def test_keys_that_would_mean_something_else_are_refused(line, expected, here):
    Path("loss.yaml").write_text(f"losses: {{{line}}}\n")
    with pytest.raises(UserError) as error:
        load_loss_config("loss.yaml")
    assert all(part in str(error.value) for part in expected)
