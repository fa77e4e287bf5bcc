"""What train_ldm.py needs, tiny: packed toy images, a VAE with random weights, caches with features; and flags."""

from pathlib import Path

import cache_latents
from dataset.toy import main as make_toy
from preprocessing import main as preprocess
from tests.command_line import argv_of
from tests.latent_caches import flags as cache_flags
from tests.latent_caches import save_vae

LATENTS = "latents"


def write_data(folder: Path, images: int = 24, hflip: bool = False, seed: int = 0) -> Path:
    """A packed toy set at 32 px with a latent cache inside, features of efficientnet-lite0 on a 4×4 grid."""
    drawn = ["--num-images", str(images), "--resolution", "32", "--seed", str(seed)]
    make_toy(["--output", str(folder / "images"), *drawn])
    packed = folder / "packed"
    preprocess(["--imagenet-path", str(folder / "images"), "--output-path", str(packed), "--resolution", "32"])
    vae = save_vae(folder)
    options = {"cache_features": True, "enc_type": "efficientnet-lite0", "features_grid": 4}
    assert cache_latents.main(cache_flags(packed, vae, LATENTS, **options, **({"hflip": True} if hflip else {}))) == 0
    return packed


def flags(data, output, name: str = "run", **changes) -> list[str]:
    """Flags of a tiny training; ``changes`` replace or add (True: a bare flag, None: leave out)."""
    aligned = set(str(changes.get("align", "repa")).split("+"))
    values = {
        "output_dir": output,
        "exp_name": name,
        "data_dir": data,
        "vae_latents_name": LATENTS,
        "model": "SiT-Ti/2",
        "enc_type": "efficientnet-lite0",
        "encoder_depth": 2 if aligned & {"repa", "irepa"} else None,
        "projector_width": 32 if "repa" in aligned else None,
        "batch_size": 4,
        "max_train_steps": 2,
        "log_steps": 1,
        "num_workers": 1,
        "ema_decay": 0.9,
        "learning_rate": 1e-3,
        "grid_steps": 2,
    } | changes
    return argv_of(values)
