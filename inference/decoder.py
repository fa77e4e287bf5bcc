"""Latents decoded by another VAE than the one that a run was trained with."""

from pathlib import Path

from errors import UserError
from formats.vae import load_tokenizer
from models.tokenizers import Tokenizer


def with_decoder(own: Tokenizer, source: str, run: Path) -> Tokenizer:
    """The VAE of ``--decoder``, in eval mode, with the latent statistics of the run's.

    Args:
        own: the run's VAE.
        source: another one in any form, with the same encoder: then its decoder knows the run's latents.
        run: the run's folder, for messages.

    Raises:
        UserError: no such VAE, or one of other latents.
    """
    try:
        other, _ = load_tokenizer(source)
    except UserError as error:
        raise UserError(f"--decoder {str(error).removeprefix('--vae ')}") from error
    is_same = type(other) is type(own) and other.packing == own.packing
    if not is_same or other.encoder_checksum() != own.encoder_checksum():
        raise UserError(
            f"--decoder {source} has another encoder than the VAE of {run}, so that its decoder knows other latents; "
            f"give one whose decoder alone was trained, from {run / 'vae'} (train_sendvae.py --freeze-encoder)"
        )
    return other.with_statistics(own.statistics).requires_grad_(False)
