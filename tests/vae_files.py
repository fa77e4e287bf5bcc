"""Files of VAEs as public training codes leave them, for tests; written without ``formats``."""

import argparse
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file
from torch import nn

from files import write_json
from models.tokenizers import Tokenizer
from runtime.checkpoint import CheckpointFolder
from tests.foreign_classes import foreign_classes
from tests.public_vae import PublicPatchGAN, random_vae, randomised

State = dict[str, torch.Tensor]


def random_discriminator(seed: int = 5) -> PublicPatchGAN:
    return randomised(PublicPatchGAN(), seed)


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def random_moments(channels: int, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance, each ``[C]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, generator=generator), 0.3 + 3 * torch.rand(channels, generator=generator)


def write_lightning(path: Path, state: State, discriminator: State) -> None:
    """As pytorch-lightning 1.x saves VA-VAE: the loss's networks, projections, callbacks and flags too."""
    names = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "omegaconf.listconfig.ListConfig")
    with foreign_classes(*names) as (callback, listed):
        tensors = state | prefixed(discriminator, "loss.discriminator.") | {"loss.logvar": torch.zeros(())}
        tensors |= {"loss.perceptual_loss.net.slice1.0.weight": torch.ones(2, 3, 3, 3)}
        tensors |= {"linear_proj.weight": torch.ones(8, 4, 1, 1), "foundation_model.model.blocks.0.x": torch.ones(3)}
        content = {
            "epoch": 3,
            "global_step": 10,
            "pytorch-lightning_version": "1.7.7",
            "state_dict": tensors,
            "callbacks": {callback: {"best_model_score": torch.tensor(0.1)}},
            "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]}],
            "hyper_parameters": {"ddconfig": listed()},
        }
        torch.save(content, path)


def write_stable_diffusion(path: Path, state: State) -> None:
    """Everything of an image generator in one file."""
    tensors = prefixed(state, "first_stage_model.") | {"model.diffusion_model.time_embed.0.weight": torch.ones(2, 2)}
    tensors |= {"cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.ones(4)}
    tensors |= {"model_ema.decay": torch.tensor(0.9999), "betas": torch.ones(10)}
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)


def repae_checkpoint(state: State, discriminator: State | None, mean: torch.Tensor, var: torch.Tensor) -> dict:
    """REPA-E's training checkpoint; the running statistics of ``model`` are others than those of ``ema``."""
    sit = {"x_embedder.proj.weight": torch.ones(8, len(mean), 1, 1), "blocks.0.attn.qkv.weight": torch.ones(24, 8)}
    statistics = {"bn.running_mean": mean, "bn.running_var": var, "bn.num_batches_tracked": torch.tensor(7)}
    other = statistics | {"bn.running_mean": mean + 1, "bn.running_var": var * 2}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    checkpoint = {"model": sit | other, "ema": sit | statistics, "vae": state, "discriminator": discriminator}
    checkpoint |= {"opt": optimizer, "opt_vae": optimizer, "opt_disc": optimizer, "steps": 400000}
    return checkpoint | {"args": argparse.Namespace(vae="f8d4", model="SiT-XL/2", learning_rate=1e-4)}


def old_attention(state: State) -> State:
    """Today's diffusers names → those before version 0.17."""
    renamed = {}
    for name, tensor in state.items():
        if ".attentions." in name:
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor
    return renamed


def random_diffusers(seed: int, latent_channels: int = 4, **changes) -> diffusers.AutoencoderKL:
    """Of f4d4-tiny's architecture, every tensor random."""
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [16, 32, 64],
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "norm_num_groups": 8,
        "sample_size": 32,
        "scaling_factor": 1.0,
        "force_upcast": False,
    } | changes
    return randomised(diffusers.AutoencoderKL(**config), seed)


def write_run(
    folder: Path,
    tokenizer: Tokenizer,
    steps: tuple[int, ...] = (10, 20),
    state: str = "finished",
    ema: bool = False,
) -> Path:
    """A run of train_sendvae.py whose VAE at step N has N added to ``decoder.conv_out.bias``; ``vae/`` is the last."""
    checkpoints, discriminator = CheckpointFolder(folder), random_discriminator()
    bias = tokenizer.network.decoder.conv_out.bias
    start = bias.detach().clone()
    for step in steps:
        with torch.no_grad():
            bias.copy_(start + step)
        modules: dict[str, nn.Module] = {"model": tokenizer, "discriminator": discriminator}
        if ema:
            modules["ema"] = tokenizer
        checkpoints.save(step, modules, {"optimizer": {}}, {"vae": "f4d4-tiny"})
    if state == "finished":
        tokenizer.save(folder / "vae")
    write_json(folder / "args.json", {"args": {"vae": "f4d4-tiny"}})
    write_json(folder / "status.json", {"state": state, "step": steps[-1], "max_train_steps": 99, "reason": None})
    return folder


def tiny_ldm_state(seed: int = 3, **changes) -> State:
    """f4d4-tiny in the LDM layout."""
    arguments = {"width": 16, "multipliers": (1, 2, 4), "blocks": 1, "latent_channels": 4, "groups": 8} | changes
    return random_vae(seed, **arguments).state_dict()
