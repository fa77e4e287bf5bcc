"""Latents decoded by another VAE than the one that a run was trained with."""

from pathlib import Path

import torch

from errors import UserError
from formats.vae import load_tokenizer
from inference.trained_ldm import TrainedLDM
from models.tokenizers import TOKENIZERS, Tokenizer, architecture_names


def with_decoder(own: Tokenizer, source: str, trained: TrainedLDM) -> Tokenizer:
    """The VAE of ``--decoder``, in eval mode on the CPU, with the latent statistics of the run's.

    Args:
        own: the run's VAE, on the CPU.
        source: another one in any form, with the same encoder: then its decoder knows the run's latents.
        trained: the run.

    Raises:
        UserError: no such VAE, or one of other latents.
    """
    if own.stores_images:
        raise UserError(f"--decoder {source}: {trained.folder} was trained on pixels, which none decodes; leave it out")
    if source in (*architecture_names(), *TOKENIZERS) and not Path(source).exists():
        raise UserError(f"--decoder {source} has no weights: give a VAE's folder, file or name on the hub")
    try:
        other, _ = load_tokenizer(source)
    except UserError as error:
        raise UserError(f"--decoder {str(error).removeprefix('--vae ')}") from error
    if not has_same_latents(own, other, trained.resolution):
        of_run = trained.folder / "vae" if trained.vae_config is None else trained.checkpoint.folder
        raise UserError(
            f"--decoder {source} makes other latents than the VAE of {trained.folder}, and its decoder knows those; "
            f"give one whose decoder alone was trained, from {of_run}, in float32 (train_sendvae.py --freeze-encoder)"
        )
    return other.with_statistics(own.statistics).requires_grad_(False)


@torch.inference_mode()
def has_same_latents(a: Tokenizer, b: Tokenizer, resolution: int) -> bool:
    """Whether two VAEs make the same of an image of this side, in pixels, to the bit: whatever of them differs."""
    if type(a) is not type(b):
        return False
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (1, 3, resolution, resolution), dtype=torch.uint8, generator=generator)
    try:
        if a.latent_shape(resolution) != b.latent_shape(resolution):
            return False
        return torch.equal(*(tokenizer.encode(image).stored() for tokenizer in (a, b)))
    except UserError:  # not of this size
        return False
