"""What the benchmarks compute: other methods, against formulas, finite differences and recorded runs; and their figures."""

import argparse
import copy
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from memorization_guard import Trace, lab
from memorization_guard.core.judge import SUSPICIOUS
from memorization_guard.core.trace import Steps
from memorization_guard.diffusers import calibrate, guard
from memorization_guard.evaluation.signals import SIGNALS
from memorization_guard.lab.evaluate import FIRST_SEED

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
peers, shots, countermeasures, detection, mitigation, verdict = map(
    importlib.import_module, ("peers", "shots", "countermeasures", "detection", "mitigation", "verdict")
)

SHOTS = [shots.Shot("exact", "a red cat on a mat", 3), shots.Shot("ordinary", "a blue dog in the sun", 4)]
STEPS = 4


@pytest.fixture
def start(tiny_pipe):
    """Pipeline, latents, timestep and embeddings of the first step of two images."""
    with torch.no_grad():
        uncond, cond = shots.embeddings(tiny_pipe, SHOTS)
    return tiny_pipe, shots.starting_latents(tiny_pipe, SHOTS), 981, uncond, cond


@pytest.fixture
def tiny_flow(tokenizer):
    """A StableDiffusion3Pipeline whose latents are [4, 8, 8]."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, projection_dim=16, bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )  # fmt: skip
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=8,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=CLIPTextModelWithProjection(text).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text).eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled_latents(pipe, part=SHOTS):
    texts = [shot.prompt for shot in part]
    noise = shots.starting_latents(pipe, part)
    return pipe(texts, latents=noise, num_inference_steps=STEPS, guidance_scale=shots.GUIDANCE, output_type="latent").images


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
    found = peers.sharpness(
        lambda latent: peers.noise_predictions(pipe, latent, t, uncond, cond), x, delta(pipe, x, t, uncond, cond), float(noise)
    )
    torch.testing.assert_close(found, change.flatten(1).norm(dim=1).to(found.dtype), rtol=1e-4, atol=0)
    assert (found > 0).all()


def test_the_hessian_difference_of_linear_predictions_is_that_of_their_squared_matrices():
    x, with_prompt, without = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(0))
    latents = x[:2].reshape(2, 3, 2, 2)

    def predict(latent):
        flat = latent.flatten(1)
        return (flat @ without.T).view_as(latent), (flat @ with_prompt.T).view_as(latent)

    # The Jacobian of A x is A; what the pass backwards gives is its transpose times the prediction.
    expected = (x[:2] @ (with_prompt.T @ with_prompt - without.T @ without)).norm(dim=1)
    torch.testing.assert_close(peers.hessian_difference(predict, latents, 1.0), expected)
    torch.testing.assert_close(peers.hessian_difference(predict, latents, 0.5), 4 * expected)
    same = peers.hessian_difference(lambda latent: (predict(latent)[0],) * 2, latents, 1.0)
    torch.testing.assert_close(same, torch.zeros(2))


def test_the_score_change_is_the_distance_of_two_predictions():
    before, after = torch.zeros(2, 1, 2, 1), torch.tensor([3.0, 4.0, 0.0, 0.0]).view(2, 1, 2, 1)
    torch.testing.assert_close(peers.score_change(before, after), torch.tensor([5.0, 0.0]))


def test_entropy_of_attention_is_that_of_its_mean():
    torch.testing.assert_close(peers.attention_entropy(torch.full((2, 8), 1 / 8)), torch.full((2,), math.log(8)))
    torch.testing.assert_close(peers.attention_entropy(torch.tensor([0.0, 1.0, 0.0])), torch.tensor(0.0))
    torch.testing.assert_close(peers.attention_entropy(torch.tensor([0.5, 0.5, 0.0])), torch.tensor(math.log(2)))


def test_late_entropy_is_that_of_the_last_fifth_and_what_the_summary_gained():
    first, late = torch.full((4,), 0.25), torch.tensor([0.5, 0.25, 0.25, 0.0])
    # Ten steps, of which the last two count; a prompt of three tokens with begin and end, so that the last two are summary.
    attention = torch.stack([first] * 8 + [late] * 2)[:, None]
    log2 = math.log(2)
    expected = (0.5 * log2 + 2 * 0.25 * 2 * log2) + 0.25 * 2 * log2 - 2 * 0.25 * 2 * log2
    torch.testing.assert_close(peers.late_entropy(attention, torch.tensor([3])), torch.tensor([expected]))
    # Without a step that differs there is nothing gained.
    same = peers.late_entropy(first.expand(3, 2, 4), torch.tensor([2, 4]))
    torch.testing.assert_close(same, torch.full((2,), 2 * log2))


@torch.no_grad()
def test_attention_is_that_of_the_pass_with_the_prompt(tiny_pipe):
    (layer,) = (module for name, module in tiny_pipe.unet.named_modules() if name.endswith("down_blocks.1.attentions.0"))
    layer = layer.transformer_blocks[0].attn2
    given = []
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: given.append((args[0], kwargs)), with_kwargs=True)
    with peers.watched(tiny_pipe, SHOTS) as run:
        shots.latents_of(tiny_pipe, SHOTS, num_inference_steps=STEPS, guidance_scale=shots.GUIDANCE)
    hook.remove()
    places, text = given[0][0][2:], given[0][1]["encoder_hidden_states"][2:]
    query, key = (part.unflatten(2, (layer.heads, -1)) for part in (layer.to_q(places), layer.to_k(text)))
    scores = torch.einsum("bphd,bthd->bhpt", query, key) / query.shape[-1] ** 0.5
    first = run.steps[0].attention
    torch.testing.assert_close(peers.half_size_layer(first), scores.softmax(-1).mean((1, 2)))
    assert len(first) == 4
    for attention in first.values():
        torch.testing.assert_close(attention.sum(-1), torch.ones(2))
    assert run.lengths.tolist() == [len(tiny_pipe.tokenizer(shot.prompt).input_ids) for shot in SHOTS]
    assert not layer._forward_pre_hooks


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
    found = countermeasures.optimised_prompt(*start, target=target, iterations=3, lr=0.02)
    with torch.no_grad():
        after = delta(pipe, x, t, uncond, found).flatten(1).norm(dim=1)
    assert after[high] < before[high]
    torch.testing.assert_close(found[low], cond[low], rtol=0, atol=0)
    # Nothing but the decay of three steps moves the first token.
    torch.testing.assert_close(found[high, 0], cond[high, 0], rtol=1e-3, atol=0)
    assert (found[high, 1:] - cond[high, 1:]).abs().max() > 0.01
    assert all(weight.grad is None for weight in pipe.unet.parameters())
    alone = countermeasures.optimised_prompt(
        pipe, x[[high]], t, uncond[[high]], cond[[high]], target=target, iterations=3, lr=0.02
    )
    torch.testing.assert_close(found[[high]], alone)


def test_sail_lowers_its_loss_and_leaves_latents_that_are_low_enough(start):
    pipe, x, t, uncond, cond = start
    with torch.no_grad():
        before = countermeasures.sail_loss(*start, 0.05)
    high, low = int(before.argmax()), int(before.argmin())
    found = countermeasures.sail(*start, threshold=float(before.mean()), weight=0.05, steps=3)
    with torch.no_grad():
        after = countermeasures.sail_loss(pipe, found, t, uncond, cond, 0.05)
    assert after[high] < before[high]
    torch.testing.assert_close(found[low], x[low], rtol=0, atol=0)
    assert all(weight.grad is None for weight in pipe.unet.parameters())


def test_guidance_switched_on_from_the_start_is_the_ordinary_path(tiny_pipe):
    plain = sampled_latents(tiny_pipe)
    for rule in (countermeasures.static_transition(until=1000), countermeasures.dynamic_transition(before=shots.GUIDANCE)):
        with countermeasures.guided_by(tiny_pipe, rule):
            torch.testing.assert_close(sampled_latents(tiny_pipe), plain, rtol=0, atol=0)
    assert not tiny_pipe.unet._forward_hooks


def test_guidance_that_never_comes_is_the_path_without_a_prompt(tiny_pipe):
    with countermeasures.guided_by(tiny_pipe, countermeasures.static_transition(until=-1)):
        without = sampled_latents(tiny_pipe)
    empty = sampled_latents(tiny_pipe, [shots.Shot(shot.group, "", shot.seed) for shot in SHOTS])
    torch.testing.assert_close(without, empty, rtol=0, atol=1e-4)
    assert (without - sampled_latents(tiny_pipe)).abs().max() > 1e-2


def test_dynamic_guidance_waits_for_a_local_minimum_and_takes_a_repeated_timestep_once():
    rule = countermeasures.dynamic_transition()
    # The second image never falls. At 961 the first look would make a minimum of the first image, the second does not.
    series = [(981, 3.0, 1.0), (961, 2.0, 1.0), (961, 2.5, 1.0), (941, 2.2, 2.0), (921, 2.3, 3.0), (901, 1.0, 4.0)]
    scales = [rule(t, torch.tensor([first, second])).tolist() for t, first, second in series]
    assert scales == [[1.0, 1.0]] * 4 + [[7.5, 1.0]] * 2


def test_masked_attention_is_that_of_the_public_code(tiny_pipe):
    """No weight on the padding, and the begin token's logits 1.25 times as large in the pass with the prompt; and afterwards
    the network's own attention again."""
    layer = next(module for name, module in tiny_pipe.unet.named_modules() if name.endswith("attn2"))
    places, text = torch.randn(4, 6, layer.to_q.in_features), torch.randn(4, 12, layer.to_k.in_features)
    own = layer(places, encoder_hidden_states=text)
    lengths = [len(tiny_pipe.tokenizer(shot.prompt).input_ids) for shot in SHOTS]
    assert max(lengths) < 12
    with countermeasures.attention_masked(tiny_pipe, SHOTS):
        found = layer(places, encoder_hidden_states=text)
    expected = []
    for row, (x, tokens) in enumerate(zip(places, text, strict=True)):
        query, key, value = (
            part.unflatten(-1, (layer.heads, -1)) for part in (layer.to_q(x), layer.to_k(tokens), layer.to_v(tokens))
        )
        logits = torch.einsum("qhd,khd->hqk", query, key) * layer.scale
        logits[:, :, lengths[row % 2] :] = -torch.inf
        if row >= 2:
            logits[:, :, 0] *= 1.25
        expected.append(layer.to_out[0](torch.einsum("hqk,khd->qhd", logits.softmax(-1), value).flatten(1)))
    torch.testing.assert_close(found, torch.stack(expected))
    torch.testing.assert_close(layer(places, encoder_hidden_states=text), own)
    assert not torch.allclose(found, own)


def test_watching_sees_the_norms_that_the_trace_has(tiny_pipe):
    with guard(tiny_pipe) as run, peers.watched(tiny_pipe, SHOTS) as seen:
        shots.sample(tiny_pipe, SHOTS, STEPS)
    norms = torch.stack([evaluation.norm for evaluation in seen.steps])
    assert norms.shape == (STEPS, 2)
    # PNDM evaluates its second timestep twice, and the second evaluation counts.
    np.testing.assert_allclose(norms.T, [np.delete(trace.guidance_norm, 1) for trace in run.traces], rtol=1e-3)
    np.testing.assert_allclose(seen.mean_norm(2), norms[:2].mean(0))
    first = seen.steps[0]
    torch.testing.assert_close(first.x, shots.starting_latents(tiny_pipe, SHOTS))
    # Asked once more, the network says the same.
    with torch.no_grad():
        torch.testing.assert_close(seen.predicting(first.t)(first.x), (first.eps_u, first.eps_c))


def test_latents_are_those_that_the_seeds_give_in_a_pipeline(tiny_pipe):
    generators = [torch.Generator().manual_seed(shot.seed) for shot in SHOTS]
    prompts = [shot.prompt for shot in SHOTS]
    images = tiny_pipe(prompts, generator=generators, num_inference_steps=STEPS, guidance_scale=7.5, output_type="np").images
    np.testing.assert_array_equal(shots.sample(tiny_pipe, SHOTS, STEPS), (images * 255).round().astype(np.uint8))


def test_fewer_images_are_still_of_all_prompts_with_the_seeds_of_the_figures():
    every = shots.shots(lab.BUNDLED, "tuning", ["exact", "template"])
    assert len(every) == 10 * 8 + 6 * 12
    assert len({(shot.prompt, shot.seed) for shot in every}) == len({shot.seed for shot in every}) == len(every)
    few = shots.shots(lab.BUNDLED, "tuning", ["exact", "template"], 12)
    assert {shot.prompt for shot in few} == {shot.prompt for shot in every}
    assert set(few) < set(every)
    # Seeds are counted up over the prompts, each repeated.
    prompt = lab.prompts("exact", "tuning")[2]
    seeds = {shot.seed for shot in every if shot.prompt == prompt}
    assert seeds == {FIRST_SEED["tuning"] + 2 * shots.IMAGES["exact"] + i for i in range(8)}


def test_costs_count_what_was_called(start):
    pipe, x, t, uncond, cond = start

    def with_sharpness(part):
        shots.sample(pipe, part, STEPS)
        peers.sharpness(lambda latent: peers.noise_predictions(pipe, latent, t, uncond, cond), x, x, 1.0)

    def with_prompt(part):
        embedding = countermeasures.optimised_prompt(*start, target=0.0, iterations=2)
        kept = torch.empty(1 << 20)
        shots.sample(pipe, part, STEPS)
        return embedding, kept

    ways = {"plain": lambda part: shots.sample(pipe, part, STEPS), "sharpness": with_sharpness, "prompt": with_prompt}
    costs = shots.costs(pipe, ways, SHOTS)
    assert costs["plain"]["extra_calls"] == {"forward": 0, "jvp": 0, "backward": 0}
    assert costs["sharpness"]["extra_calls"] == {"forward": 0, "jvp": 1, "backward": 0}
    assert costs["prompt"]["extra_calls"] == {"forward": 2, "jvp": 0, "backward": 2}
    assert costs["plain"]["time_ratio"] == 1
    assert 4 << 20 <= costs["prompt"]["extra_memory"] < 8 << 20
    with shots.counted(pipe) as calls:
        shots.sample(pipe, SHOTS, STEPS)
    assert calls.forward == STEPS + 1  # PNDM looks twice at its second timestep


def scores_of(pipe, batch, names=tuple(detection.PEERS)):
    how = {"num_inference_steps": STEPS, "guidance_scale": shots.GUIDANCE}
    return detection.peer_scores(pipe, SHOTS, how, batch, names)


def test_every_score_is_taken_of_every_image(tiny_pipe):
    scores, together = scores_of(tiny_pipe, 1), scores_of(tiny_pipe, 2)
    for name, scored in scores.items():
        assert np.isfinite(scored.values).all()
        np.testing.assert_allclose(scored.values, together[name].values, rtol=1e-3, err_msg=name)
        assert scored.calls == together[name].calls
    assert (scores["Wen, first step"].values != scores["Wen, whole run"].values).all()
    calls = {name: (scored.calls[0].forward, scored.calls[0].jvp, scored.calls[0].backward) for name, scored in scores.items()}
    assert calls.pop("Jeon, sharpness") == (0, 1, 0)
    assert calls.pop("Hessian difference") == (1, 0, 1)
    assert [calls.pop(name) for name in list(calls) if "Asthana" in name] == [(1, 0, 0)] * 3
    assert set(calls.values()) == {(0, 0, 0)}


def test_scores_of_a_rectified_flow_are_those_of_its_velocity(tiny_flow):
    left_out = detection.inapplicable(tiny_flow)
    assert sorted(name.split(",")[0] for name in left_out) == ["Asthana", "Asthana", "Ren", "Ren"]
    names = [name for name in detection.PEERS if name not in left_out]
    scores = scores_of(tiny_flow, 2, names)
    assert all(np.isfinite(scored.values).all() and (scored.values != 0).all() for scored in scores.values())
    with peers.watched(tiny_flow, SHOTS) as run:
        shots.latents_of(tiny_flow, SHOTS, num_inference_steps=STEPS, guidance_scale=shots.GUIDANCE)
    first = run.steps[0]
    assert (first.t, first.attention, peers.level_at(tiny_flow.scheduler, first.t).noise) == (1000, {}, 1)
    # x = (1 - t) x0 + t eps and v = eps - x0, so that eps = x + (1 - t) v.
    t = float(tiny_flow.scheduler.timesteps[-3])
    with torch.no_grad():
        without, with_prompt = (first.x + (1 - t / 1000) * velocity for velocity in run.predicting(t)(first.x))
    np.testing.assert_allclose(scores["Asthana, alignment alone"].values, peers.alignment(without, with_prompt), rtol=1e-5)


def test_the_verdict_is_of_the_first_step_and_asks_where_it_is_suspicious(tiny_pipe):
    how = {"num_inference_steps": STEPS, "guidance_scale": shots.GUIDANCE}
    profile = calibrate(tiny_pipe, [f"a cat {number}" for number in range(9)], progress=False, **how)
    texts = [*(f"a cat {number}" for number in range(6)), "a dog in the sun"]
    images = [shots.Shot("ordinary", text, 100 + number) for number, text in enumerate(texts)]
    found = detection.verdicts(tiny_pipe, profile, images, how)
    for value, calls in zip(found.values, found.calls, strict=True):
        assert calls.forward in (0, 3)  # a noise, its negative, and the run's own latent once more
        assert calls.forward or value < -math.log(SUSPICIOUS)
    assert {calls.forward for calls in found.calls} == {0, 3}


def test_figures_are_of_each_group_against_the_ordinary_images():
    scores = {
        "first": detection.Scored(np.array([1.0, 0.0]), [shots.Calls(), shots.Calls()]),
        "second": detection.Scored(np.array([0.0, 1.0]), [shots.Calls(forward=3), shots.Calls()]),
    }
    found = detection.figures(scores, SHOTS)
    rows = found["exact"]["scores"]
    assert (rows["first"]["auc"], rows["second"]["auc"]) == (1.0, 0.0)
    assert rows["second"]["extra_calls"] == {"forward": 3, "jvp": 0, "backward": 0}
    assert set(found["ordinary"]["scores"]["first"]) == {"median", "extra_calls"}


def test_every_method_of_mitigation_samples(tiny_pipe):
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
