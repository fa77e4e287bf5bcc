"""generate.py on a tiny run with random weights: what an image depends on, what it does not, and interruptions."""

import json
import signal
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset.npz
import generate
from dataset.images import open_images
from dataset.npz import write_npz
from dataset.shards import PackedReader
from diffusion.counted_noise import counted_normal
from errors import UserError
from formats.vae import load_tokenizer
from inference.arguments import run_and_step
from inference.sample_folder import build_sampler, default_folder, load_networks
from inference.sampling import choose_labels, default_shard_size, preview_rows
from inference.trained_ldm import open_guide, open_trained_ldm
from models.denoisers.config import SiTConfig
from models.denoisers.sit import SiT
from models.denoisers.transformer import Transformer
from runtime import cli
from tests.ldm_runs import CLASS_NAMES, RESOLUTION, STEP, flags, write_ldm_run
from tests.stages import Stage


@pytest.fixture(autouse=True)
def one_thread():
    """As stages have: the number of threads may move a sum's last bit, and so a pixel by a level."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ldm_run(tmp_path_factory.mktemp("exps") / "run", milestone=True)


def sampled(run: Path, folder: Path, **changes: object) -> np.ndarray:
    """Run generate.py in this process; the images ``[N, H, W, 3]``."""
    assert generate.main(flags(run, sample_dir=folder, **changes)) == 0
    return images_in(folder)


def images_in(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        return file["arr_0"]


def largest_difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


@pytest.mark.slow
def test_neither_batch_nor_processes_matter(run, tmp_path):
    """Batches of 4 and 7 and two processes: the same labels, images within one level."""
    process = Stage(
        "generate.py", *flags(run, sample_dir=tmp_path / "two", pproc_batch_size=3, num_fid_samples=15), processes=2
    )
    four = sampled(run, tmp_path / "four", pproc_batch_size=4, num_fid_samples=15)
    seven = sampled(run, tmp_path / "seven", pproc_batch_size=7, num_fid_samples=15)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "process 0 of 2: 10 images" in output
    assert "process 1 of 2: 5 images" in output
    two = images_in(tmp_path / "two")
    print("largest difference:", largest_difference(four, seven), largest_difference(four, two))
    assert four.shape == (15, RESOLUTION, RESOLUTION, 3)
    assert largest_difference(four, seven) <= 1
    assert largest_difference(four, two) <= 1
    labels = [(tmp_path / name / "labels.npy").read_bytes() for name in ("four", "seven", "two")]
    assert labels[0] == labels[1] == labels[2]
    assert not list((tmp_path / "two").glob("*.tmp"))
    assert largest_difference(four[0], four[1]) > 20  # the images are not all the same


def test_noise_of_an_image(run):
    """Bit for bit the same in any batch, another for each image and step."""
    trained = open_trained_ldm(run, None, "ema")
    args = generate.parse_arguments(flags(run))
    process = generate.this_process()
    networks = load_networks(args, trained, trained.load_autoencoder(), process)
    sampler = build_sampler(args, trained, networks, process)
    whole = sampler.noise(torch.arange(14), 3)
    for size in (4, 7):
        parts = [sampler.noise(items, 3) for items in torch.arange(14).split(size)]
        assert torch.equal(torch.cat(parts), whole)
    assert len({image.numpy().tobytes() for step in (0, 1, 2) for image in sampler.noise(torch.arange(5), step)}) == 15


def test_against_a_sampler_written_out(run, tmp_path):
    """SDE with guidance, step by step from the formulas: the same pixels within one level."""
    scale, low, high, steps, count = 2.0, 0.1, 0.8, 6, 4
    found = sampled(
        run,
        tmp_path / "out",
        num_fid_samples=count,
        num_steps=steps,
        cfg_scale=scale,
        guidance_low=low,
        guidance_high=high,
        label_sampling="equal",
        seed=5,
    )
    checkpoint = open_trained_ldm(run, None, "ema").checkpoint
    model = SiT(SiTConfig.from_dict(checkpoint.manifest()["args"]["denoiser"])).eval()
    checkpoint.load_module("ema", model)
    items, labels = torch.arange(count), torch.arange(count) % len(CLASS_NAMES)
    times = [1 - 0.96 * k / (steps - 1) for k in range(steps)] + [0.0]
    x = counted_normal(5, items, 0, (4, 8, 8)).double()
    with torch.no_grad():
        for k, (t, then) in enumerate(pairwise(times)):
            time_of_all = torch.full((count,), t)
            v = model(x.float(), time_of_all, labels)[0].double()
            if low <= t <= high:
                without = model(x.float(), time_of_all, torch.full_like(labels, len(CLASS_NAMES)))[0].double()
                v = without + scale * (v - without)
            score = -(x + (1 - t) * v) / t
            x = x + (then - t) * (v - t * score)
            if k < steps - 1:
                x = x + (2 * t * (t - then)) ** 0.5 * counted_normal(5, items, k + 1, (4, 8, 8))
        tokenizer, _ = load_tokenizer(str(run / "vae"))
        pixels = 127.5 * (tokenizer.decode(tokenizer.statistics.denormalize(x.float())) + 1)
    expected = pixels.round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert largest_difference(found, expected.astype(np.uint8)) <= 1


@pytest.mark.slow
def test_interrupted_twice(run, tmp_path):
    """SIGTERM, then SIGKILL, then to the end: the bytes of a run that was left alone."""
    argv = flags(run, num_fid_samples=14, shard_size=2, pproc_batch_size=2, num_steps=50)
    begun = tmp_path / "stopped"
    for number, shard, code in ((signal.SIGTERM, 0, 130), (signal.SIGKILL, 1, -signal.SIGKILL)):
        process = Stage("generate.py", *argv, "--sample-dir", str(begun))
        wait_for(begun / f"images-{shard:05d}.json", process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert "Traceback" not in errors
    kept = {path.name: path.stat().st_mtime_ns for path in begun.glob("images-?????.npy")}
    assert 2 <= len(kept) < 7
    assert not (begun / "index.json").exists()
    straight = tmp_path / "straight"
    for folder in (begun, straight):
        assert generate.main([*argv, "--sample-dir", str(folder)]) == 0
    for name in ("samples.npz", "index.json", "labels.npy", "preview.png", "images-00000.npy", "images-00006.npy"):
        assert (begun / name).read_bytes() == (straight / name).read_bytes(), name
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in begun.glob("*.npy")}.items()
    assert not [*begun.glob("*.tmp"), *begun.glob("images-?????.json")]


def wait_for(path: Path, process: Stage) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_npz_is_the_shards(run, tmp_path, monkeypatch):
    found = sampled(run, tmp_path / "out", shard_size=3)
    images = open_images(tmp_path / "out")
    packed = np.empty((10, 3, RESOLUTION, RESOLUTION), np.uint8)
    images.read_into(range(10), packed)
    assert np.array_equal(found, packed.transpose(0, 2, 3, 1))
    assert images.class_names == CLASS_NAMES
    PackedReader(tmp_path / "out").verify()
    monkeypatch.setattr(dataset.npz, "CHUNK_BYTES", 4 * 3 * RESOLUTION**2)  # 4, 4 and 2 images
    write_npz(images, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "out" / "samples.npz").read_bytes()


def test_whole_batches(run, tmp_path, monkeypatch):
    """With --compile every batch has the same size; what is too much is thrown away."""
    sizes = []
    forward = SiT.forward

    def counting(self, x, t, y):
        sizes.append(len(x))
        return forward(self, x, t, y)

    monkeypatch.setattr(SiT, "forward", counting)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    whole = sampled(run, tmp_path / "whole", compile=True, classes="dog,cat")
    assert set(sizes) == {4}
    sizes.clear()
    assert largest_difference(whole, sampled(run, tmp_path / "out", classes="dog,cat")) <= 1
    assert set(sizes) == {4, 1}  # shards of 5


def test_npz_can_follow(run, tmp_path):
    """A complete folder gets what it lacks, without a shard being touched."""
    argv = flags(run, sample_dir=tmp_path / "out", preview=0)
    assert generate.main([*argv, "--no-npz"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "samples.npz" not in names
    assert "preview.png" not in names
    before = (tmp_path / "out" / "images-00000.npy").stat().st_mtime_ns
    assert generate.main(argv) == 0
    assert len(images_in(tmp_path / "out")) == 10
    assert (tmp_path / "out" / "images-00000.npy").stat().st_mtime_ns == before


@pytest.mark.parametrize("sampler", [{"mode": "ode"}, {"mode": "ode", "heun": True}, {"mode": "sde"}])
def test_samplers_and_bf16(run, tmp_path, sampler):
    """bf16 is near float32, and not the same."""
    exact = sampled(run, tmp_path / "no", **sampler)
    rough = sampled(run, tmp_path / "bf16", mixed_precision="bf16", **sampler)
    difference = np.abs(exact.astype(float) - rough).mean()
    print(f"{sampler}: mean difference of bf16 {difference:.2f} levels, standard deviation {exact.std():.1f}")
    assert 0 < difference < 0.1 * exact.std()


def test_what_an_image_depends_on(run, tmp_path):
    base = sampled(run, tmp_path / "base", num_fid_samples=3)
    cosine = write_ldm_run(tmp_path / "cosine", path_type="cosine")
    changes = {
        "seed": {"seed": 1},
        "guidance": {"cfg_scale": 3},
        "weights": {"weights": "model"},
        "sampler": {"mode": "ode"},
        "steps": {"num_steps": 4},
        "label": {"classes": "fish"},
    }
    for name, change in changes.items():
        other = sampled(run, tmp_path / name, num_fid_samples=3, **change)
        assert largest_difference(base, other) > 3, name
    assert largest_difference(base, sampled(cosine, tmp_path / "path", num_fid_samples=3)) > 3
    outside = sampled(run, tmp_path / "outside", num_fid_samples=3, cfg_scale=3, guidance_high=0.03)
    assert np.array_equal(base, outside)


def test_times_are_shifted_as_in_the_training_unless_the_flag_says_otherwise(run, tmp_path):
    """The run's own latents have 256 numbers, so that auto is √(256 / 4096) = 1/4."""
    shifted = write_ldm_run(tmp_path / "shifted", time_shift=3.0)
    values = {}
    own, given = [("plain", run, None), ("own", shifted, None)], [("three", run, 3), ("auto", run, "auto")]
    for name, folder, flag in [*own, ("one", shifted, 1), *given]:
        images = sampled(folder, tmp_path / name, mode="ode", num_fid_samples=4, num_steps=5, time_shift=flag)
        settings = json.loads((tmp_path / name / "index.json").read_text())["source"]
        values[name] = settings["time_shift"], images.tobytes()
    shifts = {"plain": 1, "own": 3, "one": 1, "three": 3, "auto": 0.25}
    assert {name: value[0] for name, value in values.items()} == shifts
    assert values["own"] == values["three"]
    assert values["plain"] == values["one"]
    assert len({images for _, images in values.values()}) == 3


def test_truncated_pixels(run, tmp_path):
    """At most one level below the rounded ones, never above; half of them."""
    rounded = sampled(run, tmp_path / "round").astype(int)
    difference = rounded - sampled(run, tmp_path / "truncate", rounding="truncate")
    assert set(np.unique(difference)) == {0, 1}
    assert 0.4 < difference.mean() < 0.6


def test_labels():
    assert choose_labels(7, [0, 1, 2], "equal", 0).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert choose_labels(5, [7, 3], "equal", 0).tolist() == [7, 3, 7, 3, 7]
    labels = choose_labels(9000, [7, 3, 5], "random", 0)
    assert np.array_equal(labels[:100], choose_labels(100, [7, 3, 5], "random", 0))
    assert not np.array_equal(labels, choose_labels(9000, [7, 3, 5], "random", 1))
    _, counts = np.unique(labels, return_counts=True)
    assert np.abs(counts - 3000).max() < 5 * np.sqrt(9000 * 2 / 9)
    equal = choose_labels(50_000, range(1000), "equal", 0)
    assert (np.bincount(equal) == 50).all()


@pytest.mark.parametrize(("classes", "expected"), [("fish,0", {2, 0}), ("dog", {1}), ("2, 1", {1, 2})])
def test_classes(run, tmp_path, capsys, classes, expected):
    sampled(run, tmp_path / "out", num_fid_samples=5, classes=classes, label_sampling="equal")
    labels = np.load(tmp_path / "out" / "labels.npy")
    assert set(labels.tolist()) == expected
    assert np.ptp([(labels == label).sum() for label in expected]) <= 1
    assert ("get one more" in capsys.readouterr().out) == (len(expected) == 2)


def test_class_names_that_are_numbers():
    names = ["0", "1", "10", "2"]  # as folders are sorted
    assert generate.parse_classes("0,1", names) == [0, 1]
    assert generate.parse_classes("10", names) == [2]
    with pytest.raises(UserError, match="--classes 2 is the number of class 10 and the name of class 3"):
        generate.parse_classes("2", names)


def test_checkpoints(run, tmp_path):
    """The newest of a finished run, a milestone by its step, the one before a damaged one."""
    assert open_trained_ldm(run, None, "ema").step == STEP
    assert open_trained_ldm(run, STEP // 2, "ema").checkpoint.folder.parent.name == "milestones"
    unfinished = write_ldm_run(tmp_path / "run", state="running", milestone=True)
    assert open_trained_ldm(unfinished, STEP, "model").step == STEP
    damaged = write_ldm_run(tmp_path / "damaged", milestone=True)
    weights = damaged / "checkpoints" / f"{STEP:07d}" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    messages = []
    assert open_trained_ldm(damaged, None, "ema", messages.append).step == STEP // 2
    assert "another checksum" in messages[0]
    assert f"trained for {STEP} steps" in messages[1]
    assert open_trained_ldm(damaged, None, "model").step == STEP


def test_dry_run_writes_nothing(run, tmp_path, capsys):
    before = sorted(run.rglob("*"))
    assert generate.main(flags(run, dry_run=True, num_steps=250, cfg_scale=2, guidance_high=0.5)) == 0
    output = capsys.readouterr().out
    assert sorted(run.rglob("*")) == before
    inside = sum(1 - 0.96 * k / 249 <= 0.5 for k in range(250))
    assert f"{250 + inside} forward passes" in output
    assert f"{10 * 3 * RESOLUTION**2} bytes" in output


def test_dry_run_of_random_networks_needs_no_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    untrained = ["--dry-run", "--model", "SiT-Ti/2", "--vae", "f4d4-tiny", "--resolution", "32"]
    assert generate.main([*untrained, "--mode", "ode", "--num-steps", "7", "--num-fid-samples", "10"]) == 0
    output = capsys.readouterr().out
    config = SiTConfig(model="SiT-Ti/2", latent_channels=4, latent_size=8, num_classes=1000)
    assert f"checkpoint none (random): {sum(p.numel() for p in SiT(config).parameters()):,} parameters" in output
    assert "7 forward passes" in output
    assert f"{10 * 3 * 32**2} bytes" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "SiT-Ti/2"], "for --dry-run only"),
        (["--model", "SiT-Ti/2", "--dry-run", "--ckpt", "x"], "--ckpt and --model exclude each other"),
        (["--model", "SiT-Ti/2", "--dry-run", "--train-steps", "3"], "--train-steps and --model exclude"),
        (["--model", "SiT-Ti/2", "--dry-run", "--vae-ckpt", "x"], "--vae-ckpt and --model exclude"),
        (["--model", "SiT-Ti/2", "--dry-run", "--resolution", "33"], "not a multiple of the VAE's downsampling"),
        (["--model", "SiT-Q/2", "--dry-run"], "SiT-Q/2 is not known"),
        (["--dry-run"], "give --exp-path"),
    ],
)
def test_what_cannot_be_sampled_untrained(words, said, capsys):
    assert cli.run(generate.main, words) == 2
    assert said in capsys.readouterr().err


def test_default_folder(run, tmp_path):
    args = generate.parse_arguments(flags(run, cfg_scale=2.5, guidance_high=0.75))
    folder = default_folder(args, open_trained_ldm(run, None, "ema"))
    assert folder == run / "samples-0000010-sde3-cfg2.5-0-0.75-10-seed0"

    args = generate.parse_arguments(flags(run, mode="ode", cfg_scale=2.5, guidance_channels=3, time_shift=2))
    folder = default_folder(args, open_trained_ldm(run, None, "ema"))
    assert folder == run / "samples-0000010-ode3-shift2-cfg2.5-0-1-3ch-10-seed0"


def test_times_and_channels_of_guidance_mean_nothing_without_it(run):
    args = generate.parse_arguments(flags(run, guidance_high=0.75, guidance_channels=3))
    assert (args.guidance_low, args.guidance_high, args.guidance_channels) == (0.0, 1.0, None)


def test_a_folder_from_before_there_were_shifts_goes_on(run, tmp_path):
    argv = flags(run, sample_dir=tmp_path / "out", mode="ode")
    assert generate.main(argv) == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    for name in ("time_shift", "guidance_channels"):
        del index["source"][name]
    (tmp_path / "out" / "index.json").write_text(json.dumps(index))
    assert generate.main(argv) == 0
    with pytest.raises(UserError, match="another --time-shift"):
        generate.main([*argv, "--time-shift", "2"])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run on the same latents, of another architecture."""
    return write_ldm_run(tmp_path_factory.mktemp("others") / "small", model="LightningDiT-Ti/2", seed=7)


@pytest.mark.parametrize("mode", ["sde", "ode"])
@pytest.mark.parametrize("channels", [None, 3])
def test_against_autoguidance_written_out(run, small, tmp_path, mode, channels):
    """Each step from the formulas, the guide of another architecture: the same pixels within one level."""
    scale, low, high, steps, count = 2.5, 0.1, 0.8, 6, 4
    guidance = {"cfg_scale": scale, "guidance_low": low, "guidance_high": high, "guidance_channels": channels}
    sampling = {"mode": mode, "num_steps": steps, "num_fid_samples": count, "label_sampling": "equal", "seed": 5}
    found = sampled(run, tmp_path / "out", guide=f"{small}@{STEP}", **guidance, **sampling)
    model, guide = (open_trained_ldm(folder, STEP, "ema").load_model() for folder in (run, small))
    items, labels = torch.arange(count), torch.arange(count) % len(CLASS_NAMES)
    last = 0.04 if mode == "sde" else 1 / steps
    times = [1 - (1 - last) * k / (steps - 1) for k in range(steps)] + [0.0]
    x = counted_normal(5, items, 0, (4, 8, 8)).double()
    with torch.no_grad():
        for k, (t, then) in enumerate(pairwise(times)):
            own, other = (network(x.float(), torch.full((count,), t), labels)[0].double() for network in (model, guide))
            v = own.clone()
            if low <= t <= high:
                v[:, :channels] = (scale * own - (scale - 1) * other)[:, :channels]
            if mode == "ode":
                x = x + (then - t) * v
                continue
            x = x + (then - t) * (v + x + (1 - t) * v)  # v − t·score, score = −(x + (1 − t)·v) / t
            if k < steps - 1:
                x = x + (2 * t * (t - then)) ** 0.5 * counted_normal(5, items, k + 1, (4, 8, 8))
        tokenizer, _ = load_tokenizer(str(run / "vae"))
        pixels = 127.5 * (tokenizer.decode(tokenizer.statistics.denormalize(x.float())) + 1)
    expected = pixels.round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert largest_difference(found, expected) <= 1
    without = sampled(run, tmp_path / "without", **sampling)
    classifier_free = sampled(run, tmp_path / "cfg", **guidance, **sampling)
    assert min(largest_difference(found, other) for other in (without, classifier_free)) > 3


def test_a_network_that_guides_itself_changes_nothing(run, tmp_path):
    """Latents of any scale are those without guidance, to rounding."""
    trained, process = open_trained_ldm(run, None, "ema"), generate.this_process()
    items, labels = torch.arange(4), torch.arange(4) % len(CLASS_NAMES)
    latents = []
    for scale in (1, 0.5, 4):
        args = generate.parse_arguments(flags(run, cfg_scale=scale, num_steps=6))
        args.guide = run, STEP
        networks = load_networks(args, trained, trained.load_autoencoder(), process)
        latents.append(
            build_sampler(args, trained, networks._replace(guide=networks.model), process).latents(items, labels)
        )
    for found in latents[1:]:
        torch.testing.assert_close(found, latents[0], rtol=1e-4, atol=1e-4)


def test_the_folder_says_who_guides(run, small, tmp_path):
    """By @STEP an earlier one of the same run; a rerun goes on, one by another guide or by none is refused."""
    argv = flags(run, sample_dir=tmp_path / "out", cfg_scale=2, num_fid_samples=4)
    by_early = [*argv, "--guide", f"@{STEP // 2}"]
    assert generate.main([*by_early, "--no-npz"]) == 0
    early = open_trained_ldm(run, STEP // 2, "ema")
    made_by = json.loads((tmp_path / "out" / "index.json").read_text())["source"]
    assert made_by["guide"] == f"SiT-Ti/2 of step {STEP // 2}" and made_by["guide_sha256"] == early.checksum
    assert made_by["weights_sha256"] == open_trained_ldm(run, STEP, "ema").checksum != early.checksum
    before = (tmp_path / "out" / "images-00000.npy").stat().st_mtime_ns
    assert generate.main([*argv, "--guide", f"{run}@{STEP // 2}"]) == 0
    assert (tmp_path / "out" / "images-00000.npy").stat().st_mtime_ns == before
    for others in (["--guide", str(small)], []):
        with pytest.raises(UserError, match="another --guide"):
            generate.main([*argv, *others])
    plain = sampled(run, tmp_path / "plain", cfg_scale=2, num_fid_samples=4)
    assert largest_difference(images_in(tmp_path / "out"), plain) > 3
    made_by = json.loads((tmp_path / "plain" / "index.json").read_text())["source"]
    assert made_by["guide"] is None and made_by["guide_sha256"] is None


@pytest.mark.slow
def test_two_processes_make_the_bytes_of_one_with_a_guide(run, small, tmp_path):
    argv = flags(run, guide=small, cfg_scale=2, guidance_high=0.75, num_fid_samples=15)
    process = Stage("generate.py", *argv, "--sample-dir", str(tmp_path / "two"), processes=2)
    assert generate.main([*argv, "--sample-dir", str(tmp_path / "one")]) == 0
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    for name in ("samples.npz", "index.json", "labels.npy", "images-00000.npy", "images-00002.npy"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_a_guide_needs_no_null_class(small, tmp_path):
    untrained_null = write_ldm_run(tmp_path / "run", cfg_prob=0.0)
    assert generate.main(flags(untrained_null, sample_dir=tmp_path / "made", guide=small, cfg_scale=2)) == 0


def test_runs_that_do_not_name_their_statistics_are_compared_by_those_themselves(run, tmp_path):
    silent = write_ldm_run(tmp_path / "silent", seed=7, statistics_checksum=None)
    assert open_guide(open_trained_ldm(run, None, "ema"), silent, None).folder == silent


def test_a_compiled_guide(run, small, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    monkeypatch.setattr(Transformer, "compile", lambda self, **options: compiled.append(self.config.model))
    sampled(run, tmp_path / "out", guide=small, cfg_scale=2, compile=True)
    assert compiled == ["SiT-Ti/2", "LightningDiT-Ti/2"]


def test_dry_run_counts_the_guide(run, small, capsys):
    argv = flags(run, guide=small, dry_run=True, num_steps=250, cfg_scale=2, guidance_high=0.5)
    assert generate.main(argv) == 0
    output = capsys.readouterr().out
    inside = sum(1 - 0.96 * k / 249 <= 0.5 for k in range(250))
    assert f"250 forward passes and {inside} of the guide an image" in output
    size = sum(p.numel() for p in open_trained_ldm(small, None, "ema").load_model().parameters())
    assert f"guide: LightningDiT-Ti/2 of step {STEP}: {size:,} parameters" in output
    shards = 10 * 3 * RESOLUTION**2
    assert f"{shards} bytes of shards" in output


def test_default_folders_with_a_guide(run, small):
    trained = open_trained_ldm(run, None, "ema")
    for guide, name in ((f"@{STEP // 2}", "0000005"), (small, "small-0000010")):
        args = generate.parse_arguments(flags(run, cfg_scale=2.5, guidance_high=0.75, guide=guide))
        guided = replace(trained, guide=open_guide(trained, *args.guide))
        assert default_folder(args, guided) == run / f"samples-0000010-sde3-auto2.5-0-0.75-{name}-10-seed0"


def test_names_of_guides(tmp_path):
    (tmp_path / "a@7").mkdir()
    cases = {"exps/a@7": ("exps/a", 7), "exps/a": ("exps/a", None), str(tmp_path / "a@7"): (tmp_path / "a@7", None)}
    for text, (folder, step) in cases.items():
        assert run_and_step(text) == (Path(folder), step)
    assert run_and_step("@20000") == (None, 20000)


def test_no_guidance_without_a_null_class(tmp_path):
    untrained_null = write_ldm_run(tmp_path / "run", cfg_prob=0.0)
    with pytest.raises(UserError, match=r"--cfg-scale 2: .*--cfg-prob 0"):
        generate.main(flags(untrained_null, cfg_scale=2))
    assert generate.main(flags(untrained_null, sample_dir=tmp_path / "made")) == 0


def test_shard_sizes_and_previews():
    assert [default_shard_size(n) for n in (1, 4096, 4097, 50_000, 10**6)] == [64, 64, 128, 832, 1024]
    assert preview_rows(np.arange(8) % 2, 8) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert preview_rows(np.arange(100), 9) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert preview_rows(np.arange(100), 1) == [[0]]
    assert preview_rows(np.arange(100), 7) == [[0, 1, 2], [3, 4, 5]]
    assert preview_rows(np.array([0, 0, 0, 1]), 4) == [[0], [3]]
