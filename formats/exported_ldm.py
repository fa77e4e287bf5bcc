"""A trained diffusion transformer as a folder that needs no run: SiT, VAE, and how to sample with them."""

import json
from pathlib import Path

from models.denoisers.sit import SiT
from models.tokenizers import STATISTICS_FILE, Tokenizer

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
from diffusion.guidance import guided
from diffusion.samplers import model_velocity, sample_ode
from models.denoisers.sit import SiT

folder, label = {folder!r}, 0
sit, vae = SiT.from_pretrained(f"{{folder}}/{transformer}"), AutoencoderKL.from_pretrained(f"{{folder}}/{vae}")
mean, std = (load_file(f"{{folder}}/{vae}/{statistics}")[name][:, None, None] for name in ("mean", "std"))
noise = torch.randn(1, *sit.latent_shape, generator=torch.Generator().manual_seed(0))
z = sample_ode(guided(model_velocity(sit), 2.5, sit.null_class, high=0.75), noise, torch.tensor([label]), num_steps=50)
image = vae.decode(z * std + mean).sample[0].detach().clamp(-1, 1)
Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save("sample.png")"""


def write_exported(folder: Path, name: str, model: SiT, tokenizer: Tokenizer, facts: dict) -> None:
    """Write SiT, VAE, ``model_index.json`` and a README with a snippet that samples an image.

    Args:
        folder: is made; what it is given is overwritten.
        name: of the folder as the snippet is to call it.
        model: without projectors.
        tokenizer: with the statistics of the SiT's training.
        facts: ``path_type``, ``resolution``, ``steps``, ``weights``, ``class_names``; plain JSON values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / TRANSFORMER)
    tokenizer.save(folder / VAE)
    index = {
        "_class_name": "LatentDiffusion",
        TRANSFORMER: [f"{SiT.__module__}", SiT.__name__],
        VAE: ["diffusers", "AutoencoderKL"],
    }
    (folder / INDEX_FILE).write_text(json.dumps(index | facts, indent=2) + "\n")
    places = {"transformer": TRANSFORMER, "vae": VAE, "statistics": STATISTICS_FILE}
    text = README.format(
        model=model.config.model,
        latent="×".join(map(str, model.latent_shape)),
        classes=model.config.num_classes,
        snippet=SNIPPET.format(folder=name, **places),
        **places,
        **{key: facts[key] for key in ("resolution", "steps", "path_type", "weights")},
    )
    (folder / SNIPPET_FILE).write_text(text)
