"""The VAE: ``diffusers.AutoencoderKL`` with its latent statistics, from uint8 images to images in [-1, 1]."""

import copy
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from errors import UserError
from models.latent_statistics import LatentStatistics
from models.weight_files import weights_checksum

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs" / "vae"
STATISTICS_FILE = "latents_stats.safetensors"
# What the layers do, beside what the weights' names and shapes say; a fixed list, because diffusers adds keys.
_ARCHITECTURE_KEYS = (
    *("in_channels", "out_channels", "latent_channels", "block_out_channels", "down_block_types", "up_block_types"),
    *("layers_per_block", "act_fn", "norm_num_groups", "mid_block_add_attention"),
)


@dataclass(frozen=True)
class Posterior:
    """The encoder's diagonal Gaussian: float32 ``mean`` and ``logvar`` (in [-30, 20]), each ``[B, C, h, w]``."""

    mean: torch.Tensor
    logvar: torch.Tensor

    @property
    def std(self) -> torch.Tensor:
        return (0.5 * self.logvar).exp()

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """``mean + std·noise`` for standard normal ``noise`` of the same shape."""
        return self.mean + self.std * noise


class Autoencoder(nn.Module):
    """A KL autoencoder and the statistics of its latents.

    Args:
        network: any ``AutoencoderKL``.
    """

    def __init__(self, network: AutoencoderKL):
        super().__init__()
        self.network = network
        self.statistics = LatentStatistics(self.latent_channels)

    @property
    def latent_channels(self) -> int:
        return self.network.config.latent_channels

    @property
    def downsampling(self) -> int:
        """Image pixels per latent position, along a side."""
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    @property
    def architecture(self) -> dict:
        """What :meth:`from_architecture` builds this network from, plain JSON values."""
        config = json.loads(self.network.to_json_string())
        return {key: value for key, value in config.items() if not key.startswith("_")}

    @classmethod
    def from_architecture(cls, config: dict) -> "Autoencoder":
        """A VAE with random weights."""
        return cls(AutoencoderKL.from_config(config)).eval()

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where VQGAN's adaptive GAN weight compares gradients."""
        return self.network.decoder.conv_out.weight

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) for square images; raises where the resolution does not fit the downsampling."""
        if resolution % self.downsampling:
            raise UserError(f"resolution {resolution} is not a multiple of the VAE's downsampling {self.downsampling}")
        side = resolution // self.downsampling
        return self.latent_channels, side, side

    def encode(self, images: torch.Tensor) -> Posterior:
        """uint8 images ``[B, 3, H, W]`` → posterior over latents ``[B, C, H/f, W/f]``, un-normalised."""
        parameters = self.network.encode(to_signed(images)).latent_dist.parameters.float()
        mean, logvar = parameters.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Un-normalised latents ``[B, C, h, w]`` → images ``[B, 3, H, W]``, nominally in [-1, 1], not clamped."""
        return self.network.decode(z).sample.float()

    def checksum(self) -> str:
        """SHA-256 of architecture and weights: which VAE this is, whatever its statistics, scaling factor or folder."""
        config = {key: _list_or_value(self.network.config.get(key)) for key in _ARCHITECTURE_KEYS}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        digest.update(weights_checksum(self.network.state_dict()).encode())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write a diffusers folder with the latent statistics beside the weights, complete or not at all."""
        folder = Path(folder)
        beside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        # a copy, because safetensors refuses weights that are in channels_last order
        network = copy.deepcopy(self.network).to(memory_format=torch.contiguous_format)
        statistics = self.statistics.tensors()
        if network.config.get("latents_mean") is not None:  # still those of the VAE that training started from
            network.register_to_config(latents_mean=statistics["mean"].tolist(), latents_std=statistics["std"].tolist())
        network.save_pretrained(beside, safe_serialization=True)
        save_file(statistics, beside / STATISTICS_FILE)
        replaced = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)  # so that no half-deleted folder ever has the name
        beside.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 0…255 → float32 in [-1, 1]: x/127.5 − 1."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`to_signed`: clamped and rounded."""
    return ((images.float() + 1.0) * 127.5).round_().clamp_(0, 255).to(torch.uint8)


def architecture_names() -> list[str]:
    """The names that ``--vae`` knows."""
    return sorted(path.stem for path in CONFIG_DIR.glob("*.json"))


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
        if _list_or_value(found.get(key)) != _list_or_value(config.get(key)):
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


def _list_or_value(value):
    """JSON gives lists where diffusers gives tuples."""
    return list(value) if isinstance(value, tuple) else value


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
