"""What every denoiser is: noisy latent, time and class → velocity, and the hidden states on the way."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from errors import UserError, one_line
from files import is_out_of_reach, whole_folder, write_safetensors
from models.compilation import compile_options
from models.denoisers.config import DenoiserConfig
from models.denoisers.sprint import Route
from models.weight_files import NotWeightsError, read_state_dict
from schema import read_json

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"  # as diffusers calls them


LEAST_TIME = 0.05  # by which the distance to predicted data is divided at least (t_eps of JiT, arXiv 2511.13720)


class Denoiser(nn.Module, ABC):
    """A network on latents. Nothing of an alignment is part of it: projectors are kept apart (``loss.alignment``).

    Args:
        config: of its kind.
    """

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        config.check()
        self.config = config

    @property
    @abstractmethod
    def depth(self) -> int:
        """Blocks; hidden states are those after block 1 to ``depth``."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of a hidden state."""

    @property
    @abstractmethod
    def grid(self) -> int:
        """Tokens along a side of a hidden state."""

    @property
    def null_class(self) -> int:
        """The label that means "no class", for classifier-free guidance."""
        return self.config.num_classes

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of what it is given."""
        return self.config.latent_shape

    @property
    def class_token_width(self) -> int:
        """Channels D of the class token beside the latent; 0: none."""
        return self.config.class_token_width

    @property
    def damps(self) -> bool:
        """Whether its velocity is made of predicted data, and shrinks below ``LEAST_TIME``."""
        return self.config.prediction == "x"

    def target(self, velocity: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What its velocity is compared with in training: a true one ``[B, ...]``, at ``[B]``, damped likewise."""
        if not self.damps:
            return velocity
        return velocity * (t / LEAST_TIME).clamp_max(1).reshape(-1, *[1] * (velocity.ndim - 1))

    def undamped(self, velocity: torch.Tensor, t: float) -> torch.Tensor:
        """Its velocity at time ``t`` > 0 as it would be without damping: one step from there to 0 ends at its data."""
        return velocity * (LEAST_TIME / t) if self.damps and t < LEAST_TIME else velocity

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of what is noised and sampled: the latent's, or (C·h·w + D,) where a class token goes with it."""
        width = self.class_token_width
        return (math.prod(self.latent_shape) + width,) if width else self.latent_shape

    def pack(self, latent: torch.Tensor, class_token: torch.Tensor | None) -> torch.Tensor:
        """Latents ``[B, C, h, w]`` and class tokens ``[B, D]`` → states; the latents themselves where D is 0."""
        return torch.cat([latent.flatten(1), class_token], dim=1) if self.class_token_width else latent

    def unpack(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The inverse of :meth:`pack`; no class token (None) where D is 0."""
        if not self.class_token_width:
            return state, None
        latent, class_token = state.tensor_split([math.prod(self.latent_shape)], dim=1)
        return latent.unflatten(1, self.latent_shape), class_token

    def describe(self) -> str:
        """Its sizes, for the log."""
        token = f" and a class token of {self.class_token_width}" if self.class_token_width else ""
        made = ", predicts the data" if self.damps else ""
        made += f", guided by its output after block {self.config.guide_depth}" if self.config.guide_depth else ""
        return f"{self.config.model}: {self.depth} blocks of {self.width}, {self.grid}×{self.grid} tokens{token}{made}"

    @abstractmethod
    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, taps: Sequence[int] = ()
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Predict the velocity.

        Args:
            x: noisy normalised latent ``[B, C, h, w]``; with a class token the noisy state (:attr:`state_shape`).
            t: time in [0, 1], data at 0, noise at 1, ``[B]``.
            y: class in 0…num_classes, the last one the null class, int64 ``[B]``.
            taps: blocks whose output is wanted, counted from 1.

        A kind with ``config.flow_map_blocks`` also takes ``arrival`` ``[B]``, a time up to ``t``, and predicts the mean
        velocity between both; None: ``t`` itself, the velocity there.

        Returns:
            velocity, in the shape of ``x``; the hidden state ``[B, grid², width]`` after each of the taps, without a
            class token; of fewer tokens where :meth:`places` says so.
        """

    def hidden_states(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, taps: Sequence[int]
    ) -> tuple[torch.Tensor, ...]:
        """The hidden states alone; a kind that can leaves out the blocks after the last tap."""
        return self(x, t, y, taps)[1]

    def guide_velocity(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """What guides it: the velocity by its output after block ``config.guide_depth``.

        Args:
            x, t, y: as in :meth:`forward`.
            state: the hidden state there.

        Returns:
            in the shape of ``x``.
        """
        raise NotImplementedError(f"{self.config.model} has no output on the way")

    def with_guide(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Its velocity and that of :meth:`guide_velocity`, of one pass."""
        prediction, (state,) = self(x, t, y, (self.config.guide_depth,))
        return prediction, self.guide_velocity(x, t, y, state)

    def places(self, tap: int, route: Route | None) -> torch.Tensor | None:
        """Which tokens of the grid a hidden state has.

        Args:
            tap: its block.
            route: what was given to :meth:`forward`, which a kind with ``config.sparse_blocks`` takes after ``taps``.

        Returns:
            int64 ``[B, n]``; None: all of them, in order.
        """
        return None if route is None or tap not in self.config.sparse_blocks else route.kept

    def state_size(self, tap: int, route: Route | None) -> tuple[int, int]:
        """Tokens and channels of the hidden state after a block; arguments as :meth:`places`."""
        places = self.places(tap, route)
        return self.grid**2 if places is None else places.shape[1], self.width

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        raise UserError(f"{self.config.model} cannot recompute its activations: leave --gradient-checkpointing out")

    def compile(self, *args, **options) -> None:
        """``torch.compile`` in place. A network of equal blocks compiles them one by one: they share a graph."""
        super().compile(*args, **compile_options(options))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and the weights as safetensors, complete or not at all; replaces the folder."""
        content = {"_class_name": type(self).__name__} | self.config.to_dict()
        with whole_folder(folder) as temporary:
            (temporary / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
            write_safetensors(self.state_dict(), temporary / WEIGHTS_FILE, with_checksum=True)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Denoiser":
        """The network that :meth:`save_pretrained` wrote, in eval mode on the CPU.

        Raises:
            UserError: no such folder, not of this kind, or weights of another one.
        """
        from models.denoisers import denoiser_config  # the registry, in which a module of a kind may be imported

        folder = Path(folder)
        try:
            content = read_json(folder / CONFIG_FILE)
            if (kind := content.get("_class_name")) != cls.__name__:
                raise UserError(f"{folder / CONFIG_FILE} describes a {kind}, not a {cls.__name__}")
            config = denoiser_config({key: value for key, value in content.items() if not key.startswith("_")})
            model = cls(config)
            model.load_state_dict(read_state_dict(folder / WEIGHTS_FILE))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, NotWeightsError, RuntimeError) as error:
            if is_out_of_reach(error):
                raise
            raise UserError(f"{folder} is not a complete folder of a {cls.__name__} ({one_line(error)})") from error
        return model.eval()


def velocity_to(data: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The velocity on the linear path of states ``x`` ``[B, ...]`` at times ``[B]`` whose data were ``data``.

    ``(x − data)/t``: ``ε − data`` where ``x`` is ``(1 − t)·data + t·ε``. Below ``LEAST_TIME`` it is divided by that, in
    training and in sampling.
    """
    return (x - data) / t.clamp_min(LEAST_TIME).reshape(-1, *[1] * (x.ndim - 1))
