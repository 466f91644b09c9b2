"""What the benchmarks compute: other methods, against formulas, finite differences and recorded runs; and their figures."""

import argparse
import copy
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from memorization_guard import Trace, lab
from memorization_guard.core.trace import Steps
from memorization_guard.diffusers import guard
from memorization_guard.evaluation.signals import SIGNALS
from memorization_guard.lab.evaluate import FIRST_SEED

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
peers, detection, mitigation, verdict = map(importlib.import_module, ("peers", "detection", "mitigation", "verdict"))

SHOTS = [peers.Shot("exact", "a red cat on a mat", 3), peers.Shot("ordinary", "a blue dog in the sun", 4)]
STEPS = 4


@pytest.fixture
def start(tiny_pipe):
    """Pipeline, latents, timestep and embeddings of the first step of two images."""
    with torch.no_grad():
        uncond, cond = peers.embeddings(tiny_pipe, SHOTS)
    return tiny_pipe, peers.starting_latents(tiny_pipe, SHOTS), 981, uncond, cond


def sampled_latents(pipe, part=SHOTS):
    texts = [shot.prompt for shot in part]
    noise = peers.starting_latents(pipe, part)
    return pipe(texts, latents=noise, num_inference_steps=STEPS, guidance_scale=peers.GUIDANCE, output_type="latent").images


def delta(pipe, x, t, uncond, cond):
    eps_u, eps_c = peers.noise_predictions(pipe, x, t, uncond, cond)
    return eps_c - eps_u


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_sharpness_is_the_change_of_the_score_difference_along_itself(start, kind):
    pipe, x, _, uncond, cond = start
    pipe.unet = copy.deepcopy(pipe.unet).double()
    pipe.scheduler.register_to_config(prediction_type=kind)
    x, uncond, cond, t = x.double(), uncond.double(), cond.double(), 400
    noise = (1 - pipe.scheduler.alphas_cumprod[t].double()).sqrt()

    def score_difference(latent):
        return -delta(pipe, latent, t, uncond, cond) / noise

    step, along = 1e-4, score_difference(x)
    change = (score_difference(x + step * along) - score_difference(x - step * along)) / (2 * step)
    found = peers.sharpness(pipe, x, t, uncond, cond, delta(pipe, x, t, uncond, cond))
    torch.testing.assert_close(found, change.flatten(1).norm(dim=1).to(found.dtype), rtol=1e-4, atol=0)
    assert (found > 0).all()


def test_noise_of_a_velocity_prediction_gives_back_the_noise(tiny_pipe):
    tiny_pipe.scheduler.register_to_config(prediction_type="v_prediction")
    x0, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    abar = tiny_pipe.scheduler.alphas_cumprod[700]
    x, v = abar.sqrt() * x0 + (1 - abar).sqrt() * eps, abar.sqrt() * eps - (1 - abar).sqrt() * x0
    eps_u, eps_c = peers.as_noise(tiny_pipe.scheduler, x, 700, torch.cat([v, v]))
    torch.testing.assert_close(eps_u, eps)
    torch.testing.assert_close(eps_c, eps)


def test_alignment_is_of_the_channels_at_each_place_and_then_the_mean():
    # Two places of two channels: one guided straight on (cosine 1), one at a right angle (cosine 0), one backwards (-1).
    eps_u = torch.tensor([[[[1.0, 2.0, 0.0]], [[0.0, 0.0, 3.0]]]])
    towards = torch.tensor([[[[5.0, 0.0, 0.0]], [[0.0, 0.1, -1.0]]]])
    cosine = peers.alignment(eps_u, eps_u + towards)
    torch.testing.assert_close(cosine, torch.tensor([0.0]))
    norm = peers.guidance_norm(eps_u, eps_u + towards)
    torch.testing.assert_close(norm, torch.tensor([26.01]).sqrt())
    torch.testing.assert_close(peers.anisotropy(norm, cosine + 0.5, (1.0, 2.0)), torch.tensor([26.01]).sqrt() + 1)


def test_an_optimised_prompt_has_a_smaller_norm_and_leaves_the_weights_alone(start):
    pipe, x, t, uncond, cond = start
    with torch.no_grad():
        before = delta(*start).flatten(1).norm(dim=1)
    # Between both, so that one image is optimised and the other is not.
    high, low = int(before.argmax()), int(before.argmin())
    target = float(before.mean())
    found = peers.optimised_prompt(*start, target=target, iterations=3, lr=0.02)
    with torch.no_grad():
        after = delta(pipe, x, t, uncond, found).flatten(1).norm(dim=1)
    assert after[high] < before[high]
    torch.testing.assert_close(found[low], cond[low], rtol=0, atol=0)
    # Nothing but the decay of three steps moves the first token.
    torch.testing.assert_close(found[high, 0], cond[high, 0], rtol=1e-3, atol=0)
    assert (found[high, 1:] - cond[high, 1:]).abs().max() > 0.01
    assert all(weight.grad is None for weight in pipe.unet.parameters())
    alone = peers.optimised_prompt(pipe, x[[high]], t, uncond[[high]], cond[[high]], target=target, iterations=3, lr=0.02)
    torch.testing.assert_close(found[[high]], alone)


def test_sail_lowers_its_loss_and_leaves_latents_that_are_low_enough(start):
    pipe, x, t, uncond, cond = start
    with torch.no_grad():
        before = peers.sail_loss(*start, 0.05)
    high, low = int(before.argmax()), int(before.argmin())
    found = peers.sail(*start, threshold=float(before.mean()), weight=0.05, steps=3)
    with torch.no_grad():
        after = peers.sail_loss(pipe, found, t, uncond, cond, 0.05)
    assert after[high] < before[high]
    torch.testing.assert_close(found[low], x[low], rtol=0, atol=0)
    assert all(weight.grad is None for weight in pipe.unet.parameters())


def test_guidance_switched_on_from_the_start_is_the_ordinary_path(tiny_pipe):
    plain = sampled_latents(tiny_pipe)
    for rule in (peers.static_transition(until=1000), peers.dynamic_transition(before=peers.GUIDANCE)):
        with peers.guided_by(tiny_pipe, rule):
            torch.testing.assert_close(sampled_latents(tiny_pipe), plain, rtol=0, atol=0)
    assert not tiny_pipe.unet._forward_hooks


def test_guidance_that_never_comes_is_the_path_without_a_prompt(tiny_pipe):
    with peers.guided_by(tiny_pipe, peers.static_transition(until=-1)):
        without = sampled_latents(tiny_pipe)
    empty = sampled_latents(tiny_pipe, [peers.Shot(shot.group, "", shot.seed) for shot in SHOTS])
    torch.testing.assert_close(without, empty, rtol=0, atol=1e-4)
    assert (without - sampled_latents(tiny_pipe)).abs().max() > 1e-2


def test_dynamic_guidance_waits_for_a_local_minimum_and_takes_a_repeated_timestep_once():
    rule = peers.dynamic_transition()
    # The second image never falls. At 961 the first look would make a minimum of the first image, the second does not.
    series = [(981, 3.0, 1.0), (961, 2.0, 1.0), (961, 2.5, 1.0), (941, 2.2, 2.0), (921, 2.3, 3.0), (901, 1.0, 4.0)]
    scales = [rule(t, torch.tensor([first, second])).tolist() for t, first, second in series]
    assert scales == [[1.0, 1.0]] * 4 + [[7.5, 1.0]] * 2


def test_watching_sees_the_norms_that_the_trace_has(tiny_pipe):
    with guard(tiny_pipe) as run, peers.watched(tiny_pipe) as seen:
        peers.sample(tiny_pipe, SHOTS, STEPS)
    norms = torch.stack(list(seen.norms.values()))
    assert norms.shape == (STEPS, 2)
    # PNDM evaluates its second timestep twice, and the second evaluation counts.
    np.testing.assert_allclose(norms.T, [np.delete(trace.guidance_norm, 1) for trace in run.traces], rtol=1e-3)
    np.testing.assert_allclose(seen.mean_norm(2), norms[:2].mean(0))
    torch.testing.assert_close(seen.x, peers.starting_latents(tiny_pipe, SHOTS))


def test_latents_are_those_that_the_seeds_give_in_a_pipeline(tiny_pipe):
    generators = [torch.Generator().manual_seed(shot.seed) for shot in SHOTS]
    prompts = [shot.prompt for shot in SHOTS]
    images = tiny_pipe(prompts, generator=generators, num_inference_steps=STEPS, guidance_scale=7.5, output_type="np").images
    np.testing.assert_array_equal(peers.sample(tiny_pipe, SHOTS, STEPS), (images * 255).round().astype(np.uint8))


def test_fewer_images_are_still_of_all_prompts_with_the_seeds_of_the_figures():
    every = peers.shots(lab.BUNDLED, "tuning", ["exact", "template"])
    assert len(every) == 10 * 8 + 6 * 12
    assert len({(shot.prompt, shot.seed) for shot in every}) == len({shot.seed for shot in every}) == len(every)
    few = peers.shots(lab.BUNDLED, "tuning", ["exact", "template"], 12)
    assert {shot.prompt for shot in few} == {shot.prompt for shot in every}
    assert set(few) < set(every)
    # Seeds are counted up over the prompts, each repeated.
    prompt = lab.prompts("exact", "tuning")[2]
    seeds = {shot.seed for shot in every if shot.prompt == prompt}
    assert seeds == {FIRST_SEED["tuning"] + 2 * peers.IMAGES["exact"] + i for i in range(8)}


def test_costs_count_what_was_called(start):
    pipe, x, t, uncond, cond = start

    def with_sharpness(part):
        peers.sample(pipe, part, STEPS)
        peers.sharpness(pipe, x, t, uncond, cond, x)

    def with_prompt(part):
        embedding = peers.optimised_prompt(*start, target=0.0, iterations=2)
        kept = torch.empty(1 << 20)
        peers.sample(pipe, part, STEPS)
        return embedding, kept

    ways = {"plain": lambda part: peers.sample(pipe, part, STEPS), "sharpness": with_sharpness, "prompt": with_prompt}
    costs = peers.costs(pipe, ways, SHOTS)
    assert costs["plain"]["extra_calls"] == {"forward": 0, "jvp": 0, "backward": 0}
    assert costs["sharpness"]["extra_calls"] == {"forward": 0, "jvp": 1, "backward": 0}
    assert costs["prompt"]["extra_calls"] == {"forward": 2, "jvp": 0, "backward": 2}
    assert costs["plain"]["time_ratio"] == 1
    assert 4 << 20 <= costs["prompt"]["extra_memory"] < 8 << 20
    with peers.counted(pipe) as calls:
        peers.sample(pipe, SHOTS, STEPS)
    assert calls.forward == STEPS + 1  # PNDM looks twice at its second timestep


def test_the_benchmarks_take_every_score_and_every_method(tiny_pipe):
    scores = detection.all_scores(tiny_pipe, None, SHOTS, STEPS, batch=1)
    assert all(len(values) == 2 and np.isfinite(values).all() for values in scores.values())
    together = detection.all_scores(tiny_pipe, None, SHOTS, STEPS, batch=2)
    for name, values in scores.items():
        np.testing.assert_allclose(values, together[name], rtol=1e-3, err_msg=name)
    assert (scores["Wen, 10 steps"] == scores["Wen, whole run"]).all()  # of four
    assert (scores["Wen, first step"] != scores["Wen, whole run"]).all()
    rows = detection.figures({"first": np.array([1.0, 0.0]), "second": np.array([0.0, 1.0])}, SHOTS)["exact"]["scores"]
    assert (rows["first"]["auc"], rows["second"]["auc"]) == (1.0, 0.0)

    images = {name: method(SHOTS) for name, method in mitigation.methods(tiny_pipe, None, STEPS).items()}
    assert {made.shape for made in images.values()} == {images["plain"].shape}
    for name in ("Jain, static transition", "Jain, dynamic transition"):
        assert (images[name] != images["plain"]).any(), name


class TinyLab:
    """A lab around the tiny pipeline, whose every red image is a copy."""

    def __init__(self, pipe):
        self.pipeline = lambda: pipe

    def prompts(self, group, split):
        return [f"a {group} cat {number}" for number in range(9)]

    def copy_score(self, image, prompt):
        return float(image[..., 0].mean() > image[..., 2].mean())


def test_the_verdict_is_measured_under_every_sampler(tiny_pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verdict, "Lab", lambda *_: TinyLab(tiny_pipe))
    arguments = argparse.Namespace(
        model="m", world="w", device="cpu", split="tuning", guidance=5.0, batch=4, images=(9, 2, 2, 2),
        samplers=["Euler:3", "PNDM:4"], profile_per_sampler=False, json=tmp_path / "v.json",
    )  # fmt: skip
    result = verdict.measure(arguments)
    assert json.loads((tmp_path / "v.json").read_text()) == result
    assert list(result["samplers"]) == ["Euler:3", "PNDM:4"]
    euler, pndm = result["samplers"].values()
    assert set(euler["detection"]["exact"]) == set(SIGNALS)
    assert all(0 <= row["auc_95"][0] <= row["auc"] <= row["auc_95"][1] <= 1 for row in euler["detection"]["exact"].values())
    # The published scores hold for one sampler; the verdict does not depend on it.
    assert pndm["detection"]["template"]["S_mem"] is None
    assert pndm["detection"]["template"]["p-value, -log10"] is not None
    assert euler["notes"] == pndm["notes"] == []
    assert euler["triggered"]["ordinary"]["0.001"]["of"] == euler["copies"]["exact"]["mitigated"]["of"] == 2
    verdict.print_figures(result)
    assert "| PNDM:4 | exact | S_mem | - | - |" in capsys.readouterr().out


def test_rates_of_the_verdict_count_what_it_says():
    def sampled(p_values):
        traces = [
            Trace(p_value=value, steps=Steps(mitigated=np.array([value is not None and value <= 0.01]))) for value in p_values
        ]
        return verdict.Sampled(["a", "b", "c", "d"], np.zeros((4, 2, 2, 3)), traces)

    found = sampled([0.5, 0.05, 0.01, 1.0])
    assert [verdict.triggered(found, rate)["count"] for rate in (0.1, 0.01, 0.001)] == [2, 1, 0]
    assert verdict.triggered(found, 0.001)["rate_95"] == pytest.approx([0, 0.6024], abs=1e-4)
    assert verdict.touched(found)["rate"] == 0.25
    assert verdict.detection(found, found)["p-value, -log10"]["auc"] == 0.5
    unjudged = sampled([0.01, 0.05, 0.5, None])
    assert verdict.triggered(unjudged, 0.1)["count"] == 2
    assert verdict.detection(unjudged, found)["p-value, -log10"] is None
