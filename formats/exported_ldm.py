"""A trained diffusion transformer elsewhere: as a folder that needs no run, with how to sample, or as REPA-E's file."""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch

from formats.sit import BATCH_NORM, REPA_PREFIX, State
from models.denoisers import Denoiser
from models.denoisers.config import SiTConfig
from models.latent_statistics import LatentStatistics
from models.tokenizers import STATISTICS_FILE, Tokenizer

DEFAULT_ENCODER_DEPTH = 8  # of REPA and REPA-E
# What REPA-E's utils.py, models/ and samplers.py know; the last takes 1000 for the null class, whatever there is.
REPAE_VAES, REPAE_PROJECTOR_WIDTH, REPAE_RESOLUTIONS, REPAE_CLASSES = ("f8d4", "f16d32"), 2048, (256, 512), 1000
REPAE_ENCODERS = (
    *(f"{kind}-vit-{size}" for kind in ("dinov2", "dinov2reg") for size in "sblg"),
    *("mocov3-vit-s", "mocov3-vit-b", "mocov3-vit-l", "clip-vit-L", "mae-vit-l", "jepa-vit-h"),
)

INDEX_FILE, TRANSFORMER, VAE, SNIPPET_FILE = "model_index.json", "transformer", "vae", "README.md"

README = """# {model}, {resolution} px

| part | class |
|---|---|
| `{transformer}/` | `{cls}`: {model}, latents {latent}, {classes} classes and the null class {classes} |
| `{vae}/` | `diffusers.AutoencoderKL`, with the latent statistics in `{statistics}` |

Trained for {steps} steps on the {path_type} path; these are its {weights} weights. One image, from a clone of the
repository:

```python
{snippet}
```
"""

SNIPPET = """import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
{imports}from diffusion.samplers import model_velocity, {sampler}
from {module} import {name}

folder, label = {folder!r}, 0
sit, vae = {name}.from_pretrained(f"{{folder}}/{transformer}"), AutoencoderKL.from_pretrained(f"{{folder}}/{vae}")
mean, std = (load_file(f"{{folder}}/{vae}/{statistics}")[name][:, None, None] for name in ("mean", "std"))
noise = torch.randn(1, *sit.state_shape, generator=torch.Generator().manual_seed(0))
velocity = {velocity}
z = {sampler}(velocity, noise, torch.tensor([label]), num_steps={num_steps}{times})
image = vae.decode(sit.unpack(z)[0] * std + mean).sample[0].detach().clamp(-1, 1)
Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save("sample.png")"""


def write_exported(folder: Path, name: str, model: Denoiser, tokenizer: Tokenizer, facts: dict) -> None:
    """Write denoiser, VAE, ``model_index.json`` and a README with a snippet that samples an image.

    Args:
        folder: is made; what it is given is overwritten.
        name: of the folder as the snippet is to call it.
        model: the denoiser.
        tokenizer: an ``AutoencoderKL``, with the statistics of the denoiser's training.
        facts: ``path_type``, ``time_shift``, ``cfg_prob`` (with 0 there is no null class to guide by), ``resolution``,
            ``steps``, ``weights``, ``class_names``; plain JSON values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / TRANSFORMER)
    tokenizer.save(folder / VAE)
    module, cls = type(model).__module__, type(model).__name__
    index = {"_class_name": "LatentDiffusion", TRANSFORMER: [module, cls], VAE: ["diffusers", "AutoencoderKL"]}
    (folder / INDEX_FILE).write_text(json.dumps(index | facts, indent=2) + "\n")
    how = {"imports": "", "velocity": "model_velocity(sit)", "times": "", "sampler": "sample_ode", "num_steps": 50}
    if model.config.flow_map_blocks:  # what it has learned of guidance is in its jumps
        how |= {"sampler": "sample_map", "num_steps": 4}
    elif facts["cfg_prob"] != 0:
        how["imports"] = "from diffusion.guidance import guided\n"
        how["velocity"] = "guided(model_velocity(sit), 2.5, sit.null_class, high=0.75)"
    if facts["time_shift"] != 1:
        how["times"] = f", shift={facts['time_shift']!r}, path_type={facts['path_type']!r}"
    places = {"transformer": TRANSFORMER, "vae": VAE, "statistics": STATISTICS_FILE}
    text = README.format(
        model=model.config.model,
        cls=f"{module}.{cls}",
        latent="×".join(map(str, model.latent_shape)),
        classes=model.config.num_classes,
        snippet=SNIPPET.format(folder=name, module=module, name=cls, **how, **places),
        **places,
        **{key: facts[key] for key in ("resolution", "steps", "path_type", "weights")},
    )
    (folder / SNIPPET_FILE).write_text(text)


def repae_checkpoint(
    sets: Mapping[str, State], alignment: State, statistics: LatentStatistics, vae: State, facts: Mapping, step: int
) -> dict:
    """What REPA-E's ``generate.py`` reads, to be written with ``torch.save``.

    Args:
        sets: state dicts of a SiT, ``"model"`` and ``"ema"``.
        alignment: the trained one of ``loss.alignment.DenoiserAlignments``; both sets get REPA's projectors from it,
            because they are not averaged, and sampling never uses them.
        statistics: of the latents; become the BatchNorms', which add the same 1e-4 to var as we do.
        vae: in the LDM layout.
        facts: the content of ``args.json`` (:func:`repae_facts`).
        step: trained for.
    """
    beside = {key.removeprefix(REPA_PREFIX): t for key, t in alignment.items() if key.startswith(REPA_PREFIX)}
    tensors = statistics.tensors()
    beside |= {f"{BATCH_NORM}running_{name}": tensors[name] for name in ("mean", "var")}
    beside[f"{BATCH_NORM}num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    networks = {name: dict(state) | beside for name, state in sets.items()}
    return networks | {"vae": vae, "args": Namespace(**facts), "steps": step}


def repae_facts(config: SiTConfig, trained_with: Mapping, has_projectors: bool) -> dict[str, object]:
    """The flags that REPA-E's ``generate.py`` looks at, under its names.

    Args:
        config: of the SiT.
        trained_with: the run's own arguments.
        has_projectors: whether it was aligned with VFMs.
    """
    resolution = trained_with["resolution"]
    return {
        "model": config.model,
        "num_classes": config.num_classes,
        "encoder_depth": trained_with.get("encoder_depth") or DEFAULT_ENCODER_DEPTH,
        "qk_norm": config.qk_norm,
        "fused_attn": True,
        "bn_momentum": 0.1,
        "resolution": resolution,
        "vae": f"f{resolution // config.latent_size}d{config.latent_channels}",
        "path_type": trained_with["path_type"],
        "prediction": "v",
        "cfg_prob": trained_with.get("cfg_prob", 0.1),
        "enc_type": trained_with.get("enc_type") if has_projectors else "None",
    }


def what_repae_lacks(facts: Mapping, projector_width: int | None) -> list[str]:
    """Why REPA-E's own code cannot build or sample this network; empty where it can.

    Args:
        facts: from :func:`repae_facts`.
        projector_width: of the projectors, None where there are none.
    """
    reasons, resolution, classes = [], facts["resolution"], facts["num_classes"]
    if facts["model"].startswith(("SiT-Ti", "SiT-S")) or facts["model"].endswith(("/16", "/32")):
        reasons.append(f"it builds no {facts['model']}")
    if facts["vae"] not in REPAE_VAES:
        reasons.append(f"it knows the VAEs {' and '.join(REPAE_VAES)}, not {facts['vae']}")
    if resolution not in REPAE_RESOLUTIONS:
        reasons.append(f"it knows images of {' and '.join(map(str, REPAE_RESOLUTIONS))} px, not of {resolution}")
    vfms = [] if projector_width is None else str(facts["enc_type"]).split(",")
    if unknown := [name for name in vfms if name not in REPAE_ENCODERS]:
        reasons.append(f"it knows no VFM {unknown[0]}, which it builds to learn its width")
    elif resolution == 512 and (others := [name for name in vfms if not name.startswith("dinov2-")]):
        reasons.append(f"at 512 px it takes dinov2 alone, not {others[0]}")
    if not vfms:
        reasons.append("it expects a projector for each encoder, and this run was not aligned with any")
    elif projector_width != REPAE_PROJECTOR_WIDTH:
        reasons.append(f"its projectors have width {REPAE_PROJECTOR_WIDTH}, not {projector_width}")
    if not facts["cfg_prob"]:
        reasons.append("it builds no null class for a cfg_prob of 0, and there is one in every SiT here")
    if classes != REPAE_CLASSES:
        reasons.append(
            f"its guidance takes class {REPAE_CLASSES} for the null class, not {classes}: --cfg-scale 1 only"
        )
    return reasons
