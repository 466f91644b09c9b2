"""Pipelines with loops of their own, tiny and with random weights: traced bit for bit, judged, and corrected."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from memorization_guard.adapters.network import Evaluation
from memorization_guard.adapters.sampling import _along
from memorization_guard.diffusers import guard

from .conftest import near, profile_around, recorded
from .test_schedulers import EPSILON

PARTS = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
PHOTO = np.random.default_rng(0).random((1, 16, 16, 3)).astype(np.float32)
MASK = np.zeros((1, 16, 16), dtype=np.float32)
MASK[:, 4:12, 4:12] = 1


def unet(kind=diffusers.UNet2DConditionModel, **keywords):
    torch.manual_seed(0)
    return kind(**(UNET | keywords)).eval()


def check(pipe, *, guided=True, halves=lambda outputs: outputs[0].chunk(2)[::-1], images=2, plain_guidance=True, **keywords):
    """Traced bit for bit; stable beside what it was itself; and corrected in every step beside something else.

    ``halves`` gives the predictions with and without the prompt from the outputs of a step.
    """
    pipe.set_progress_bar_config(disable=True)

    def paint():
        torch.manual_seed(5)
        generators = [torch.Generator().manual_seed(seed) for seed in range(images)]
        return pipe(**{"num_inference_steps": 4, "output_type": "latent", "generator": generators} | keywords)[0]

    def watched(*arguments, **more):
        with recorded(pipe) as record, guard(pipe, *arguments, **more) as run:
            image = paint()
        return image, run, record

    plain = paint()
    image, run, _ = watched(serves="whole")
    assert run.error is None
    assert torch.equal(torch.as_tensor(image), torch.as_tensor(plain))
    traces = run.traces
    assert len(traces) == images
    assert all("early" not in (trace.note or "") for trace in traces)
    assert np.isfinite(traces[0].evaluations.guidance).all() == guided
    assert np.isfinite(traces[0].evaluations.velocity).all()
    assert len(traces[0].steps) == traces[0].settings.steps
    _, stable, _ = watched(profile_around(traces[0]))
    assert stable.traces[0].verdict == "stable"
    changed, corrected, record = watched(profile_around(traces[0], 0.01), "mitigate")
    assert corrected.error is None
    assert all(trace.verdict == "corrected" and trace.trigger_step == 0 for trace in corrected.traces)
    # References are asked with the prompt alone, other runs in their own batches: the answer is the same.
    asked = [trace.asked for trace in corrected.traces]
    assert asked == pytest.approx([trace.asked for trace in traces], rel=1e-4)
    assert not torch.equal(torch.as_tensor(changed), torch.as_tensor(plain))
    mask = corrected.traces[0].evaluations.corrected
    assert mask[0]
    for number, (outputs, prediction, _) in enumerate(record.steps if guided and plain_guidance else []):
        if mask[number]:
            cond, uncond = halves(outputs)
            wanted = (uncond - (cond - uncond))[:1]
            assert near(prediction[:1], wanted.narrow(1, 0, prediction.shape[1]), 1e-3), number
    return traces[0]


def test_stable_diffusion(tiny_pipe):
    trace = check(tiny_pipe, prompt=["a red cat", "a blue dog"], height=16, width=16)
    assert (trace.settings.sampler, trace.settings.steps, len(trace.evaluations)) == ("PNDM", 4, 5)
    assert (trace.settings.guidance_scale, trace.settings.latent_shape) == (7.5, (4, 8, 8))


def test_without_guidance_one_prediction_is_judged_alone(tiny_pipe):
    trace = check(tiny_pipe, guided=False, prompt=["a red cat"] * 2, height=16, width=16, guidance_scale=1.0)
    assert trace.settings.guidance_scale == 1.0


@pytest.mark.parametrize("scheduler", ["PNDM", "DDIM", "Euler", "DPM++ 2M"])
def test_image_to_image(tiny_pipe, scheduler):
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**tiny_pipe.components, requires_safety_checker=False)
    pipe.scheduler = EPSILON[scheduler]()
    trace = check(pipe, prompt=["a red cat"] * 2, image=np.repeat(PHOTO, 2, 0), strength=0.5, num_inference_steps=10)
    assert trace.settings.steps == 5


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(tiny_pipe, channels):
    tiny_pipe.unet = unet(in_channels=channels)
    pipe = diffusers.StableDiffusionInpaintPipeline(**tiny_pipe.components, requires_safety_checker=False)
    check(pipe, prompt=["a red cat"] * 2, image=PHOTO, mask_image=MASK, height=16, width=16, strength=1.0)


@pytest.mark.parametrize("channels", [None, 4, 9])
def test_another_size_is_judged_at_the_size_of_the_profile(tiny_pipe, channels):
    """From text, and with the mask and the image that an inpainting network is given beside the latent."""
    pipe, inputs = tiny_pipe, {}
    if channels is not None:
        tiny_pipe.unet = unet(in_channels=channels)
        pipe = diffusers.StableDiffusionInpaintPipeline(**tiny_pipe.components, requires_safety_checker=False)
        inputs = {"image": PHOTO, "mask_image": MASK, "strength": 1.0}
    pipe.set_progress_bar_config(disable=True)

    def run(height, *arguments, **more):
        with guard(pipe, *arguments, **more) as run:
            pipe("a red cat", height=height, width=16, num_inference_steps=4, output_type="latent", **inputs)
        assert run.error is None
        return run.traces[0]

    own = run(16, serves="whole")
    for scale, verdict in ((1.0, "stable"), (0.01, "corrected")):
        trace = run(32, profile_around(own, scale), "mitigate")
        assert trace.verdict == verdict
        assert trace.settings.latent_shape == (4, 16, 8)
        # What is asked at the profile's size is what was asked there, but for the picture beside it.
        assert trace.asked == pytest.approx(own.asked, rel=1e-4 if channels != 9 else 0.5)


def test_controlnet(tiny_pipe):
    torch.manual_seed(0)
    control = diffusers.ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 8),
    )
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **tiny_pipe.components, controlnet=control, requires_safety_checker=False
    )
    own = check(pipe, prompt=["a red cat"] * 2, image=torch.rand(2, 3, 16, 16), height=16, width=16)
    # What a ControlNet adds has the run's size, so that the network cannot be asked at another: the run says so.
    with guard(pipe, profile_around(own, 0.01), "mitigate") as run:
        image = torch.rand(1, 3, 32, 16)
        pipe("a red cat", image=image, height=32, width=16, num_inference_steps=4, output_type="latent")
    assert run.traces[0].verdict == "unscored"
    assert run.traces[0].note.startswith(
        "The run has latents of (4, 16, 8), the profile of (4, 8, 8), and what the prompt does"
    )


def test_instruct_pix2pix(tiny_pipe):
    tiny_pipe.unet = unet(in_channels=8)
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(**tiny_pipe.components, requires_safety_checker=False)
    trace = check(pipe, plain_guidance=False, prompt=["a red cat"] * 2, image=np.repeat(PHOTO, 2, 0), image_guidance_scale=1.5)
    assert trace.settings.guidance_scale == 7.5


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_perturbed_attention(tiny_pipe, scale):
    parts = tiny_pipe.components | {"image_encoder": None}
    pipe = diffusers.StableDiffusionPAGPipeline(**parts, pag_applied_layers=["mid"], requires_safety_checker=False)
    check(
        pipe,
        guided=scale > 1,
        plain_guidance=False,
        prompt=["a red cat"] * 2,
        pag_scale=3.0,
        guidance_scale=scale,
        height=16,
        width=16,
    )


def test_what_is_judged_does_not_depend_on_guidance(tiny_pipe):
    """Of the first evaluation, which guidance has no part in; scales are told to the profile alone."""
    size = {"height": 16, "width": 16}
    pag = diffusers.StableDiffusionPAGPipeline(
        **tiny_pipe.components, pag_applied_layers=["mid"], requires_safety_checker=False
    )
    with guard(tiny_pipe) as run:
        tiny_pipe("a red cat", num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(0), **size)
    profile = profile_around(run.traces[0])

    def first(pipe, **keywords):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        with guard(pipe, profile) as run:
            pipe("a red cat", num_inference_steps=4, output_type="latent", generator=generator, **size, **keywords)
        evaluations = run.traces[0].evaluations
        names = ("velocity", "denoised", "guidance", "detail")
        return np.array([*(getattr(evaluations, name)[0] for name in names), run.traces[0].p_value])

    wanted = first(tiny_pipe)
    for keywords in ({"guidance_scale": 3.0}, {"guidance_scale": 12.0}, {"guidance_rescale": 0.7}):
        np.testing.assert_array_equal(first(tiny_pipe, **keywords), wanted)
    np.testing.assert_allclose(first(pag, pag_scale=3.0), wanted, rtol=1e-4, atol=1e-4)


def test_animatediff(tiny_pipe):
    torch.manual_seed(0)
    motion = diffusers.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        motion_max_seq_length=4,
        use_motion_mid_block=False,
    )
    pipe = diffusers.AnimateDiffPipeline(
        vae=tiny_pipe.vae,
        text_encoder=tiny_pipe.text_encoder,
        tokenizer=tiny_pipe.tokenizer,
        unet=tiny_pipe.unet,
        motion_adapter=motion,
        scheduler=EPSILON["DDIM"](),
    )
    trace = check(pipe, images=1, prompt="a red cat", num_frames=3, height=16, width=16)
    assert trace.settings.latent_shape == (4, 3, 8, 8)


def text_config(tokenizer):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        projection_dim=16,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )


def test_stable_diffusion_xl_with_a_refiner(tokenizer, tiny_parts):
    torch.manual_seed(0)
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "cross_attention_dim": 32}
    parts = {
        "vae": tiny_parts[1],
        "text_encoder": CLIPTextModel(text_config(tokenizer)),
        "text_encoder_2": CLIPTextModelWithProjection(text_config(tokenizer)),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "add_watermarker": False,
    }
    base = diffusers.StableDiffusionXLPipeline(
        **parts, unet=unet(projection_class_embeddings_input_dim=16 + 6 * 8, **extra), scheduler=EPSILON["Euler"]()
    )
    size = {"height": 16, "width": 16}
    check(base, prompt=["a red cat"] * 2, **size)
    trace = check(base, prompt=["a red cat"] * 2, num_inference_steps=10, denoising_end=0.6, **size)
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts,
        unet=unet(projection_class_embeddings_input_dim=16 + 5 * 8, **extra),
        scheduler=EPSILON["Euler"](),
        requires_aesthetics_score=True,
    )
    with guard(base) as run:
        latents = base(["a red cat"] * 2, num_inference_steps=10, denoising_end=0.6, output_type="latent", **size)[0]
    rest = check(refiner, prompt=["a red cat"] * 2, image=latents, num_inference_steps=10, denoising_start=0.6)
    assert (trace.settings.steps, rest.settings.steps) == (6, 4)
    assert trace.settings.end_sigma == pytest.approx(rest.settings.sigmas[0], rel=1e-3)
    # The last latent of the base, on the VP scale: nothing of the sampler's own scale is left in it.
    wanted = float(latents[0].norm()) / np.hypot(1, trace.settings.end_sigma)
    assert run.traces[0].steps.latent_norm[-1] == pytest.approx(wanted, rel=1e-4)


def tiny_vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def test_stable_diffusion_3(tokenizer):
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=CLIPTextModelWithProjection(text_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer)),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    trace = check(pipe, prompt=["a red cat"] * 2, height=16, width=16)
    skipped = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    other = check(pipe, plain_guidance=False, prompt=["a red cat"] * 2, height=16, width=16, **skipped)
    assert len(other.evaluations) == len(trace.evaluations) == 4
    assert other.evaluations.velocity[0] == trace.evaluations.velocity[0]


def flux(kind=diffusers.FluxPipeline, embeds=True):
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=embeds,
    )
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return kind(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=tiny_vae(), transformer=transformer, **nothing)


def embeddings(prefix="", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}prompt_embeds": torch.randn(2, 6, 32, generator=generator),
        f"{'negative_' if prefix else ''}pooled_prompt_embeds": torch.randn(2, 32, generator=generator),
    }


def test_flux_with_embedded_guidance():
    trace = check(flux(), guided=False, height=16, width=16, **embeddings())
    assert trace.settings.guidance_scale == 1.0
    assert "guidance 3.5 embedded" in trace.settings.sampler
    assert trace.settings.prediction_type == "flow_prediction"


def test_flux_with_guidance_of_two_calls():
    """The pipeline keeps its scale to itself: the correction is made for the usual one, and the direction is exact."""
    both = embeddings() | embeddings("negative_", seed=1)
    trace = check(flux(), plain_guidance=False, height=16, width=16, true_cfg_scale=4.0, **both)
    assert trace.settings.guidance_scale is None
    assert len(trace.evaluations) == 4


def test_flux_kontext_judges_the_latent_and_not_its_reference():
    pipe = flux(diffusers.FluxKontextPipeline)
    keywords = {"image": torch.rand(1, 3, 32, 32), "height": 32, "width": 32, "max_area": 32 * 32, "_auto_resize": False}
    trace = check(pipe, guided=False, **keywords, **embeddings())
    assert trace.settings.latent_shape == (64, 16)


def test_wan_asks_for_the_two_predictions_one_after_the_other():
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer)
    texts = {"prompt_embeds": torch.randn(1, 6, 32), "negative_prompt_embeds": torch.randn(1, 6, 32)}
    trace = check(pipe, images=1, halves=lambda outputs: outputs, height=16, width=16, num_frames=5, **texts)
    assert len(trace.evaluations) == 4
    assert trace.settings.guidance_scale == 5.0


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 7.5, 15.0])
def test_a_contrary_negative_prompt_is_no_prediction_turned_round(scale):
    """A v prediction in noise is little but the mean image: guidance away from another one points away from it."""
    mean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    other = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for cond, uncond in ((mean, other), (mean, mean + 0.3 * other), (mean, mean.clone())):
        evaluation = Evaluation(0, mean, cond, uncond, (0.0, 1.0))
        guided = uncond + scale * (cond - uncond)
        assert _along(guided, evaluation) == pytest.approx(1.0, abs=0.05)
        assert _along(0.5 * guided, evaluation) > 0
        assert _along(-guided, evaluation) < 0
    assert _along(-mean, Evaluation(0, mean, mean, None, (0.0, 1.0))) < 0
    assert _along(mean[:, :2], Evaluation(0, mean, mean, None, (0.0, 1.0))) == 1.0
