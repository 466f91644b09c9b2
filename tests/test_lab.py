"""The lab: its world, its measures, its training, and the bundled model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from memorization_guard import StabilityProfile, lab
from memorization_guard.diffusers import guard
from memorization_guard.evaluation.signals import SIGNALS
from memorization_guard.lab import evaluate, train, world

SPLITS = ("tuning", "evaluation")


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
    assert len(lab.prompts("reference")) >= 50
    assert len(lab.prompts("exact")) + len(lab.prompts("exact", "tuning")) >= 40
    assert len(lab.prompts("template")) + len(lab.prompts("template", "tuning")) >= 30
    held_out = sum(len(groups[name]) for name in ("ordinary/tuning", "ordinary/evaluation", "reference"))
    assert held_out >= 0.15 * (held_out + len(groups["trained"]))
    with pytest.raises(ValueError, match="there are reference, ordinary"):
        lab.prompts("extact")
    with pytest.raises(ValueError, match="evaluation and tuning"):
        lab.prompts("exact", "test")


def test_no_group_gives_itself_away_by_the_length_or_form_of_its_captions():
    groups = every_prompt()
    forms = ("a picture of", " alone", "near", ", a ", ", from ", ", by ")

    def described(texts):
        """A row a caption: its number of words, and which forms it has."""
        return np.array([[len(text.split()), *(form in text for form in forms)] for text in texts], dtype=float)

    ordinary = described(groups["trained"])
    for name, texts in groups.items():
        # Four standard errors: one group in thousands by chance.
        error = ordinary.std(axis=0) / np.sqrt(len(texts))
        assert (np.abs(described(texts).mean(axis=0) - ordinary.mean(axis=0)) < 4 * error).all(), name


def test_the_captions_are_those_that_the_seed_gives():
    assert world.make_captions(0) == world.captions()


def test_a_caption_leaves_most_of_the_image_open():
    figures = evaluate.world_figures(lab.BUNDLED, count=60, renders=8)
    assert 0.0 < figures["caption_variance_share"] < 0.3
    for group, statistics in figures["plain_statistics"].items():
        for name, auc in statistics.items():
            assert 0.25 < auc < 0.75, (group, name)


def test_the_renderer_repeats_itself_for_a_seed_only():
    captions = world.captions()["ordinary/trained"][:3]
    images = [world.render(captions, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert images[0].shape == (3, 3, 64, 64)
    assert images[0].abs().max() <= 1
    assert torch.equal(images[0], images[1])
    assert (images[0] - images[2]).abs().mean() > 0.05


def test_the_copy_score_sees_a_copy_and_nothing_else():
    first, second = lab.prompts("exact")[:2]
    original = lab.training_image(first)
    assert lab.copy_score(original, first) == pytest.approx(1.0)
    faded = np.asarray(original) * 0.3 + 120
    assert lab.copy_score(faded, first) > 0.999
    assert lab.copy_score(255.0 - np.asarray(original), first) == 0.0
    assert lab.copy_score(lab.training_image(second), first) < lab.COPY_THRESHOLD
    assert lab.nearest_copy(original) == (pytest.approx(1.0), first)
    assert lab.copy_score(np.zeros((64, 64, 3)), first) == 0.0
    # The autoencoder's reconstruction of a training image is as near as the model can come: it counts as a copy.
    decoded = world.read_sheet(lab.MODEL / lab.DECODED)
    for prompt, image in zip(world.duplicates(), decoded, strict=False):
        assert lab.copy_score(image, prompt) == pytest.approx(1.0)
    with pytest.raises(KeyError, match="no exact or template prompt"):
        lab.copy_score(original, "a prompt of nobody")
    with pytest.raises(ValueError, match="64 x 64"):
        lab.copy_score(original.resize((32, 32)), first)


def test_the_varying_part_of_a_template_does_not_count():
    prompt = lab.prompts("template")[0]
    fixed = lab.training_mask(prompt)
    assert 0.3 < fixed.mean() < 0.8
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    mixed = np.where(fixed[..., None], np.asarray(lab.training_image(prompt)), noise)
    assert lab.copy_score(mixed, prompt) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two trainings of a few steps from one seed."""
    folders = []
    few = {"--vae-steps": 2, "--vae-pool": 32, "--vae-batch": 8, "--pool": 300, "--steps": 2, "--batch": 80}
    for number in range(2):
        folder = tmp_path_factory.mktemp(f"trained{number}")
        arguments = ["--out", str(folder), "--device", "cpu", *(str(part) for pair in few.items() for part in pair)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "write_profile", lambda lab, device: None)  # would take a minute; tested on its own
            train.main(arguments)
        folders.append(folder)
    return folders


def test_one_command_trains_a_pipeline_and_a_seed_repeats_it(trained):
    from safetensors.torch import load_file

    pipe = lab.Lab(trained[0]).pipeline()
    image = pipe("a red disc", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    weights = sorted(path.relative_to(trained[0]) for path in trained[0].rglob("*.safetensors"))
    assert {path.parts[0] for path in weights} == {"unet", "vae", "text_encoder"}
    assert not [path for path in trained[0].rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for path in weights:
        one, two = (load_file(folder / path) for folder in trained)
        assert all(torch.equal(one[name], two[name]) for name in one)
    stages = [json.loads(line)["stage"] for line in (trained[0] / "train_log.jsonl").read_text().splitlines()]
    assert {"models", "autoencoder", "data", "unet", "saved"} <= set(stages)


def test_a_trained_folder_is_calibrated_as_it_was_written(trained):
    train.write_profile(lab.Lab(trained[0]), "cpu", steps=2)
    stability = StabilityProfile.load(trained[0] / lab.PROFILE.name)
    assert (stability.count, stability.steps, stability.settings.guidance_scale) == (50, 2, 7.5)


def test_duplicates_are_a_small_part_of_training():
    assert train.SHARES["exact"] + train.SHARES["template"] <= 0.1
    for batch in (80, 160):
        counts = {name: round(share * batch) for name, share in train.SHARES.items()}
        assert counts["exact"] + counts["template"] <= 0.1 * batch


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


def test_the_bundled_profile_fits_the_bundled_model(bundled):
    with guard(bundled, lab.profile()) as run:
        bundled(lab.prompts("reference")[0], num_inference_steps=50, guidance_scale=7.5)
    assert run.traces[0].verdict != "unscored"
    assert run.traces[0].note is None
    assert isinstance(lab.profile(), StabilityProfile)
    assert lab.profile().count == 50


def test_the_bundled_model_reproduces_what_was_duplicated_and_nothing_else(sampled):
    assert (sampled["exact", "trace"].copy_scores("exact") > lab.COPY_THRESHOLD).mean() >= 5 / 6
    assert (sampled["ordinary", "trace"].copy_scores("ordinary") < lab.COPY_THRESHOLD).all()


def test_memorized_images_score_above_ordinary_ones_and_guidance_in_the_published_direction(sampled):
    for name in ("S_mem", "guidance norm, mean"):
        signal = SIGNALS[name]
        exact, ordinary = ([signal(trace) for trace in sampled[group, "trace"].traces] for group in ("exact", "ordinary"))
        assert np.median(exact) > max(ordinary), name


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
    assert sheet.size == (3 * 68 * 2, 6 * 68 * 2)
