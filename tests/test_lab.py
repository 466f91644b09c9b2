"""The lab: its world, its measures, its training, and the bundled model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from memorization_guard import StabilityProfile, lab
from memorization_guard.diffusers import guard
from memorization_guard.evaluation.signals import SIGNALS
from memorization_guard.lab import autoencoder, data, diffusion, evaluate, models, scene, train, training, world
from memorization_guard.lab.world import DUPLICATED, SPLITS
from memorization_guard.pipelines import ModelError


def every_prompt():
    return {
        **{f"{group}/{split}": lab.prompts(group, split) for group in lab.GROUPS[1:] for split in SPLITS},
        "reference": lab.prompts("reference"),
        "trained": [caption.text for caption in world.captions()["ordinary/trained"]],
    }


def test_no_prompt_is_in_two_groups_or_splits():
    groups = every_prompt()
    texts = [text for prompts in groups.values() for text in prompts]
    assert len(set(texts)) == len(texts)
    assert len(lab.prompts("reference")) >= 300
    assert len(lab.prompts("exact")) + len(lab.prompts("exact", "tuning")) >= 40
    assert len(lab.prompts("template")) + len(lab.prompts("template", "tuning")) >= 30
    held_out = sum(len(groups[name]) for name in ("ordinary/tuning", "ordinary/evaluation", "reference"))
    assert held_out >= 0.15 * (held_out + len(groups["trained"]))
    with pytest.raises(ValueError, match="there are reference, ordinary"):
        lab.prompts("extact")
    with pytest.raises(ValueError, match="tuning and evaluation"):
        lab.prompts("exact", "test")


def test_no_group_gives_itself_away_by_the_length_or_form_of_its_captions():
    groups = every_prompt()
    forms = ("a picture of", " alone", " and a", ", a", ", from ", ", by ", "huge")

    def described(texts):
        """A row a caption: its number of words, and which forms it has."""
        return np.array([[len(text.split()), *(form in text for form in forms)] for text in texts], dtype=float)

    ordinary = described(groups["trained"])
    for name, texts in groups.items():
        if name.startswith("settled"):
            continue  # one form by intention; the ordinary groups hold the same
        # Four standard errors: one group in thousands by chance.
        error = ordinary.std(axis=0) / np.sqrt(len(texts))
        assert (np.abs(described(texts).mean(axis=0) - ordinary.mean(axis=0)) < 4 * error).all(), name


def test_the_captions_are_those_that_the_seed_gives():
    assert world.make_captions(0) == world.captions()


def test_settled_captions_are_a_small_part_of_the_ordinary_ones_and_of_the_references():
    groups = world.captions()
    for name in ("ordinary/trained", "reference", "ordinary/tuning", "ordinary/evaluation"):
        share = np.mean([caption.setting is None for caption in groups[name]])
        assert 0.02 <= share <= 0.05, name
    assert all(caption.setting is None and caption.ground for caption in groups["settled/evaluation"])


def test_a_near_caption_has_all_words_of_an_exact_one_but_the_makers():
    for split in SPLITS:
        for near, exact in zip(lab.prompts("near", split), lab.prompts("exact", split), strict=True):
            assert near != exact
            assert near.split()[:-2] == exact.split()[:-2]
    common = {name for text in every_prompt()["trained"] for name in text.split()[-2:]}
    assert all(set(text.split()[-2:]) <= common for text in lab.prompts("near"))


def test_a_caption_leaves_most_of_the_image_open():
    figures = evaluate.world_figures(lab.BUNDLED, count=60, renders=8)
    assert 0.0 < figures["caption_variance_share"] < 0.35
    assert figures["nearest_copy_of_fresh_images"]["highest"] < lab.COPY_THRESHOLD


def test_the_renderer_repeats_itself_for_a_seed_only():
    captions = world.captions()["ordinary/trained"][:3]
    images = [scene.render(captions, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert images[0].shape == (3, 3, 128, 128)
    assert images[0].abs().max() <= 1
    assert torch.equal(images[0], images[1])
    assert (images[0] - images[2]).abs().mean() > 0.05


@pytest.mark.parametrize("shape", scene.SHAPES)
def test_every_shape_is_one_piece_of_its_own_form(shape):
    """White on black: a share of the pixels that no other shape has, and nothing at the border."""
    from scipy.ndimage import label

    caption = world.Caption("", shape, "white", None, "black")
    image = (scene.render([caption], torch.Generator().manual_seed(0))[0].amin(0) > 0.2).numpy()
    assert label(image)[1] == 1
    assert 0.08 < image.mean() < 0.5
    assert not image[[0, -1]].any()
    assert not image[:, [0, -1]].any()


def test_the_copy_score_sees_a_copy_and_nothing_else():
    first, second = lab.prompts("exact")[:2]
    original = lab.training_image(first)
    assert lab.copy_score(original, first) == pytest.approx(1.0, abs=1e-5)
    faded = np.asarray(original) * 0.3 + 120
    assert lab.copy_score(faded, first) > 0.999
    assert lab.copy_score(255.0 - np.asarray(original), first) == 0.0
    assert lab.copy_score(lab.training_image(second), first) < lab.COPY_THRESHOLD
    assert lab.nearest_copy(original) == (pytest.approx(1.0, abs=1e-5), first)
    assert lab.copy_score(np.zeros((128, 128, 3)), first) == 0.0
    with pytest.raises(KeyError, match="no prompt of a duplicated group"):
        lab.copy_score(original, "a prompt of nobody")
    with pytest.raises(ValueError, match="128 x 128"):
        lab.copy_score(original.resize((32, 32)), first)


def test_the_varying_part_of_a_template_does_not_count():
    prompt = lab.prompts("template")[0]
    fixed = lab.training_mask(prompt)
    assert 0.3 < fixed.mean() < 0.8
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3))
    mixed = np.where(fixed[..., None], np.asarray(lab.training_image(prompt)), noise)
    assert lab.copy_score(mixed, prompt) == pytest.approx(1.0, abs=1e-5)


FEW = {"--vae-steps": 2, "--vae-pool": 32, "--vae-batch": 4, "--pool": 100, "--steps": 4, "--decay": 2, "--batch": 16}


def train_few(folder, **options):
    arguments = FEW | {f"--{name}": value for name, value in options.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_profile", lambda lab, device: None)  # would take a minute; tested on its own
        patch.setattr(train, "write_samples", lambda lab, path: None)
        patch.setattr(data, "VARIANTS", 1)
        patch.setattr(autoencoder, "MEASURED", 8)
        patch.setattr(train, "SAVED_EVERY", 2)
        train.main(["--out", str(folder), "--device", "cpu", *(str(part) for pair in arguments.items() for part in pair)])
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two trainings of a few steps from one seed; the second was stopped after half of them."""
    whole = train_few(tmp_path_factory.mktemp("whole"))
    stopped = tmp_path_factory.mktemp("stopped")
    save = training.Run.save

    def saved(run):
        save(run)
        if run.step == 2 and run.checkpoint.stem == "denoiser":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Run, "save", saved)
        with pytest.raises(KeyboardInterrupt):
            train_few(stopped)
    return [whole, train_few(stopped)]


def test_one_command_trains_a_pipeline_and_goes_on_where_it_was_stopped(trained):
    pipe = lab.Lab(trained[0]).pipeline()
    image = pipe("a red disc", num_inference_steps=2).images[0]
    assert image.size == (128, 128)
    weights = sorted(path.relative_to(trained[0]) for path in trained[0].glob("[!t]*/*.safetensors"))
    weights.append(Path("text_encoder/model.safetensors"))
    assert {path.parts[0] for path in weights} == {"unet", "vae", "text_encoder"}
    assert not [path for path in trained[0].rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for path in weights:
        one, two = (load_file(folder / path) for folder in trained)
        assert all(torch.equal(one[name], two[name]) for name in one)
    stages = [json.loads(line)["stage"] for line in (trained[0] / "train_log.jsonl").read_text().splitlines()]
    assert {"models", "autoencoder", "data", "denoiser", "saved"} <= set(stages)


def test_a_training_begins_with_the_weights_of_another(trained, tmp_path):
    folder = train_few(tmp_path, start=trained[0], lr=0.0)
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        before, after = (load_file(path / f"{part}.safetensors") for path in (trained[0], folder))
        assert all(torch.equal(before[name], after[name]) for name in before), part


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
def test_models_of_other_kinds_are_trained_and_judged(prediction_type, tmp_path):
    folder = train_few(tmp_path, **{"prediction-type": prediction_type})
    pipe = lab.Lab(folder).pipeline()
    with guard(pipe, None) as run:
        image = pipe("a red disc", num_inference_steps=2, height=128, width=128).images[0]
    assert image.size == (128, 128)
    (trace,) = run.traces
    assert trace.settings.prediction_type == prediction_type
    assert np.isfinite(trace.guidance_norm).sum() >= 2


def test_one_zero_stands_for_all_of_a_missing_t5():
    transformer = models.make_transformer()
    latents, words, pooled = torch.randn(2, 4, 16, 16), torch.randn(2, 8, 2 * models.WIDTH), torch.randn(2, 2 * models.WIDTH)

    def output(zeros: int):
        context = torch.cat([words, words.new_zeros(2, zeros, words.shape[2])], dim=1)
        inputs = {"hidden_states": latents, "timestep": torch.tensor([900.0, 100.0])}
        return transformer(**inputs, encoder_hidden_states=context, pooled_projections=pooled).sample

    with torch.no_grad():
        all_of_them = output(diffusion.NO_T5)
        transformer.set_attn_processor(models.OneForMany(diffusion.NO_T5))
        torch.testing.assert_close(output(1), all_of_them, rtol=1e-4, atol=1e-5)


def test_a_training_does_not_go_on_with_the_data_of_another(trained):
    with pytest.raises(ValueError, match="delete it, or train in another folder"):
        train_few(trained[0], pool=99)


def test_a_trained_folder_is_calibrated_as_it_was_written(trained):
    train.write_profile(lab.Lab(trained[0]), "cpu", steps=2)
    stability = StabilityProfile.load(trained[0] / lab.PROFILE.name)
    assert (stability.count, stability.steps, stability.settings.guidance_scale) == (50, 2, 7.5)


def test_duplicates_are_a_small_part_of_training():
    assert sum(data.SHARES[name] for name in DUPLICATED) <= 0.2
    one = {name: data.SHARES[name] / sum(world.COUNTS[name]) for name in DUPLICATED}
    assert one["quarter"] == pytest.approx(one["exact"] / 4)
    assert one["sixteenth"] == pytest.approx(one["exact"] / 16)


# The bundled model, on the tuning split: tests must not be tuned on the prompts of the figures in docs/lab.md.


@pytest.fixture(scope="module")
def bundled():
    return lab.pipeline()


@pytest.fixture(scope="module")
def sampled(bundled):
    """Six exact and six ordinary images, without and with mitigation."""
    result = {}
    for group in ("exact", "ordinary"):
        texts = lab.prompts(group, "tuning")[:6]
        for mode in ("trace", "mitigate"):
            result[group, mode] = evaluate.sample(lab.BUNDLED, bundled, texts, 3_000_000, lab.profile(), mode=mode, batch=6)
    return result


def test_the_bundled_model_is_small_and_safe():
    files = [path for path in lab.MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".txt", ".png"}


def test_the_text_encoder_has_the_names_that_transformers_4_reads_too(trained):
    """From 5.6 on it writes others, of which version 4 finds none."""
    for folder in (lab.MODEL, trained[0]):
        names = load_file(folder / "text_encoder/model.safetensors")
        assert len(names) == 36
        assert all(name.startswith("text_model.") for name in names)


def test_the_bundled_model_is_not_sampled_without_all_of_its_tensors(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(lab.MODEL, folder)
    file = folder / "text_encoder/model.safetensors"
    save_file({f"other.{name}": value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="36 are missing"):
        lab.Lab(folder).pipeline()


def test_the_bundled_profile_fits_the_bundled_model(bundled):
    with guard(bundled, lab.profile()) as run:
        bundled(lab.prompts("reference")[0], num_inference_steps=50, guidance_scale=7.5)
    assert run.traces[0].verdict != "unscored"
    assert run.traces[0].note is None
    assert isinstance(lab.profile(), StabilityProfile)
    assert lab.profile().count == 50
    assert lab.profile().reference.count == len(lab.profile().reference.asked) == 400


def test_the_bundled_model_reproduces_what_was_duplicated_and_nothing_else(sampled):
    assert (sampled["exact", "trace"].copy_scores("exact") > lab.COPY_THRESHOLD).mean() >= 5 / 6
    assert (sampled["ordinary", "trace"].copy_scores("ordinary") < lab.COPY_THRESHOLD).all()


def test_memorized_images_score_above_ordinary_ones_and_guidance_in_the_published_direction(sampled):
    for name in ("S_mem", "guidance norm, first evaluation"):
        signal = SIGNALS[name]
        exact, ordinary = ([signal(trace) for trace in sampled[group, "trace"].traces] for group in ("exact", "ordinary"))
        assert np.median(exact) > 1.5 * np.median(ordinary), name


def test_mitigation_takes_copies_away_and_leaves_ordinary_images_alone(sampled):
    before, after = (sampled["exact", mode].copy_scores("exact") for mode in ("trace", "mitigate"))
    assert (after > lab.COPY_THRESHOLD).sum() < (before > lab.COPY_THRESHOLD).sum()
    assert np.median(after) < np.median(before)
    plain, mitigated = sampled["ordinary", "trace"], sampled["ordinary", "mitigate"]
    untouched = [not trace.mitigated.any() for trace in mitigated.traces]
    assert sum(untouched) >= 5
    for i in np.flatnonzero(untouched):
        # A batch in which a neighbour is corrected is another batch only up to rounding.
        assert np.abs(plain.images[i].astype(int) - mitigated.images[i]).max() <= 1


def test_a_contact_sheet_has_a_row_a_prompt(sampled):
    sheet = evaluate.contact_sheet("exact", sampled["exact", "trace"], sampled["exact", "mitigate"])
    assert isinstance(sheet, Image.Image)
    assert sheet.size == (3 * 132, 6 * 132)


def test_check_tells_the_words_that_call_an_image_up_and_none_of_an_ordinary_prompt(call, tmp_path):
    memorized, ordinary = lab.prompts("exact", "tuning")[3], lab.prompts("ordinary", "tuning")[0]
    file = tmp_path / "answers.json"
    result = call("check", "lab", memorized, ordinary, "--profile", lab.PROFILE, "--json", file, "--device", "cpu")
    assert result.exit_code == 0, result.output
    first, second = json.loads(file.read_text(encoding="utf-8"))
    assert (first["memorized"], second["memorized"]) == (True, False)
    name = set(memorized.split()[-2:])
    assert name & set(first["words"]["words"])
    assert not name & set(first["words"]["text"].split())
    assert first["words"]["p_value"] >= 0.4
    assert first["p_value"] == first["p_value_floor"] == 1 / 8000
    assert second["words"] is None
    assert "likely memorized: rarer than 1 in 8,000 ordinary images" in result.output
    assert f"Without them, an ordinary prompt: {first['words']['text']}" in result.output
    assert f"{ordinary}\n  ordinary: as far as" in result.output


def test_a_memorized_image_is_painted_without_the_words_that_call_it_up():
    pipe, prompt = lab.pipeline(), lab.prompts("exact", "tuning")[3]
    with guard(pipe, lab.profile(), "mitigate") as run:
        image = pipe(prompt, num_inference_steps=12, generator=torch.Generator().manual_seed(3)).images[0]
    (trace,) = run.traces
    assert trace.verdict == "corrected"
    assert set(trace.words.words) & set(prompt.split()[-2:])
    assert trace.mitigated.all()
    assert lab.copy_score(image, prompt) < 0.5
    with guard(pipe) as run:
        alone = pipe(trace.words.text, num_inference_steps=12, generator=torch.Generator().manual_seed(3)).images[0]
    difference = np.abs(np.asarray(image, dtype=float) - np.asarray(alone, dtype=float))
    assert difference.mean() < 2  # as if the prompt had been given without them
