"""What one GPU does with the work of every stage, against its own ceilings and against plain code, in one run.

    python benchmarks/gpu.py --output gpu.json            # real sizes, random weights: about 25 minutes (estimated)
    python benchmarks/gpu.py --parts ldm,sampling         # some of it
    python benchmarks/gpu.py --rehearse                   # tiny networks, any device: does it run at all?

Ceilings: a large matrix product in bf16 and a large copy. Then SiT-XL/1 with REPA from images, Send-VAE on f16d32,
caching and guided sampling, each built by the real script from its real flags, on random data that lies on the device.
``plain`` is the same work as public code writes it: eager, AdamW and EMA one tensor at a time, every loss fetched in
every step, VAE in float32. MFU counts the floating-point operations of the eager step (torch's counter, also of what
is frozen) against the matrix product that was measured. Medians of ``--repeats`` timings.

``launch_ms`` is when the CPU was through with a step that the GPU may still be at, at most: a GPU with about a thousand
launches to go lets the CPU wait. With few images it is what launching takes; a step cannot be faster. ``loss`` is that
of the last step: the same network and optimizer, with as many steps on as many images, comes out at the same to the
precision of its variant. ``first_step_seconds`` is less where torch's cache on the disk holds kernels of an earlier
variant or run. Four variants are experiments that no script offers: CUDA graphs, and small kernels launched as one
(Inductor's combo kernels); in sampling a GELU that the matrix product before it applies (cuBLASLt's epilogue; a CPU
takes GELU's other formula), and a residual stream in bf16. Where one fails, the table says so.
"""

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cache_latents
import generate
import train_ldm
import train_sendvae
from inference.latent_cache import ChunkEncoder, Target, autocast_for, chunk_size, latents_encoder
from inference.sample_folder import build_sampler, load_networks
from loss.vae_objective import load_loss_config
from models.compilation import FUSING
from runtime.cli import ArgumentParser, add_debug_argument, is_out_of_memory, non_negative_int, positive_int, run
from runtime.processes import set_inference_numerics, this_process
from training import dry_run
from training.method import Method, to_device, train_step
from training.run import begin

PUBLISHED_IMAGES, PUBLISHED_STEPS = 50_000, 250


@dataclass(frozen=True)
class Sizes:
    """What is measured: flags of the scripts, and batches.

    Attributes:
        matrix: side of the matrix product.
        copy: bytes of the copy.
        ldm, sendvae, cache, sample: flags; ``repa`` those of the alignment that trainings with one have besides.
        ldm_lightning: ``--model`` of the LightningDiT beside it.
        ldm_batches: images at once, of each timing.
        ldm_small_batches: the same, of what is meant for few images: the share of a GPU where there are many.
        sendvae_batch, cache_batch, sample_batch: images at once.
        sample_steps: of the sampler whose outcome is compared with float32's.
    """

    matrix: int = 8192
    copy: int = 4 << 30
    ldm: tuple[str, ...] = ("--vae", "f16d32", "--model", "SiT-XL/1", "--enc-type", "dinov2-vit-b")
    repa: tuple[str, ...] = ()
    ldm_lightning: str = "LightningDiT-XL/1"
    ldm_batches: tuple[int, ...] = (64, 128)
    ldm_small_batches: tuple[int, ...] = (4, 32)
    sendvae: tuple[str, ...] = ("--vae", "f16d32", "--vae-ckpt", "none", "--enc-type", "dinov2-vit-b")
    sendvae_batch: int = 32
    cache: tuple[str, ...] = ("--vae", "f16d32", "--vae-ckpt", "none")
    cache_batch: int = 256
    sample: tuple[str, ...] = ("--model", "SiT-XL/1", "--vae", "f16d32", "--cfg-scale", "2.5")
    sample_batch: int = 64
    sample_steps: int = 20


TINY_NETWORKS = ("--vae", "f4d4-tiny", "--resolution", "32")
TINY = Sizes(
    matrix=256,
    copy=1 << 20,
    ldm=(*TINY_NETWORKS, "--model", "SiT-Ti/2", "--enc-type", "efficientnet-lite0"),
    repa=("--encoder-depth", "4"),
    ldm_lightning="LightningDiT-Ti/2",
    ldm_batches=(2, 4),
    ldm_small_batches=(1, 2),
    sendvae=(
        *(*TINY_NETWORKS, "--vae-ckpt", "none", "--enc-type", "efficientnet-lite0", "--mapper-grid", "2"),
        *("--loss-cfg-path", "configs/l1_kl_gan.yaml"),
    ),
    sendvae_batch=2,
    cache=(*TINY_NETWORKS, "--vae-ckpt", "none"),
    cache_batch=16,
    sample=(*TINY_NETWORKS, "--model", "SiT-Ti/2", "--cfg-scale", "2.5"),
    sample_batch=2,
    sample_steps=2,
)


@dataclass
class Report:
    """Rows as they are measured, printed and written at once.

    Attributes:
        repeats: timings of each.
        device: where.
        kernels: of each step that are shown.
        output: the JSON file, or None.
    """

    repeats: int
    device: torch.device
    kernels: int = 0
    output: Path | None = None
    rows: list[dict] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"

    def record(self, row: dict) -> None:
        self.rows.append(row)
        if self.output is not None:
            content = {"device": self.name, "torch": torch.__version__, "ceilings": self.ceilings, "rows": self.rows}
            self.output.write_text(json.dumps(content, indent=1) + "\n")

    def seconds(
        self, function: Callable[[], object], warm_up: int = 2, times: int = 1, is_awaited: bool = True
    ) -> float:
        """Median of one call, until the GPU is done with it or, not awaited, until it was launched."""
        for _ in range(warm_up):
            function()
        taken = []
        for _ in range(self.repeats):
            self.wait()
            start = time.perf_counter()
            for _ in range(times):
                function()
            if is_awaited:
                self.wait()
            taken.append((time.perf_counter() - start) / times)
        return statistics.median(taken)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def failed(self, part: str, what: str, images: int, error: Exception) -> None:
        """Record an experiment that raised."""
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(f"{part:9} {what:34}{images:5}  {said}", flush=True)
        self.record({"part": part, "what": what, "images": images, "failed": said})

    def forget_peak(self) -> None:
        """Give back what the last network held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def add(self, part: str, what: str, seconds: float, images: int, flops: float = 0.0, **more: object) -> None:
        """Record a timing.

        Args:
            part: of the work.
            what: which variant.
            seconds: for ``images`` images.
            images: at once.
            flops: floating-point operations of an image; 0: not counted.
            more: further figures.
        """
        row = {"part": part, "what": what, "images": images, "seconds": seconds, "images_per_second": images / seconds}
        if flops and "matrix_flops" in self.ceilings:
            row["mfu"] = flops * images / seconds / self.ceilings["matrix_flops"]
            row["tflop_per_second"] = flops * images / seconds / 1e12
        if self.device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.record(row | more)
        figures = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in more.items())
        mfu = f"  MFU {row['mfu']:.1%}" if "mfu" in row else ""
        peak = f"  {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
        rate = f"{1000 * seconds:9.1f} ms{images / seconds:10.1f} images/s"
        print(f"{part:9} {what:34}{images:5}{rate}{mfu}{peak}  {figures}", flush=True)


def measure_ceilings(report: Report, sizes: Sizes) -> None:
    """The matrix product and the copy that the rest is compared with."""
    device, side = report.device, sizes.matrix
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = report.seconds(lambda: a @ b, times=10)
    report.ceilings["matrix_flops"] = 2 * side**3 / seconds
    source = torch.empty(sizes.copy, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    seconds = report.seconds(lambda: target.copy_(source))
    report.ceilings["copy_bytes"] = 2 * sizes.copy / seconds
    print(
        f"ceilings: {report.ceilings['matrix_flops'] / 1e12:.0f} TFLOP/s in a bf16 matrix product of {side}, "
        f"{report.ceilings['copy_bytes'] / 1e12:.2f} TB/s copying"
    )


# -- training

LDM_VARIANTS = {
    "plain": ("--no-compile",),
    "eager": ("--no-compile",),
    "eager, checkpointing": ("--no-compile", "--gradient-checkpointing"),
    "compiled": ("--compile",),
    "compiled, deterministic": ("--compile", "--deterministic"),
    "compiled, Muon": ("--compile", "--optimizer", "muon"),
    "compiled, LightningDiT": ("--compile",),
    "compiled, SPRINT": ("--compile",),
    "compiled, flow map": ("--compile",),
    "compiled, few images": ("--compile",),
    "compiled, combo kernels": ("--compile",),
    "compiled, CUDA graphs": ("--compile",),
}
INDUCTOR = {"compiled, combo kernels": {"combo_kernels": True}, "compiled, CUDA graphs": {"triton.cudagraphs": True}}
FEW_IMAGES = ("compiled, few images", *INDUCTOR)
ONE_BATCH = ("plain", "compiled, Muon", "compiled, LightningDiT", "compiled, SPRINT", "compiled, flow map")
FLOW_MAP = ("--align", "none", "--flow-map-blocks", "2", "--flow-map-cfg-scale", "2.5")  # as many blocks cost the same
SENDVAE_VARIANTS = {
    "plain, VAE in float32": ("--no-compile", "--mixed-precision", "no"),
    "eager": ("--no-compile",),
    "eager, channels_last": ("--no-compile", "--channels-last"),
    "compiled": ("--compile",),
    "compiled, NCHW": ("--compile", "--no-channels-last"),
    "compiled, deterministic": ("--compile", "--deterministic"),
}


def measure_ldm(report: Report, sizes: Sizes, variants: Sequence[str]) -> None:
    """SiT with REPA from images: whole steps, and their parts; each number of images compiled on its own."""
    for what in variants:
        batches = sizes.ldm_small_batches if what in FEW_IMAGES else sizes.ldm_batches
        for images in batches[:1] if what in ONE_BATCH else batches:
            own = {"compiled, LightningDiT": ("--model", sizes.ldm_lightning), "compiled, SPRINT": ("--sprint",)}
            of_repa = FLOW_MAP if what == "compiled, flow map" else sizes.repa
            network = (*sizes.ldm, *of_repa, *own.get(what, ()))
            flops = flops_of_ldm(network)
            with compiled_with(INDUCTOR.get(what, {})):
                args, method = build_ldm([*network, *LDM_VARIANTS[what]])
            batch = to_device(train_ldm.random_batch(args, method, images), report.device)
            step = plain_ldm_step(method, batch) if what == "plain" else ldm_step(method, batch, what)
            fits = time_training(report, "ldm", what, step, images, flops)
            if fits and what not in ("plain", *FEW_IMAGES) and images == batches[0]:
                show_parts(report, what, method, batch, images)
            del method, step, batch


def ldm_step(method: Method, batch, what: str) -> Callable[[], dict[str, torch.Tensor]]:
    """A step; with CUDA graphs its blocks are one generation, or each would overwrite what the one before it gave."""

    def step() -> dict[str, torch.Tensor]:
        if "CUDA graphs" in what:
            torch.compiler.cudagraph_mark_step_begin()
        return train_step(method, 0, [batch])

    return step


def compiled_with(settings: dict[str, bool]):
    """Context: networks that are told to compile in it do so with these settings of Inductor, forwards and backwards.

    A backward pass is compiled by a thread of autograd's, which does not see what is set for this one.
    """
    counters["inductor"].pop("cudagraph_skips", None)
    return mock.patch.dict(FUSING, settings)


DRY = ("--dry-run", "--random-weights", "--max-train-steps", "1000")


@functools.cache  # two parts count the same, and a network of this size is drawn for 15 s
def flops_of_ldm(network: tuple[str, ...]) -> float:
    """Of an image in a step, by the flags of the network."""
    args, method = build_ldm([*network, *LDM_VARIANTS["eager"]])
    return flops_of_step(method, train_ldm.random_batch(args, method, 2))


def build_ldm(flags: Sequence[str]) -> tuple[argparse.Namespace, Method]:
    args = train_ldm.parse_arguments([*DRY, *flags])
    accelerator = begin_anew(args)
    tokenizer = train_ldm.open_tokenizer(args, None)
    config = train_ldm.resolve(args, None, tokenizer)
    return args, train_ldm.build(args, config, tokenizer, accelerator)


def begin_anew(args: argparse.Namespace) -> Accelerator:
    """Precision and numerics; accelerate remembers those of the process's first training."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()
    torch.manual_seed(0)  # the same random weights and data for all
    torch.use_deterministic_algorithms(False)  # the last training may have asked for them
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    return begin(args, None)


def plain_ldm_step(method: Method, batch) -> Callable[[], dict[str, torch.Tensor]]:
    """The same network and losses with clipping, AdamW and EMA one tensor at a time, and a synchronisation a step."""
    parameters = list(method.networks.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, foreach=False)
    average = {name: p.detach().clone() for name, p in method.denoiser.named_parameters()}

    def step() -> dict[str, torch.Tensor]:
        values, _ = method.accumulate(0, 0, batch, 1.0, True)
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in method.denoiser.named_parameters():
                average[name].mul_(0.9999).add_(parameter, alpha=1e-4)
        for value in values.values():
            value.item()
        return values

    return step


def show_parts(report: Report, what: str, method: Method, batch, images: int) -> None:
    """The share of VFM, denoiser and optimizer in a step."""
    draws = method.draws(0, 0, batch)
    x, features, route = method.normalised(batch, draws), method.features(batch), method.route(0, draws)

    parameters = list(method.networks.parameters())
    gradients = [torch.randn_like(parameter) for parameter in parameters]

    def update() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):  # the update drops them
            parameter.grad = gradient
        method.update(0, {}, [])

    def backward() -> None:
        method.backward(x, draws, batch.labels, features, 1.0, True, route)

    report.add("ldm", f"{what}: VFM", report.seconds(lambda: method.features(batch)), images)
    report.add("ldm", f"{what}: forward and backward", report.seconds(backward), images)
    report.add("ldm", f"{what}: clip, optimizer, EMA", report.seconds(update), images)


def measure_sendvae(report: Report, sizes: Sizes, variants: Sequence[str]) -> None:
    """A VAE with its VFM, mapper, LPIPS and discriminator."""
    flops = 0.0
    for what in variants:
        if not flops:
            method, resolution, start = build_sendvae([*sizes.sendvae, *SENDVAE_VARIANTS["eager"]])
            flops = flops_of_step(method, dry_run.image_batch(None, 2, resolution, 1000), start)
        method, resolution, start = build_sendvae([*sizes.sendvae, *SENDVAE_VARIANTS[what]])
        images = sizes.sendvae_batch
        batch = to_device(dry_run.image_batch(None, images, resolution, 1000), report.device)

        def step(method=method, batch=batch, start=start, what=what) -> dict[str, torch.Tensor]:
            values = train_step(method, start, [batch])
            if what.startswith("plain"):
                for value in values.values():
                    value.item()
            return values

        time_training(report, "sendvae", what, step, images, flops)
        del method, step, batch


def build_sendvae(flags: Sequence[str]) -> tuple[Method, int, int]:
    """The method, the side of its images, the step at which everything trains."""
    args = train_sendvae.parse_arguments([*DRY, *flags])
    loss = load_loss_config(args.loss_cfg_path, args.loss_override)
    accelerator = begin_anew(args)
    train_sendvae.resolve(args, None)
    method, _ = train_sendvae.build(args, loss, accelerator)
    return method, args.resolution, loss.discriminator_start


def time_training(
    report: Report, part: str, what: str, step: Callable[[], dict[str, torch.Tensor]], images: int, flops: float
) -> bool:
    """A step after its first, whose seconds are shown too: kernels are compiled there. False: no figures.

    Raises:
        Exception: what the step raised, but for a lack of memory and for what an experiment may raise.
    """
    report.forget_peak()
    start = time.perf_counter()
    try:
        step()
        report.wait()
        first = time.perf_counter() - start
        seconds = report.seconds(step)
        figures = {"first_step_seconds": first}
        launched = report.seconds(step, warm_up=0, is_awaited=False)  # as many steps of all, for the loss
        if not what.startswith("plain"):  # which fetches its losses
            figures["launch_ms"] = 1000 * launched
        figures["loss"] = step()["loss"].item()
        if "CUDA graphs" in what:
            figures["graphs_skipped"] = counters["inductor"]["cudagraph_skips"]
    except Exception as error:
        if is_out_of_memory(error):
            print(f"{part:9} {what:34}{images:5}  out of memory", flush=True)
            report.record({"part": part, "what": what, "images": images, "out_of_memory": True})
            return False
        if what not in INDUCTOR:
            raise
        report.failed(part, what, images, error)
        return False
    report.add(part, what, seconds, images, flops, **figures)
    if report.kernels:
        show_kernels(step, report.kernels)
    return True


def show_kernels(step: Callable[[], object], most: int) -> None:
    """The kernels of a step that take longest."""
    with torch.profiler.profile() as profile:
        step()
    kernels = [event for event in profile.key_averages() if event.device_type.name == "CUDA"]
    events = sorted(kernels, key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    for event in events[:most]:
        milliseconds, share = event.self_device_time_total / 1000, event.self_device_time_total / max(total, 1)
        print(f"{milliseconds:12.2f} ms {share:6.1%} {event.count:6} × {event.key[:90]}")


def flops_of_step(method: Method, batch, step: int = 0) -> float:
    """Of an image, in an uncompiled step."""
    images = len(batch[0])
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        train_step(method, step, [to_device(batch, method.accelerator.device)])
    return counter.get_total_flops() / images


# -- inference

INFERENCE_VARIANTS = {
    "float32": ("--no-compile", "--no-allow-tf32"),
    "TF32": ("--no-compile",),
    "TF32, compiled": ("--compile",),
    "bf16": ("--no-compile", "--mixed-precision", "bf16"),
    "bf16, compiled": ("--mixed-precision", "bf16", "--compile"),
    "bf16, compiled, NCHW": ("--mixed-precision", "bf16", "--compile", "--no-channels-last"),
}


def measure_caching(report: Report, sizes: Sizes, variants: Sequence[str]) -> None:
    """Images from the host through the VAE's encoder and back, in the fixed chunks of cache_latents.py."""
    process, exact = this_process(), None
    for what in variants:
        flags = ["--dry-run", *sizes.cache, *INFERENCE_VARIANTS[what]]
        args = cache_latents.parse_arguments(flags)
        args.resolution = args.resolution or 256
        set_inference_numerics(process, args.mixed_precision, args.allow_tf32)
        torch.compiler.reset()
        torch.manual_seed(0)  # the same random weights for all
        networks = cache_latents.build_networks(args, process)
        autocast = autocast_for(process.device, args.mixed_precision)
        worker = ChunkEncoder(process.device, chunk_size(args.resolution, process.device), 1, autocast)
        target = Target("latents", None, latents_encoder(networks.tokenizer, torch.float16), False, ())
        shape = (sizes.cache_batch, 3, args.resolution, args.resolution)
        batch = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        if process.device.type == "cuda":
            batch = batch.pin_memory()
        report.forget_peak()
        seconds = report.seconds(lambda w=worker, b=batch, t=target: w.start(b, [t])(), warm_up=1)
        found = torch.from_numpy(worker.start(batch, [target])()[0]).float()
        exact = found if exact is None else exact
        report.add("caching", what, seconds, len(batch), difference=relative(found, exact))
        worker.close()
        del networks, worker, target


def measure_sampling(report: Report, sizes: Sizes, variants: Sequence[str]) -> None:
    """A guided evaluation of the denoiser, the decoder, and what all published samples would take."""
    exact = None
    for what in variants:
        try:
            z = time_sampling(report, sizes, what, exact)
            exact = z if exact is None else exact
        except Exception as error:
            if what not in SAMPLING_EXPERIMENTS or is_out_of_memory(error):
                raise
            report.failed("sampling", what, sizes.sample_batch, error)


def time_sampling(report: Report, sizes: Sizes, what: str, exact: torch.Tensor | None) -> torch.Tensor:
    """One variant against the latents ``exact``, where there are some; gives its own."""
    process, flags = this_process(), INFERENCE_VARIANTS["bf16, compiled" if what in SAMPLING_EXPERIMENTS else what]
    args = generate.parse_arguments(["--dry-run", *sizes.sample, *flags])
    set_inference_numerics(process, args.mixed_precision, args.allow_tf32)
    torch.compiler.reset()
    torch.manual_seed(0)  # the same random weights for all
    trained = generate.open_model(args, print)
    args.mode, args.num_steps = "ode", sizes.sample_steps
    networks = load_networks(args, trained, trained.load_autoencoder(), process)
    with torch.no_grad():
        for parameter in networks.model.parameters():  # what starts at zero would make a velocity of zero
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, device=parameter.device))  # drawn in float32
    if what in SAMPLING_EXPERIMENTS:
        SAMPLING_EXPERIMENTS[what](networks.model)  # which is compiled when it is first called
    sampler = build_sampler(args, trained, networks, process)
    items = torch.arange(sizes.sample_batch, device=process.device)
    labels = items % len(trained.class_names)
    report.forget_peak()
    with torch.inference_mode():
        noise = sampler.noise(items, 0)
        evaluation = report.seconds(lambda: sampler.velocity(noise, 0.5, labels), times=3)
        z = sampler.latents(items, labels)
        decoding = report.seconds(lambda: [sampler.decode(part) for part in z.split(sampler.decode_batch)])
    seconds = PUBLISHED_IMAGES / len(items) * (PUBLISHED_STEPS * evaluation + decoding)
    figures = {"hours_50k": seconds / 3600, "decode_seconds": decoding}
    report.add(
        "sampling", what, evaluation, len(items), **figures, difference=relative(z, z if exact is None else exact)
    )
    return z


def gelu_in_product(model: nn.Module) -> None:
    """SiT's MLPs, in bf16: of the 6 bytes a hidden number that product and GELU move, the 2 of the result are left."""

    def mlp(layers: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight, bias = layers.fc1.weight, layers.fc1.bias
        hidden = torch._addmm_activation(bias, x.flatten(0, 1).to(weight.dtype), weight.t(), use_gelu=True)
        return layers.fc2(hidden.unflatten(0, x.shape[:2]))

    for block in model.blocks:
        block.mlp.forward = functools.partial(mlp, block.mlp)


def bf16_residuals(model: nn.Module) -> None:
    """Tokens start in bf16, so that every block adds in bf16."""
    model.pos_embed = model.pos_embed.bfloat16()


SAMPLING_EXPERIMENTS = {
    "bf16, compiled, GELU in product": gelu_in_product,
    "bf16, compiled, bf16 residuals": bf16_residuals,
}


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    return ((found - exact).norm() / exact.norm()).item()


PARTS = {
    "ldm": (measure_ldm, tuple(name for name in LDM_VARIANTS if name not in INDUCTOR)),
    "sendvae": (measure_sendvae, tuple(SENDVAE_VARIANTS)),
    "caching": (measure_caching, tuple(INFERENCE_VARIANTS)),
    "sampling": (
        measure_sampling,
        (*(name for name in INFERENCE_VARIANTS if "NCHW" not in name), *SAMPLING_EXPERIMENTS),
    ),
    # last: a GPU that an experiment leaves in error serves nothing after it
    "graphs": (measure_ldm, tuple(INDUCTOR)),
}


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    process = this_process()
    if process.device.type != "cuda" and not args.rehearse:
        print("benchmarks/gpu.py: no CUDA device; --rehearse runs it with tiny networks on a CPU", file=sys.stderr)
        return 2
    report = Report(args.repeats, process.device, args.kernels, args.output)
    print(f"{report.name}, torch {torch.__version__}")
    sizes = TINY if args.rehearse else Sizes()
    measure_ceilings(report, sizes)
    for part in args.parts:
        measure, variants = PARTS[part]
        try:
            measure(report, sizes, [what for what in variants if is_wanted(what, args)])
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            print(f"{part}: out of memory, the rest of it is left out ({str(error).splitlines()[0]})", flush=True)
        report.forget_peak()
    return 0


def is_wanted(what: str, args: argparse.Namespace) -> bool:
    """Whether a variant is to be measured."""
    return (args.compile or "compiled" not in what) and (args.only is None or what in args.only)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), metavar="A,B", help=f"some of {', '.join(PARTS)}, separated by commas")
    add("--only", metavar="'A; B'", help="variants to measure, by their names in the table, separated by '; '")
    add("--repeats", type=positive_int, default=5, metavar="N", help="timings of each")
    add("--kernels", type=non_negative_int, default=0, metavar="N", help="show the N longest kernels of each step")
    add("--rehearse", action="store_true", help="tiny networks, on a CPU too")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="measure compiled networks too")
    add("--output", type=Path, metavar="FILE", help="write all figures as JSON")
    add_debug_argument(parser)
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"--parts {unknown[0]}: there are {', '.join(PARTS)}")
    if args.only is not None:
        args.only, known = args.only.split("; "), [what for part in args.parts for what in PARTS[part][1]]
        if unknown := [what for what in args.only if what not in known]:
            parser.error(f"--only '{unknown[0]}': there are {'; '.join(dict.fromkeys(known))}")
    return args


if __name__ == "__main__":
    sys.exit(run(main))
