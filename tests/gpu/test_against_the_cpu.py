"""The same numbers on a GPU as on the CPU, to rounding."""

import pytest
import torch

import generate
from diffusion.counted_noise import counted_integers, counted_normal, philox
from formats.vae import load_tokenizer
from inference.latent_cache import ChunkEncoder, Target, autocast_for, latents_encoder
from inference.sample_folder import build_sampler, load_networks
from inference.sampling import ImageSampler
from runtime.processes import Process, set_inference_numerics, this_process
from tests.gpu import needs_gpu
from tests.ldm_runs import flags, write_ldm_run

pytestmark = needs_gpu
CPU = Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_ldm_run(tmp_path_factory.mktemp("exps") / "ldm", guide_depth=2)


GUIDANCE = {
    "null class": {"cfg_scale": 2.0},
    "internal": {"cfg_scale": 2.0, "guide": "internal"},
    "both": {"cfg_scale": 2.0, "guide": "internal", "guide_scale": 1.5, "guide_low": 0.3, "guidance_high": 0.7},
}


def sampler_on(run, process: Process, **changes) -> ImageSampler:
    args = generate.parse_arguments(flags(run, **changes))
    set_inference_numerics(process, args.mixed_precision, allow_tf32=False)
    trained = generate.open_model(args, print)
    networks = load_networks(args, trained, trained.load_autoencoder(), process)
    return build_sampler(args, trained, networks, process)


def test_noise():
    """Words and integers bit for bit, normals to the last bits of the logarithm and the cosine."""
    counter = (torch.arange(1000), torch.tensor(3), torch.tensor(7), torch.tensor(0))
    words = zip(philox(counter, (1, 2)), philox(tuple(word.cuda() for word in counter), (1, 2)), strict=True)
    assert all(torch.equal(word, other.cpu()) for word, other in words)
    items = torch.tensor([0, 5, 1 << 40])
    normal = counted_normal(9, items, 4, (64,), dtype=torch.float64)
    assert (counted_normal(9, items.cuda(), 4, (64,), dtype=torch.float64).cpu() - normal).abs().max() < 1e-12
    single = counted_normal(9, items, 4, (64,))
    assert (counted_normal(9, items.cuda(), 4, (64,)).cpu() - single).abs().max() < 1e-6
    assert torch.equal(counted_integers(9, items.cuda(), 1000).cpu(), counted_integers(9, items, 1000))


@pytest.mark.parametrize("vae", ["f4d4-tiny", "rae-tiny", "rae-mae-b"])
def test_cached_latents(vae):
    """What a cache stores, float32; also features of a convolutional VFM, and of a ViT."""
    torch.manual_seed(0)
    tokenizer, _ = load_tokenizer(vae, "none")
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    stored = []
    for process in (CPU, this_process()):
        set_inference_numerics(process, "no", allow_tf32=False)
        tokenizer.to(process.device)
        target = Target("latents", None, latents_encoder(tokenizer, torch.float32), False, ())
        worker = ChunkEncoder(process.device, 4, 1, autocast_for(process.device, "no"))
        stored.append(torch.from_numpy(worker.start(images, [target])()[0].copy()))
        worker.close()
    torch.testing.assert_close(stored[1], stored[0], rtol=1e-4, atol=1e-5 if vae == "f4d4-tiny" else 1e-4)


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize(("mode", "compiled"), [("ode", False), ("sde", False), ("sde", True)])
def test_samples(run, guidance, mode, compiled):
    """Pixels of guided samples, on the GPU also compiled: at most one level apart."""
    images = []
    for process in (CPU, this_process()):
        is_compiled = {"compile": True} if compiled and process is not CPU else {}
        sampler, items = sampler_on(run, process, mode=mode, **GUIDANCE[guidance], **is_compiled), torch.arange(4)
        images.append(sampler(items.to(process.device), (items % 3).to(process.device))[0].cpu().int())
    assert (images[1] - images[0]).abs().max() <= 1


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_sampling_does_not_synchronise(run, guidance):
    """Noise, sampler, guidance and decoding only launch kernels."""
    changes = GUIDANCE[guidance] | {"guidance_high": 0.5, "mixed_precision": "bf16"}
    sampler = sampler_on(run, this_process(), **changes)
    items = torch.arange(4, device="cuda")
    first = sampler(items, items % 3)[0].cpu()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again, _ = sampler(items, items % 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again.cpu())
