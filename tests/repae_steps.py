"""Tiny REPA-E trainings for the tests, and REPA-E's step written out with torch alone."""

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import nn

from dataset.loader import ImageBatch
from diffusion.draws import Draws, draw
from formats.vae import load_tokenizer
from loss.alignment import TokenGrid, build_denoiser_alignment
from loss.alignment.denoiser import ThroughDenoiser
from loss.vae_objective import VAELossConfig, VAEObjective
from models.denoisers.config import SiTConfig
from models.denoisers.sit import SiT
from models.discriminator import PatchDiscriminator
from models.encoders import build_encoder
from tests.sendvae_runs import random_images
from training.ldm import LDM, drawn_times
from training.method import Metrics
from training.repae import Encoded, Repae
from training.sendvae import SendVAE

CONFIG = SiTConfig("SiT-Ti/2", 4, 8, num_classes=6)
DEPTH = 2
RATES = {"lr": 1e-2, "vae_lr": 2e-3, "disc_lr": 5e-3}
CFG_PROB, EMA_DECAY, MOMENTUM, CLIP = 0.5, 0.9, 0.1, 0.7
# A large epsilon, because AdamW's first steps are otherwise the signs of gradients that may be rounding errors.
ADAMW = {"betas": (0.9, 0.999), "weight_decay": 0.0, "eps": 1e-3}
FLAGS = {
    "align_schedule": "constant",
    "align_until": None,
    "seed": 0,
    "freeze_vae": False,
    "freeze_encoder": False,
    "latent_noise": 0.0,
    "bn_momentum": MOMENTUM,
    "cfg_prob": CFG_PROB,
    "velocity_cosine_coeff": 0.0,
    "guide_coeff": 1.0,
    "learning_rate": RATES["lr"],
    "vae_learning_rate": RATES["vae_lr"],
    "disc_learning_rate": RATES["disc_lr"],
    "lr_schedule": "constant",
    "lr_hold_steps": 0,
    "lr_decay_until": None,
    "lr_floor": 0.0,
    "warmup_steps": 0,
    "max_train_steps": 100,
    "max_grad_norm": CLIP,
    "optimizer": "adamw",
    "adam_beta1": ADAMW["betas"][0],
    "adam_beta2": ADAMW["betas"][1],
    "adam_weight_decay": ADAMW["weight_decay"],
    "adam_epsilon": ADAMW["eps"],
    "ema_decay": EMA_DECAY,
    "posthoc_ema": "none",
    "encoder_depth": DEPTH,
    "projector_width": 16,
}


def tiny_trainer(
    accelerator: Accelerator | None = None,
    *,
    gan: bool = True,
    align: bool = True,
    vae_align_coeff: float = 1.5,
    proj_coeff: float = 0.5,
    weighting: str = "uniform",
    path_type: str = "linear",
    **loss: object,
) -> Repae:
    """f4d4-tiny, SiT-Ti/2 whose zero-initialised layers are not zero, efficientnet-lite0, no LPIPS.

    Args:
        accelerator: one process on the CPU by default.
        gan: with a discriminator.
        align: both halves with the VFM; without, there is none.
        vae_align_coeff, proj_coeff: weights of both.
        weighting, path_type: of the denoiser's objective.
        loss: fields of ``VAELossConfig``.
    """
    accelerator = accelerator or Accelerator(cpu=True)
    choices = {"proj_coeff": proj_coeff, "weighting": weighting, "path_type": path_type}
    choices |= {"time_shift": 1.0, "time_mean": 0.0, "time_std": 1.0}
    args = argparse.Namespace(**FLAGS | choices)
    torch.manual_seed(0)
    tokenizer, _ = load_tokenizer("f4d4-tiny", "none")
    tokenizer.train().statistics.load(torch.tensor([0.2, -0.1, 0.0, 0.1]), torch.tensor([0.8, 1.2, 1.0, 0.5]))
    discriminator = PatchDiscriminator(width=8).train() if gan else None
    objective = VAEObjective(
        VAELossConfig(perceptual_weight=0.0, discriminator_weight=0.1 if gan else 0.0, **loss), None
    )
    denoiser = SiT(CONFIG).train()
    encoders = [build_encoder("efficientnet-lite0", denoiser.grid)] if align else []
    features = [TokenGrid(encoder.name, encoder.grid, encoder.embed_dim) for encoder in encoders]
    alignment = build_denoiser_alignment(args, ["repa"] if align else [], denoiser, features).train()
    for module in (denoiser, alignment):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    through = None
    if align and vae_align_coeff:
        times = partial(drawn_times, args)
        through = ThroughDenoiser(denoiser, alignment["repa"], vae_align_coeff, times, path_type)
    vae = SendVAE(args, accelerator, tokenizer, through, encoders, objective, discriminator)
    return Repae(vae, LDM(args, accelerator, denoiser, alignment, tokenizer, encoders=None))


def fixed_draws(trainer: Repae, draws: Sequence[Draws]) -> None:
    """Let these be drawn for the first, second … micro-step, whatever the step."""
    trainer.vae.draws = lambda step, micro_step, batch: draws[micro_step]


def accumulate_vae(trainer: Repae, batch: ImageBatch, draws: Draws) -> tuple[Metrics, Encoded]:
    """The gradients of a step's first half, for which just these numbers are drawn."""
    with patch.object(trainer.vae, "draws", lambda step, micro_step, batch: draws):
        return trainer.phases[0].accumulate(0, 0, batch, 1.0, synchronise=True)


def accumulate_denoiser(trainer: Repae, encoded: Encoded) -> Metrics:
    """The gradients of the second half, on what the first one left and no optimizer's step between them."""
    z = encoded.latent.double()
    count = torch.tensor([z.numel() / z.shape[1]], dtype=torch.float64)
    trainer.vae.batch_moments = torch.cat([z.sum((0, 2, 3)), (z**2).sum((0, 2, 3)), count])
    return trainer.phases[1].accumulate(0, 0, encoded, 1.0, synchronise=True)[0]


def random_batch(count: int, seed: int = 1) -> ImageBatch:
    labels = torch.randint(0, CONFIG.num_classes, (count,), generator=torch.Generator().manual_seed(seed))
    return ImageBatch(random_images(count, seed), labels)


def batch_draws(count: int, seed: int = 2) -> Draws:
    return draw((count, *CONFIG.latent_shape), torch.Generator().manual_seed(seed))


class PlainRepae:
    """The same networks as a trainer's, and REPA-E's step with ``BatchNorm2d``, autograd and ``torch.optim`` alone."""

    def __init__(self, trainer: Repae, vae_align_coeff: float = 1.5, proj_coeff: float = 0.5):
        self.vae = copy.deepcopy(trainer.vae.tokenizer.network)
        self.discriminator = copy.deepcopy(trainer.vae.discriminator)
        self.denoiser = copy.deepcopy(trainer.ldm.denoiser)
        self.projectors = copy.deepcopy(trainer.ldm.alignment["repa"].projectors)
        self.encoder = trainer.vae.encoders[0]
        self.vae_align_coeff, self.proj_coeff = vae_align_coeff, proj_coeff
        self.bn = nn.BatchNorm2d(4, eps=1e-4, momentum=MOMENTUM, affine=False)
        self.bn.running_mean.copy_(trainer.vae.statistics.mean)
        self.bn.running_var.copy_(trainer.vae.statistics.var)
        self.ema_denoiser, self.ema_bn = copy.deepcopy(self.denoiser), copy.deepcopy(self.bn)
        # one optimizer, and one norm to clip, for the denoiser and its projectors
        self.trained = {
            "vae_lr": nn.ModuleList([self.vae]),
            "disc_lr": nn.ModuleList([self.discriminator]),
            "lr": nn.ModuleList([self.denoiser, self.projectors]),
        }
        self.optimizers = {
            rate: torch.optim.AdamW(networks.parameters(), **ADAMW) for rate, networks in self.trained.items()
        }

    def vae_terms(self, batch: ImageBatch, draws: Draws) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The VAE's terms by name, and x, x̂, z, features for what follows."""
        x = batch.images.float() / 127.5 - 1
        mean, logvar = self.vae.encode(x).latent_dist.parameters.chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        z = mean + torch.exp(logvar / 2) * draws.posterior
        x_hat = self.vae.decode(z).sample
        features = self.encoder(batch.images)
        _, tokens = self.predict(self.bn.eval()(z), draws, batch.labels)
        terms = {
            "reconstruction": (x - x_hat).abs().mean(),
            "kl": 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / len(x),
            "gan": -self.discriminator(x_hat).mean(),
            "alignment": 1 - cosine(tokens, features).mean(),
        }
        return terms, {"x": x, "x_hat": x_hat, "z": z, "features": features}

    def discriminator_term(self, x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
        real, fake = self.discriminator(x), self.discriminator(x_hat.detach())
        return 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())

    def denoiser_terms(
        self, z: torch.Tensor, features: torch.Tensor, labels: torch.Tensor, draws: Draws
    ) -> dict[str, torch.Tensor]:
        """Moves the BatchNorm's running statistics, as a forward pass in training mode does."""
        normalised = self.bn.train()(z.detach())
        labels = torch.where(draws.dropout < CFG_PROB, CONFIG.num_classes, labels)
        velocity, tokens = self.predict(normalised, draws, labels)
        target = draws.noise - normalised
        return {
            "denoise": ((velocity - target) ** 2).mean(),
            "repa": 1 - cosine(tokens, features).mean(),
        }

    def predict(self, z: torch.Tensor, draws: Draws, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocity and projected tokens at the times drawn, of normalised latents."""
        t = draws.times[:, None, None, None]
        hidden = []
        block = self.denoiser.blocks[DEPTH - 1]
        handle = block.register_forward_hook(lambda module, args, output: hidden.append(output))
        velocity, _ = self.denoiser((1 - t) * z + t * draws.noise, draws.times, labels)
        handle.remove()
        return velocity, self.projectors[0](hidden[0])

    def vae_loss(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        gan, alignment = 0.1 * terms["gan"], self.vae_align_coeff * terms["alignment"]
        return terms["reconstruction"] + 1e-6 * terms["kl"] + gan + alignment

    def step(self, batch: ImageBatch, draws: Draws) -> dict[str, float]:
        """One step; returns losses and gradient norms under the trainer's names."""
        terms, kept = self.vae_terms(batch, draws)
        values = terms | {"vae_loss": self.vae_loss(terms)}
        values["vae_grad_norm"] = self.update("vae_lr", values["vae_loss"])
        values["discriminator"] = self.discriminator_term(kept["x"], kept["x_hat"])
        values["disc_grad_norm"] = self.update("disc_lr", values["discriminator"])
        terms = self.denoiser_terms(kept["z"], kept["features"], batch.labels, draws)
        values |= terms | {"loss": terms["denoise"] + self.proj_coeff * terms["repa"]}
        values["grad_norm"] = self.update("lr", values["loss"])
        self.follow()
        return {name: value.item() for name, value in values.items()}

    def update(self, rate: str, loss: torch.Tensor) -> torch.Tensor:
        """Clip to the norm and step, by hand."""
        parameters = list(self.trained[rate].parameters())
        grads = torch.autograd.grad(loss, parameters, retain_graph=True)
        norm = torch.sqrt(sum((g.double() ** 2).sum() for g in grads))
        for parameter, gradient in zip(parameters, grads, strict=True):
            parameter.grad = gradient * min(1.0, CLIP / (float(norm) + 1e-6))
        optimizer = self.optimizers[rate]
        optimizer.param_groups[0]["lr"] = RATES[rate]
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def follow(self) -> None:
        """REPA-E's update_ema: parameters and float buffers."""
        for average, current in ((self.ema_denoiser, self.denoiser), (self.ema_bn, self.bn)):
            pairs = [*zip(average.parameters(), current.parameters(), strict=True)]
            pairs += zip(average.buffers(), current.buffers(), strict=True)
            for old, new in pairs:
                if new.is_floating_point():
                    old.data = EMA_DECAY * old.data + (1 - EMA_DECAY) * new.data

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a step changes, by the names of :func:`state_of`."""
        networks = {
            "vae": self.vae,
            "discriminator": self.discriminator,
            "denoiser": self.denoiser,
            "projectors": self.projectors,
            "ema": self.ema_denoiser,
        }
        state = {f"{n}.{k}": v for n, network in networks.items() for k, v in network.state_dict().items()}
        for name, bn in (("statistics", self.bn), ("statistics_ema", self.ema_bn)):
            state |= {f"{name}.mean": bn.running_mean, f"{name}.var": bn.running_var}
        return state


def networks_of(trainer: Repae) -> dict[str, nn.Module]:
    """What has gradients."""
    networks = {"vae": trainer.vae.tokenizer.network, "denoiser": trainer.ldm.denoiser}
    if trainer.vae.discriminator is not None:
        networks["discriminator"] = trainer.vae.discriminator
    if len(trainer.ldm.alignment):
        networks["projectors"] = trainer.ldm.alignment["repa"].projectors
    return networks


def state_of(trainer: Repae) -> dict[str, torch.Tensor]:
    """Everything that a step changes."""
    networks = networks_of(trainer) | {
        "ema": trainer.ldm.ema.module,
        "statistics": trainer.vae.statistics,
        "statistics_ema": trainer.statistics_ema.module,
    }
    return {f"{n}.{k}": v for n, network in networks.items() for k, v in network.state_dict().items()}


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
