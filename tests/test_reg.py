"""REG: a class token that is noised, predicted and sampled beside the latent, and what holds without one."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusion.counted_noise import Purpose, counted_normal, counted_state
from diffusion.guidance import guided
from diffusion.samplers import model_velocity, sample_ode, sample_sde
from errors import UserError
from inference.sampling import ImageSampler, SamplerSettings
from models.denoisers import DENOISERS, Denoiser, DenoiserConfig, denoiser_config
from models.denoisers.config import LightningDiTConfig, SiTConfig
from models.denoisers.lightningdit import RotaryPositions
from models.encoders import Encoder, build_encoder
from models.encoders.registry import EncoderSpec, encoder_spec
from tests.distributed_ldm_step import BATCH, batch_draws
from tests.ldm_steps import CONFIG, FEATURES, accumulate, networks, part_of, random_batch, tiny_trainer
from tests.sendvae_runs import gradients
from training.method import train_step

WIDTH = 12
PLAIN = {"SiT": CONFIG, "LightningDiT": LightningDiTConfig("LightningDiT-Ti/2", 4, 8, num_classes=6)}
CONFIGS = {kind: config.with_class_token(WIDTH) for kind, config in PLAIN.items()}
LATENT = math.prod(CONFIG.latent_shape)
COEFF = 0.03


def filled(config: DenoiserConfig, seed: int = 0):
    """A network none of whose layers is zero."""
    torch.manual_seed(seed)
    model = config.build()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


def inputs(count: int = 3, dtype: torch.dtype = torch.float32, width: int = WIDTH):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, LATENT + width, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.rand(count, generator=generator).to(dtype), torch.arange(count) % 6


class TestNetwork:
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_shapes_and_types(self, kind):
        model = CONFIGS[kind].build()
        assert (model.class_token_width, model.state_shape) == (WIDTH, (LATENT + WIDTH,))
        x, t, y = inputs()
        velocity, states = model(x, t, y, taps=(2, 6))
        assert velocity.shape == x.shape
        assert velocity.dtype == torch.float32
        assert not velocity.any()  # both heads begin at zero
        assert [state.shape for state in states] == [(3, 16, 192)] * 2
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x, t, y)[0].shape == x.shape

    def test_packing_and_unpacking_are_inverse(self):
        model, plain = CONFIGS["SiT"].build(), CONFIG.build()
        latent, token = torch.randn(2, 4, 8, 8), torch.randn(2, WIDTH)
        state = model.pack(latent, token)
        assert state.shape == (2, *model.state_shape)
        assert all(map(torch.equal, model.unpack(state), (latent, token)))
        assert plain.pack(latent, None) is latent
        assert plain.unpack(latent) == (latent, None)

    def test_output_equals_a_derivation_in_float64(self):
        """Embedding, place, modulated norm and both heads, written anew around the blocks."""
        model = filled(CONFIGS["SiT"]).double()
        x, t, y = inputs(dtype=torch.float64)
        velocity, (state,) = model(x, t, y, taps=(6,))
        w = model.state_dict()
        latent, token = x[:, :LATENT].view(3, 4, 8, 8), x[:, LATENT:]
        patches = F.conv2d(latent, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2)
        patches = patches.flatten(2).transpose(1, 2) + w["pos_embed"]
        first = token @ w["class_token_embedder.proj.weight"].T + w["class_token_embedder.proj.bias"]
        first = (first - first.mean(1, keepdim=True)) / (first.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        first = first * w["class_token_embedder.norm.weight"] + w["class_token_embedder.norm.bias"]
        h = torch.cat([first[:, None], patches], 1)
        condition = F.silu(model.t_embedder(t) + model.y_embedder(y))[:, None]
        for block in model.blocks:
            h = block(h, condition)
        modulation = condition @ w["final_layer.adaLN_modulation.1.weight"].T + w["final_layer.adaLN_modulation.1.bias"]
        shift, scale = modulation.chunk(2, -1)
        normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        normed = normed * (1 + scale) + shift
        out = normed[:, 1:] @ w["final_layer.linear.weight"].T + w["final_layer.linear.bias"]  # [3, 16, 2·2·4]
        out = out.view(3, 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(3, -1)
        out_token = normed[:, 0] @ w["final_layer.class_token.weight"].T + w["final_layer.class_token.bias"]
        torch.testing.assert_close(velocity, torch.cat([out, out_token], 1), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(state, h[:, 1:], rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_each_depends_on_the_other(self, kind):
        model = filled(CONFIGS[kind])
        x, t, y = inputs()
        x.requires_grad_()
        velocity = model(x, t, y)[0]
        to_latent, to_token = velocity[:, :LATENT].square().sum(), velocity[:, LATENT:].square().sum()
        embedder, head = model.class_token_embedder.proj.weight, model.final_layer.class_token.weight
        of_latent = torch.autograd.grad(to_latent, [x, embedder], retain_graph=True)
        of_token = torch.autograd.grad(to_token, [x, head])
        assert of_latent[0][:, LATENT:].abs().min() > 0
        assert of_token[0][:, :LATENT].abs().min() > 0
        assert of_latent[1].any()
        assert of_token[1].any()

    def test_a_token_that_is_nowhere_is_not_turned(self):
        x = torch.randn(2, 17, 3, 24)
        turned = RotaryPositions(24, 4, unplaced=1)(x)
        assert torch.equal(turned[:, 0], x[:, 0])
        assert torch.equal(turned[:, 1:], RotaryPositions(24, 4)(x[:, 1:]))

    def test_checkpointing_and_truncation_change_nothing(self):
        model = filled(CONFIGS["SiT"]).train()
        x, t, y = inputs()
        expected, states = model(x, t, y, taps=(2,))
        model.gradient_checkpointing = True
        assert torch.equal(model(x, t, y)[0], expected)
        assert torch.equal(model.hidden_states(x, t, y, (2,))[0], states[0])

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_its_configuration_is_kept_and_that_of_others_is_as_it_was(self, kind, tmp_path):
        config = CONFIGS[kind]
        assert denoiser_config(config.to_dict()) == config
        assert "class_token_width" not in PLAIN[kind].to_dict()
        assert denoiser_config(PLAIN[kind].to_dict()) == PLAIN[kind]
        assert set(config.build().state_dict()) - set(PLAIN[kind].build().state_dict()) == {
            *(f"class_token_embedder.{part}.{kind}" for part in ("proj", "norm") for kind in ("weight", "bias")),
            "final_layer.class_token.weight",
            "final_layer.class_token.bias",
        }
        model = filled(config)
        model.save_pretrained(tmp_path / "model")
        assert torch.equal(type(model).from_pretrained(tmp_path / "model")(*inputs())[0], model.eval()(*inputs())[0])

    def test_another_kind_refuses(self, monkeypatch):
        class Other(DenoiserConfig):
            pass

        monkeypatch.setitem(DENOISERS, "Other", Other)
        with pytest.raises(UserError, match="Other-1 takes no class token: leave --reg-coeff out"):
            Other("Other-1", 4, 8, 6).with_class_token(8)


class TestLoss:
    @pytest.mark.parametrize("path_type", ["linear", "cosine"])
    def test_terms_equal_a_derivation_in_float64(self, path_type):
        config = CONFIGS["SiT"]
        trainer = tiny_trainer(config=config, reg_coeff=COEFF, path_type=path_type, velocity_cosine_coeff=0.25)
        batch, draws = random_batch(BATCH, config=config), batch_draws(class_token_width=WIDTH)
        metrics = accumulate(trainer, batch, draws)

        x = trainer.normalised(batch, draws).double()  # tests/test_ldm_step.py derives it
        token, t = batch.class_token.double(), draws.times.double()
        noise, token_noise = draws.noise[:, :LATENT].double().view_as(x), draws.noise[:, LATENT:].double()
        if path_type == "linear":
            a, s, da, ds = 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        else:
            half = math.pi / 2
            a, s, da, ds = (half * t).cos(), (half * t).sin(), -half * (half * t).sin(), half * (half * t).cos()
        over, over_token = (lambda c: c[:, None, None, None]), (lambda c: c[:, None])
        noisy = torch.cat(
            [(over(a) * x + over(s) * noise).flatten(1), over_token(a) * token + over_token(s) * token_noise], 1
        )
        predicted, (state,) = trainer.denoiser.double()(noisy, t, batch.labels, taps=(4,))
        target = over(da) * x + over(ds) * noise
        denoise = ((predicted[:, :LATENT].view_as(x) - target) ** 2).mean()
        class_token = ((predicted[:, LATENT:] - over_token(da) * token - over_token(ds) * token_noise) ** 2).mean()
        direction = 1 - F.cosine_similarity(predicted[:, :LATENT].view_as(x), target, dim=1).mean()
        tokens, features = trainer.alignment["repa"].double().projectors[0](state), batch.features[0].double()
        repa = 1 - F.cosine_similarity(tokens, features, dim=-1).mean()
        assert tokens.shape == (BATCH, 16, 12)
        assert metrics["denoise"].item() == pytest.approx(denoise.item(), rel=1e-5)
        assert metrics["class_token"].item() == pytest.approx(class_token.item(), rel=1e-5)
        assert metrics["repa"].item() == pytest.approx(repa.item(), rel=1e-5)
        loss = denoise + COEFF * class_token + 0.25 * direction + 0.5 * repa
        assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-5)

    def test_gradients_are_those_of_the_latent_plus_beta_times_those_of_the_token(self):
        config, found = CONFIGS["SiT"], {}
        batch, draws = random_batch(BATCH, config=config), batch_draws(class_token_width=WIDTH)
        for coeff in (0.0, 1.0, COEFF):
            trainer = tiny_trainer(config=config, align=(), reg_coeff=coeff)
            accumulate(trainer, batch._replace(features=None), draws)
            found[coeff] = gradients(networks(trainer))
        for name, gradient in found[COEFF].items():
            expected = (1 - COEFF) * found[0.0][name] + COEFF * found[1.0][name]
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
        assert not found[0.0]["denoiser.final_layer.class_token.weight"].any()
        assert found[0.0]["denoiser.class_token_embedder.proj.weight"].any()

    def test_accumulated_micro_batches_are_the_whole_batch(self):
        config = CONFIGS["LightningDiT"]
        batch, draws = random_batch(BATCH, config=config), batch_draws(class_token_width=WIDTH)
        whole, parts = (tiny_trainer(config=config, reg_coeff=COEFF) for _ in range(2))
        accumulate(whole, batch, draws)
        for part in (slice(0, 4), slice(4, 8)):
            accumulate(parts, part_of(batch, part), part_of(draws, part), share=0.5)
        expected, found = gradients(networks(whole)), gradients(networks(parts))
        assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-6

    def test_the_loss_of_the_token_falls_and_the_average_follows(self):
        config = CONFIGS["SiT"]
        trainer = tiny_trainer(config=config, reg_coeff=1.0, learning_rate=2e-3, ema_decay=0.9)
        batch = random_batch(16, config=config)
        losses = [train_step(trainer, step, [batch])["class_token"].item() for step in range(40)]
        assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
        name = "final_layer.class_token.weight"
        averaged, trained = (dict(net.named_parameters())[name] for net in (trainer.ema.module, trainer.denoiser))
        assert not torch.equal(averaged, trained)
        assert F.cosine_similarity(averaged.flatten(), trained.flatten(), dim=0) > 0.9

    def test_a_step_draws_what_it_draws_without_one(self):
        """Noise of the token comes on top, so that runs with and without one can be compared pair by pair."""
        plain, reg = tiny_trainer(), tiny_trainer(config=CONFIGS["SiT"], reg_coeff=COEFF)
        without, with_token = (trainer.draws(3, 1, random_batch(4)) for trainer in (plain, reg))
        assert with_token.noise.shape == (4, LATENT + WIDTH)
        assert torch.equal(with_token.noise[:, :LATENT], without.noise.flatten(1))
        for name in ("posterior", "times", "dropout"):
            assert torch.equal(getattr(with_token, name), getattr(without, name))
        assert without.noise.shape == (4, *CONFIG.latent_shape)

    def test_where_features_are_not_aligned_the_token_is_still_seen(self):
        """From the images: the first VFM alone where nothing is aligned; features and token in one pass where it is."""
        encoder = build_encoder("efficientnet-lite0", 4, random_weights=True)
        config, calls = CONFIG.with_class_token(encoder.embed_dim), []
        encoder.register_forward_hook(lambda *_: calls.append(1))
        features = [FEATURES[0]._replace(width=encoder.embed_dim)]
        trainer = tiny_trainer(config=config, features=features, reg_coeff=COEFF)
        trainer.encoders = [encoder]
        images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        batch = random_batch(4)._replace(images=images, features=None)
        tokens = encoder(images, class_token=True)
        for is_aligned in (True, False):
            calls.clear()
            seen, token = trainer.seen(batch, is_aligned)
            assert len(calls) == 1
            assert torch.equal(token, tokens[:, 0])
            assert seen is None if not is_aligned else torch.equal(seen[0], tokens[:, 1:])


class Known(nn.Module):
    """A velocity that is ε − x₀ for a given x₀: on the linear path it leads from the noise ε to x₀."""

    latent_shape, class_token_width, null_class = CONFIG.latent_shape, WIDTH, 6
    pack, unpack = Denoiser.pack, Denoiser.unpack

    def __init__(self, end: torch.Tensor):
        super().__init__()
        self.end = end

    def forward(self, x, t, y):
        """At time t the state is x₀ + t·(ε − x₀); labels move the end, the null class's by nothing."""
        return (x - self.end * (1 + (y != self.null_class)[:, None])) / t[:, None], ()


class TestSampling:
    @pytest.mark.parametrize("heun", [False, True])
    def test_a_known_velocity_takes_latent_and_token_to_their_ends(self, heun):
        """Straight paths: Euler's and Heun's steps are exact."""
        end = torch.linspace(-3, 3, LATENT + WIDTH)
        noise = counted_state(Known(end), 7, torch.arange(4), 0)
        state = sample_ode(model_velocity(Known(end)), noise, torch.full((4,), 6), 5, heun=heun)
        torch.testing.assert_close(state, end.expand(4, -1), rtol=0, atol=2e-6)

    def test_guidance_acts_on_both(self):
        """Ends x₀ without and 2·x₀ with a class, guided at 3: x₀ + 3·x₀."""
        end = torch.linspace(-3, 3, LATENT + WIDTH)
        model = Known(end)
        noise = counted_state(model, 7, torch.arange(4), 0)
        state = sample_ode(guided(model_velocity(model), 3.0, 6), noise, torch.zeros(4, dtype=torch.int64), 5)
        torch.testing.assert_close(state, 4 * end.expand(4, -1), rtol=0, atol=1e-5)

    def test_euler_maruyama_treats_the_token_like_a_latent(self):
        """Two values that the same velocity moves, one in the latent, one in the token, with the same noise."""
        x, steps = torch.randn(2, LATENT + WIDTH), torch.randn(9, 2, LATENT + WIDTH)
        for noise in (x, *steps):
            noise[:, LATENT] = noise[:, 0]
        model = Known(torch.ones(LATENT + WIDTH))
        state = sample_sde(model_velocity(model), x, torch.full((2,), 6), 10, lambda step: steps[step])
        assert torch.equal(state[:, LATENT], state[:, 0])
        assert not torch.equal(state[:, LATENT + 1], state[:, 1])

    def test_noise_of_the_token_is_counted_apart(self):
        model, items = Known(torch.zeros(LATENT + WIDTH)), torch.arange(6)
        noise = counted_state(model, 3, items, 2)
        assert torch.equal(noise[:, :LATENT], counted_normal(3, items, 2, CONFIG.latent_shape).flatten(1))
        assert torch.equal(noise[:, LATENT:], counted_normal(3, items, 2, (WIDTH,), Purpose.CLASS_TOKEN))
        assert torch.equal(noise[4:5], counted_state(model, 3, items[4:5], 2))
        assert not torch.equal(noise[:, LATENT:], noise[:, :WIDTH])
        plain = CONFIG.build()
        assert torch.equal(counted_state(plain, 3, items, 2), counted_normal(3, items, 2, CONFIG.latent_shape))

    @pytest.mark.parametrize("mode", ["ode", "sde"])
    def test_the_latent_alone_comes_out(self, mode):
        trainer = tiny_trainer(config=CONFIGS["SiT"], reg_coeff=COEFF)
        settings = SamplerSettings(mode, 3, False, 2.0, 0.0, 0.7, "linear", 1.0, seed=0)
        options = {"truncate": False, "decode_batch": 4, "autocast": trainer.accelerator.autocast}
        sampler = ImageSampler(trainer.denoiser.eval(), trainer.tokenizer, settings, **options)
        items, labels = torch.arange(4), torch.arange(4)
        latents = sampler.latents(items, labels)
        assert latents.shape == (4, *CONFIG.latent_shape)
        torch.testing.assert_close(sampler.latents(items[2:], labels[2:]), latents[2:], rtol=1e-4, atol=1e-4)


class TestEncoders:
    def network(self, **changes) -> Encoder:
        import timm

        torch.manual_seed(0)
        options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
        network = timm.models.vision_transformer.VisionTransformer(**options | changes)
        spec = EncoderSpec("tiny", "vit", 24, 8, final_norm=changes.get("final_norm", True))
        return Encoder(spec, 4, network)

    @pytest.mark.parametrize("registers", [0, 4])
    def test_of_a_vit_it_is_the_first_token_after_the_last_norm(self, registers):
        encoder = self.network(reg_tokens=registers)
        images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
        tokens = encoder(images, class_token=True)
        expected = encoder.network.forward_features(encoder.preprocess(images))
        assert tokens.shape == (3, 17, 24)
        assert torch.equal(tokens[:, 0], expected[:, 0])
        assert torch.equal(tokens[:, 1:], encoder(images))
        assert torch.equal(tokens[:, 1:], expected[:, 1 + registers :])

    def test_where_patch_tokens_are_taken_before_the_norm_so_is_the_class_token(self):
        encoder = self.network()
        encoder.spec = EncoderSpec("tiny", "vit", 24, 8, final_norm=False)
        images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
        tokens = encoder(images, class_token=True)
        normed = encoder.network.forward_features(encoder.preprocess(images))
        torch.testing.assert_close(encoder.network.norm(tokens), normed)
        assert not torch.equal(tokens[:, 0], normed[:, 0])

    def test_a_network_without_one_gives_the_mean_of_its_patches(self):
        images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
        options = {"class_token": False, "global_pool": "avg", "reg_tokens": 2}
        for encoder in (self.network(**options), build_encoder("efficientnet-lite0", 4, random_weights=True)):
            tokens = encoder(images, class_token=True)
            assert tokens.shape == (3, 17, encoder.embed_dim)
            torch.testing.assert_close(tokens[:, 0].double(), encoder(images).double().mean(1), rtol=1e-5, atol=1e-6)

    def test_dinov2_s_class_token_is_768_wide(self):
        assert encoder_spec("dinov2-vit-b").embed_dim == 768


def test_the_preset_says_that_early_numbers_are_disputed():
    text = (Path(__file__).resolve().parents[1] / "configs" / "experiments" / "reg_imagenet256.yaml").read_text()
    assert "disputed" in text
    assert "issue 10" in text


def test_of_the_largest_what_it_costs():
    """SiT-XL/2 with DINOv2-B's class token: 768·1152 in and out, their biases, and the norm's two vectors."""
    with torch.device("meta"):
        plain = SiTConfig("SiT-XL/2", 4, 32, num_classes=1000)
        sizes = [sum(p.numel() for p in c.build().parameters()) for c in (plain, plain.with_class_token(768))]
    assert sizes[1] - sizes[0] == 2 * 768 * 1152 + 1152 + 768 + 2 * 1152
