"""Names of an autoencoder's tensors: latent-diffusion's (LDM) layout and older spellings ⇄ those of today's diffusers.

Pure renames: no value changes, and 1×1 convolutions of attention become linear layers of the same numbers. LDM counts
the decoder's levels from the other end.
"""

import re
from collections.abc import Mapping

import torch

State = dict[str, torch.Tensor]

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of diffusers before 0.17
_PLAIN = {  # LDM → diffusers, where nothing is counted
    "mid.block_1": "mid_block.resnets.0",
    "mid.attn_1": "mid_block.attentions.0",
    "mid.block_2": "mid_block.resnets.1",
    "norm_out": "conv_norm_out",
}
_LDM_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(?:(block|attn)\.(\d+)|(downsample|upsample))\.(.+)")
_LEVEL = re.compile(
    r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_LISTS = {"block": "resnets", "attn": "attentions"}


def is_ldm(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the names are those of the LDM layout."""
    return any(name.startswith(("encoder.down.", "encoder.mid.", "decoder.mid.", "decoder.up.")) for name in state)


def to_diffusers(state: Mapping[str, torch.Tensor]) -> State:
    """Tensors by LDM, older diffusers or today's diffusers names → by today's diffusers names."""
    if is_ldm(state):
        levels = _levels(state, r"(?:encoder\.down|decoder\.up)\.(\d+)\.")
        state = {_from_ldm(name, levels): tensor for name, tensor in state.items()}
    else:
        state = {_from_old_diffusers(name): tensor for name, tensor in state.items()}
    return {name: _as_linear(tensor) if _is_projection(name) else tensor for name, tensor in state.items()}


def to_ldm(state: Mapping[str, torch.Tensor]) -> State:
    """Tensors by today's diffusers names → by LDM names; the inverse of :func:`to_diffusers`."""
    levels = _levels(state, r"(?:encoder\.down|decoder\.up)_blocks\.(\d+)\.")
    return {
        _to_ldm(name, levels): tensor[:, :, None, None] if _is_projection(name) and tensor.ndim == 2 else tensor
        for name, tensor in state.items()
    }


def _levels(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=-1)


def _from_ldm(name: str, levels: int) -> str:
    if found := _LDM_LEVEL.fullmatch(name):
        side, level, kind, index, sampler, rest = found.groups()
        if side == "decoder.up":
            level = levels - 1 - int(level)
        place = f"{sampler}rs.0" if sampler else f"{_LISTS[kind]}.{index}"
        place = f"{side}_blocks.{level}.{place}"
        return f"{place}.{_replaced(rest, _ATTENTION if kind == 'attn' else {'nin_shortcut': 'conv_shortcut'})}"
    half, _, rest = name.partition(".")
    for theirs, ours in _PLAIN.items():
        if half in ("encoder", "decoder") and rest.startswith(f"{theirs}."):
            rest = rest.removeprefix(f"{theirs}.")
            return f"{half}.{ours}.{_replaced(rest, _ATTENTION) if 'attn' in theirs else rest}"
    return name


def _to_ldm(name: str, levels: int) -> str:
    back = {ours: theirs for theirs, ours in _ATTENTION.items()}
    if found := _LEVEL.fullmatch(name):
        side, level, kind, index, rest = found.groups()
        if side == "decoder.up":
            level = levels - 1 - int(level)
        if kind in ("downsamplers", "upsamplers"):
            return f"{side}.{level}.{kind.removesuffix('rs')}.{rest}"
        if kind == "attentions":
            return f"{side}.{level}.attn.{index}.{_replaced(rest, back)}"
        return f"{side}.{level}.block.{index}.{_replaced(rest, {'conv_shortcut': 'nin_shortcut'})}"
    half, _, rest = name.partition(".")
    for theirs, ours in _PLAIN.items():
        if half in ("encoder", "decoder") and rest.startswith(f"{ours}."):
            rest = rest.removeprefix(f"{ours}.")
            return f"{half}.{theirs}.{_replaced(rest, back) if 'attn' in theirs else rest}"
    return name


def _from_old_diffusers(name: str) -> str:
    found = re.fullmatch(r"(.+\.attentions\.\d+\.)(.+)", name)
    return found[1] + _replaced(found[2], _OLD_ATTENTION) if found else name


def _replaced(rest: str, names: Mapping[str, str]) -> str:
    """``q.weight`` → ``to_q.weight``; what is not in the table stays."""
    for old, new in names.items():
        if rest.startswith(f"{old}."):
            return new + rest.removeprefix(old)
    return rest


def _is_projection(name: str) -> bool:
    return ".attentions." in name and name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))


def _as_linear(weight: torch.Tensor) -> torch.Tensor:
    return weight[:, :, 0, 0] if weight.ndim == 4 and weight.shape[2:] == (1, 1) else weight
