"""Flags of a tiny train_repae.py."""

from tests.command_line import argv_of


def flags(data, output, name: str = "run", **changes) -> list[str]:
    """``changes`` replace or add (True: a bare flag, None: leave out)."""
    values = {
        "output_dir": output,
        "exp_name": name,
        "data_dir": data,
        "resolution": 32,
        "vae": "f4d4-tiny",
        "vae_ckpt": "none",
        "model": "SiT-Ti/2",
        "enc_type": "efficientnet-lite0",
        "encoder_depth": 2,
        "projector_width": 32,
        "loss_cfg_path": "configs/l1_kl_gan.yaml",
        "batch_size": 4,
        "max_train_steps": 2,
        "log_steps": 1,
        "num_workers": 1,
        "ema_decay": 0.9,
        "learning_rate": 1e-3,
        "grid_steps": 2,
    } | changes
    return argv_of(values)
