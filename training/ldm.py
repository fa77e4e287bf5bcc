"""Stage 3: a denoiser trained on cached latents, its hidden states aligned (REPA, arXiv 2410.06940, and others)."""

import argparse
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from dataset.latents import LatentBatch, LatentDataset, features_name
from dataset.loader import read_batches
from diffusion.counted_noise import counted_state
from diffusion.draws import Draws, Stream, draw, seeded_generator
from diffusion.flow import add_noise, training_times, velocity
from diffusion.guidance import guided
from diffusion.samplers import model_velocity, sample_ode
from formats.averages import MAIN, posthoc_names
from loss.alignment import DenoiserAlignments, DenoisingStep
from loss.denoising import denoising_error, direction_error
from loss.total import joined, total
from models.denoisers import Denoiser
from models.denoisers.sprint import Route, draw_route
from models.encoders import Encoder, encoder_names
from models.feature_norm import FeatureNorm, SpatialNorm
from models.pixels import to_uint8
from models.tokenizers import Tokenizer
from runtime.pictures import save_grid
from training.alignment_schedule import alignment_factor
from training.ema import build_averages, twin
from training.features import batch_features, features_and_class_token
from training.method import Method, Metrics, micro_batch_size, to_device
from training.optimizer import build_optimizer, optimizer_step, scheduled_rate
from training.token_drop import token_drop_at
from training.validation import HeldOutLatents, mean_denoising_errors

GRID_COLUMNS, GRID_ROWS = 8, 2


class AlignedDenoiser(nn.Module):
    """Denoiser and alignment behind one forward, so that DDP sees every parameter.

    Args:
        denoiser: the network.
        alignment: of its hidden states; may be a sum of none.
    """

    def __init__(self, denoiser: Denoiser, alignment: DenoiserAlignments):
        super().__init__()
        self.denoiser, self.alignment = denoiser, alignment

    def forward(
        self, noisy: torch.Tensor, step: DenoisingStep, taught: Mapping[str, Sequence[torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
        """Velocity of the states, that of the network's own guide where it has one, and the alignment's terms: none
        without features.

        Args:
            noisy: states, as ``Denoiser.forward`` takes them.
            step: what is known before.
            taught: the averaged network's hidden states (:meth:`DenoiserAlignments.taught`).
        """
        taps = () if step.features is None else self.alignment.taps
        routed = () if step.route is None else (step.route,)
        depth, guide = self.denoiser.config.guide_depth, None
        asked = (*taps, depth) if depth else taps
        output = self.denoiser(noisy, step.t, step.labels, asked, *routed)
        prediction, states = checked(output, self.denoiser, noisy, asked, step.route)
        if depth:
            guide = self.denoiser.guide_velocity(noisy, step.t, step.labels, states[-1])
            states = states[:-1]
        if step.features is None:
            unused = sum(parameter.sum() for parameter in self.alignment.parameters())  # DDP wants their gradients
            return prediction + 0.0 * unused, guide, {}
        places = [self.denoiser.places(tap, step.route) for tap in taps]
        step = step._replace(states=states, places=places, velocity=self.denoiser.unpack(prediction)[0])
        return prediction, guide, self.alignment(step, taught)


def checked(
    output: tuple[torch.Tensor, Sequence[torch.Tensor]],
    denoiser: Denoiser,
    noisy: torch.Tensor,
    taps: Sequence[int],
    route: Route | None = None,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """What a denoiser returned, where it has the shapes that it promises: another one could be broadcast unnoticed.

    Raises:
        ValueError: it has not.
    """
    states = [(len(noisy), *denoiser.state_size(tap, route)) for tap in taps]
    if not (isinstance(output, tuple) and len(output) == 2):
        raise ValueError(f"{type(denoiser).__name__} must return its velocity and a tuple of hidden states")
    found, promised = [tuple(x.shape) for x in (output[0], *output[1])], [tuple(noisy.shape), *states]
    if found != promised:
        raise ValueError(
            f"{type(denoiser).__name__} returned a velocity and hidden states of {found} instead of {promised}"
        )
    return output


def drawn_times(args: argparse.Namespace, draws: torch.Tensor) -> torch.Tensor:
    """Times to train at from what ``Draws.times`` holds, ``[B]``."""
    return training_times(draws, args.weighting, args.path_type, args.time_shift, args.time_mean, args.time_std)


class LDM(Method):
    """Trains a denoiser; implements ``training.method.Method``.

    Args:
        args: the flags of train_ldm.py or train_repae.py.
        accelerator: precision and processes.
        denoiser: is trained.
        alignment: its projectors train along.
        tokenizer: of the latents; its statistics normalise them.
        encoders: frozen VFMs that images are run through; None where features come with the batch.
        feature_norm: of the VFMs' features, or None: as they are.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        denoiser: Denoiser,
        alignment: DenoiserAlignments,
        tokenizer: Tokenizer,
        encoders: Sequence[Encoder] | None,
        feature_norm: FeatureNorm | SpatialNorm | None = None,
    ):
        self.args, self.accelerator = args, accelerator
        self.denoiser, self.alignment, self.tokenizer, self.encoders = denoiser, alignment, tokenizer, encoders
        self.feature_norm = feature_norm
        networks = self.wrapped()
        self.optimizer = build_optimizer(args, networks, args.optimizer)
        self.averages = build_averages(args, denoiser)
        self.ema = self.averages.get(MAIN)
        # Compiled, it shall meet micro-batches alone: grids and validation of the average have other sizes, and graphs
        # of any size, which would serve the training too from then on.
        self.teacher = twin(self.ema.module) if alignment.needs_average else None
        self.networks = accelerator.prepare_model(networks)
        self.snapshot = tuple(posthoc_names(args.posthoc_ema))
        self.milestone = tuple(name for name in self.averages if name not in self.snapshot) or ("model",)
        self.held_out: LatentDataset | None = None

    def wrapped(self) -> nn.Module:
        """All that is trained, behind one forward."""
        return AlignedDenoiser(self.denoiser, self.alignment)

    @property
    def sampled(self) -> Denoiser:
        """The network that samples: the main average where there is one."""
        return self.denoiser if self.ema is None else self.ema.module

    def unread(self, step: int) -> Collection[str]:
        """Images and features, once nothing is aligned with them."""
        if alignment_factor(self.args, step):
            return ()
        features = [features_name(name) for name in encoder_names(self.args.enc_type)]
        needs_images = self.denoiser.class_token_width and self.encoders is not None
        return features if needs_images else [*features, "images"]

    def accumulate(
        self, step: int, micro_step: int, batch: LatentBatch, share: float, synchronise: bool
    ) -> tuple[Metrics, None]:
        """Add the gradients of one micro-batch."""
        draws = self.draws(step, micro_step, batch)
        x = self.normalised(batch, draws)
        factor = alignment_factor(self.args, step)
        features, class_token = self.seen(batch, is_aligned=bool(factor))
        route = self.route(step, draws)
        return self.backward(x, draws, batch.labels, features, share, synchronise, route, factor, class_token), None

    def draws(self, step: int, micro_step: int, batch: LatentBatch) -> Draws:
        """A function of (seed, step, micro-step, rank)."""
        device, counters = self.accelerator.device, (step, micro_step, self.accelerator.process_index)
        generator = seeded_generator(device, Stream.TRAINING, self.args.seed, *counters)
        return self._draw(len(batch.labels), generator, self.args.weighting)

    def _draw(self, count: int, generator: torch.Generator, weighting: str = "uniform") -> Draws:
        """With noise in the shape of the denoiser's state; a class token's comes last and moves no other number."""
        draws = draw((count, *self.denoiser.latent_shape), generator, weighting)
        token = torch.randn(count, self.denoiser.class_token_width, generator=generator, device=generator.device)
        return draws._replace(noise=self.denoiser.pack(draws.noise, token))

    def route(self, step: int, draws: Draws) -> Route | None:
        """Through a network with SPRINT; drawn after :meth:`draws`, before what an alignment draws. None for others."""
        args = self.args
        if not self.denoiser.config.sparse_blocks:
            return None
        count, dropped = len(draws.times), token_drop_at(args, step)
        return draw_route(count, self.denoiser.grid, dropped, args.path_drop, draws.generator)

    def normalised(self, batch: LatentBatch, draws: Draws) -> torch.Tensor:
        """Samples of what the cache holds, normalised, float32 ``[B, C, h, w]``."""
        return self.tokenizer.statistics.normalize(self.tokenizer.sample(batch.stored, draws.posterior))

    def features(self, batch: LatentBatch) -> list[torch.Tensor]:
        """What the alignment compares with, ``[B, N, D]`` for each VFM; empty where it compares with none."""
        if not self.alignment.needs_features:
            return []
        return batch_features(self.accelerator, self.encoders, self.feature_norm, batch)

    def seen(self, batch: LatentBatch, is_aligned: bool) -> tuple[list[torch.Tensor] | None, torch.Tensor | None]:
        """:meth:`features`, None where nothing is aligned; the class token ``[b, D]``, None where there is none."""
        if not self.denoiser.class_token_width or batch.class_token is not None:
            token = None if batch.class_token is None else batch.class_token.float()
            return self.features(batch) if is_aligned else None, token
        uses_features = is_aligned and self.alignment.needs_features
        encoders, norm = (self.encoders, self.feature_norm) if uses_features else (self.encoders[:1], None)
        features, token = features_and_class_token(self.accelerator, encoders, norm, batch.images)
        return (features if uses_features else []) if is_aligned else None, token

    def backward(
        self,
        x: torch.Tensor,
        draws: Draws,
        labels: torch.Tensor,
        features: Sequence[torch.Tensor] | None,
        share: float,
        synchronise: bool,
        route: Route | None = None,
        factor: float = 1.0,
        class_token: torch.Tensor | None = None,
    ) -> Metrics:
        """Add the gradients of normalised latents ``x`` ``[B, C, h, w]``; the rest as in ``Phase.accumulate``.

        ``route`` is :meth:`route`'s; the alignment's weights are multiplied by ``factor``; ``class_token`` ``[B, D]``
        is of the same images.
        """
        args = self.args
        t = drawn_times(args, draws.times)
        labels = torch.where(draws.dropout < args.cfg_prob, self.denoiser.null_class, labels)
        with self.reducing(self.networks, synchronise):
            state = self.denoiser.pack(x, class_token)
            noisy = add_noise(state, t, draws.noise, args.path_type)
            target = self.denoiser.target(velocity(state, t, draws.noise, args.path_type), t)
            target, token_target = self.denoiser.unpack(target)
            step = DenoisingStep(x, t, labels, draws, target, features, route=route)
            taught = {} if features is None else self.taught(state, step)
            prediction, guide, aligned = self.networks(noisy, step, taught)
            prediction, token_prediction = self.denoiser.unpack(prediction)
            terms, weights = {"denoise": denoising_error(prediction, target).mean()}, {"denoise": 1.0}
            if class_token is not None:
                terms["class_token"] = denoising_error(token_prediction, token_target).mean()
                weights["class_token"] = args.reg_coeff
            if guide is not None:
                terms["guide"], weights["guide"] = denoising_error(guide, target).mean(), args.guide_coeff
            if args.velocity_cosine_coeff:
                terms["velocity_cosine"] = direction_error(prediction, target).mean()
                weights["velocity_cosine"] = args.velocity_cosine_coeff
            terms = joined(terms, aligned)
            alignment_weights = self.alignment.weights(aligned).items()
            weights = joined(weights, {name: factor * weight for name, weight in alignment_weights})
            loss = total(terms, weights)
            self.accelerator.backward(loss * share)
        return {"loss": loss.detach()} | {name: term.detach() for name, term in terms.items()}

    def taught(self, state: torch.Tensor, step: DenoisingStep) -> dict[str, Sequence[torch.Tensor]]:
        """What the averaged network makes of the same states, noise and labels, for alignments that compare with it."""

        @torch.no_grad()
        def teach(times: torch.Tensor, taps: Sequence[int]) -> Sequence[torch.Tensor]:
            with self.accelerator.autocast():
                noisy = add_noise(state, times, step.draws.noise, self.args.path_type)
                states = self.teacher.hidden_states(noisy, times, step.labels, taps)
            return checked((noisy, states), self.teacher, noisy, taps)[1]

        return self.alignment.taught(teach, step.t, step.draws)

    def update(self, step: int, metrics: Metrics, kept: Sequence[None]) -> Metrics:
        """Optimizer and averages."""
        rate, scaler = self.rates(step)["lr"], self.accelerator.scaler
        norm, skipped = optimizer_step(self.optimizer, rate, self.args.max_grad_norm, scaler)
        for average in self.averages.values():
            average.update(step)
        return {"grad_norm": norm, "skipped": skipped}

    def rates(self, step: int) -> dict[str, float]:
        return {"lr": scheduled_rate(self.args, self.args.learning_rate, step)}

    def modules(self) -> dict[str, nn.Module | None]:
        averages = {name: average.module for name, average in self.averages.items()}
        return {"model": self.denoiser, "alignment": self.alignment, "feature_norm": self.feature_norm} | averages

    def states(self) -> dict[str, object]:
        return {"optimizer": self.optimizer, "scaler": self.accelerator.scaler}

    def networks_by_name(self) -> Mapping[str, nn.Module | None]:
        return {
            self.denoiser.config.model: self.denoiser,
            **{f"projectors of {part.called()}": part for part in self.alignment.values()},
            **{f"VFM {encoder.name}": encoder for encoder in self.encoders or ()},
            "VAE": self.tokenizer,
        }

    def watch(self, held_out: LatentDataset | None) -> None:
        """What :meth:`validate` measures on."""
        self.held_out = held_out

    def validate(self) -> dict[str, float]:
        if self.held_out is None:
            return {}
        networks = {"val": self.denoiser} | ({} if self.ema is None else {"val_ema": self.ema.module})
        return {
            f"{name}/{term}": error
            for name, network in networks.items()
            for term, error in mean_denoising_errors(
                self, network, self.args.path_type, self._held_out_latents()
            ).items()
        }

    def sample(self, path: Path) -> None:
        self.save_sample_grid(self.tokenizer, path)

    @torch.no_grad()
    def save_sample_grid(self, tokenizer: Tokenizer, path: Path) -> None:
        """Two rows of samples of each of :meth:`grid_samplers`, the same noise and labels always.

        Args:
            tokenizer: decodes, with the statistics that the sampled network's latents are normalised by.
            path: the PNG.
        """
        network = self.sampled
        was_training = network.training
        network.eval()
        images = [self._grid_images(network, tokenizer, sampler) for sampler in self.grid_samplers(network)]
        network.train(was_training)
        save_grid(list(torch.cat(images).split(GRID_COLUMNS)), path)

    def grid_samplers(self, network: Denoiser) -> list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """How samples are made that are shown one below the other: (noise, labels) → states."""
        args, unguided = self.args, model_velocity(network, self.accelerator.autocast)

        def sampler(scale: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
            velocity = guided(unguided, scale, network.null_class)
            times = {"shift": args.time_shift, "path_type": args.path_type}
            return lambda noise, labels: sample_ode(velocity, noise, labels, args.grid_steps, **times)

        return [sampler(scale) for scale in ([1.0] if args.grid_cfg_scale == 1 else [1.0, args.grid_cfg_scale])]

    def _grid_images(self, network: Denoiser, tokenizer: Tokenizer, sampler: Callable) -> torch.Tensor:
        """uint8 images ``[GRID_ROWS · GRID_COLUMNS, 3, H, W]``, labels spread over the classes."""
        accelerator, classes = self.accelerator, network.null_class
        count = GRID_COLUMNS * GRID_ROWS
        items = torch.arange(count, device=accelerator.device)
        labels = items * max(1, classes // count) % classes
        noise = counted_state(network, self.args.seed, items, 0)
        latent, _ = network.unpack(sampler(noise, labels))
        with accelerator.autocast():
            return to_uint8(tokenizer.decode(tokenizer.statistics.denormalize(latent)))

    def _held_out_latents(self) -> Iterator[HeldOutLatents]:
        """This process's share of the items, evenly spread over the held-out set."""
        args, accelerator = self.args, self.accelerator
        count = min(args.max_val_images, len(self.held_out))
        items = np.unique(np.linspace(0, len(self.held_out) - 1, count).astype(np.int64))
        items = items[accelerator.process_index :: accelerator.num_processes]
        size = micro_batch_size(args, accelerator)
        batches = [items[first : first + size] for first in range(0, len(items), size)]
        for numbers, batch in zip(
            batches, read_batches(self.held_out, batches, num_workers=args.num_workers), strict=True
        ):
            batch = to_device(batch, accelerator.device)
            generator = seeded_generator(accelerator.device, Stream.VALIDATION, args.seed, int(numbers[0]))
            draws = self._draw(len(numbers), generator)
            _, class_token = self.seen(batch, is_aligned=False)
            state = self.denoiser.pack(self.normalised(batch, draws), class_token)
            yield HeldOutLatents(numbers, state, draws.noise, batch.labels)
