"""Other prompts in the place of a run's own: pipelines of several kinds ask and sample them as if they had been given."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from memorization_guard.core import asking, words
from memorization_guard.core.judge import Judge
from memorization_guard.core.words import Memory, Words
from memorization_guard.diffusers import guard

from .conftest import profile_around
from .test_pipelines import MASK, PHOTO, text_config, tiny_vae, unet
from .test_schedulers import EPSILON

SIZE = {"height": 16, "width": 16, "num_inference_steps": 4}


def stable_diffusion(parts, tokenizer):
    return diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False), SIZE


def without_guidance(parts, tokenizer):
    return stable_diffusion(parts, tokenizer)[0], SIZE | {"guidance_scale": 1.0}


def inpainting(parts, tokenizer):
    pipe = diffusers.StableDiffusionInpaintPipeline(**(parts | {"unet": unet(in_channels=9)}), requires_safety_checker=False)
    return pipe, SIZE | {"image": PHOTO, "mask_image": MASK, "strength": 1.0}


def perturbed_attention(parts, tokenizer):
    more = {"pag_applied_layers": ["mid"], "requires_safety_checker": False}
    return diffusers.StableDiffusionPAGPipeline(**parts, **more), SIZE | {"pag_scale": 3.0}


def stable_diffusion_xl(parts, tokenizer):
    torch.manual_seed(0)
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "cross_attention_dim": 32}
    return diffusers.StableDiffusionXLPipeline(
        vae=parts["vae"],
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(projection_class_embeddings_input_dim=16 + 6 * 8, **extra),
        scheduler=EPSILON["Euler"](),
        add_watermarker=False,
    ), SIZE


def stable_diffusion_3(parts, tokenizer):
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
    )  # fmt: skip
    encoders = {f"text_encoder{n}": CLIPTextModelWithProjection(text_config(tokenizer)) for n in ("", "_2")}
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=tiny_vae(), **encoders,
        tokenizer=tokenizer, tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    ), SIZE  # fmt: skip


KINDS = [stable_diffusion, without_guidance, inpainting, perturbed_attention, stable_diffusion_xl, stable_diffusion_3]


@pytest.fixture
def parts(tiny_pipe):
    return {
        **{name: part for name, part in tiny_pipe.components.items() if name not in ("image_encoder",)},
        "scheduler": EPSILON["Euler"](),
    }


def painted(pipe, prompts, keywords):
    """Latents of the prompts, each from its own noise."""
    torch.manual_seed(5)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    image = pipe(prompts, generator=generators, output_type="latent", **keywords)[0]
    return torch.as_tensor(np.asarray(image))


def finding(monkeypatch, text):
    """Has every prompt that triggers go on as ``text``, after the network was asked what it says of it."""
    asked = []

    def find(prompt, detail, tail):
        asked.append(detail([text, prompt, text]))
        return Words(("red",), (0.001,), text, 0.9)

    monkeypatch.setattr(words, "find", find)
    monkeypatch.setattr(asking, "_memory", Memory())  # other tests have the same model
    return asked


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_another_prompt_is_asked_and_sampled_as_if_it_had_been_the_runs_own(kind, parts, tokenizer, monkeypatch):
    pipe, keywords = kind(parts, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red cat", "a red cat", "a blue dog"]
    with guard(pipe, serves="whole") as whole:
        plain = painted(pipe, prompts, keywords)
        own = painted(pipe, ["a cat", "a red cat", "a blue dog"], keywords)
    without, red = whole.traces[3], whole.traces[0]
    asked = finding(monkeypatch, "a cat")
    with guard(pipe, profile_around(red, 0.01), "mitigate") as run:
        kept = painted(pipe, prompts, keywords)
    assert run.error is None
    assert [trace.words and trace.words.text for trace in run.traces] == ["a cat"] * 3
    # Both prompts of the batch are looked at once, and asked what a run of their own was asked.
    assert len(asked) == 2
    np.testing.assert_allclose(asked[0], [without.asked, red.asked, without.asked], rtol=1e-3)
    # What perturbed attention made of the first evaluation is still of the old prompt; how much, depends on the weights.
    away = float((kept[0] - plain[0]).abs().max())
    close = away / 2 if kind is perturbed_attention else 1e-3 * float(own[0].abs().max())
    assert torch.allclose(kept[0], own[0], atol=close)
    assert not torch.allclose(kept[0], plain[0], atol=close)
    assert not pipe.unet._forward_pre_hooks if hasattr(pipe, "unet") else not pipe.transformer._forward_pre_hooks
    # The next run has its own prompt again.
    with guard(pipe) as run:
        assert torch.equal(painted(pipe, prompts, keywords), plain)


def test_of_a_batch_only_what_triggered_goes_on_otherwise(parts, tokenizer, monkeypatch):
    pipe, keywords = stable_diffusion(parts, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red cat", "a blue dog"]
    with guard(pipe, serves="whole") as run:
        plain = painted(pipe, prompts, keywords)
    finding(monkeypatch, "a cat")

    def judge_first(self, detail, tail):
        self.p_value, self.trigger = np.array([0.0001, 0.5]), np.array([0, -1])

    monkeypatch.setattr(Judge, "_judge", judge_first)
    with guard(pipe, profile_around(run.traces[0]), "mitigate") as run:
        kept = painted(pipe, prompts, keywords)
    assert [trace.verdict for trace in run.traces] == ["corrected", "stable"]
    assert torch.equal(kept[1], plain[1])
    assert not torch.equal(kept[0], plain[0])


def test_a_run_that_does_not_trigger_encodes_nothing(parts, tokenizer):
    pipe, keywords = stable_diffusion(parts, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    handle = pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    painted(pipe, ["a red cat"], keywords)
    own = len(calls)
    with guard(pipe, serves="whole") as run:
        painted(pipe, ["a red cat"], keywords)
    with guard(pipe, profile_around(run.traces[0]), "mitigate") as run:
        painted(pipe, ["a red cat"], keywords)
    handle.remove()
    assert run.traces[0].verdict == "stable"
    assert len(calls) == 3 * own


@pytest.mark.parametrize("how", ["embeddings", "two texts"])
def test_where_the_prompt_is_not_known_the_image_is_steered(how, parts, tokenizer, monkeypatch):
    kind = stable_diffusion if how == "embeddings" else stable_diffusion_xl
    pipe, keywords = kind(parts, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    if how == "embeddings":
        prompt, negative = pipe.encode_prompt("a red cat", "cpu", 1, True)
        keywords = keywords | {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    else:
        keywords = keywords | {"prompt": "a red cat", "prompt_2": "a blue dog"}
    with guard(pipe, serves="whole") as run:
        pipe(output_type="latent", **keywords)
    asked = finding(monkeypatch, "a cat")
    with guard(pipe, profile_around(run.traces[0], 0.01), "mitigate") as run:
        pipe(output_type="latent", **keywords)
    assert asked == []
    assert (run.error, run.traces[0].verdict, run.traces[0].words) == (None, "corrected", None)
