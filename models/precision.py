"""The weights of frozen networks in the precision in which they are multiplied."""

import torch
from torch import nn

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by ``--mixed-precision``; with ``no`` all stays float32


def hold_products(network: nn.Module | None, mixed_precision: str) -> None:
    """Round what linear layers and convolutions multiply by, in place, once and not in every call.

    Only for a network that is not trained and that runs under nothing but autocast of this precision: autocast would
    round the same weights and biases to the same values each time, which takes a kernel for each of them and reads four
    bytes a parameter to write two. What comes out is the same to the bit. Norms and embeddings stay in float32, as they
    do under autocast; so does a layer of another class, which may do more with its weight than multiply by it. Take a
    checksum before, as it is of the weights as they are.

    Args:
        network: None: there is none.
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
    """
    if network is None or mixed_precision == "no":
        return
    for module in network.modules():
        if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(AUTOCAST[mixed_precision])
