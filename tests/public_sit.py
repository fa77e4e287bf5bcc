"""The SiT of REPA and REPA-E in plain torch, written from the published layout, and writers of their checkpoints.

Nothing of ``models`` is in it: what this project's converters read is compared with it.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, DEPTH, HEADS, PATCH = 192, 6, 3, 2  # SiT-Ti/2


class PublicBlock(nn.Module):
    def __init__(self, qk_norm: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.attn.q_norm = nn.LayerNorm(WIDTH // HEADS) if qk_norm else nn.Identity()
        self.attn.k_norm = nn.LayerNorm(WIDTH // HEADS) if qk_norm else nn.Identity()
        self.attn.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.mlp.fc2 = nn.Linear(4 * WIDTH, WIDTH)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        six = [part.unsqueeze(1) for part in self.adaLN_modulation(c).split(WIDTH, dim=-1)]
        h = self.norm1(x) * (1 + six[1]) + six[0]
        batch, tokens, _ = h.shape
        q, k, v = self.attn.qkv(h).reshape(batch, tokens, 3, HEADS, WIDTH // HEADS).unbind(2)
        q, k = self.attn.q_norm(q), self.attn.k_norm(k)
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        x = x + six[2] * self.attn.proj(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(batch, tokens, WIDTH))
        h = F.gelu(self.mlp.fc1(self.norm2(x) * (1 + six[4]) + six[3]), approximate="tanh")
        return x + six[5] * self.mlp.fc2(h)


class PublicSiT(nn.Module):
    """SiT-Ti/2 with all weights random and none zero.

    Args:
        channels, side, classes: of the latents and labels.
        dims: widths of the encoders, one projector each.
        encoder_depth: block after which hidden states are projected.
        qk_norm: LayerNorm on queries and keys.
        batch_norm: REPA-E's, with its statistics.
        is_guided: internal guidance's, with a second output after that block.
        seed: of all weights.
    """

    def __init__(
        self,
        *,
        channels=4,
        side=8,
        classes=6,
        dims=(112,),
        encoder_depth=2,
        qk_norm=False,
        batch_norm=False,
        is_guided=False,
        seed=0,
    ):
        super().__init__()
        self.channels, self.side, self.encoder_depth = channels, side, encoder_depth
        tokens = (side // PATCH) ** 2
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, WIDTH, PATCH, stride=PATCH)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(classes + 1, WIDTH)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, WIDTH), requires_grad=False)
        self.blocks = nn.ModuleList(PublicBlock(qk_norm) for _ in range(DEPTH))
        self.projectors = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, dim))
            for dim in dims
        )
        for name in ("final_layer_xr", "final_layer") if is_guided else ("final_layer",):
            layer = nn.Module()
            layer.norm_final = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
            layer.linear = nn.Linear(WIDTH, PATCH * PATCH * channels)
            layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))
            self.add_module(name, layer)
        if batch_norm:
            self.bn = nn.BatchNorm2d(channels, eps=1e-4, affine=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.06, generator=generator)
            if batch_norm:
                self.bn.running_mean.normal_(generator=generator)
                self.bn.running_var.uniform_(0.3, 2.0, generator=generator)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Velocity ``[B, C, h, w]``, and what the projectors make of block ``encoder_depth``, or the second output."""
        frequencies = 10000 ** (-torch.arange(128) / 128)
        angles = t[:, None] * frequencies
        time = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        c = time + self.y_embedder.embedding_table(y)
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        for number, block in enumerate(self.blocks, start=1):
            h = block(h, c)
            if number == self.encoder_depth:
                projected = [project(h) for project in self.projectors]
                if hasattr(self, "final_layer_xr"):
                    projected.append(self.velocity(h, c, x, self.final_layer_xr))
        return self.velocity(h, c, x), projected

    def velocity(
        self, h: torch.Tensor, c: torch.Tensor, x: torch.Tensor, layer: nn.Module | None = None
    ) -> torch.Tensor:
        """Of tokens after the blocks, by the last layer or another one, in the shape of ``x``."""
        layer = self.final_layer if layer is None else layer
        shift, scale = layer.adaLN_modulation(c).unsqueeze(1).split(WIDTH, dim=-1)
        h = layer.linear(layer.norm_final(h) * (1 + scale) + shift)
        grid = self.side // PATCH
        h = h.reshape(len(x), grid, grid, PATCH, PATCH, self.channels)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(x.shape)


class PublicFlowMap(PublicSiT):
    """Decoupled MeanFlow's: the blocks after ``before`` are told another time; with the weights of its loss."""

    def __init__(self, before: int = 4, seed: int = 0):
        super().__init__(dims=(), seed=seed)
        self.before = before
        self.logvar_linear = nn.Linear(256, 1)

    def jump(self, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The mean velocity from ``t`` to ``r``, ``[B, C, h, w]``."""
        label, conditions = self.y_embedder.embedding_table(y), []
        for time in (t, r):
            angles = time[:, None] * 10000 ** (-torch.arange(128) / 128)
            conditions.append(label + self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=1)))
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        for number, block in enumerate(self.blocks):
            h = block(h, conditions[number >= self.before])
        return self.velocity(h, conditions[1], x)


def public_args(**changes: object) -> dict:
    """What REPA-E's train_ldm_only.py writes into args.json, as far as it matters here."""
    values = {
        "model": "SiT-Ti/2",
        "num_classes": 6,
        "encoder_depth": 2,
        "qk_norm": False,
        "fused_attn": True,
        "resolution": 32,
        "path_type": "linear",
        "prediction": "v",
        "cfg_prob": 0.1,
        "enc_type": "efficientnet-lite0",
        "learning_rate": 1e-4,
    } | changes
    return {name: value for name, value in values.items() if value is not None}


def trained(model: PublicSiT, steps: int = 3, seed: int = 5) -> torch.optim.AdamW:
    """Train on made-up gradients, so that AdamW has moments; the frozen position embedding gets none."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def write_checkpoint(path: Path, model: PublicSiT, ema: PublicSiT, args: dict, steps: int, **parts: object) -> Path:
    """A checkpoint of their training scripts: flags as an ``argparse.Namespace``; ``parts`` add or replace entries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "opt": trained(model).state_dict(),
        "args": argparse.Namespace(**args),
        "steps": steps,
    } | parts
    contents["model"] = {key: tensor.clone() for key, tensor in model.state_dict().items()}  # after its training
    torch.save(contents, path)
    return path


def write_experiment(folder: Path, model: PublicSiT, ema: PublicSiT, args: dict, steps: int = 7, **parts) -> Path:
    """A folder as their training scripts leave it: args.json and checkpoints/0000007.pt."""
    write_checkpoint(folder / "checkpoints" / f"{steps:07d}.pt", model, ema, args, steps, **parts)
    (folder / "args.json").write_text(json.dumps(args, indent=4))
    return folder
