"""Small vision transformers without timm: one forward pass in plain torch, and how each public code writes its tensors.

Weights are kept under names of our own here (``patch``, ``cls``, ``reg``, ``pos``, ``pre``, ``0.qkv``, …, ``norm``);
each writer gives the file content of one layout. Nothing here imports what it tests.
"""

import math
from argparse import Namespace
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class PlainViT:
    """Sizes and kinds.

    Attributes:
        width, depth, heads: as usual.
        patch: side in pixels.
        grid: of the position table.
        cls: whether there is a class token.
        registers: number of register tokens.
        positions: ``all`` (class token and patches), ``patches``, or ``rope``.
        eps: of the layer norms.
        pre_norm: a norm before the first block, and no bias in the patch embedding.
        layer_scale: a learnt factor on each branch.
        mlp: ``gelu``, ``quick_gelu`` or ``swiglu``.
        hidden: width of the MLP (of both halves for swiglu).
        qkv_bias: in the attention.
    """

    width: int = 32
    depth: int = 2
    heads: int = 2
    patch: int = 16
    grid: int = 3
    cls: bool = True
    registers: int = 0
    positions: str = "all"
    eps: float = 1e-6
    pre_norm: bool = False
    layer_scale: bool = False
    mlp: str = "gelu"
    hidden: int = 128
    qkv_bias: bool = True

    def weights(self, seed: int) -> dict[str, torch.Tensor]:
        """Random, and large enough that each of them matters."""
        d = self.width
        shapes: dict[str, tuple[int, ...]] = {"patch.weight": (d, 3, self.patch, self.patch)}
        if not self.pre_norm:
            shapes["patch.bias"] = (d,)
        if self.cls:
            shapes["cls"] = (d,)
        if self.registers:
            shapes["reg"] = (self.registers, d)
        if self.positions != "rope":
            shapes["pos"] = (self.grid**2 + (self.cls and self.positions == "all"), d)
        norms = ["norm"] + (["pre"] if self.pre_norm else [])
        for i in range(self.depth):
            norms += [f"{i}.norm1", f"{i}.norm2"]
            inner = self.hidden // 2 if self.mlp == "swiglu" else self.hidden
            for name, out, inputs in (("qkv", 3 * d, d), ("proj", d, d), ("fc1", self.hidden, d), ("fc2", d, inner)):
                shapes[f"{i}.{name}.weight"] = (out, inputs)
                if name != "qkv" or self.qkv_bias:
                    shapes[f"{i}.{name}.bias"] = (out,)
            if self.layer_scale:
                shapes |= {f"{i}.ls1": (d,), f"{i}.ls2": (d,)}
        for name in norms:
            shapes |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(shape, generator=generator) * (0.02 if name == "patch.weight" else 0.2)
            for name, shape in shapes.items()
        }

    def tokens(self, w: dict[str, torch.Tensor], x: torch.Tensor, final_norm: bool) -> torch.Tensor:
        """Normalised images ``[B, 3, grid·patch, grid·patch]`` → patch tokens ``[B, grid², D]``."""
        x = F.conv2d(x, w["patch.weight"], w.get("patch.bias"), stride=self.patch).flatten(2).transpose(1, 2)
        prefix = [w["cls"].expand(len(x), 1, -1)] if self.cls else []
        if self.positions == "all":
            x = torch.cat([*prefix, x], 1) + w["pos"]
        else:
            x = torch.cat([*prefix, x + w["pos"] if self.positions == "patches" else x], 1)
        if self.registers:
            x = torch.cat([x[:, :1], w["reg"].expand(len(x), -1, -1), x[:, 1:]], 1)
        x = self._norm(w, "pre", x) if self.pre_norm else x
        for i in range(self.depth):
            scales = (w[f"{i}.ls1"], w[f"{i}.ls2"]) if self.layer_scale else (1, 1)
            x = x + scales[0] * self._attention(w, i, self._norm(w, f"{i}.norm1", x))
            x = x + scales[1] * self._mlp(w, i, self._norm(w, f"{i}.norm2", x))
        x = self._norm(w, "norm", x) if final_norm else x
        return x[:, self.cls + self.registers :]

    def _norm(self, w, name, x):
        return F.layer_norm(x, (self.width,), w[f"{name}.weight"], w[f"{name}.bias"], self.eps)

    def _attention(self, w, i, x):
        q, k, v = F.linear(x, w[f"{i}.qkv.weight"], w.get(f"{i}.qkv.bias")).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        if self.positions == "rope":
            q, k = self._rotate(q), self._rotate(k)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        return F.linear((weights @ v).transpose(1, 2).flatten(2), w[f"{i}.proj.weight"], w[f"{i}.proj.bias"])

    def _rotate(self, q):
        """DINOv3: axial angles of patch centres in [-1, 1], base 100; class and register tokens stay."""
        quarter = q.shape[-1] // 4
        periods = 100.0 ** (torch.arange(quarter) / quarter)
        centres = (torch.arange(self.grid) + 0.5) / self.grid * 2 - 1
        rows, columns = torch.meshgrid(centres, centres, indexing="ij")
        angles = [2 * math.pi * axis.flatten()[:, None] / periods for axis in (rows, columns)]
        angles = torch.cat([*angles, *angles], -1)  # [N, head width]
        prefix, patches = q[:, :, : self.cls + self.registers], q[:, :, self.cls + self.registers :]
        first, second = patches.chunk(2, -1)
        return torch.cat([prefix, patches * angles.cos() + torch.cat([-second, first], -1) * angles.sin()], 2)

    def _mlp(self, w, i, x):
        x = F.linear(x, w[f"{i}.fc1.weight"], w[f"{i}.fc1.bias"])
        if self.mlp == "swiglu":
            gate, value = x.chunk(2, -1)
            x = F.silu(gate) * value
        else:
            x = x * torch.sigmoid(1.702 * x) if self.mlp == "quick_gelu" else F.gelu(x)
        return F.linear(x, w[f"{i}.fc2.weight"], w[f"{i}.fc2.bias"])


def dino(w: dict[str, torch.Tensor], **names: str) -> dict[str, torch.Tensor]:
    """What DINO, DINOv2, MAE, MoCo v3, I-JEPA and timm share; ``names`` replaces parts of a name."""
    table = {
        **{"cls": "cls_token", "reg": "register_tokens", "pos": "pos_embed"},
        **{"patch": "patch_embed.proj", "qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
        **{"ls1": "ls1.gamma", "ls2": "ls2.gamma"},
    } | names
    state = {}
    for name, tensor in w.items():
        block = name.split(".")[0].isdigit()
        parts = [table.get(part, part) for part in name.split(".")]
        tensor = tensor.view(1, -1, tensor.shape[-1]) if name in ("cls", "reg", "pos") else tensor
        state[".".join((["blocks"] if block else []) + parts)] = tensor
    return state


def dinov1_teacher(w):
    """A training's checkpoint: the teacher under DDP's and the wrapper's prefix, with its head, beside the student."""
    head = {"head.mlp.0.weight": torch.zeros(4, 4), "head.last_layer.weight_v": torch.zeros(4, 4)}
    teacher = {f"backbone.{name}": tensor for name, tensor in dino(w).items()} | head
    student = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in teacher.items()}
    return {"student": student, "teacher": teacher, "optimizer": {"state": {}}, "args": Namespace(arch="vit_base")}


def dinov2(w):
    """The published backbone: with the mask token."""
    return dino(w) | {"mask_token": torch.zeros(1, w["cls"].shape[-1])}


def dinov2_giant(w):
    return dino(w, fc1="mlp.w12", fc2="mlp.w3") | {"mask_token": torch.zeros(1, w["cls"].shape[-1])}


def dinov2_training(w):
    """teacher_checkpoint.pth: heads beside the backbone, blocks in chunks of one."""
    state = {}
    for name, tensor in dinov2(w).items():
        parts = name.split(".")
        state["backbone." + ".".join(parts[:2] + parts[1:] if parts[0] == "blocks" else parts)] = tensor
    return {"teacher": state | {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.mlp.0.bias": torch.zeros(2)}}


def dinov3(w):
    """Storage tokens, masked biases of zero, the periods of RoPE."""
    width = w["cls"].shape[-1]
    state = dino(w, reg="storage_tokens") | {"mask_token": torch.zeros(1, width), "rope_embed.periods": torch.ones(4)}
    for name in [name for name in state if name.endswith("qkv.weight")]:
        bias = name.replace("weight", "bias")
        state |= {bias: torch.zeros(3 * width), f"{bias}_mask": torch.ones(3 * width)}
    return state


def mae(w):
    """With the decoder, whose mask token is narrower."""
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 8)}
    return {"model": dino(w) | decoder | {"decoder_blocks.0.norm1.weight": torch.zeros(8)}, "epoch": 1}


def mocov3(w):
    """Both encoders and the predictor under DDP's prefix; blocks 13 and 14 misnamed."""
    state = {"module.predictor.0.weight": torch.zeros(2, 2)}
    wrong = {"13.norm1": "13.norm13", "13.mlp.fc1": "13.mlp.fc13", "14.norm2": "14.norm14", "14.mlp.fc2": "14.mlp.fc14"}
    for name, tensor in dino(w).items():
        for right, misnamed in wrong.items():
            name = name.replace(f"blocks.{right}.", f"blocks.{misnamed}.")
        state[f"module.base_encoder.{name}"] = tensor
        state[f"module.momentum_encoder.{name}"] = torch.zeros_like(tensor)
    state |= {
        "module.base_encoder.head.0.weight": torch.zeros(2, 2),
        "module.momentum_encoder.head.0.weight": torch.ones(2),
    }
    return {"epoch": 300, "arch": "vit_base", "state_dict": state}


def ijepa(w):
    encoder = {f"module.{name}": tensor for name, tensor in dino(w).items()}
    target = {name: torch.zeros_like(tensor) for name, tensor in encoder.items()}
    return {
        "encoder": encoder,
        "predictor": {"module.x": torch.zeros(1)},
        "target_encoder": target,
        "epoch": 300,
        "lr": 0.1,
    }


def openai_clip(w):
    """The state dict of the whole model, in half precision, with sizes among the tensors."""
    rename = {"patch.weight": "conv1.weight", "cls": "class_embedding", "pos": "positional_embedding"}
    inside = {"norm1": "ln_1", "norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj", "proj": "attn.out_proj"}
    state = {"proj": torch.zeros(w["cls"].shape[-1], 8)}
    for name, tensor in w.items():
        block, *parts = name.split(".")
        if block.isdigit() and parts[0] == "qkv":
            new = f"transformer.resblocks.{block}.attn.in_proj_{parts[1]}"
        elif block.isdigit():
            new = f"transformer.resblocks.{block}.{inside[parts[0]]}.{parts[1]}"
        else:
            new = rename.get(name) or name.replace("pre.", "ln_pre.").replace("norm.", "ln_post.")
        state[new] = tensor
    text = {"token_embedding.weight": torch.zeros(4, 8), "transformer.resblocks.0.ln_1.weight": torch.zeros(8)}
    return {f"visual.{name}": tensor for name, tensor in state.items()} | text | {"logit_scale": torch.zeros(())}


def open_clip_training(w):
    return {"epoch": 3, "name": "run", "state_dict": {f"module.{name}": t for name, t in openai_clip(w).items()}}


def open_clip_timm_tower(w):
    """SigLIP as open_clip stores it: timm's names in a trunk, attention pooling, a text tower."""
    trunk = dino(w) | {"attn_pool.latent": torch.zeros(1, 1, 4), "attn_pool.norm.weight": torch.zeros(4)}
    return {f"visual.trunk.{name}": t for name, t in trunk.items()} | {"text.token_embedding.weight": torch.zeros(2, 2)}


def timm_dinov2_registers(w):
    """timm's own: the class token bears its position, the table is for patches."""
    state = dino(w, reg="reg_token")
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    return state | {"pos_embed": state["pos_embed"][:, 1:]}


def timm_clip(w):
    return dino(w, pre="norm_pre")


def timm_dinov3(w):
    return dino(w, reg="reg_token", ls1="gamma_1", ls2="gamma_2")
