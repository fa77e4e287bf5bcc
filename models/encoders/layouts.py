"""Other people's key layouts of vision transformers → timm's.

Known by their content: timm's own, DINO (student or teacher, with or without heads), DINOv2 with and without registers,
DINOv3, MAE with and without its decoder, MoCo v3, I-JEPA, OpenAI CLIP and open_clip (both kinds of image tower).
"""

import re

import torch

# A checkpoint's nested dictionaries that hold networks, the one wanted first: DINO's averaged weights, I-JEPA's context
# encoder (as REPA takes it).
NESTED_KEYS = ("state_dict", "model", "teacher", "student", "encoder", "target_encoder")

# What networks are wrapped in or accompanied by; taken off in this order, and only what is inside is kept.
PREFIXES = ("_orig_mod.", "module.", "teacher.", "base_encoder.", "visual.", "trunk.", "backbone.")

CLIP_NAMES = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.mlp.fc2."),
    (r"^transformer\.resblocks\.(\d+)\.ls_([12])\.", r"blocks.\1.ls\2."),
)
MOCOV3_NAMES = (  # in published files block 13's and block 14's parts bear the block's number
    (r"^blocks\.13\.(norm|mlp\.fc)13\.", r"blocks.13.\g<1>1."),
    (r"^blocks\.14\.(norm|mlp\.fc)14\.", r"blocks.14.\g<1>2."),
)
DINOV2_NAMES = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # blocks in chunks, as in training
    (r"^register_tokens$", "reg_token"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),  # giant: SwiGLU
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
DINOV3_NAMES = (
    (r"^storage_tokens$", "reg_token"),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
)


def to_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a vision transformer's tensors to timm's names, as float32; what belongs to no ViT keeps its name.

    Raises:
        ValueError: a layout that is recognised but cannot be converted.
    """
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if "class_embedding" in state and "conv1.weight" in state:
        return _clip(state)
    if "storage_tokens" in state:
        return _dinov3(state)
    if any(name.startswith(("embeddings.", "vision_model.embeddings.")) for name in state):
        raise ValueError("it is in the layout of transformers: take timm's file, or the original one")
    return _dinov2(_renamed(state, MOCOV3_NAMES))


def _clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIP's own image tower; the projection to the space shared with the text is left out."""
    state = _renamed({name: tensor for name, tensor in state.items() if name != "proj"}, CLIP_NAMES)
    if state["pos_embed"].ndim != 2:
        raise ValueError(f"positional_embedding has {state['pos_embed'].ndim} dimensions instead of 2")
    state["cls_token"] = state["cls_token"].view(1, 1, -1)
    state["pos_embed"] = state["pos_embed"][None]
    return state


def _dinov2(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm keeps no position of the class token when there are registers: it is added to the token."""
    has_registers = "register_tokens" in state
    state = _renamed(state, DINOV2_NAMES)
    if has_registers:
        if state["pos_embed"].ndim != 3:
            raise ValueError(f"pos_embed has {state['pos_embed'].ndim} dimensions instead of 3")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


def _dinov3(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published networks have biases of zero in q, k and v, and timm has none; angles of RoPE are calculated."""
    computed = (".periods", ".bias_mask", "mask_token")
    for name in [name for name in state if name.endswith("attn.qkv.bias")]:
        bias = state.pop(name)
        mask = state.get(f"{name}_mask", torch.ones_like(bias))
        if (bias * mask).any():
            raise ValueError(f"{name} is not zero, and timm's network has no such bias")
    return _renamed({name: tensor for name, tensor in state.items() if not name.endswith(computed)}, DINOV3_NAMES)


def _renamed(state: dict[str, torch.Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
    def rename(name: str) -> str:
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    return {rename(name): tensor for name, tensor in state.items()}
