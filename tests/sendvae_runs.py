"""Tiny Send-VAE trainings for the tests: flags, and a trainer without a run."""

import torch
from accelerate import Accelerator

from formats.vae import load_tokenizer
from loss.alignment.vf import VFLoss
from loss.vae_objective import VAELossConfig, VAEObjective
from models.discriminator import PatchDiscriminator
from models.encoders import build_encoder
from models.mapper import LinearMapper, Mapper
from tests.command_line import argv_of
from training.ema import EMA
from training.optimizer import build_adamw
from training.sendvae import SendVAE, SendVAETrainer

RESOLUTION = 32
GRID = 2
ADAMW = {"betas": (0.9, 0.999), "weight_decay": 0.0, "eps": 1e-8}


def flags(data, output, name: str = "run", **changes) -> list[str]:
    """Flags of a tiny training; ``changes`` replace or add (True: a bare flag, None: leave out)."""
    values = {
        "output_dir": output,
        "exp_name": name,
        "data_dir": data,
        "resolution": RESOLUTION,
        "vae": "f4d4-tiny",
        "vae_ckpt": "none",
        "enc_type": "efficientnet-lite0",
        "loss_cfg_path": "configs/l1_kl_gan.yaml",
        "batch_size": 4,
        "max_train_steps": 2,
        "log_steps": 1,
        "num_workers": 1,
    } | changes
    return argv_of(values)


def tiny_trainer(
    accelerator: Accelerator | None = None,
    seed: int = 0,
    gan: bool = True,
    align_coeff: float = 1.0,
    bn_momentum: float = 0.1,
    ema_decay: float = 0.0,
    freeze_vae: bool = False,
    vf_loss: VFLoss | None = None,
    **loss: object,
) -> SendVAETrainer:
    """f4d4-tiny, one ViT block, efficientnet-lite0 on a 2×2 grid, no LPIPS; random weights from ``seed``.

    With ``vf_loss`` a linear mapper, on the latent's 8×8 grid.
    """
    accelerator = accelerator or Accelerator(cpu=True)
    torch.manual_seed(seed)
    tokenizer, _ = load_tokenizer("f4d4-tiny", "none")
    encoders, mapper = [], None
    if align_coeff:
        encoders = [build_encoder("efficientnet-lite0", RESOLUTION // 4 if vf_loss else GRID)]
        width = encoders[0].embed_dim
        mapper = LinearMapper(4, width) if vf_loss else Mapper(4, RESOLUTION // 4, GRID, width, projector_width=64)
    model = SendVAE(tokenizer, mapper, freeze_vae=freeze_vae, raw_latent=vf_loss is not None).train()
    discriminator = PatchDiscriminator(width=8).train() if gan else None
    config = VAELossConfig(perceptual_weight=0.0, discriminator_weight=0.1 if gan else 0.0, **loss)
    return SendVAETrainer(
        model,
        VAEObjective(config, None),
        discriminator,
        encoders,
        align_coeff=align_coeff,
        bn_momentum=bn_momentum,
        max_grad_norm=1.0,
        seed=seed,
        optimizer=build_adamw(model.parameters(), **ADAMW),
        disc_optimizer=build_adamw(discriminator.parameters(), **ADAMW) if gan else None,
        ema=EMA(tokenizer, ema_decay) if ema_decay else None,
        accelerator=accelerator,
        vf_loss=vf_loss,
    )


def random_images(count: int, seed: int = 1) -> torch.Tensor:
    """uint8 ``[count, 3, 32, 32]``."""
    return torch.randint(
        0, 256, (count, 3, RESOLUTION, RESOLUTION), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all gradients by name."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
