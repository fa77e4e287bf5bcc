"""VAEs as users have them: an architecture's name, a diffusers folder, and its latent statistics."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file

from errors import UserError
from models.autoencoder import CONFIG_DIR, STATISTICS_FILE, Autoencoder, architecture_names, list_or_value


def build_autoencoder(vae: str, checkpoint: str | None = None) -> tuple[Autoencoder, bool]:
    """Build a VAE and load its weights.

    Args:
        vae: an architecture's name (:func:`architecture_names`) or a diffusers folder.
        checkpoint: diffusers folder with weights for it, ``"none"`` for random ones; by default the ``vae`` folder.

    Returns:
        the autoencoder in eval mode, and whether its latent statistics are known (from our own file beside the weights,
        or from ``latents_mean`` / ``latents_std`` in the diffusers configuration).

    Raises:
        UserError: no such name, folder or weights, or weights of another architecture.
    """
    config = _architecture(vae)
    if checkpoint is None and vae in architecture_names():
        raise UserError(
            f"--vae {vae} names an architecture without weights: add --vae-ckpt with a diffusers folder, "
            "or --vae-ckpt none to train from scratch"
        )
    if checkpoint == "none":
        return Autoencoder(_from_config(config, vae)).eval(), False
    folder, given = (
        (Path(vae), f"--vae {vae}") if checkpoint is None else (Path(checkpoint), f"--vae-ckpt {checkpoint}")
    )
    autoencoder = Autoencoder(_load_network(folder, given, config, vae))
    known = _load_statistics(autoencoder, folder, given)
    return autoencoder.eval(), known


def _architecture(vae: str) -> dict:
    if vae in architecture_names():
        return json.loads((CONFIG_DIR / f"{vae}.json").read_text())
    if not Path(vae).is_dir():
        names = ", ".join(architecture_names())
        raise UserError(f"--vae {vae}: neither a known architecture ({names}) nor a diffusers folder")
    return _read_config(Path(vae), f"--vae {vae}")


def _read_config(folder: Path, given: str) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{given} is not a diffusers VAE folder: it has no config.json")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{given}: config.json is not readable as JSON ({error})") from error
    if not isinstance(config, dict) or config.get("_class_name") != "AutoencoderKL":
        found = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{given}: config.json describes {found}, not an AutoencoderKL")
    return config


def _from_config(config: dict, name: str) -> AutoencoderKL:
    try:
        return AutoencoderKL.from_config(config)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--vae {name}: its configuration does not build ({error})") from error


def _load_network(folder: Path, given: str, config: dict, vae: str) -> AutoencoderKL:
    if not folder.exists():
        raise UserError(f"{given}: no such folder (a diffusers folder, or none for random weights)")
    if not folder.is_dir():
        raise UserError(f"{given} is a file; a diffusers folder with config.json and weights is expected")
    found = _read_config(folder, given)
    for key in ("block_out_channels", "latent_channels", "down_block_types", "layers_per_block"):
        if list_or_value(found.get(key)) != list_or_value(config.get(key)):
            raise UserError(
                f"{given} has {key} {found.get(key)} where --vae {vae} has {config.get(key)}: "
                "give the architecture that these weights belong to"
            )
    try:
        network, info = AutoencoderKL.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, torch_dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{given}: weights do not load ({_first_line(error)})") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            keys = ", ".join(str(key) for key in sorted(info[kind])[:3])
            raise UserError(f"{given}: {len(info[kind])} {kind.replace('_', ' ')}, first {keys}")
    return network


def _load_statistics(autoencoder: Autoencoder, folder: Path, given: str) -> bool:
    channels = autoencoder.latent_channels
    path = folder / STATISTICS_FILE
    if path.is_file():
        try:
            tensors = load_file(path)
            mean, std, var = tensors["mean"], tensors["std"], tensors.get("var")
        except (SafetensorError, KeyError) as error:
            raise UserError(
                f"{given}: latent statistics do not load from {STATISTICS_FILE} ({_first_line(error)})"
            ) from error
        source = STATISTICS_FILE
    else:
        config = autoencoder.network.config
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return False
        mean, std = torch.tensor(config.latents_mean).flatten(), torch.tensor(config.latents_std).flatten()
        var, source = None, "latents_mean, latents_std of config.json"
    if any(tensor is not None and tensor.shape != (channels,) for tensor in (mean, std, var)):
        raise UserError(f"{given}: {source}: statistics of {mean.numel()} channels for a VAE with {channels}")
    autoencoder.statistics.load(mean, std, var)
    return True


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
