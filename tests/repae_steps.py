"""Tiny REPA-E trainers for the tests, and REPA-E's step written out with torch alone."""

import copy

import torch
from accelerate import Accelerator
from torch import nn

from dataset.loader import ImageBatch
from diffusion.draws import Draws, draw
from formats.vae import load_tokenizer
from loss.vae_objective import VAELossConfig, VAEObjective
from models.denoisers.sit import SiT, SiTConfig
from models.discriminator import PatchDiscriminator
from models.encoders import build_encoder
from tests.sendvae_runs import random_images
from training.ema import EMA
from training.ldm import LDMTrainer
from training.optimizer import build_adamw
from training.repae import RepaeTrainer
from training.sendvae import SendVAE, SendVAETrainer

CONFIG = SiTConfig("SiT-Ti/2", 4, 8, num_classes=6, encoder_depth=2, feature_dims=(112,), projector_width=16)
# A large epsilon, because AdamW's first steps are otherwise the signs of gradients that may be rounding errors.
ADAMW = {"betas": (0.9, 0.999), "weight_decay": 0.0, "eps": 1e-3}
RATES = {"lr": 1e-2, "vae_lr": 2e-3, "disc_lr": 5e-3}
CFG_PROB, EMA_DECAY, MOMENTUM, CLIP = 0.5, 0.9, 0.1, 0.7


def tiny_trainer(
    accelerator: Accelerator | None = None,
    *,
    gan: bool = True,
    vae_align_coeff: float = 1.5,
    proj_coeff: float = 0.5,
    weighting: str = "uniform",
    path_type: str = "linear",
    config: SiTConfig = CONFIG,
    **loss: object,
) -> RepaeTrainer:
    """f4d4-tiny, SiT-Ti/2 whose zero-initialised layers are not zero, efficientnet-lite0, no LPIPS."""
    accelerator = accelerator or Accelerator(cpu=True)
    torch.manual_seed(0)
    tokenizer, _ = load_tokenizer("f4d4-tiny", "none")
    tokenizer.statistics.load(torch.tensor([0.2, -0.1, 0.0, 0.1]), torch.tensor([0.8, 1.2, 1.0, 0.5]))
    discriminator = PatchDiscriminator(width=8).train() if gan else None
    vae_model = SendVAE(tokenizer, mapper=None).train()
    loss_config = VAELossConfig(perceptual_weight=0.0, discriminator_weight=0.1 if gan else 0.0, **loss)
    sit_model = SiT(config).train()
    for parameter in sit_model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    common = {"max_grad_norm": CLIP, "seed": 0, "accelerator": accelerator}
    vae = SendVAETrainer(
        vae_model,
        VAEObjective(loss_config, None),
        discriminator,
        encoders=(),
        align_coeff=vae_align_coeff,
        bn_momentum=MOMENTUM,
        optimizer=build_adamw(vae_model.parameters(), **ADAMW),
        disc_optimizer=build_adamw(discriminator.parameters(), **ADAMW) if gan else None,
        ema=None,
        **common,
    )
    sit = LDMTrainer(
        sit_model,
        tokenizer.statistics,
        [build_encoder("efficientnet-lite0", config.grid)] if config.feature_dims else None,
        proj_coeff=proj_coeff,
        cfg_prob=CFG_PROB,
        path_type=path_type,
        weighting=weighting,
        optimizer=build_adamw(sit_model.parameters(), **ADAMW),
        ema=EMA(sit_model, EMA_DECAY),
        **common,
    )
    return RepaeTrainer(vae, sit, EMA(tokenizer.statistics, EMA_DECAY))


def random_batch(count: int, seed: int = 1) -> ImageBatch:
    labels = torch.randint(0, CONFIG.num_classes, (count,), generator=torch.Generator().manual_seed(seed))
    return ImageBatch(random_images(count, seed), labels)


def batch_draws(count: int, seed: int = 2) -> Draws:
    return draw((count, 4, 8, 8), "uniform", torch.device("cpu"), torch.Generator().manual_seed(seed))


class PlainRepae:
    """The same networks as a trainer's, and REPA-E's step with ``BatchNorm2d``, autograd and ``torch.optim`` alone."""

    def __init__(self, trainer: RepaeTrainer, vae_align_coeff: float = 1.5, proj_coeff: float = 0.5):
        self.vae = copy.deepcopy(trainer.vae.model.tokenizer.network)
        self.discriminator = copy.deepcopy(trainer.vae.discriminator)
        self.sit = copy.deepcopy(trainer.sit.model)
        self.encoder = trainer.sit.encoders[0]
        self.vae_align_coeff, self.proj_coeff = vae_align_coeff, proj_coeff
        self.bn = nn.BatchNorm2d(4, eps=1e-4, momentum=MOMENTUM, affine=False)
        self.bn.running_mean.copy_(trainer.statistics.mean)
        self.bn.running_var.copy_(trainer.statistics.var)
        self.ema_sit, self.ema_bn = copy.deepcopy(self.sit), copy.deepcopy(self.bn)
        self.optimizers = {
            "vae_lr": torch.optim.AdamW(self.vae.parameters(), **ADAMW),
            "disc_lr": torch.optim.AdamW(self.discriminator.parameters(), **ADAMW),
            "lr": torch.optim.AdamW(self.sit.parameters(), **ADAMW),
        }

    def vae_terms(self, batch: ImageBatch, draws: Draws) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The VAE's terms by name, and x, x̂, z, features for what follows."""
        x = batch.images.float() / 127.5 - 1
        mean, logvar = self.vae.encode(x).latent_dist.parameters.chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        z = mean + torch.exp(logvar / 2) * draws.posterior
        x_hat = self.vae.decode(z).sample
        features = self.encoder(batch.images)
        _, tokens = self.sit(self.noisy(self.bn.eval()(z), draws), draws.times, batch.labels, with_tokens=True)
        terms = {
            "reconstruction": (x - x_hat).abs().mean(),
            "kl": 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / len(x),
            "gan": -self.discriminator(x_hat).mean(),
            "alignment": 1 - cosine(tokens[0], features).mean(),
        }
        return terms, {"x": x, "x_hat": x_hat, "z": z, "features": features}

    def discriminator_term(self, x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
        real, fake = self.discriminator(x), self.discriminator(x_hat.detach())
        return 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())

    def sit_terms(
        self, z: torch.Tensor, features: torch.Tensor, labels: torch.Tensor, draws: Draws
    ) -> dict[str, torch.Tensor]:
        """Moves the BatchNorm's running statistics, as a forward pass in training mode does."""
        normalised = self.bn.train()(z.detach())
        labels = torch.where(draws.dropout < CFG_PROB, CONFIG.num_classes, labels)
        velocity, tokens = self.sit(self.noisy(normalised, draws), draws.times, labels, with_tokens=True)
        target = draws.noise - normalised
        return {
            "denoise": ((velocity - target) ** 2).mean(),
            "repa": 1 - cosine(tokens[0], features).mean(),
        }

    def noisy(self, z: torch.Tensor, draws: Draws) -> torch.Tensor:
        t = draws.times[:, None, None, None]
        return (1 - t) * z + t * draws.noise

    def vae_loss(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        gan, alignment = 0.1 * terms["gan"], self.vae_align_coeff * terms["alignment"]
        return terms["reconstruction"] + 1e-6 * terms["kl"] + gan + alignment

    def step(self, batch: ImageBatch, draws: Draws) -> dict[str, float]:
        """One step; returns losses and gradient norms under the trainer's names."""
        terms, kept = self.vae_terms(batch, draws)
        values = terms | {"vae_loss": self.vae_loss(terms)}
        values["vae_grad_norm"] = self.update("vae_lr", self.vae, values["vae_loss"])
        values["discriminator"] = self.discriminator_term(kept["x"], kept["x_hat"])
        values["disc_grad_norm"] = self.update("disc_lr", self.discriminator, values["discriminator"])
        sit = self.sit_terms(kept["z"], kept["features"], batch.labels, draws)
        values |= sit | {"loss": sit["denoise"] + self.proj_coeff * sit["repa"]}
        values["grad_norm"] = self.update("lr", self.sit, values["loss"])
        self.follow()
        return {name: value.item() for name, value in values.items()}

    def update(self, rate: str, network: nn.Module, loss: torch.Tensor) -> torch.Tensor:
        """Clip to the norm and step, by hand."""
        parameters = list(network.parameters())
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
        for average, current in ((self.ema_sit, self.sit), (self.ema_bn, self.bn)):
            pairs = [*zip(average.parameters(), current.parameters(), strict=True)]
            pairs += zip(average.buffers(), current.buffers(), strict=True)
            for old, new in pairs:
                if new.is_floating_point():
                    old.data = EMA_DECAY * old.data + (1 - EMA_DECAY) * new.data

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a step changes, by the names of :func:`state_of`."""
        networks = {"vae": self.vae, "discriminator": self.discriminator, "sit": self.sit, "ema": self.ema_sit}
        state = {f"{n}.{k}": v for n, network in networks.items() for k, v in network.state_dict().items()}
        for name, bn in (("statistics", self.bn), ("statistics_ema", self.ema_bn)):
            state |= {f"{name}.mean": bn.running_mean, f"{name}.var": bn.running_var}
        return state


def state_of(trainer: RepaeTrainer) -> dict[str, torch.Tensor]:
    """Everything that a step changes."""
    networks = {
        "vae": trainer.vae.model.tokenizer.network,
        "discriminator": trainer.vae.discriminator,
        "sit": trainer.sit.model,
        "ema": trainer.sit.ema.module,
        "statistics": trainer.statistics,
        "statistics_ema": trainer.statistics_ema.module,
    }
    return {f"{n}.{k}": v for n, network in networks.items() if network for k, v in network.state_dict().items()}


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
