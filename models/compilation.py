"""What Inductor, the compiler behind ``torch.compile``, is told about denoisers, VFMs and VAEs."""

# It writes an expression of many operations and reads to memory, in float32, and reads it again from there. Gradients
# of norms with the activation or modulation that follows are longer than its limits, and read once. Left whole, the
# backward pass of a residual block moves 5.9 in place of 10.2 GB (32 images, 128 channels at 256 px; counted in the
# code for an H100), that of a SiT-XL block 4.2 in place of 4.5 (128 images).
FUSING = {"realize_opcount_threshold": 100, "realize_acc_reads_threshold": 16, "realize_reads_threshold": 8}


# Of one function, such as a block's: f16d32 has 15 kinds of residual blocks, each with and without gradients, for a
# batch and for its rest. torch's own limit is 8.
MOST_GRAPHS = 128


def allow_graphs() -> None:
    """Let a function be compiled for so many shapes; beyond the limit it would run uncompiled."""
    import torch._dynamo.config as limits  # here, because it takes a second

    limit = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"  # torch 2.6
    setattr(limits, limit, max(getattr(limits, limit), MOST_GRAPHS))


def compile_options(options: dict) -> dict:
    """Arguments of ``torch.compile``, with these limits; another backend has none.

    Each number of images or tokens has a graph of its own: after one for any number was made, as for what is left of a
    held-out set, the training would go on with that.
    """
    options = {"dynamic": False} | options
    return options if "backend" in options else options | {"options": FUSING | options.get("options", {})}
