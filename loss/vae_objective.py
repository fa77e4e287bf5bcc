"""The whole objective of a VAE step: every term, its weight, and where the weighted sum is taken.

Every trainer of a VAE calls this module. Terms come unweighted and by name; :func:`total` applies the
weights, once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypedDict

import torch
from torch import nn

from errors import UserError
from loss.adversarial import LeCam, adaptive_weight, generator_loss, hinge_discriminator_loss
from loss.reconstruction import RECONSTRUCTION_LOSSES, reconstruction_loss
from loss.total import total
from schema import MalformedError, parse_yaml

PATCHGAN = "patchgan"
# Keys of REPA-E's file that are not fields here. A KL autoencoder has no quantizer: any weight of it will do. The other
# two must be 0, as in REPA-E's file.
IGNORED_KEY = "quantizer_weight"
ZERO_KEYS = {
    "logvar_init": "which divides the reconstruction term by exp(logvar_init); leave it out, and divide "
    "reconstruction_weight by that instead",
    "proj_coef": "the weight of the alignment, which is a flag here; leave it out, and give --vae-align-proj-coeff of "
    "train_repae.py or --align-coeff of train_sendvae.py",
}


@dataclass(frozen=True)
class VAELossConfig:
    """The YAML file of ``--loss-cfg-path``; the defaults are method's, and REPA-E's key names.

    Attributes:
        discriminator: ``patchgan``, or the VFM, of ``--enc-type``'s names, whose features it is given.
        discriminator_resolution: side of the images that such a VFM sees, pixels.
        discriminator_augment: whether it sees augmented images (``loss.augmentation``).
        discriminator_start: the first step, from 0, at which it is a term of the VAE's loss.
        discriminator_update_start: the first at which it learns, no later; None: the same.
    """

    reconstruction_loss: str = "l1"
    reconstruction_weight: float = 1.0
    perceptual_loss: str = "lpips"
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6
    discriminator: str = PATCHGAN
    discriminator_resolution: int = 224
    discriminator_augment: bool = False
    discriminator_weight: float = 0.1
    discriminator_factor: float = 1.0
    discriminator_start: int = 0
    discriminator_update_start: int | None = None
    adaptive_discriminator_weight: bool = False
    lecam_regularization_weight: float = 0.0
    lecam_ema_decay: float = 0.999

    def __post_init__(self):
        if self.reconstruction_loss not in RECONSTRUCTION_LOSSES:
            raise UserError(f"reconstruction_loss {self.reconstruction_loss!r} is none of {[*RECONSTRUCTION_LOSSES]}")
        if self.perceptual_loss != "lpips":
            raise UserError(f"perceptual_loss {self.perceptual_loss!r} is not known; there is lpips")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and not 0 <= value < math.inf:
                raise UserError(f"{field.name} must be a finite number of at least 0, got {value}")
        if self.discriminator_update_start is not None and self.discriminator_update_start > self.discriminator_start:
            raise UserError(
                f"discriminator_update_start {self.discriminator_update_start} is after discriminator_start "
                f"{self.discriminator_start}: a discriminator that has learned nothing would be listened to"
            )
        if self.lecam_ema_decay > 1:
            raise UserError(f"lecam_ema_decay must lie in [0, 1], got {self.lecam_ema_decay}")

    @property
    def uses_gan(self) -> bool:
        return self.discriminator_weight * self.discriminator_factor > 0

    @property
    def vfm_of_discriminator(self) -> str | None:
        """Whose features it is given; None: it sees the images."""
        return None if self.discriminator == PATCHGAN else self.discriminator


class _Losses(TypedDict):
    losses: dict | None


def load_loss_config(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> VAELossConfig:
    """Read a loss configuration.

    Args:
        path: YAML with the fields of :class:`VAELossConfig`, at the top or under ``losses:``.
        overrides: ``KEY=VALUE`` strings that win over the file.

    Raises:
        UserError: no such file, not YAML, an unknown key, a value of the wrong type.
    """
    if not Path(path).is_file():
        raise UserError(f"--loss-cfg-path {path}: no such file")
    try:
        values = parse_yaml(Path(path).read_bytes(), _Losses | None) or {}
    except MalformedError as error:
        raise UserError(f"--loss-cfg-path {path}: YAML of KEY: VALUE lines is expected ({error})") from error
    values = dict(values.get("losses") or values)
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise UserError(f"--loss-override {text}: KEY=VALUE is expected")
        try:
            values[key] = parse_yaml(value, Any)
        except MalformedError as error:
            raise UserError(f"--loss-override {text}: {value!r} is not a YAML value") from error
    kinds = {field.name: field.type for field in fields(VAELossConfig)}
    for key in [key for key in values if key not in kinds and key != IGNORED_KEY]:
        if key not in ZERO_KEYS:
            raise UserError(f"{path}: unknown loss key {key}; there are {', '.join(kinds)}")
        if _typed(key, values[key], float) != 0:
            raise UserError(f"{path}: {key} {values[key]} is not 0, {ZERO_KEYS[key]}")
    return VAELossConfig(**{k: _typed(k, v, kinds[k]) for k, v in values.items() if k in kinds})


def _typed(key: str, value, kind: type | UnionType):
    """YAML reads 1e-6 as a string; everything else must already be what the field is."""
    if isinstance(kind, UnionType):  # KIND | None
        if value is None:
            return None
        kind = kind.__args__[0]
    try:
        if isinstance(value, bool) != (kind is bool):
            raise ValueError
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        return kind(float(value)) if kind is int else kind(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"loss key {key}: {value!r} is not of type {kind.__name__}") from None


class VAEObjective(nn.Module):
    """Terms of the generator's and the discriminator's loss.

    Args:
        config: weights and switches.
        perceptual: LPIPS, or None where ``perceptual_weight`` is 0.
    """

    def __init__(self, config: VAELossConfig, perceptual: nn.Module | None):
        super().__init__()
        if config.perceptual_weight > 0 and perceptual is None:
            raise ValueError("perceptual_weight is positive and there is no perceptual network")
        self.config = config
        self.perceptual = perceptual if config.perceptual_weight > 0 else None
        self.lecam = LeCam(config.lecam_ema_decay) if config.lecam_regularization_weight > 0 else None

    def gan_active(self, step: int) -> bool:
        """Whether the discriminator is a term of the VAE's loss at ``step`` (counted from 0)."""
        return self.config.uses_gan and step >= self.config.discriminator_start

    def discriminator_learns(self, step: int) -> bool:
        """Whether it is trained at ``step``: then, and before it if that is asked for."""
        first = self.config.discriminator_update_start
        return self.config.uses_gan and step >= (self.config.discriminator_start if first is None else first)

    def generator_terms(
        self,
        images: torch.Tensor,
        reconstruction: torch.Tensor,
        regulariser: dict[str, torch.Tensor],
        discriminator: Callable[[torch.Tensor], torch.Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> dict[str, torch.Tensor]:
        """Unweighted scalar terms of the VAE's loss.

        LPIPS and the discriminator are gone through backwards at once: adaptive weights and the loss, which all ask for
        gradients of the same terms, begin at the reconstruction, and their activations are free again before the
        decoder's are needed.

        Args:
            images, reconstruction: ``[B, 3, H, W]`` in [-1, 1].
            regulariser: the tokenizer's own terms, e.g. ``kl``.
            discriminator: images → logits, unwrapped and with frozen parameters; None leaves the GAN term out.
            scaler: fp16's.
        """
        terms = {"reconstruction": reconstruction_loss(images, reconstruction, self.config.reconstruction_loss)}
        if self.perceptual is not None:
            perceptual = self.perceptual
            terms["perceptual"] = linked(lambda x: perceptual(images, x).float().mean(), reconstruction, scaler)
        terms |= regulariser
        if discriminator is not None:
            terms["gan"] = linked(lambda x: generator_loss(discriminator(x)), reconstruction, scaler)
        return terms

    def fidelity(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weighted pixel terms, which adaptive weights compare with."""
        weights = {"reconstruction": self.config.reconstruction_weight, "perceptual": self.config.perceptual_weight}
        return total({name: terms[name] for name in weights if name in terms}, weights)

    def generator_weights(
        self,
        terms: dict[str, torch.Tensor],
        last_layer: torch.Tensor,
        gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> dict[str, float | torch.Tensor]:
        """The weight of each term; what a tokenizer has besides ``kl`` counts once.

        Args:
            terms: from :meth:`generator_terms`.
            last_layer: the decoder's last weight, for the adaptive GAN weight.
            gradient: (scalar, parameter) → its gradient there; averaged over processes, so that all of them use the
                same adaptive weight.
        """
        config = self.config
        weights: dict[str, float | torch.Tensor] = {
            "reconstruction": config.reconstruction_weight,
            "perceptual": config.perceptual_weight,
            "kl": config.kl_weight,
            "gan": config.discriminator_weight * config.discriminator_factor,
        }
        weights = {name: weights.get(name, 1.0) for name in terms}
        if config.adaptive_discriminator_weight and "gan" in terms:
            gradients = [gradient(loss, last_layer) for loss in (self.fidelity(terms), terms["gan"])]
            weights["gan"] = weights["gan"] * adaptive_weight(*gradients)
        return weights

    def discriminator_terms(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """Unweighted scalar terms of the discriminator's loss, from logits of any shape."""
        terms = {"discriminator": hinge_discriminator_loss(real_logits, fake_logits)}
        if self.lecam is not None:
            terms["lecam"] = self.lecam(real_logits, fake_logits)
        return terms

    def discriminator_weights(self) -> dict[str, float]:
        """The weight of each discriminator term."""
        weights = {"discriminator": self.config.discriminator_factor}
        if self.lecam is not None:
            weights["lecam"] = self.config.lecam_regularization_weight
        return weights


def gradient_at(
    loss: torch.Tensor, x: torch.Tensor, scaler: torch.amp.GradScaler | None = None, keep_graph: bool = True
) -> torch.Tensor:
    """The gradient of a scalar at one tensor.

    Args:
        loss: the scalar.
        x: a parameter, say.
        scaler: fp16's, without which small gradients would be rounded to 0.
        keep_graph: for further gradients of ``loss``.
    """
    if scaler is None:
        return torch.autograd.grad(loss, x, retain_graph=keep_graph)[0]
    gradient = torch.autograd.grad(scaler.scale(loss), x, retain_graph=keep_graph)[0]
    return gradient / scaler.scale(torch.ones_like(loss))


def linked(
    term: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, scaler: torch.amp.GradScaler | None = None
) -> torch.Tensor:
    """``term(x)``, a scalar, whose gradient at ``x`` is computed now and not in every backward pass.

    Args:
        term: without trained parameters, which would get no gradient.
        x: of any shape.
        scaler: fp16's.
    """
    if not x.requires_grad:
        return term(x)
    leaf = x.detach().requires_grad_()
    value = term(leaf.view_as(leaf))  # torch's FLOP counter hooks what modules get, and cannot where that is a leaf
    return _Linked.apply(x, value.detach(), gradient_at(value, leaf, scaler, keep_graph=False))


class _Linked(torch.autograd.Function):
    """``value``, as a function of ``x`` whose gradient is known."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return upstream * ctx.saved_tensors[0], None, None
