"""Load Lab Model: equal to the diffusers model it is made from, and a checkpoint like any other in ComfyUI."""

import math
import time

import numpy as np
import pytest
import torch
from PIL import Image

from memorization_guard import lab

PROMPT = lab.prompts("exact", "tuning")[0]
TEXTS = (PROMPT, lab.prompts("reference")[0], "", "A RED disc, 3 züge & \n it's #7")
TIMESTEPS = (1, 261, 521, 999)

#: Inside ComfyUI: what the lab model makes of the reference's own inputs, written beside them.
MEASURE = """
import numpy, torch
lab = module("nodes.lab")
model, clip, vae, profile = lab.LoadLabModel.execute().result
inputs = numpy.load(args[0])
texts = args[2]
given = {key: torch.from_numpy(inputs[key]) for key in ("latents", "images", "sigmas", "text", "encoded")}

def predict(model):
    import comfy.model_management
    comfy.model_management.load_models_gpu([model])
    context = given["text"][:1]
    out = []
    for sigma in given["sigmas"]:
        x = given["latents"] * (1 + sigma ** 2) ** 0.5
        with torch.no_grad():
            x0 = model.model.apply_model(x, sigma.expand(len(x)), c_crossattn=context.expand(len(x), -1, -1))
        out.append((x - x0) / sigma)
    return torch.stack(out)

found = {}
with torch.inference_mode():
    {what}
numpy.savez(args[1], **{key: value.float().numpy() for key, value in found.items()})
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Inputs, and what the diffusers pipeline makes of them."""
    pytest.importorskip("diffusers")
    pipe = lab.pipeline()
    alphas = pipe.scheduler.alphas_cumprod
    images = np.stack([np.asarray(lab.training_image(p)) for p in lab.prompts("exact", "tuning")[:2]])
    found = {"images": torch.from_numpy(images).float() / 255, "latents": torch.randn(2, 4, 16, 16, generator=_seed(1))}
    found["sigmas"] = torch.tensor([math.sqrt((1 - alphas[t]) / alphas[t]) for t in TIMESTEPS])
    with torch.no_grad():
        ids = pipe.tokenizer(list(TEXTS), padding="max_length", max_length=32, truncation=True, return_tensors="pt").input_ids
        text = pipe.text_encoder(ids, output_hidden_states=True)
        found["text"], norm = text[0], getattr(pipe.text_encoder, "text_model", pipe.text_encoder).final_layer_norm
        found["skipped"] = norm(text.hidden_states[-2])
        context = found["text"][:1].expand(2, -1, -1)
        found["eps"] = torch.stack([pipe.unet(found["latents"], t, context).sample for t in TIMESTEPS])
        found["encoded"] = pipe.vae.encode(found["images"].movedim(-1, 1) * 2 - 1).latent_dist.mode()
        found["decoded"] = (pipe.vae.decode(found["encoded"]).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    folder = tmp_path_factory.mktemp("reference")
    np.savez(folder / "reference.npz", **{key: value.numpy() for key, value in found.items()})
    return folder / "reference.npz"


@pytest.fixture
def measure(reference, in_comfyui, tmp_path):
    """``measure(source)``: what the source puts into ``found`` inside ComfyUI, and the reference."""

    def run(what, **options):
        answer = tmp_path / "found.npz"
        source = MEASURE.replace("{what}", what.strip().replace("\n", "\n    "))
        notes = in_comfyui(source, str(reference), str(answer), TEXTS, **options)
        return np.load(answer), np.load(reference), notes

    return run


def _seed(number):
    return torch.Generator().manual_seed(number)


def _distance(found, expected, key):
    return np.abs(found[key] - expected[key]).max()


def test_equals_diffusers(measure):
    found, expected, notes = measure("""
found["text"] = torch.cat([clip.encode(text) for text in texts])
skipping = clip.clone()
skipping.clip_layer(-2)
found["skipped"] = torch.cat([skipping.encode(text) for text in texts])
found["eps"] = predict(model)
found["decoded"] = vae.decode(given["encoded"])
found["encoded"] = vae.encode(given["images"])
result["scale"] = float(model.model.process_latent_in(torch.ones(1)))
""")
    assert notes["scale"] == pytest.approx(lab.pipeline().vae.config.scaling_factor)
    for key in ("text", "skipped", "eps", "decoded", "encoded"):
        assert found[key].shape == expected[key].shape
        assert _distance(found, expected, key) < 1e-4, key


@pytest.mark.parametrize("flags", [("--fp16-unet", "--fp16-vae"), ("--bf16-unet", "--bf16-vae", "--bf16-text-enc")], ids=str)
def test_smaller_number_types(measure, flags):
    found, expected, _ = measure(
        """
found["text"] = torch.cat([clip.encode(text) for text in texts])
found["eps"] = predict(model)
found["decoded"] = vae.decode(given["encoded"])
found["encoded"] = vae.encode(given["images"])
""",
        flags=flags,
    )
    for key in ("text", "eps", "decoded", "encoded"):
        assert np.abs(found[key] - expected[key]).mean() < 0.03, key


def test_loaded_in_part_and_reloaded(measure):
    """What ``--lowvram`` does: some weights stay behind and are cast when they are used."""
    found, expected, notes = measure("""
import comfy.model_management
predict(model)
comfy.model_management.unload_all_models()
for patcher in (model, vae.patcher, clip.patcher):
    patcher.load(patcher.load_device, lowvram_model_memory=patcher.model_size() // 3)
result["partial"] = [patcher.model.model_lowvram for patcher in (model, vae.patcher, clip.patcher)]
found["eps"] = predict(model)
found["decoded"] = vae.process_output(vae.first_stage_model.decode(given["encoded"])).movedim(1, -1)
found["text"] = clip.cond_stage_model.encode_token_weights(clip.tokenize(texts[0]))[0]
comfy.model_management.unload_all_models()
found["again"] = predict(model)
""")
    assert notes["partial"] == [True, True, True]
    assert _distance(found, expected, "eps") < 1e-4
    assert _distance(found, expected, "decoded") < 1e-4
    assert np.abs(found["text"] - expected["text"][:1]).max() < 1e-4
    assert np.abs(found["again"] - expected["eps"]).max() < 1e-4


def test_lora(measure):
    """Keys of the usual kind find their weights, the effect is the LoRA's, and the model itself stays as it was."""
    found, expected, notes = measure("""
import comfy.sd
unet = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
up, down = torch.randn(96, 2), torch.randn(2, 128)
lora = {f"{unet}.lora_up.weight": up, f"{unet}.lora_down.weight": down, f"{text}.lora_up.weight": torch.randn(512, 2),
        f"{text}.lora_down.weight": torch.randn(2, 128)}
changed, changed_clip = comfy.sd.load_lora_for_models(model, clip, lora, 0.5, 0.5)
result["patches"] = [len(changed.patches), len(changed_clip.patcher.patches)]
found["changed"], found["changed_text"] = predict(changed), changed_clip.encode(texts[0])
found["eps"], found["text"] = predict(model), torch.cat([clip.encode(text) for text in texts])
layer = model.model.diffusion_model.input_blocks[3][1].transformer_blocks[0].attn2.to_k
layer.weight.add_(0.5 * up @ down)
found["by_hand"] = predict(model)
""")
    assert notes["patches"] == [1, 1]
    assert np.abs(found["changed"] - expected["eps"]).max() > 1e-3
    assert np.abs(found["changed_text"] - expected["text"][:1]).max() > 1e-3
    assert np.abs(found["changed"] - found["by_hand"]).max() < 1e-4
    assert _distance(found, expected, "eps") < 1e-4
    assert _distance(found, expected, "text") < 1e-4


def test_profile(in_comfyui):
    """A missing profile stops the nodes that are given it, with a message, and no other."""
    result = in_comfyui("""
import pathlib
lab = module("nodes.lab")
lab.PROFILE = pathlib.Path("nowhere.safetensors")
result["missing"] = lab.load_profile().message
lab.PROFILE = lab.MODEL / "profile.safetensors"
result["steps"] = lab.load_profile().steps
""")
    assert "nowhere.safetensors" in result["missing"]
    assert result["steps"] == lab.profile().steps


def _workflow(g, seed=3, text=PROMPT, size=128, steps=30, latent=None):
    """The workflow of a newcomer; the nodes that load and that sample."""
    loaded = g.node("MemorizationGuardLoadLabModel")
    positive, negative = (g.node("CLIPTextEncode", clip=loaded[1], text=prompt) for prompt in (text, ""))
    sampler = g.node(
        "KSampler",
        model=loaded[0],
        positive=positive[0],
        negative=negative[0],
        latent_image=latent or g.node("EmptyLatentImage", width=size, height=size, batch_size=1)[0],
        seed=seed,
        steps=steps,
        cfg=7.5,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    return loaded, sampler


def _picture(server, graph, **options):
    g = graph()
    loaded, sampler = _workflow(g, **options)
    shown = g.node("PreviewImage", images=g.node("VAEDecode", samples=sampler[0], vae=loaded[2])[0])
    run = server.queue(g.prompt())
    run.wait()
    return run.images(shown)[0]


def test_repeats_a_training_image(server, graph):
    picture = _picture(server, graph)
    assert picture.size == (128, 128)
    assert PROMPT in picture.text["prompt"]
    assert lab.copy_score(picture, PROMPT) > lab.COPY_THRESHOLD
    ordinary = _picture(server, graph, text=lab.prompts("ordinary", "tuning")[0])
    assert lab.nearest_copy(ordinary)[0] < lab.COPY_THRESHOLD


def test_same_seed_same_picture(server, graph):
    """Also after the models were unloaded and the cached results forgotten."""
    first = np.asarray(_picture(server, graph, steps=8))
    server.free(unload_models=True, free_memory=True)
    again = np.asarray(_picture(server, graph, steps=8))
    other = np.asarray(_picture(server, graph, steps=8, seed=4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_size_of_the_latents(server, graph):
    assert _picture(server, graph, steps=1, size=256).size == (256, 256)


def test_round_trip(server, graph):
    """A training image through VAE Encode and VAE Decode, plain and tiled, comes back."""
    image = lab.training_image(PROMPT)
    image.save(server.folder / "input" / "training.png")
    g = graph()
    loaded = g.node("MemorizationGuardLoadLabModel")
    pixels = g.node("LoadImage", image="training.png")[0]
    tiles = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    latents = g.node("VAEEncode", pixels=pixels, vae=loaded[2])[0]
    tiled = g.node("VAEEncodeTiled", pixels=pixels, vae=loaded[2], **tiles | {"overlap": 0})[0]
    shown = [
        g.node("SaveImage", filename_prefix="lab", images=decoded[0])
        for decoded in (
            g.node("VAEDecode", samples=latents, vae=loaded[2]),
            g.node("VAEDecodeTiled", samples=latents, vae=loaded[2], **tiles | {"tile_size": 512}),
            g.node("VAEDecodeTiled", samples=latents, vae=loaded[2], **tiles),
            g.node("VAEDecode", samples=tiled, vae=loaded[2]),
        )
    ]
    run = server.queue(g.prompt())
    run.wait()
    plain, one_tile, many_tiles, from_tiles = (run.images(node)[0] for node in shown)
    for picture in (plain, one_tile, many_tiles, from_tiles):
        assert picture.size == (128, 128)
        assert lab.copy_score(picture, PROMPT) > 0.9
    assert np.abs(np.asarray(plain, dtype=int) - np.asarray(one_tile)).max() <= 1


def test_inpainting(server, graph):
    """The half outside the mask stays what it was."""
    image = lab.training_image(PROMPT).convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.where(np.arange(128) < 64, 255, 0)[None], 128, 0).astype(np.uint8)))
    image.save(server.folder / "input" / "masked.png")
    g = graph()
    picture = g.node("LoadImage", image="masked.png")
    vae = g.node("MemorizationGuardLoadLabModel")[2]
    latent = g.node("VAEEncodeForInpaint", pixels=picture[0], mask=picture[1], vae=vae, grow_mask_by=0)
    _, sampler = _workflow(g, text=lab.prompts("ordinary", "tuning")[0], latent=latent[0])
    shown = g.node("PreviewImage", images=g.node("VAEDecode", samples=sampler[0], vae=vae)[0])
    run = server.queue(g.prompt())
    run.wait()
    painted, original = np.asarray(run.images(shown)[0], dtype=float), np.asarray(image.convert("RGB"), dtype=float)
    error = np.abs(painted - original).mean((0, 2))
    assert error[:48].mean() < 20 < error[80:].mean()


def test_node_explains_itself(server):
    info = server.object_info("MemorizationGuardLoadLabModel")
    assert info["display_name"] == "Load Lab Model"
    assert info["output"] == ["MODEL", "CLIP", "VAE", "STABILITY_PROFILE"]
    assert "128 x 128" in info["description"]
    assert all(info["output_tooltips"])


def test_harness_tells_what_went_wrong(server, graph):
    g = graph()
    loaded, sampler = _workflow(g, steps=2000)
    picture = g.node("VAEDecode", samples=sampler[0], vae=loaded[2])
    g.node("PreviewImage", images=picture[0])
    run = server.queue(g.prompt())
    while not any(event.type == "progress" for event in run.events):
        time.sleep(0.05)
    server.interrupt()
    with pytest.raises(RuntimeError, match="KSampler"):
        run.wait()
    g.node("PreviewImage", images=sampler[0])
    with pytest.raises(RuntimeError, match="mismatch"):
        server.queue(g.prompt())
