"""Several VFMs at once: one mapper or projector each, losses averaged, features cached for each."""

import json

import pytest
import torch
from safetensors.torch import load_file

import cache_latents
import train_ldm
import train_sendvae
from dataset.latents import LatentDataset, features_name
from errors import UserError
from loss.alignment import TokenGrid
from models.encoders import build_encoder, build_encoders, encoder_names
from models.mapper import Mapper
from runtime.cli import run
from runtime.measure import count_parameters
from tests import ldm_trainings, sendvae_runs
from tests.latent_caches import flags as cache_flags
from tests.latent_caches import write_cache
from tests.ldm_steps import accumulate, random_batch
from tests.ldm_steps import tiny_trainer as tiny_ldm_trainer
from tests.sendvae_runs import draws_for, gradients, image_batch, networks, random_images, tiny_trainer

NAMES = ["efficientnet-lite0", "efficientnet-lite0-s32"]
BOTH = ",".join(NAMES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A packed toy set with latents; features of the second VFM beside those of the first."""
    packed = ldm_trainings.write_data(tmp_path_factory.mktemp("data"), images=12)
    options = {"cache_features": True, "enc_type": BOTH, "features_grid": 4}
    vae = packed.parent / "vae"
    assert cache_latents.main(cache_flags(packed, vae, ldm_trainings.LATENTS, **options)) == 0
    return packed


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def mean(values) -> float:
    values = [float(value) for value in values]
    return sum(values) / len(values)


# --- names and files --------------------------------------------------------------------------------------------------


def test_names_and_files_are_separated_by_commas():
    assert encoder_names(" efficientnet-lite0, dinov2-vit-b") == ["efficientnet-lite0", "dinov2-vit-b"]
    with pytest.raises(UserError, match="names dinov2-vit-b twice"):
        encoder_names("dinov2-vit-b,dinov2-vit-b")
    with pytest.raises(UserError, match=r"--enc-type .* is not known"):
        encoder_names("dinov2-vit-b,")


def test_an_empty_entry_is_looked_for_and_another_number_of_files_is_refused(tmp_path):
    images = random_images(2)
    torch.save({"nothing": torch.zeros(1)}, tmp_path / "a,b.pth")
    encoders = build_encoders(NAMES, 4, ",")
    assert [encoder.name for encoder in encoders] == NAMES
    assert torch.equal(encoders[1](images), build_encoder(NAMES[1], 4)(images))
    with pytest.raises(UserError, match="is 3 files for the 2 encoders of --enc-type efficientnet-lite0,"):
        build_encoders(NAMES, 4, "a.pth,,")
    with pytest.raises(UserError, match=r"a,b\.pth holds no weights"):  # the file of a single VFM may have a comma
        build_encoders(NAMES[:1], 4, str(tmp_path / "a,b.pth"))


# --- VAE --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("align_loss", "metric"), [("cosine", "alignment"), ("vf", "vf_distance")])
def test_the_vaes_alignment_is_the_average_over_the_vfms(align_loss, metric):
    weights = {"reconstruction_weight": 0.0, "kl_weight": 0.0}
    options = {"gan": False, "align_loss": align_loss, "loss": weights}
    both, *singles = (tiny_trainer(vfms=vfms, **options) for vfms in (NAMES, NAMES[:1], NAMES[1:]))
    for trainer, mapper in zip(singles, both.alignment.mappers, strict=True):
        trainer.alignment.mappers[0].load_state_dict(mapper.state_dict())
    values, *alone = (t.backward(0, image_batch(4), draws_for(4), 1.0, synchronise=True)[0] for t in (both, *singles))
    assert not any("/" in name for name in alone[0])
    for name, value in zip(NAMES, alone, strict=True):
        assert values[f"{metric}/{name}"] == value[metric]
    assert values[metric].item() == pytest.approx(mean(value[metric] for value in alone), rel=1e-6)
    if align_loss == "vf":  # weighs nothing where the fidelity does
        assert values["vf_weight"] == 0
        return
    assert values["loss"] == values["alignment"]

    averaged, parts = gradients(both.tokenizer), [gradients(trainer.tokenizer) for trainer in singles]
    for name, gradient in averaged.items():
        expected = 0.5 * (parts[0][name] + parts[1][name])
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    assert sum(g.abs().sum() for g in gradients(both.alignment.mappers[1]).values()) > 0


def test_the_tokenizer_and_each_mapper_have_names_of_their_own():
    modules = tiny_trainer(vfms=NAMES).modules()
    assert {name.split(".")[0] for name in modules["model"].state_dict()} == {"network", "statistics"}
    assert {name.rsplit(".")[1] for name in modules["alignment"].state_dict()} == {"0", "1"}
    assert all(name.startswith("mappers.") for name in modules["alignment"].state_dict())
    alone = tiny_trainer(align_coeff=0.0)
    assert alone.modules()["alignment"] is None
    assert {name.split(".")[0] for name in networks(alone).state_dict()} == {"tokenizer"}


def test_a_vae_trains_with_two_vfms_and_resumes(data, tmp_path):
    options = {"enc_type": BOTH, "val_data_dir": data, "max_val_images": 6, "val_steps": 2, "log_steps": 1}
    whole = sendvae_runs.flags(data, tmp_path, "whole", max_train_steps=4, checkpointing_steps=2, **options)
    assert run(train_sendvae.main, whole) == 0
    lines = metrics(tmp_path / "whole")
    assert lines[0]["alignment"] == pytest.approx(mean(lines[0][f"alignment/{name}"] for name in NAMES), rel=1e-6)
    validation = next(line for line in lines if "val/psnr" in line)
    for metric in ("align_cosine", "align_cosine_clean", "constant_cosine"):
        each = [validation[f"val/{metric}/{name}"] for name in NAMES]
        assert validation[f"val/{metric}"] == pytest.approx(mean(each), rel=1e-6)
        assert each[0] != each[1]
    state = load_file(tmp_path / "whole" / "checkpoints" / "0000004" / "alignment.safetensors")
    widths = [state[f"mappers.{number}.patch_embed.weight"].shape[0] for number in range(2)]
    assert widths == [112, 320]

    begun = sendvae_runs.flags(data, tmp_path, "resumed", max_train_steps=2, checkpointing_steps=2, **options)
    assert run(train_sendvae.main, begun) == 0
    resumed = sendvae_runs.flags(data, tmp_path, "resumed", max_train_steps=4, checkpointing_steps=2, **options)
    assert run(train_sendvae.main, resumed) == 0
    for module in ("model", "alignment"):
        files = [tmp_path / run / "checkpoints" / "0000004" / f"{module}.safetensors" for run in ("whole", "resumed")]
        straight, again = map(load_file, files)
        assert straight.keys() == again.keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in straight.items())


def test_dry_runs_name_each_network(data, tmp_path, capsys):
    vae = sendvae_runs.flags(data, tmp_path, enc_type=BOTH, dry_run=True)
    assert run(train_sendvae.main, vae) == 0
    printed = capsys.readouterr().out
    for name in NAMES:
        assert f"VFM {name}" in printed
        assert f"alignment/{name}" in printed
    mappers = sum(count_parameters(Mapper(4, 8, sendvae_runs.GRID, width))[0] for width in (112, 320))
    table = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    assert table["alignment"] == [f"{mappers:,}"] * 2
    for source in ("images", "features"):
        assert (
            run(train_ldm.main, ldm_trainings.flags(data, tmp_path, enc_type=BOTH, dry_run=True, repa_source=source))
            == 0
        )
        printed = capsys.readouterr().out
        assert all(f"repa/{name}" in printed for name in NAMES)
        assert all((f"VFM {name}" in printed) == (source == "images") for name in NAMES)
    argv = cache_flags(data, data.parent / "vae", "other", cache_features=True, enc_type=BOTH, dry_run=True)
    assert cache_latents.main(argv) == 0
    printed = capsys.readouterr().out
    assert all(f"VFM {name}: " in printed and f"features of {name}: 12 items of 4 × " in printed for name in NAMES)


# --- latents and SiT --------------------------------------------------------------------------------------------------


def test_features_of_each_vfm_are_cached_and_read(data):
    folder = data / ldm_trainings.LATENTS
    dataset = LatentDataset(folder, features=NAMES)
    assert dataset.feature_shapes == ((16, 112), (16, 320))
    assert (folder / features_name(NAMES[1]) / "index.json").exists()
    assert list(dataset.layout) == ["stored", "labels", *(features_name(name) for name in NAMES)]
    assert features_name("timm/vit_tiny_patch16_224") == "features/timm--vit_tiny_patch16_224"


def test_features_come_in_the_order_asked_for(tmp_path):
    arrays = [
        write_cache(tmp_path / name, 6, features=name, feature_shape=(4, width)) for name, width in (("a", 6), ("b", 3))
    ]
    (tmp_path / "b" / features_name("b")).rename(tmp_path / "a" / features_name("b"))
    dataset = LatentDataset(tmp_path / "a", features=["b", "a"])
    out = {name: torch.empty(2, *shape, dtype=dtype) for name, (shape, dtype) in dataset.layout.items()}
    dataset.read_arrays(torch.tensor([3, 1]).numpy(), None, {name: tensor.numpy() for name, tensor in out.items()})
    batch = dataset.batch(out)
    assert torch.equal(batch.features[0], torch.from_numpy(arrays[1]["features"][[3, 1]]))
    assert torch.equal(batch.features[1], torch.from_numpy(arrays[0]["features"][[3, 1]]))
    assert dataset.held_bytes == 6 * (8 * 64 + 4 * 6 + 4 * 3) * 2


def test_repa_is_the_average_over_the_vfms():
    vfms = TokenGrid("a", 4, 12), TokenGrid("b", 4, 20)
    trainer, batch = tiny_ldm_trainer(features=vfms), random_batch(4, features=vfms)
    batch = batch._replace(features=tuple(part.float() for part in batch.features))
    draws = trainer.draws(0, 0, batch)
    metrics = accumulate(trainer, batch, draws)
    assert metrics["repa"].item() == pytest.approx(mean([metrics["repa/a"], metrics["repa/b"]]), rel=1e-6)
    assert metrics["loss"].item() == pytest.approx(float(metrics["denoise"] + 0.5 * metrics["repa"]), rel=1e-6)
    repa = trainer.alignment["repa"]
    ours = gradients(repa)

    x, t = trainer.normalised(batch, draws), draws.times[:, None, None, None]
    state = trainer.denoiser((1 - t) * x + t * draws.noise, draws.times, batch.labels, taps=repa.taps)[1][0]
    tokens = [project(state) for project in repa.projectors]
    cosines = [(u * v).sum(-1) / u.norm(dim=-1) / v.norm(dim=-1) for u, v in zip(tokens, batch.features, strict=True)]
    assert [(1 - cosine.mean()).item() for cosine in cosines] == pytest.approx(
        [metrics["repa/a"].item(), metrics["repa/b"].item()], rel=1e-5
    )
    loss = 0.5 * ((1 - cosines[0].mean()) + (1 - cosines[1].mean())) / 2
    expected = torch.autograd.grad(loss, [*repa.parameters()])
    assert len(ours) == len(expected) == 12
    for name, gradient in zip(dict(repa.named_parameters()), expected, strict=True):
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7)


def test_an_ldm_trains_with_two_vfms_from_images_and_from_the_cache(data, tmp_path):
    for source in ("images", "features"):
        assert run(train_ldm.main, ldm_trainings.flags(data, tmp_path, source, enc_type=BOTH, repa_source=source)) == 0
    images, features = (metrics(tmp_path / source)[0] for source in ("images", "features"))
    assert images["denoise"] == features["denoise"]
    for metric in ("repa", *(f"repa/{name}" for name in NAMES)):
        assert images[metric] == pytest.approx(features[metric], rel=1e-3)
    args = json.loads((tmp_path / "images" / "args.json").read_text())["args"]
    assert args["feature_widths"] == [112, 320]
    state = load_file(tmp_path / "images" / "checkpoints" / "0000002" / "alignment.safetensors")
    assert [state[f"repa.projectors.{number}.4.weight"].shape[0] for number in range(2)] == [112, 320]


def test_auto_takes_images_unless_all_features_are_cached(data, tmp_path):
    assert run(train_ldm.main, ldm_trainings.flags(data, tmp_path, "cached", enc_type=BOTH)) == 0
    args = json.loads((tmp_path / "cached" / "args.json").read_text())["args"]
    assert args["repa_source"] == "features"
    folder = data / ldm_trainings.LATENTS / features_name(NAMES[1])
    folder.rename(folder.with_name("set-aside"))
    try:
        assert run(train_ldm.main, ldm_trainings.flags(data, tmp_path, "images", enc_type=BOTH)) == 0
    finally:
        folder.with_name("set-aside").rename(folder)
    args = json.loads((tmp_path / "images" / "args.json").read_text())["args"]
    assert args["repa_source"] == "images"
