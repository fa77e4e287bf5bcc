"""SiT, the scalable interpolant transformer: noisy latent, time and class → velocity (arXiv 2401.08740, DiT's blocks).

Parameter names are those of the public SiT, REPA and REPA-E code, so that their checkpoints load.
"""

from collections import OrderedDict
from collections.abc import Iterator

from torch import nn

from models.denoisers.transformer import Attention, Block, Transformer


class SiT(Transformer):
    """LayerNorm without parameters, a GELU MLP of four times the width, positions only at the input."""

    def norm(self, width: int) -> nn.Module:
        return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)

    def make_blocks(self) -> Iterator[Block]:
        width, heads = self.width, self.config.size.heads
        qk_norm = nn.LayerNorm if self.config.qk_norm else nn.Identity
        for _ in range(self.depth):
            yield Block(width, self.norm, Attention(width, heads, qk_norm), gelu_mlp(width))


def gelu_mlp(width: int) -> nn.Sequential:
    """``[..., width]`` → the same."""
    layers = {
        "fc1": nn.Linear(width, 4 * width),
        "act": nn.GELU(approximate="tanh"),
        "fc2": nn.Linear(4 * width, width),
    }
    return nn.Sequential(OrderedDict(layers))
