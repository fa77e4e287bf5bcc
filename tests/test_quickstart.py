"""What the quickstart starts from: the VAE that comes with the code, and the versions that it installs."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.toy import draw_image
from files import checksum
from formats.vae import load_tokenizer
from loss.reconstruction import psnr
from models.pixels import to_uint8
from runtime.experiment import load_preset, resolve

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {"tiny_vae": (4, 8, 8), "miniature_vae": (16, 4, 4)}  # latents at 32 px
UNSEEN = 1234567  # seed of a set that nothing was trained on


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_vae_reconstructs_shapes_it_has_not_seen(name):
    tokenizer, statistics = load_tokenizer(str(ROOT / "pretrained" / name))
    assert statistics is not None
    assert tokenizer.latent_shape(32) == SHIPPED[name]
    assert all(parameter.dtype == torch.float32 for parameter in tokenizer.parameters())
    images = np.stack([np.asarray(draw_image(UNSEEN, number, 32)[0]).transpose(2, 0, 1) for number in range(200)])
    images = torch.from_numpy(images)
    with torch.no_grad():
        reconstructed = to_uint8(tokenizer.decode(tokenizer.encode(images).mode))
    assert psnr(images, reconstructed).mean() > 33


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_vae_is_the_one_that_its_page_describes(name):
    folder = ROOT / "pretrained" / name
    page = (folder / "README.md").read_text()
    for file in ("diffusion_pytorch_model.safetensors", "latents_stats.safetensors", "config.json"):
        assert checksum(folder / file)["sha256"] in page, file
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6


def test_every_requirement_has_a_version_that_the_tests_passed_with():
    def names(file: str) -> dict[str, str]:
        lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
        pairs = (re.match(r"([\w.-]+)(.*)", line).groups() for line in lines if line)
        return {re.sub(r"[-_.]+", "-", name).lower(): rest for name, rest in pairs}

    pinned = names("constraints.txt")
    assert names("requirements.txt").keys() <= pinned.keys()
    assert all(re.fullmatch(r"==[\w.]+ ; python_version >= .*", rest) for rest in pinned.values())


@pytest.mark.parametrize("words", [["--long"], ["--data", "tests"], ["--from-scratch"], ["--name", "a"], ["--name=a"]])
def test_compare_goes_with_the_quickstart_alone(words):
    answer = subprocess.run(
        ["./quickstart.sh", "--compare", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("quickstart.sh: error: --compare goes without")


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_an_environment_that_uv_made_has_no_pip(script, tmp_path):
    """Its packages are then installed by uv, into the one that is active."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, lines in (("python", "exit 1"), ("uv", f'echo "$@" > {tmp_path}/asked; exit 3')):
        (programs / name).write_text(f"#!/bin/sh\n{lines}\n")
        (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path)}
    answer = subprocess.run([f"./{script}"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 3, answer.stderr
    assert (tmp_path / "asked").read_text() == "pip install --quiet -r requirements.txt\n"


def test_what_compare_adds_differs_in_the_alignment_alone():
    """Same start, steps, learning rate, images, SiT and samples as the quickstart's."""
    first, second = (
        {stage.name: stage.command for stage in resolve(name, load_preset(name), "exps", []).stages}
        for name in ("quickstart", "quickstart_plain")
    )
    assert list(second) == [name for name in first if "toy" not in name and "preprocess" not in name]
    for name in ("sendvae", "cache", "ldm", "samples", "reconstruction", "evaluate", "reading"):
        command = shlex.join(second[name]).replace("quickstart_plain", "quickstart")
        if name == "sendvae":
            command = command.replace(" --align-coeff 0", "")
            for flag in ("--enc-type", "--mapper-grid", "--mapper-width"):
                place = first[name].index(flag)
                del first[name][place : place + 2]
            first[name].remove("--no-noise-injection")
        assert command == shlex.join(first[name]), name


@pytest.mark.parametrize("flag", ["--long", "--data"])
def test_from_scratch_goes_with_the_toy_shapes(flag, tmp_path):
    words = [flag, str(tmp_path)] if flag == "--data" else [flag]
    answer = subprocess.run(
        ["./quickstart.sh", "--from-scratch", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 2
    assert "--from-scratch" in answer.stderr
