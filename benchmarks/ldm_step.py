"""What a training step costs on top of the network: train_ldm.py's whole step against the bare forward and backward.

    python benchmarks/ldm_step.py --model SiT-B/1 --batch-size 4

Bare: the denoiser's forward on noisy latents, mean squared error, backward, gradients dropped. Step: reading the batch
from a cache on disk, drawing the posterior sample, time and noise, normalising, the loss, backward, clipping, AdamW,
EMA, and metrics. Between them stands what every training pays: clipping, AdamW and EMA written plainly, one tensor at a
time. Without REPA, whose VFM would hide the rest. Then the whole step of the same network with SPRINT, on a quarter of
the tokens in its middle blocks. They take turns, ``--repeats`` times; medians of seconds and of ratios are shown.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_ldm
from dataset.latents import LatentDataset
from dataset.loader import BatchLoader
from dataset.order import SampleOrder
from formats.vae import load_tokenizer
from loss.alignment import DenoiserAlignments
from models.denoisers import Denoiser, denoiser_kind
from models.tokenizers import build_tokenizer
from runtime.cli import ArgumentParser, add_debug_argument, positive_int, run
from tests.latent_caches import write_cache
from training.ldm import LDM
from training.method import train_step
from training.metrics import MeanMetrics


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def bare_step(model: Denoiser, batch: int, device: torch.device, accelerator: Accelerator) -> Callable[[], None]:
    shape = (batch, *model.latent_shape)
    x, target, t = (
        torch.randn(shape, device=device),
        torch.randn(shape, device=device),
        torch.rand(batch, device=device),
    )
    y = torch.zeros(batch, dtype=torch.int64, device=device)

    def step() -> None:
        with accelerator.autocast():
            loss = (model(x, t, y)[0].float() - target).square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def plain_update(model: Denoiser) -> Callable[[], None]:
    """Clipping, AdamW and EMA as they are usually written; gradients stay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)

    @torch.no_grad()
    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, parameter in model.named_parameters():
            average[name].mul_(0.9999).add_(parameter, alpha=1e-4)

    return update


def our_step(model: Denoiser, loader: BatchLoader, accelerator: Accelerator) -> Callable[[], None]:
    sprint = ["--sprint"] if model.config.sparse_blocks else []
    flags = train_ldm.parse_arguments(["--dry-run", "--align", "none", "--max-train-steps", "1000000", *sprint])
    # small networks, which no step runs: of a tokenizer it takes the sample and the statistics
    architecture = load_tokenizer("f4d4-tiny", "none")[0].architecture
    tokenizer = build_tokenizer(architecture | {"latent_channels": model.config.latent_channels})
    tokenizer.to(accelerator.device)
    method = LDM(flags, accelerator, model, DenoiserAlignments({}), tokenizer, encoders=None)
    metrics = MeanMetrics()
    return lambda: metrics.update(train_step(method, loader.step, next(loader)))


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", default="SiT-B/1", help="SiT-SIZE/PATCH")
    add("--latent-channels", type=positive_int, default=32, help="C")
    add("--latent-size", type=positive_int, default=16, help="h = w")
    add("--batch-size", type=positive_int, default=4, help="latents")
    add("--steps", type=positive_int, default=1, help="in a run")
    add("--repeats", type=positive_int, default=5, help="runs of each")
    add("--mixed-precision", choices=("no", "bf16"), default="no", help="precision of the networks")
    add_debug_argument(parser)
    args = parser.parse_args(argv)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=args.mixed_precision)
    device = accelerator.device
    kind = denoiser_kind(args.model)
    config = kind(args.model, args.latent_channels, args.latent_size, num_classes=1000)
    with tempfile.TemporaryDirectory() as scratch:
        write_cache(Path(scratch) / "cache", 256, shape=(args.latent_channels, args.latent_size, args.latent_size))
        dataset = LatentDataset(Path(scratch) / "cache", memory_limit=0)
        with BatchLoader(dataset, SampleOrder(len(dataset), 0), batch_size=args.batch_size, num_workers=1) as loader:
            model = config.build().to(device).train()
            runs = {"bare forward + backward": bare_step(model, args.batch_size, device, accelerator)}
            runs["our whole step"] = our_step(model, loader, accelerator)
            runs["plain update"] = plain_update(config.build().to(device))
            sparse = replace(config, sprint=True).build().to(device).train()
            runs["our whole step, SPRINT"] = our_step(sparse, loader, accelerator)
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            for repeat in range(args.repeats + 1):
                for name, function in runs.items():
                    taken = seconds_of(lambda f=function: [f() for _ in range(args.steps)], device) / args.steps
                    if repeat:  # the first run of each allocates
                        seconds[name].append(taken)
    show(args, seconds)
    return 0


def show(args: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    bare, ours, update, sparse = (np.array(seconds[name]) for name in seconds)
    print(f"{'':28}{'s/step':>9}{'of bare':>9}")
    for name, values in zip(seconds, (bare, ours, update, sparse), strict=True):
        print(f"{name:28}{np.median(values):9.3f}{np.median(values / bare):9.3f}")
    overhead = statistics.median((ours - bare) / bare)
    beyond = statistics.median((ours - bare - update) / bare)
    print(f"overhead of everything but the network: {overhead:.1%}; beyond a plain clip + AdamW + EMA: {beyond:.1%}")
    print(f"SPRINT: {statistics.median(sparse / ours):.3f} of a step")
    print(f"{args.model}, batch {args.batch_size}, median of {args.repeats}")


if __name__ == "__main__":
    sys.exit(run(main))
