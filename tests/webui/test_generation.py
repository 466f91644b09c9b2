"""Generations in the real hosts: what the guard sees and does, and that it leaves nothing behind."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from memorization_guard import StabilityProfile, Thresholds, Trace, evidence, lab
from memorization_guard.core.calibration import WHOLE_RUNS
from memorization_guard.core.judge import HOLD_SIGMA
from memorization_guard.core.reference import OPEN_SIGMA
from memorization_guard.core.trace import rarity
from memorization_guard.reports import withheld

TITLE = "Memorization Guard"
#: Thresholds that every image leaves.
EVERYTHING = Thresholds(false_positive_rate=0.999)
#: The last one says less of an image than the usual prompt does, so that nothing is below all of them.
REFERENCES = [*lab.prompts("reference")[:11], "fox"]
EXACT = lab.prompts("exact", "tuning")[0]
ORDINARY = lab.prompts("ordinary", "tuning")[0]
TRACE = ("trace",)
#: Mean difference of two images' channels, of 255, up to which they differ by rounding only.
CLOSE = 1.0


@pytest.fixture
def profile(host):
    """A profile of the usual settings."""
    name = "usual"
    if not (host.data / "models/stability_profiles" / f"{name}.safetensors").exists():
        host.calibrate(name, REFERENCES)
    return name


@pytest.fixture
def lab_profile(webui):
    """A profile of the lab model that tells how rare its copies are."""
    name = "lab"
    if not (webui.data / "models/stability_profiles" / f"{name}.safetensors").exists():
        webui.calibrate(name, lab.prompts("reference"), steps=20)
    return name


def same_as_unguarded(host, *guard, path="txt2img", **settings):
    """Makes an image without the guard, with it, and without it again; gives the guarded answer."""
    if path == "img2img":
        host.make(
            path=path, **settings
        )  # to encode an image the host draws from a generator that the run before it has seeded
    before = host.make(path=path, **settings)
    guarded = host.make(*(guard or TRACE), path=path, **settings)
    after = host.make(path=path, **settings)
    assert guarded.pixels == before.pixels == after.pixels
    return guarded


def init_images(host):
    answer = host.ask("/sdapi/v1/txt2img", {**host.usual, "seed": 5})
    return answer["images"]


# ---------------------------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("path", ["txt2img", "img2img"])
def test_every_sampler_is_traced_and_paints_the_same(host, path):
    settings = {"init_images": init_images(host), "denoising_strength": 0.6} if path == "img2img" else {}
    host.make(path=path, **settings)  # as in same_as_unguarded
    wrong = {}
    for sampler in [each["name"] for each in host.ask("/sdapi/v1/samplers")]:
        plain = host.make(path=path, sampler_name=sampler, **settings)
        traced = host.make(*TRACE, path=path, sampler_name=sampler, **settings)
        trace = traced.trace
        well = (
            (traced.pixels == plain.pixels or (path, sampler) == ("img2img", "DDPM"))  # Forge's paints another one each time
            and 0 < len(trace.steps) <= len(trace.evaluations.sigma)
            and np.isfinite(trace.steps.update_norm).all()
            and (trace.steps.sigma[:-1] >= trace.steps.sigma[1:]).all()
            and np.isfinite(trace.evaluations.guidance).all()
        )
        if not well:
            wrong[sampler] = (trace.note, trace.settings.steps, trace.steps.sigma.tolist())
    assert not wrong


def test_every_sampler_is_judged_by_one_profile_and_corrected_from_the_first_evaluation_on(host, profile):
    wrong = {}
    for sampler in [each["name"] for each in host.ask("/sdapi/v1/samplers")]:
        plain = host.make(sampler_name=sampler)
        answer = host.make("mitigate", profile, *host.constants(EVERYTHING), sampler_name=sampler)
        trace, own = answer.trace, sampler == "Euler"
        well = (
            trace.verdict == "corrected"
            and trace.p_value is not None
            and (trace.score is not None) == own
            and corrected_from_the_first(trace)
            and answer.pixels != plain.pixels
            and f"{TITLE} rarity: " in answer.info["infotexts"][0]
        )
        if not well:
            wrong[sampler] = (trace.verdict, trace.note, trace.p_value, trace.score, trace.evaluations.corrected.tolist())
    assert not wrong


@pytest.mark.parametrize("scheduler", ["Karras", "Exponential", "SGM Uniform", "Align Your Steps", "Simple", "Beta"])
def test_schedules(host, scheduler):
    trace = same_as_unguarded(host, scheduler=scheduler).trace
    assert np.allclose(trace.steps.sigma, trace.settings.sigmas, rtol=2e-3)


def test_an_option_of_the_sampler_is_part_of_its_name(host):
    assert host.make(*TRACE, sampler_name="Euler a").trace.settings.sampler == "euler_ancestral"
    assert host.make(*TRACE, sampler_name="Euler a", eta=0.5).trace.settings.sampler == "euler_ancestral(eta=0.5)"
    assert host.make(*TRACE, sampler_name="DPM++ 2M SDE Heun").trace.settings.sampler == "dpmpp_2m_sde(solver_type=heun)"


# ------------------------------------------------------------------------------------------------------ ways to generate


def test_batches_have_a_trace_for_each_image(host, profile):
    settings = {"batch_size": 2, "n_iter": 2}
    answer = same_as_unguarded(host, "trace", profile, **settings)
    traces = [runs[0] for runs in answer.traces]
    assert [len(runs) for runs in answer.traces] == [1, 1, 1, 1]
    assert len({tuple(trace.steps.update_norm) for trace in traces}) == 4
    for number, trace in enumerate(traces):
        alone = host.make("trace", profile, seed=host.usual["seed"] + number).trace
        assert np.allclose(alone.steps.update_norm, trace.steps.update_norm, rtol=1e-3)
    assert all(f"{TITLE} verdict" in text for text in answer.info["infotexts"])


def test_a_grid_of_images_has_no_verdict_of_its_own(host, profile):
    with host.options(return_grid=True, samples_save=False):
        answer = host.make("trace", profile, batch_size=2, save_images=True)
    assert [f"{TITLE} verdict" in text for text in answer.info["infotexts"]] == [False, True, True]


def test_hires_fix_has_two_runs(host, profile):
    settings = {
        "enable_hr": True,
        "hr_scale": 2,
        "hr_upscaler": "Latent",
        "denoising_strength": 0.6,
        "hr_second_pass_steps": 8,
    }
    answer = same_as_unguarded(host, "trace", profile, **settings)
    ((first, second),) = answer.traces
    assert first.verdict == "stable" or first.trigger_step is not None
    assert second.p_value is not None  # of what its prompt says in noise
    assert second.settings.latent_shape[1] == 2 * first.settings.latent_shape[1]
    text = answer.info["infotexts"][0]
    assert f"{TITLE} verdict: {first.verdict}" in text
    assert f"{TITLE} hires verdict: {second.verdict}" in text


def test_inpainting(host, profile):
    images = init_images(host)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    settings = {"init_images": images, "mask": png(mask), "denoising_strength": 0.8, "inpainting_fill": 1}
    for sampler in ("Euler", "DDIM", "UniPC"):
        trace = same_as_unguarded(host, path="img2img", sampler_name=sampler, **settings).trace
        assert np.isfinite(trace.steps.update_norm).all()
    corrected = host.make("mitigate", profile, *host.constants(EVERYTHING), path="img2img", **settings)
    assert corrected.trace.mitigated.any()


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": "a red disc AND a blue cross :0.5"},
        {"prompt": "[a red disc:a blue cross:0.5] on sand"},
        {"prompt": "a fox", "negative_prompt": "a blue cross, " * 20},
        {"cfg_scale": 1},
        {"s_churn": 5.0},
        {"subseed": 7, "subseed_strength": 0.3},
        {"tiling": True},
    ],
    ids=lambda settings: " ".join(settings),
)
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_prompts_and_settings(host, settings, sampler):
    trace = same_as_unguarded(host, sampler_name=sampler, **settings).trace
    assert np.isfinite(trace.steps.update_norm).all()
    # Forge does not evaluate the unconditional prediction where it would not count.
    assert np.isfinite(trace.evaluations.guidance).all() == (host.kind == "webui" or "cfg_scale" not in settings)


@pytest.mark.parametrize(
    "options",
    [
        {"skip_early_cond": 0.3},
        {"s_min_uncond": 3.0, "s_min_uncond_all": True},
        {"pad_cond_uncond": True},
        {"batch_cond_uncond": False},
        {"always_discard_next_to_last_sigma": True},
        {"sgm_noise_multiplier": True},
        {"eta_noise_seed_delta": 31337},
        {"live_previews_enable": False},
    ],
    ids=lambda options: " ".join(options),
)
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_options_of_the_host(host, options, sampler):
    with host.options(**options):
        trace = same_as_unguarded(host, sampler_name=sampler, prompt="word " * 90).trace
    assert np.isfinite(trace.steps.update_norm).all()
    guided = np.isfinite(trace.evaluations.guidance)
    if "skip_early_cond" in options:
        assert not guided[0]
        assert guided[-1]
    elif "s_min_uncond" in options and sampler == "Euler":
        assert guided[0]
        assert not guided[-1]
    elif "s_min_uncond" not in options:
        assert guided.all()


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_joined_prompts_are_judged_and_corrected(host, profile, sampler):
    settings = {"prompt": f"{EXACT} AND {ORDINARY} :0.5", "sampler_name": sampler}
    plain = host.make(**settings)
    trace = (answer := host.make("mitigate", profile, *host.constants(EVERYTHING), **settings)).trace
    assert corrected_from_the_first(trace)
    assert np.isfinite(trace.evaluations.guidance).all()
    assert answer.pixels != plain.pixels


def test_a_prompt_joined_with_itself_is_judged_as_alone(host, profile):
    alone = host.make("trace", profile).trace
    joined = host.make("trace", profile, prompt="a fox :0.25 AND a fox :0.75").trace
    assert joined.p_value == pytest.approx(alone.p_value, rel=1e-2, abs=1e-4)
    assert np.allclose(joined.evaluations.detail, alone.evaluations.detail, rtol=1e-2, equal_nan=True)
    assert np.allclose(joined.evaluations.guidance, alone.evaluations.guidance, rtol=1e-2)


def test_the_refiner_switches_under_the_guard(host):
    name = host.ask("/sdapi/v1/sd-models")[0]["title"]
    trace = same_as_unguarded(host, refiner_checkpoint=name, refiner_switch_at=0.5).trace
    plain = host.make(*TRACE).trace
    assert trace.settings.model_hash != plain.settings.model_hash


def test_a_lora_is_part_of_the_models_identity_while_it_is_there(webui):
    import torch
    from safetensors.torch import save_file

    folder = webui.data / "models/Lora"
    folder.mkdir(exist_ok=True)
    layer = "diffusion_model_input_blocks_3_1_transformer_blocks_0_attn2_to_v"
    down, up = torch.ones(4, 128), torch.ones(96, 4)
    save_file({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}, folder / "guard-test.safetensors")
    webui.ask("/sdapi/v1/refresh-loras", {})
    plain = webui.make(*TRACE)
    merged = same_as_unguarded(webui, prompt="a fox <lora:guard-test:0.1>")
    assert merged.pixels != plain.pixels
    other = webui.make(*TRACE, prompt="a fox <lora:guard-test:0.2>")
    after = webui.make(*TRACE)
    hashes = [answer.trace.settings.model_hash for answer in (plain, merged, other, after)]
    assert hashes[0] == hashes[3]
    assert len(set(hashes)) == 3
    assert after.pixels == plain.pixels
    assert "Networks not found" not in webui.said()


@pytest.mark.parametrize("how", ["interrupt", "skip"])
def test_an_ended_run_is_told_and_the_next_is_whole(host, how):
    before = host.make()
    ended = {}

    def generate():
        ended["answer"] = host.make(*TRACE, steps=150, width=256, height=256)

    thread = threading.Thread(target=generate)
    thread.start()
    deadline = time.monotonic() + 60
    while host.ask("/sdapi/v1/progress?skip_current_image=true")["state"]["sampling_step"] < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    host.ask(f"/sdapi/v1/{how}", {})
    thread.join()
    trace = ended["answer"].trace
    assert 0 < len(trace.steps) < 150
    assert trace.verdict == "unscored"
    assert "interrupted" in trace.note
    assert host.make().pixels == before.pixels


def test_an_error_of_the_host_leaves_nothing_behind(host):
    before = host.make()
    with pytest.raises(RuntimeError, match="500"):
        host.make(*TRACE, enable_hr=True, hr_upscaler="no such upscaler")
    assert host.make().pixels == before.pixels
    assert host.make(*TRACE).pixels == before.pixels


# ------------------------------------------------------------------------------------------------------ what it says


def test_infotext_and_info_carry_the_verdict(host, profile):
    answer = host.make("trace", profile)
    text, trace = answer.info["infotexts"][0], answer.trace
    assert f"{TITLE}: trace" in text
    assert f"{TITLE} profile: {profile}" in text
    assert f"{TITLE} verdict: {trace.verdict}" in text
    assert f"{TITLE} score: {trace.score:.2f}" in text
    assert f"{TITLE} rarity: " in text
    assert rarity(trace.p_value) in text
    assert "traces" not in text


def test_without_the_guard_nothing_is_said(host):
    answer = host.make()
    assert TITLE not in json.dumps(answer.info)


def test_other_steps_schedule_and_guidance_are_scored_and_the_infotext_says_how_rare_it_is(host, profile):
    for settings in (
        {"steps": host.usual["steps"] + 3},
        {"scheduler": "Karras"},
        {"cfg_scale": 30},
    ):
        answer = host.make("trace", profile, **settings)
        assert answer.trace.verdict != "unscored"
        assert answer.trace.score is None
        assert f"{TITLE} rarity: " in answer.info["infotexts"][0]
        assert f"{TITLE} score: " not in answer.info["infotexts"][0]


def test_guidance_changes_nothing_in_the_first_verdict(host, profile):
    own = host.make("trace", profile).trace
    for scale in (2, 30):
        other = host.make("trace", profile, cfg_scale=scale).trace
        assert other.p_value == pytest.approx(own.p_value, rel=1e-4)
        assert other.evaluations.detail[0] == pytest.approx(own.evaluations.detail[0], rel=1e-4)


def test_another_size_is_judged_at_the_size_of_the_profile(host, profile):
    # On the lab model no reference has less detail than the usual prompt, which then exceeds no threshold.
    prompt = {"prompt": EXACT} if host.kind == "webui" else {}
    for size in ({"width": 192, "height": 192, **prompt}, {"width": 192, "height": 128, **prompt}):
        answer = host.make("mitigate", profile, *host.constants(EVERYTHING), **size)
        assert answer.trace.verdict == "corrected"
        assert answer.trace.asked is not None
        assert answer.trace.mitigated.any()
        assert answer.trace.note is None
        assert answer.pixels != host.make(**size).pixels


def test_where_there_is_one_prediction_only_the_answers_are_judged(host, profile):
    prompt = {"prompt": EXACT} if host.kind == "webui" else {}
    for changed, settings in (({"skip_early_cond": 1.0}, {}), ({}, {"cfg_scale": 1})):
        with host.options(**changed):
            trace = host.make("mitigate", profile, *host.constants(EVERYTHING), **settings, **prompt).trace
        assert trace.verdict == "corrected"
        assert trace.asked is not None
        assert trace.mitigated.any()


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "DPM fast", "DDIM", "UniPC"])
def test_a_run_is_stopped_once_all_its_images_have_triggered(host, profile, sampler):
    settings = {"sampler_name": sampler, "steps": 24, "batch_size": 2}
    whole = host.make("trace", profile, *host.constants(EVERYTHING), **settings)
    stopped = host.make("stop", profile, *host.constants(EVERYTHING), **settings)
    assert len(stopped.images) == len(whole.images) == 2
    for (trace,), (reference,) in zip(stopped.traces, whole.traces, strict=True):
        assert trace.verdict == "likely copy"
        assert len(trace.steps) < len(reference.steps)
        assert trace.trigger_step == reference.trigger_step
        assert trace.note == (
            "The run ended early: stopped, since every image of the batch had triggered. Nothing of the image is handed on: "
            "if a picture comes out, it is a plain one."
        )
    assert all((np.asarray(image) == withheld.GREY).mean() > 0.5 for image in stopped.images)
    assert f"{TITLE}: stop" in stopped.info["infotexts"][0]
    assert f"{TITLE} verdict: " in stopped.info["infotexts"][0]
    # The next one is whole.
    assert len(host.make(*TRACE, **settings).traces[0][0].steps) == len(whole.traces[0][0].steps)


def test_the_lab_model_is_stopped_at_a_copy_and_paints_what_is_ordinary_to_its_end(webui, lab_profile):
    answer = webui.make("stop", lab_profile, prompt=EXACT, steps=20)
    assert answer.trace.verdict == "likely copy"
    assert len(answer.trace.steps) < 15
    assert lab.copy_score(answer.images[0], EXACT) < 0.5
    ordinary = webui.make("stop", lab_profile, prompt=ORDINARY, steps=20)
    assert len(ordinary.trace.steps) == 20
    assert ordinary.pixels == webui.make(prompt=ORDINARY, steps=20).pixels


@pytest.mark.parametrize(
    ("guard", "why"),
    [
        (("trace", "no such profile"), "there is no stability profile 'no such profile'"),
        (("guess",), "the mode is 'guess'"),
        (("trace", "None", -3), "false_positive_rate is -3"),
        (("trace", "None", "published"), "the published method edits latents between solver steps"),
    ],
)
def test_bad_input_to_the_accordion_loses_no_image(host, guard, why):
    arguments = [*guard, *["None", *host.constants(Thresholds())][len(guard) - 1 :]]
    answer = host.make(*arguments)
    assert answer.pixels == host.make().pixels
    assert TITLE not in answer.info["infotexts"][0]
    assert f"not watched: {why}" in host.said()


def test_the_script_refuses_in_the_words_of_the_accordion_before_it_samples(host):
    for mode, profile, why in (
        ("trace", "no such profile", "there is no stability profile 'no such profile'"),
        ("mitigate", "None", "nothing is judged, and mode mitigate does nothing"),
        ("stop", "None", "nothing is judged, and mode stop does nothing"),
        ("guess", "None", "the mode is 'guess'"),
    ):
        warning = next(told for told in warnings(host.make(mode, profile)) if why in told)
        with pytest.raises(RuntimeError, match="500") as refused:
            host.script(mode, profile)
        assert warning.removeprefix("not watched: ") in str(refused.value)


def test_where_the_script_and_the_accordion_are_both_on_it_is_said_which_one_holds(host, profile):
    alone = host.script("mitigate", profile, thresholds=EVERYTHING)
    on = {"alwayson_scripts": {TITLE: {"args": [True, "trace", "None"]}}}
    both = host.script("mitigate", profile, thresholds=EVERYTHING, **on)
    assert both.pixels == alone.pixels
    (told,) = set(warnings(both)) - set(warnings(alone))
    assert told == "the script of the dropdown and the accordion are both on: the script's settings hold"


def test_traces_and_graphs_beside_the_image(host, profile):
    folder = host.data / "saved"
    options = {"samples_save": True, "outdir_txt2img_samples": str(folder), "save_to_dirs": False}
    with host.options(memorization_guard_save_trace=True, memorization_guard_gallery_graph=True, **options):
        answer = host.make("trace", profile, save_images=True, batch_size=2)
    files = sorted(folder.rglob("*.stability.json"))
    assert len(files) == 2
    # What follows from the rounded numbers of a list can differ in the last digit: both are read once.
    saved = [Trace.from_dict(json.loads(file.read_text(encoding="utf-8"))["traces"][0]).to_dict() for file in files]
    told = [runs[0].to_dict() for runs in answer.traces]
    assert sorted(map(json.dumps, saved)) == sorted(map(json.dumps, told))
    assert all(file.with_name(file.name.replace(".stability.json", ".png")).exists() for file in files)
    assert [image.size for image in answer.images[-2:]] == [(640, 440)] * 2


def test_saved_images_carry_their_evidence_and_what_else_is_saved_does_not(host, profile, tmp_path):
    folder = host.data / "evidence"
    options = {
        "samples_save": True,
        "grid_save": True,
        "save_images_before_highres_fix": True,
        "outdir_txt2img_samples": str(folder),
        "outdir_txt2img_grids": str(folder),
        "save_to_dirs": False,
        "grid_save_to_dirs": False,
    }
    hires = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.6, "hr_upscaler": "Latent"}
    with host.options(**options):
        answer = host.make("trace", profile, save_images=True, batch_size=2, **hires)
    files = sorted(folder.iterdir())
    carrying = [file for file in files if evidence.KEY in Image.open(file).text]
    assert len(files) == 5, files
    assert [file for file in files if "grid" not in file.name and "before" not in file.name] == carrying
    for file, runs in zip(carrying, answer.traces, strict=True):
        found = evidence.verify(file)
        assert (found.pixels, found.settings, found.unaltered, found.runs) == ("match", "match", True, ("", "hires"))
        assert [trace.to_dict() for trace in found.traces] == [trace.to_dict() for trace in runs]

    call = [sys.executable, "-m", "memorization_guard", "verify"]
    told = subprocess.run([*call, carrying[0]], capture_output=True, text=True, check=True)
    assert "the trace belongs to this image" in told.stdout
    with Image.open(carrying[0]) as image:
        text = PngInfo()
        for name, value in image.text.items():
            text.add_text(name, value)
        red, *others = image.getpixel((3, 3))
        image.putpixel((3, 3), (red ^ 1, *others))
        image.save(tmp_path / "changed.png", pnginfo=text)
    told = subprocess.run([*call, tmp_path / "changed.png"], capture_output=True, text=True)
    assert told.returncode == 1, told.stdout + told.stderr
    assert "does NOT belong" in told.stdout


def test_evidence_respects_that_the_host_is_to_write_no_infotext_and_lies_beside_other_formats(host):
    options = {"samples_save": True, "save_to_dirs": False, "memorization_guard_save_trace": True}
    for name, more in (("bare", {"enable_pnginfo": False}), ("lossy", {"samples_format": "jpg"})):
        folder = host.data / name
        with host.options(outdir_txt2img_samples=str(folder), **options, **more):
            host.make(*TRACE, save_images=True)
        (file,) = [file for file in folder.iterdir() if file.suffix != ".json"]
        assert evidence.KEY not in getattr(Image.open(file), "text", {})
        found = evidence.verify(file)
        assert found.found_in.name == f"{file.stem}.stability.json"
        assert found.pixels == ("match" if name == "bare" else "unknown")
    assert "no evidence in the image" not in host.said()


# ------------------------------------------------------------------------------------------------- the dropdown's script


def test_the_script_does_what_the_accordion_does(host, profile):
    by_accordion, by_script = host.make("trace", profile), host.script("trace", profile)
    assert by_script.pixels == by_accordion.pixels
    assert by_script.trace.to_dict() == by_accordion.trace.to_dict()
    assert f"Script: {TITLE}" in by_script.info["infotexts"][0]


def test_compare_gives_pairs_and_their_graphs(host, profile):
    plain = host.make(seed=1, batch_size=2).pixels
    answer = host.script("compare", profile, thresholds=EVERYTHING, batch_size=2, seed=1)
    assert len(answer.images) == 8
    for number in range(2):
        without, mitigated, *graphs = answer.images[4 * number : 4 * number + 4]
        assert without.tobytes() == plain[number]
        assert mitigated.tobytes() != without.tobytes()
        assert [graph.size for graph in graphs] == [(640, 440)] * 2
    assert len(answer.info["infotexts"]) == 8


def test_calibration_makes_a_profile_of_the_settings(host, profile):
    made = StabilityProfile.load(host.data / "models/stability_profiles" / f"{profile}.safetensors")
    assert made.count >= 8
    trace = host.make("trace", profile).trace
    assert trace.settings.model_hash == made.settings.model_hash is not None
    assert made.settings.sampler == "euler"
    assert made.settings.steps == host.usual["steps"]
    assert trace.note is None
    for name, replace, why in ((profile, False, "tick 'Replace'"), ("../escape", True, "'../escape' cannot name a profile")):
        arguments = "\n".join(REFERENCES), name, replace
        assert why in refusal(host, lambda arguments=arguments: host.script("calibrate", "None", *arguments))
    assert not (host.data / "models/escape.safetensors").exists()


def test_the_next_request_can_name_the_profile_that_one_has_made(host):
    saved = host.script("calibrate", "None", "\n".join(REFERENCES), "", True, batch_size=8, prompt="").info["infotexts"][0]
    name = re.search("saved the stability profile '(.*?)'", saved)[1]
    answer = host.make("trace", name)
    assert answer.trace.p_value is not None
    assert f"{TITLE} profile: {name}" in answer.info["infotexts"][0]


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_of_many_references_those_after_the_first_fifty_are_evaluated_once(host, sampler):
    prompts, before = lab.prompts("reference")[: WHOLE_RUNS + 10], len(host.said())
    host.calibrate("many", prompts, sampler_name=sampler)
    made = StabilityProfile.load(host.data / "models/stability_profiles/many.safetensors")
    assert 0 < len(made.reference.probed) <= 10
    assert len(prompts) - 3 <= made.reference.count == len(prompts) - sum(made.left_out.values())
    assert made.reference.asked.shape == (made.reference.count,)
    assert "The run ended early" not in host.said()[before:]  # they were stopped as they should be
    assert not list((host.data / "models/stability_profiles").glob(".calibration-*"))


@pytest.mark.parametrize("sampler", ["Heun", "DPM fast", "DDIM", "UniPC"])
def test_a_profile_can_be_made_with_other_samplers(host, sampler):
    host.calibrate("of-sampler", REFERENCES, sampler_name=sampler)
    trace = host.make("mitigate", "of-sampler", *host.constants(EVERYTHING), sampler_name=sampler).trace
    assert trace.verdict == "corrected"
    assert corrected_from_the_first(trace)


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2M", "DDIM", "UniPC", "LCM", "Restart"])
def test_a_transferred_profile_takes_ordinary_images_for_ordinary(webui, lab_profile, sampler):
    for seed, prompt in enumerate(lab.prompts("ordinary", "tuning")[:4]):
        trace = webui.make("trace", lab_profile, sampler_name=sampler, steps=20, prompt=prompt, seed=seed).trace
        assert trace.verdict == "stable", trace.p_value


def test_the_lab_model_is_found_out_and_steered(webui, lab_profile):
    copied, left, touched = 0, 0, 0
    for seed, prompt in enumerate(lab.prompts("exact", "tuning")[:3]):
        plain = webui.make("trace", lab_profile, steps=20, prompt=prompt, seed=seed)
        assert plain.trace.trigger_step is not None
        copied += is_copy(plain, prompt)
        left += is_copy(webui.make("mitigate", lab_profile, steps=20, prompt=prompt, seed=seed), prompt)
    for seed, prompt in enumerate(lab.prompts("ordinary", "tuning")[:3]):
        touched += webui.make("mitigate", lab_profile, steps=20, prompt=prompt, seed=seed).trace.mitigated.any()
    assert (copied, left, touched) == (3, 0, 0)


def test_no_sampler_leaves_a_copy(webui, lab_profile):
    copied, left = {}, {}
    for sampler in [each["name"] for each in webui.ask("/sdapi/v1/samplers")]:
        settings = {"sampler_name": sampler, "steps": 20, "prompt": EXACT}
        copied[sampler] = is_copy(webui.make(**settings), EXACT)
        left[sampler] = is_copy(webui.make("mitigate", lab_profile, **settings), EXACT)
    assert sum(copied.values()) > 15, copied
    assert not any(left.values()), left


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": f"{EXACT} AND {EXACT} :0.5"},
        {"prompt": f"{EXACT} AND {ORDINARY} :0.05"},
        {"cfg_scale": 1, "prompt": EXACT},
        {"cfg_scale": 14, "prompt": EXACT, "negative_prompt": ORDINARY},
    ],
    ids=["and itself", "and another", "cfg 1", "cfg 14"],
)
@pytest.mark.parametrize("sampler", ["Euler", "DDIM", "UniPC"])
def test_no_way_to_prompt_leaves_a_copy(webui, lab_profile, settings, sampler):
    settings = {"steps": 20, "sampler_name": sampler, **settings}
    assert is_copy(webui.make(**settings), EXACT)
    assert not is_copy(webui.make("mitigate", lab_profile, **settings), EXACT)


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_early_evaluations_without_guidance_leave_no_copy(webui, lab_profile, sampler):
    settings = {"steps": 20, "sampler_name": sampler, "prompt": EXACT}
    with webui.options(skip_early_cond=0.2):
        assert is_copy(webui.make(**settings), EXACT)
        assert not is_copy(webui.make("mitigate", lab_profile, **settings), EXACT)


def test_a_second_pass_leaves_no_copy_where_its_profile_fits(webui, lab_profile):
    hires = {"enable_hr": True, "hr_resize_x": 128, "hr_resize_y": 128, "hr_upscaler": "Latent", "denoising_strength": 0.9}
    settings = {"prompt": EXACT, "steps": 20, **hires}
    assert is_copy(webui.make(**settings), EXACT)
    answer = webui.make("mitigate", lab_profile, **settings)
    assert [trace.verdict for trace in answer.traces[0]] == ["corrected"] * 2
    assert not is_copy(answer, EXACT)


# ------------------------------------------------------------------------------------------------------ the words


STEER = Thresholds(correction="steer")


def test_an_image_of_a_memorized_prompt_goes_on_without_the_words_that_call_the_copy_up(webui, lab_profile):
    settings = {"prompt": EXACT, "steps": 20}
    answer = webui.make("mitigate", lab_profile, **settings)
    assert (answer.trace.verdict, is_copy(answer, EXACT)) == ("corrected", False)
    words = answer.trace.words
    assert set(words.words) & set(EXACT.split()[-2:]), words
    assert answer.pixels != webui.make("mitigate", lab_profile, *webui.constants(STEER), **settings).pixels
    # It is what the host makes of the other prompt by itself.
    assert close(answer, webui.make(**settings | {"prompt": words.text}))
    text = answer.info["infotexts"][0]
    written = ", ".join(words.words)
    assert f"{TITLE} words: " + (f'"{written}"' if len(words.words) > 1 else written) in text
    assert text.startswith(f"{EXACT}\n")
    # The host keeps what it made of the prompt, for the next image.
    assert is_copy(webui.make(**settings), EXACT)


def test_the_words_are_told_where_nothing_is_corrected(webui, lab_profile):
    answer = same_as_unguarded(webui, "trace", lab_profile, prompt=EXACT, steps=20)
    assert answer.trace.words.words == webui.make("mitigate", lab_profile, prompt=EXACT, steps=20).trace.words.words


def test_an_ordinary_prompt_has_no_words_and_keeps_every_bit(webui, lab_profile):
    answer = same_as_unguarded(webui, "mitigate", lab_profile, prompt=ORDINARY, steps=20)
    assert answer.trace.words is None
    assert f"{TITLE} words" not in answer.info["infotexts"][0]


def batch_of(*prompts):
    """Settings of a batch that has a prompt for each image."""
    return {"script_name": "Batch of prompts", "script_args": ["\n".join(prompts)]}


@pytest.mark.parametrize("sampler", ["Euler a", "DDIM", "UniPC"])
def test_of_a_batch_the_ordinary_image_keeps_every_bit(webui, lab_profile, sampler):
    settings = {"steps": 20, "sampler_name": sampler, **batch_of(ORDINARY, EXACT)}
    plain = webui.make(**settings)
    answer = webui.make("mitigate", lab_profile, **settings)
    (ordinary,), (exact,) = answer.traces
    assert (ordinary.words, ordinary.verdict, exact.verdict) == (None, "stable", "corrected")
    assert answer.pixels[0] == plain.pixels[0]
    without = webui.make(**settings | batch_of(ORDINARY, exact.words.text))
    assert np.abs(np.asarray(answer.images[1], float) - np.asarray(without.images[1], float)).mean() < CLOSE


@pytest.mark.parametrize(
    "prompt", [f"{EXACT} AND {ORDINARY} :0.05", f"{EXACT} :0.9", f"[{EXACT}:{ORDINARY}:0.9]"], ids=["and", "weight", "editing"]
)
def test_a_prompt_that_is_joined_weighed_or_changes_is_steered(webui, lab_profile, prompt):
    kept, steered = (
        webui.make("mitigate", lab_profile, *webui.constants(thresholds), prompt=prompt, steps=20)
        for thresholds in (Thresholds(), STEER)
    )
    assert (kept.trace.verdict, kept.trace.words) == ("corrected", None)
    assert kept.pixels == steered.pixels


def test_a_second_pass_goes_on_without_the_words_of_its_own_prompt(webui, lab_profile):
    answer = webui.make("mitigate", lab_profile, prompt=ORDINARY, hr_prompt=EXACT, steps=20, **HIRES)
    ((first, second),) = answer.traces
    assert first.words is None
    assert set(second.words.words) & set(EXACT.split()[-2:])
    assert f"{TITLE} hires words: " in answer.info["infotexts"][0]
    without = webui.make(prompt=ORDINARY, hr_prompt=second.words.text, steps=20, **HIRES)
    assert close(answer, without)


@pytest.mark.parametrize(
    "options",
    [
        {"skip_early_cond": 0.3},
        {"pad_cond_uncond": True},
        {"pad_cond_uncond_v0": True},
        {"batch_cond_uncond": False},
        {"emphasis": "No norm"},
        {"use_old_scheduling": True},
    ],
    ids=lambda options: " ".join(options),
)
def test_words_under_options_of_the_host(webui, lab_profile, options):
    with webui.options(**options):
        settings = {"prompt": EXACT, "steps": 20, "negative_prompt": "dull, " * 30}
        answer = webui.make("mitigate", lab_profile, **settings)
        assert close(answer, webui.make(**settings | {"prompt": answer.trace.words.text}))


def test_the_refiner_goes_on_without_the_words(webui):
    (checkpoint,) = (webui.data / "checkpoints").glob("memorization-guard-lab.safetensors")
    for suffix in (".safetensors", ".yaml"):
        shutil.copy(checkpoint.with_suffix(suffix), checkpoint.with_name(f"second{suffix}"))
    webui.ask("/sdapi/v1/refresh-checkpoints", {})
    refined = {"refiner_checkpoint": "second", "refiner_switch_at": 0.5}
    webui.calibrate("refined", lab.prompts("reference")[:60], steps=4, **refined)
    settings = {"prompt": EXACT, "steps": 20, **refined}
    assert is_copy(webui.make(**settings), EXACT)
    answer = webui.make("mitigate", "refined", **settings)
    assert "Refiner: second" in answer.info["infotexts"][0]
    assert close(answer, webui.make(**settings | {"prompt": answer.trace.words.text}))


@pytest.mark.parametrize("host", ["forge", "reforge"], indirect=True)
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_a_fork_goes_on_without_words_and_the_other_image_keeps_every_bit(host, profile, sampler):
    # Of a model of random weights, which words these are says nothing; that an image is that of the other prompt does.
    guard = "mitigate", profile, *host.constants(Thresholds(false_positive_rate=0.3))
    settings = {"sampler_name": sampler, "seed": 3}
    found = {prompt: host.make(*guard, prompt=prompt, **settings) for prompt in [EXACT, ORDINARY, *REFERENCES[:6], "a fox"]}
    kept = {prompt: answer for prompt, answer in found.items() if answer.trace.words is not None}
    untouched = [prompt for prompt, answer in found.items() if answer.trace.trigger_step is None]
    assert kept, [answer.trace.p_value for answer in found.values()]
    for prompt, answer in kept.items():
        assert answer.trace.verdict == "corrected"
        assert close(answer, host.make(prompt=answer.trace.words.text, **settings))
        assert not close(answer, host.make(prompt=prompt, **settings))
        assert f"{TITLE} words: " in answer.info["infotexts"][0]
    settings |= batch_of(untouched[0], next(iter(kept)))
    (ordinary,), (corrected,) = (answer := host.make(*guard, **settings)).traces
    assert (ordinary.verdict, corrected.verdict) == ("stable", "corrected")
    assert corrected.words is not None
    assert answer.pixels[0] == host.make(**settings).pixels[0]


def close(answer, other):
    """Whether two images are one, up to rounding."""
    return np.abs(np.asarray(answer.images[0], float) - np.asarray(other.images[0], float)).mean() < CLOSE


# ------------------------------------------------------------------------------------------- runs that begin in the middle


#: A second pass of the size of the first, which a profile of that size holds for.
HIRES = {"enable_hr": True, "hr_resize_x": 128, "hr_resize_y": 128, "hr_upscaler": "Latent", "denoising_strength": 0.5}


def of_an_image(webui, **settings):
    """Settings of img2img, from an image of an ordinary prompt."""
    (image,) = webui.ask("/sdapi/v1/txt2img", {**webui.usual, "prompt": ORDINARY, "seed": 5, "steps": 20})["images"]
    return {"path": "img2img", "init_images": [image], "denoising_strength": 0.5, "steps": 20, **settings}


def begins_below(trace, sigma):
    return trace.evaluations.sigma[0] < sigma


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "DPM fast", "DDIM", "PLMS", "UniPC"])
def test_an_image_of_an_image_has_the_verdict_of_its_prompt(webui, lab_profile, sampler):
    for prompt, verdict in ((EXACT, "likely copy"), (ORDINARY, "stable")):
        alone = webui.make("trace", lab_profile, prompt=prompt, sampler_name=sampler, steps=20).trace
        settings = of_an_image(webui, prompt=prompt, sampler_name=sampler)
        trace = same_as_unguarded(webui, "trace", lab_profile, **settings).trace
        assert begins_below(trace, OPEN_SIGMA)
        assert (alone.verdict, trace.verdict) == (verdict, verdict)
        if verdict == "likely copy":
            # What is asked is the same, wherever the run begins.
            assert trace.asked == pytest.approx(alone.asked, rel=1e-3)
            assert trace.p_value == pytest.approx(alone.p_value, rel=1e-2)
        mitigated = webui.make("mitigate", lab_profile, **settings).trace
        if verdict == "likely copy":
            assert corrected_from_the_first(mitigated)
        assert mitigated.evaluations.corrected.any() == (verdict == "likely copy")


def test_ordinary_images_of_images_are_stable(webui, lab_profile):
    for seed, prompt in enumerate(lab.prompts("ordinary", "tuning")[:6]):
        trace = webui.make("trace", lab_profile, **of_an_image(webui, prompt=prompt, seed=seed)).trace
        assert trace.verdict == "stable", (prompt, trace.p_value)


def test_copies_made_of_images_are_found_out(webui, lab_profile):
    for seed, prompt in enumerate(lab.prompts("exact", "tuning")):
        trace = webui.make("trace", lab_profile, **of_an_image(webui, prompt=prompt, seed=seed)).trace
        assert trace.verdict == "likely copy", (prompt, trace.p_value)


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_a_second_pass_has_the_verdict_of_the_first(webui, lab_profile, sampler):
    settings = {"steps": 20, "sampler_name": sampler, **HIRES}
    for prompt, verdict in ((EXACT, "likely copy"), (ORDINARY, "stable")):
        answer = same_as_unguarded(webui, "trace", lab_profile, prompt=prompt, **settings)
        ((first, second),) = answer.traces
        assert begins_below(second, OPEN_SIGMA)
        assert [first.verdict, second.verdict] == [verdict] * 2
        assert f"{TITLE} hires verdict: {verdict}" in answer.info["infotexts"][0]
        assert f"{TITLE} hires rarity: " in answer.info["infotexts"][0]
    ((first, second),) = webui.make("mitigate", lab_profile, prompt=EXACT, **settings).traces
    assert corrected_from_the_first(first)
    assert corrected_from_the_first(second)
    assert second.evaluations.corrected.any()


@pytest.mark.parametrize(
    ("options", "sampler"),
    [
        ({}, "Euler a"),
        ({}, "DDIM"),
        ({"batch_cond_uncond": False}, "Euler a"),
        ({"pad_cond_uncond": True}, "DDIM"),
        ({"pad_cond_uncond_v0": True}, "Euler a"),
        ({"s_min_uncond": 30.0, "s_min_uncond_all": True}, "Euler a"),
        ({"token_merging_ratio": 0.5, "token_merging_ratio_img2img": 0.5}, "Euler a"),
        ({"hypertile_enable_unet": True, "hypertile_swap_size_unet": 3}, "Euler a"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "none",
)
def test_asking_the_network_disturbs_nothing(host, profile, options, sampler):
    if host.kind != "webui" and "hypertile_enable_unet" in options:
        pytest.skip("the forks have no such option")
    settings = {"init_images": init_images(host), "denoising_strength": 0.5, "batch_size": 2, "sampler_name": sampler}
    with host.options(**options):
        for prompt in ("word " * 90, "a fox AND a red disc :0.5 AND a blue cross :-0.2"):
            answer = same_as_unguarded(host, "trace", profile, path="img2img", prompt=prompt, **settings)
            # Also where a fork leaves the prediction without the prompt out: the network is asked for the other one.
            assert all(trace.p_value is not None and trace.asked is not None for (trace,) in answer.traces)


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_what_is_asked_depends_on_the_prompt_alone(host, profile, sampler):
    settings = {"path": "img2img", "init_images": init_images(host), "sampler_name": sampler}

    def asked(prompt, strength, **more):
        traces = host.make("trace", profile, prompt=prompt, denoising_strength=strength, **settings, **more).traces
        assert all(begins_below(trace, OPEN_SIGMA) for (trace,) in traces)
        return [trace.asked for (trace,) in traces]

    (own,), (other,) = asked("a fox", 0.5), asked("a red disc", 0.5)
    assert asked("a fox", 0.4, seed=7, cfg_scale=3, batch_size=2) == pytest.approx([own] * 2, rel=1e-3)
    assert asked("a fox :0.25 AND a fox :0.75", 0.5) == pytest.approx([own], rel=1e-3)
    assert asked("a fox AND a red disc :0", 0.5) == pytest.approx([own], rel=1e-3)
    assert own != pytest.approx(other, rel=1e-3)


# -------------------------------------------------------------------------------------------------------- beside others


#: Other guidance: the host, and arguments of the extension that has it.
GUIDANCE = {
    "rescaled": ("webui", {"Other guidance": {"args": [True]}}),
    "dynamic thresholding": (
        "forge",
        {
            "DynamicThresholding (CFG-Fix) Integrated": {
                "args": [True, 3.0, 0.95, "Constant", 0.0, "Constant", 0.0, 1.0, "enable", "MEAN", "AD", 1.0]
            }
        },
    ),
    "latent modifier": ("forge", {"LatentModifier Integrated": {"args": [True, 5.0]}}),
    "perturbed attention": ("forge", {"PerturbedAttentionGuidance Integrated": {"args": [True, 8.0, 0.0, 0.0, 1.0]}}),
}


@pytest.mark.parametrize(("host", "scripts"), list(GUIDANCE.values()), ids=list(GUIDANCE), indirect=["host"])
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_guidance_of_another_extension_changes_no_verdict_and_goes_on_from_what_is_corrected(host, profile, scripts, sampler):
    own = host.make("trace", profile, sampler_name=sampler)
    plain = host.make(alwayson_scripts=scripts, sampler_name=sampler)
    traced = same_as_unguarded(host, "trace", profile, alwayson_scripts=scripts, sampler_name=sampler)
    assert plain.pixels == traced.pixels != own.pixels
    assert traced.trace.p_value == pytest.approx(own.trace.p_value, rel=1e-3)
    assert len(traced.trace.evaluations) == len(own.trace.evaluations)
    guard = "mitigate", profile, *host.constants(EVERYTHING)
    corrected = host.make(*guard, alwayson_scripts=scripts, sampler_name=sampler)
    assert corrected_from_the_first(corrected.trace)
    assert corrected.pixels != plain.pixels
    assert corrected.pixels != host.make(*guard, sampler_name=sampler).pixels


def test_rescaled_guidance_hides_no_copy(webui, lab_profile):
    settings = {"steps": 20, "prompt": EXACT, "alwayson_scripts": {"Other guidance": {"args": [True]}}}
    assert is_copy(webui.make(**settings), EXACT)
    assert not is_copy(webui.make("mitigate", lab_profile, **settings), EXACT)


def test_loading_beside_extensions_of_the_same_names(host):
    assert host.said().count("decoy: True") == 2
    assert "Error loading script" not in host.said()


def test_the_plot_has_axes_for_mode_and_thresholds(host, profile):
    axes = host.ask("/sdapi/v1/script-info")
    plot = next(each for each in axes if each["name"] == "x/y/z plot" and not each["is_img2img"])
    kind = next(arg for arg in plot["args"] if arg["label"] == "X type")
    names = kind["choices"]
    assert f"[{TITLE}] Mode" in names
    assert f"[{TITLE}] false_positive_rate" in names
    arguments = []
    for arg in plot["args"]:
        value, label = arg.get("value"), arg["label"]
        if label.endswith(" type"):
            value = names.index(
                {"X type": f"[{TITLE}] Mode", "Y type": f"[{TITLE}] false_positive_rate"}.get(label, "Nothing")
            )
        elif label.endswith(" values"):
            value = (
                {"X values": "off, trace, mitigate", "Y values": "0.1, 0.001"}.get(label, "")
                if value is None or value == ""
                else []
            )
        arguments.append(True if label in ("Use text inputs instead of dropdowns", "Include Sub Images") else value)
    settings = {"script_name": "x/y/z plot", "script_args": arguments}
    answer = host.make("trace", profile, **settings)
    texts = answer.info["infotexts"]
    assert sum(f"{TITLE}: mitigate" in text for text in texts) == 2
    assert sum(f"{TITLE}: trace" in text for text in texts) == 2
    assert sum(f"{TITLE} false_positive_rate: 0.1" in text for text in texts) == 2


def test_a_plot_says_on_its_grid_which_cells_were_not_judged(host, profile):
    plot = next(each for each in host.ask("/sdapi/v1/script-info") if each["name"] == "x/y/z plot" and not each["is_img2img"])
    labels = [arg["label"] for arg in plot["args"]]
    arguments = [arg.get("value") for arg in plot["args"]]
    names = plot["args"][labels.index("X type")]["choices"]
    for label, value in (
        ("X type", names.index(f"[{TITLE}] Profile")),
        ("X values", f"None, {profile}, no such profile"),
        ("Y type", names.index("Nothing")),
        ("Z type", names.index("Nothing")),
        ("Draw legend", False),
        ("Include Sub Images", True),
        ("Use text inputs instead of dropdowns", True),
    ):
        arguments[labels.index(label)] = value
    grid, *cells = host.make(*TRACE, script_name="x/y/z plot", script_args=arguments).images
    width, height = cells[0].size
    parts = [grid.crop((number * width, 0, (number + 1) * width, height)) for number in range(3)]
    assert [part.tobytes() == cell.tobytes() for part, cell in zip(parts, cells, strict=True)] == [False, True, False]
    assert {cell.tobytes() for cell in cells} == set(host.make().pixels)


def warnings(answer):
    return answer.info["extra_generation_params"][f"{TITLE} traces"]["warnings"]


def refusal(host, generate):
    """What the host says, in its answer or in its log, where a script raises."""
    with pytest.raises(RuntimeError, match="500") as error:
        generate()
    return str(error.value) + host.said()


def png(pixels):
    import base64
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def corrected_from_the_first(trace):
    """Whether every evaluation was corrected, but for the last ones, where the image is back among ordinary ones."""
    return trace.evaluations.corrected[trace.evaluations.sigma > HOLD_SIGMA].all()


def is_copy(answer, prompt):
    return lab.copy_score(answer.images[0], prompt) > lab.COPY_THRESHOLD
