"""Inception-v3 of 2015-12-05, the network of FID, sFID and the Inception Score, as torch-fidelity ported it.

torch-fidelity resizes to 299 px as TensorFlow 1 did and gives pooled features and logits. Its constructor downloads or
unpickles the weights; here it does neither.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from errors import UserError
from files import checksum, weights_checksum
from metrics.arguments import INCEPTION_FLAG as FLAG
from models.weight_files import MissingWeightsError, NotWeightsError, read_state_dict

URL = fidelity.URL_INCEPTION_V3
FILE_NAME = URL.rsplit("/", 1)[1]
PUBLISHED_SHA256 = FILE_NAME.rsplit("-", 1)[1].removesuffix(".pth")  # the first digits
NAME = "inception-v3-2015-12-05"
POOLED, CLASSES = 2048, 1008
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17
SPATIAL = SPATIAL_CHANNELS * SPATIAL_SIDE**2


class Inception(nn.Module):
    """uint8 images ``[B, 3, H, W]`` → pooled features ``[B, 2048]``, spatial ones ``[B, 2023]``, logits ``[B, 1008]``.

    The spatial features, sFID's, are channels 0…6 of the output of Mixed_6d (the first ones of its 1×1 branch, after
    BatchNorm and ReLU), flattened in the order row, column, channel. The logits are without bias, as ADM's Inception
    Score takes them. ``metrics.features`` keeps it in eval mode and float32.

    Args:
        network: torch-fidelity's, with weights.
        weights_sha256: of what the features come from.
    """

    def __init__(self, network: fidelity.FeatureExtractorInceptionV3, weights_sha256: str):
        super().__init__()
        self.network, self.weights_sha256 = network, weights_sha256
        self._spatial: torch.Tensor | None = None
        network.Mixed_6d.register_forward_hook(self._keep_spatial)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pooled, logits = self.network(images)
        spatial, self._spatial = self._spatial, None
        return pooled, spatial, logits

    def _keep_spatial(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def build_inception(checkpoint: str | None = None, random_weights: bool = False) -> Inception:
    """Build Inception with weights from ``checkpoint``, by default from torch's hub cache or its download.

    Args:
        checkpoint: torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``.
        random_weights: to measure sizes and speed.

    Raises:
        UserError: the weights cannot be had, or are not this network's.
    """
    path = None if random_weights else find_weights(checkpoint)
    network = _Network("inception", ["2048", "logits_unbiased"])
    if path is None:
        return Inception(network, weights_checksum(network.state_dict()))
    try:
        network.load(read_state_dict(path))
    except (NotWeightsError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise UserError(f"{path} holds no weights of Inception-v3 ({reason}); give {FILE_NAME} of {URL}") from error
    digest = checksum(path)["sha256"]
    if not digest.startswith(PUBLISHED_SHA256):
        print(
            f"WARNING: {path} is not the published {FILE_NAME} (SHA-256 {digest[:8]}…): the values cannot be compared "
            "with published ones",
            file=sys.stderr,
        )
    return Inception(network, digest)


def find_weights(checkpoint: str | None = None) -> Path:
    """The file with the weights; a download where it is in none of the places."""
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise UserError(f"{FLAG} {checkpoint}: no such file; it is {URL}")
        return Path(checkpoint)
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE_NAME
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=PUBLISHED_SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            raise MissingWeightsError(
                f"no Inception weights: {URL} cannot be reached; give the file {FILE_NAME} with {FLAG}, put it at "
                f"{path}, or take another network with --features"
            ) from error
    return path


class _Network(fidelity.FeatureExtractorInceptionV3):
    """torch-fidelity's network, whose constructor leaves the weights random."""

    def __init__(self, name: str, features: list[str]):
        with patch.object(fidelity, "load_state_dict_from_url", lambda url, progress=None: {}):
            super().__init__(name, features)

    def load_state_dict(self, state_dict: dict, *args, **kwargs) -> None:
        """What the constructor calls, with nothing to load."""

    def load(self, state_dict: dict[str, torch.Tensor]) -> None:
        super().load_state_dict(state_dict)
