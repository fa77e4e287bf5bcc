"""A VAE in the files of other codes: what goes into them, and writing them complete or not at all."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from files import flush, remove_leftovers, whole_file, write_safetensors_file, write_torch
from formats.layers import State, to_ldm
from formats.statistics import DISCRIMINATOR_SUFFIX, REPAE_SUFFIX, repae_tensors
from models.latent_statistics import LatentStatistics
from models.tokenizers.kl import KLTokenizer

NEARLY = 1e-3  # of a std: statistics that differ less between channels are one number


def diffusers_scaling(statistics: LatentStatistics) -> dict[str, object]:
    """Latent statistics in the words of diffusers' ``AutoencoderKL`` configuration.

    Its pipelines differ in what they read, so that all of it is given (diffusers 0.42)::

        Stable Diffusion, DiT         z · scaling_factor
        Stable Diffusion 3, Flux, …   (z − shift_factor) · scaling_factor
        Stable Diffusion XL           (z − latents_mean) · scaling_factor / latents_std

    The last is exactly how we normalise. The first two get the mean and the standard deviation over all channels; where
    these hardly differ between channels, there is nothing else to say, and latents_mean and latents_std are None.
    """
    mean, std = statistics.mean.cpu().double(), statistics.std.cpu().double()
    shift = mean.mean()
    spread = (std.square().mean() + (mean - shift).square().mean()).sqrt()
    config: dict[str, object] = {"scaling_factor": (1 / spread).item(), "shift_factor": shift.item()}
    same = max((mean - shift).abs().max(), (std - spread).abs().max()) <= NEARLY * spread
    per_channel = None if same else (mean.tolist(), (std / spread).tolist())
    return config | dict(zip(("latents_mean", "latents_std"), per_channel or (None, None), strict=True))


def set_scaling(tokenizer: KLTokenizer) -> None:
    """Say in a VAE's configuration what its latent statistics say."""
    tokenizer.network.register_to_config(**diffusers_scaling(tokenizer.statistics))


def scaling_config(tokenizer: KLTokenizer) -> dict[str, object]:
    """What a VAE's configuration says of the scale of its latents."""
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    return {name: tokenizer.network.config[name] for name in names}


@torch.no_grad()
def fold_statistics(tokenizer: KLTokenizer) -> None:
    """Put the latent statistics into the 1×1 convolutions on both sides of the latent, which is then normalised itself.

    The first gives mean and log-variance of ``(z − mean) / std``, the second takes it; images stay the same, but for
    rounding. The statistics become mean 0 and std 1.

    Raises:
        ValueError: there are no such convolutions.
    """
    before, after = tokenizer.network.quant_conv, tokenizer.network.post_quant_conv
    if before is None or after is None:
        raise ValueError("this VAE has no 1×1 convolutions on both sides of its latent")
    mean, std = tokenizer.statistics.mean.double(), tokenizer.statistics.std.double()
    zeros, ones = torch.zeros_like(mean), torch.ones_like(mean)
    scale, shift = torch.cat([std, ones]), torch.cat([mean, 2 * std.log()])  # of mean and log-variance
    before.weight.copy_(before.weight.double() / scale[:, None, None, None])
    before.bias.copy_((before.bias.double() - shift) / scale)
    after.bias.copy_(after.bias.double() + after.weight.double()[:, :, 0, 0] @ mean)
    after.weight.copy_(after.weight.double() * std[:, None, None])
    tokenizer.statistics.load(zeros, ones)


def ldm_state(tokenizer: KLTokenizer) -> State:
    """The network's tensors by LDM names, float32 on the CPU."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tokenizer.network.state_dict().items()}
    return to_ldm(state)


def repae_files(tokenizer: KLTokenizer, path: Path, discriminator: Mapping | None) -> dict[Path, State]:
    """REPA-E's trio: ``X.pt``, ``X-latents-stats.pt`` and, where there is a discriminator, ``X-discriminator-ckpt.pt``.

    Raises:
        NotWeightsError: REPA-E cannot store these statistics.
    """
    files = {path: ldm_state(tokenizer)}
    files[path.with_name(f"{path.stem}{REPAE_SUFFIX}{path.suffix}")] = repae_tensors(tokenizer.statistics)
    if discriminator is not None:
        files[path.with_name(f"{path.stem}{DISCRIMINATOR_SUFFIX}{path.suffix}")] = dict(discriminator)
    return files


def write_files(files: Mapping[Path, State]) -> None:
    """Write tensors by name, as safetensors or with ``torch.save`` by the suffix; all complete, then all renamed."""
    with ExitStack() as stack:
        for path, state in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent, path.name)
            temporary = stack.enter_context(whole_file(path))
            # copies: torch.save would write whole storages of which a tensor may be a part
            state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
            (write_safetensors_file if path.suffix == ".safetensors" else write_torch)(state, temporary)
            flush(temporary)  # what the disk refuses is refused before the first has its name
