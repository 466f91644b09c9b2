"""The example service: verdicts in headers, refusals, requests side by side, what happens when something breaks."""

import base64
import contextlib
import dataclasses
import io
import json
import logging
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

from fastapi.testclient import TestClient  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from memorization_guard import RunSettings, StabilityMonitor, StabilityProfile, Trace, lab  # noqa: E402
from memorization_guard.core.trace import STATEMENT, Steps  # noqa: E402
from memorization_guard.diffusers import copy_sharing_weights, guard  # noqa: E402

ROOT = Path(__file__).parents[1]
MEMORIZED, *OTHERS = lab.prompts("exact")
ORDINARY = lab.prompts("ordinary")[0]
STEPS = 9


@pytest.fixture(scope="module")
def pipe():
    return lab.pipeline()


@pytest.fixture
def serve(serving, pipe, monkeypatch):
    """Starts the service on the lab model, loaded once for all tests, and gives a client of it."""
    monkeypatch.setattr(serving.painter, "load_pipeline", lambda *_, **__: pipe)
    with contextlib.ExitStack() as stack:

        def start(**settings):
            app = serving.app.create_app(serving.settings.Settings(**{"steps": STEPS} | settings))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield start


ALLOW = {"triggered": "allow", "unscored": "allow"}
REFUSE = {"triggered": "refuse", "unscored": "refuse"}


def ask(client, prompt=MEMORIZED, *, accept="image/png", **body):
    return client.post("/images", json={"prompt": prompt, "seed": 1} | body, headers={"Accept": accept})


def metrics_of(client):
    """Samples by name and labels, as Prometheus reads them."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name.removeprefix("memorization_guard_"), *s.labels.values()): s.value for f in families for s in f.samples}


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def painted(pipe, prompt=MEMORIZED, seed=1, **keywords):
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipe(prompt, generator=generator, **{"num_inference_steps": STEPS} | keywords).images[0])


# --- answers ----------------------------------------------------------------------------------------------------------


def test_an_image_comes_with_its_verdict_in_the_headers(serve, pipe):
    answer = ask(serve(policy=ALLOW), steps=50)  # the profile's own, at which there is a published score
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    twin = copy_sharing_weights(pipe)
    with guard(twin, lab.profile()) as run:
        np.testing.assert_array_equal(pixels(answer.content), painted(twin, num_inference_steps=50))
    (trace,) = run.traces
    names = ("Verdict", "Score", "P-Value", "Trigger-Step", "Corrected-Steps", "Outcome")
    verdict, *numbers, outcome = (answer.headers[f"X-Memorization-{name}"] for name in names)
    assert (verdict, outcome) == (trace.verdict, "served")
    assert verdict == "likely copy"
    assert [float(n) for n in numbers] == pytest.approx([trace.score, trace.p_value, trace.trigger_step, 0], rel=1e-6)
    assert answer.headers["X-Seed"] == "1"


def test_an_ordinary_image_is_served_whatever_the_policy(serve):
    answer = ask(serve(policy=REFUSE), ORDINARY)
    assert answer.status_code == 200
    assert answer.headers["X-Memorization-Verdict"] == "stable"
    assert "X-Memorization-Trigger-Step" not in answer.headers
    assert float(answer.headers["X-Memorization-P-Value"]) > 0.001


def test_json_holds_the_same_image_and_the_trace(serve):
    client = serve(policy=ALLOW)
    png, answer = ask(client), ask(client, accept="application/json")
    content = answer.json()
    assert base64.b64decode(content["image"]) == png.content
    trace = Trace.from_dict(content["trace"])
    assert len(trace.steps) == STEPS
    assert trace.verdict == png.headers["X-Memorization-Verdict"]
    assert (content["outcome"], content["seed"]) == ("served", 1)


def test_without_a_seed_the_image_is_a_new_one_and_can_be_made_again(serve):
    client = serve()
    first, second = (client.post("/images", json={"prompt": ORDINARY}) for _ in range(2))
    assert first.content != second.content
    assert ask(client, ORDINARY, seed=int(first.headers["X-Seed"])).content == first.content


def test_steps_and_guidance_scale_are_the_clients(serve):
    answer = ask(serve(), ORDINARY, accept="application/json", steps=7, guidance_scale=5)
    settings = answer.json()["trace"]["settings"]
    assert (settings["steps"], settings["guidance_scale"]) == (7, 5.0)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "secret" * 5}, "prompt: at most 20 characters"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "\ud800"}, "JSON"),
        ({"prompt": "secret", "seed": -1}, "seed"),
        ({"prompt": "secret", "seed": 2**63}, "seed"),
        ({"prompt": "secret", "steps": 0}, "steps"),
        ({"prompt": "secret", "steps": 13}, "steps: at most 12"),
        ({"prompt": "secret", "steps": 5.5}, "steps"),
        ({"prompt": "secret", "guidance_scale": 12.5}, "guidance_scale: at most 12"),
        ({"prompt": "secret", "guidance_scale": "high"}, "guidance_scale"),
        ({"prompt": "secret", "height": 4096}, "height"),
        (["secret"], "object"),
    ],
)
def test_bad_input_is_refused_before_it_costs_anything(serve, body, named, monkeypatch):
    client = serve(max_prompt=20, max_steps=12)
    monkeypatch.setattr("serving.painter.guard", None)
    answer = client.post("/images", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"] == "invalid"
    assert named in answer.json()["message"]
    assert "secret" not in answer.text


def test_every_error_has_one_form(serve, serving, monkeypatch):
    """A word and a sentence in JSON, also for what is no JSON, no text, or too large to be either."""
    client = serve(max_body=20_000)
    start = b'{"prompt": "secret", '
    bodies = {
        **{number: start + b'"guidance_scale": %s}' % number for number in (b"NaN", b"Infinity", b"1e999", b"9" * 4000)},
        **{b"seed " + number: start + b'"seed": %s}' % number for number in (b"9" * 4000, b"9" * 9000, b"1.5", b'"1"')},
        **{b"text": b"secret", b"none": b"", b"null": b"null", b"half": b"{", b"form": b"prompt=secret"},
        **{b"bytes": b"\xff\xfe", b"bytes in text": b'{"prompt": "\xff"}', b"utf-16": '{"prompt": "a"}'.encode("utf-16")},
        **{b"deep": b"[" * 20_000, b"deep and whole": start + b'"seed": ' + b"[" * 9000 + b"]" * 9000 + b"}"},
    }
    answers = [client.post("/images", content=body) for body in bodies.values()]
    assert [answer.status_code for answer in answers] == [400] * len(bodies)
    answers += [client.get("/nowhere"), client.get("/images/"), client.get("/images"), client.delete("/metrics")]
    answers += [client.post("/images", content=b" " * 20_001), client.post("/images", content=(b" " * 9000 for _ in range(9)))]
    monkeypatch.setattr(serving.app, "_painted", lambda *_: 1 / 0)
    answers += [ask(client, ORDINARY, steps=1)]
    assert [answer.status_code for answer in answers[len(bodies) :]] == [404, 404, 405, 405, 413, 413, 500]
    for answer in answers:
        content = answer.json()
        assert set(content) == {"error", "message"}
        assert content["error"] == serving.app.ERRORS[answer.status_code]
        assert "secret" not in content["message"]
        assert 0 < len(content["message"]) < 500
    assert answers[-4].headers["Allow"] == "GET"


# --- policy -----------------------------------------------------------------------------------------------------------


def test_a_mitigated_image_is_another_one(serve, pipe):
    answer = ask(serve(policy={"triggered": "mitigate"}))
    assert (answer.status_code, answer.headers["X-Memorization-Outcome"]) == (200, "mitigated")
    assert int(answer.headers["X-Memorization-Corrected-Steps"]) > 0
    twin = copy_sharing_weights(pipe)
    with guard(twin, lab.profile(), "mitigate"):
        np.testing.assert_array_equal(pixels(answer.content), painted(twin))
    assert lab.copy_score(pixels(answer.content), MEMORIZED) < lab.copy_score(painted(pipe), MEMORIZED) - 0.2


@pytest.mark.parametrize("accept", ["image/png", "application/json"])
def test_a_refused_image_stays_and_is_not_painted_to_its_end(serve, pipe, accept):
    client, calls = serve(policy=REFUSE), []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    answer = ask(client, accept=accept)
    hook.remove()
    assert answer.status_code == 422
    content = answer.json()
    assert content["error"] == "refused"
    assert content["statement"] == STATEMENT
    assert content["verdict"] == answer.headers["X-Memorization-Verdict"] != "stable"
    assert set(content) == {"error", "message", "verdict", "words", "statement"}
    assert content["words"]
    assert len(calls) < STEPS


def test_the_published_method_is_a_choice_of_the_settings(serve):
    published = {"method": "published"}
    mild = ask(serve(steps=50, policy=ALLOW, thresholds=published | {"tau_strong": 1000}))
    strong = ask(serve(steps=50, policy=REFUSE, thresholds=published | {"tau_mild": 0.1, "tau_strong": 0.1}))
    assert [a.headers["X-Memorization-Verdict"] for a in (mild, strong)] == ["mild", "strong"]
    assert [a.headers["X-Memorization-Outcome"] for a in (mild, strong)] == ["served", "refused"]
    assert [a.status_code for a in (mild, strong)] == [200, 422]


@pytest.mark.parametrize(("action", "status"), [("allow", 200), ("refuse", 422)])
def test_what_is_done_with_an_unscored_image(serve, action, status, monkeypatch):
    client = serve(policy={"unscored": action})
    monkeypatch.setattr("memorization_guard.adapters.sampling.fingerprint", lambda _: 1 / 0)
    answer = ask(client, ORDINARY)
    assert answer.status_code == status
    assert answer.headers["X-Memorization-Verdict"] == "unscored"
    assert "X-Memorization-Score" not in answer.headers


@pytest.mark.parametrize(
    ("corrected", "planned", "outcome"),
    [([False, True], 2, "mitigated"), ([False, False], 2, "refused"), ([False, True], 5, "refused")],
)
def test_mitigated_is_only_what_was_steered_and_watched_to_its_end(serving, corrected, planned, outcome):
    steps = Steps(sigma=np.ones(2), mitigated=np.array(corrected))
    trace = Trace(verdict="likely copy", steps=steps, settings=RunSettings(steps=planned))
    assert serving.settings.Policy(triggered="mitigate").decide(trace) == outcome


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ('{"concurency": 2}', "concurency"),
        ('{"concurrency": 0}', "concurrency: Input should be greater than or equal to 1"),
        ('{"policy": {"triggered": "warn"}}', "policy.triggered: Input should be 'allow', 'mitigate' or 'refuse'"),
        ('{"policy": {"unscored": "mitigate"}}', "policy.unscored: Input should be 'allow' or 'refuse'"),
        ('{"policy": {"stable": "allow"}}', "policy.stable"),
        ('{"model": "other"}', "memorization-guard calibrate"),
        ('{"model": "other", "profile": "nowhere.safetensors"}', "no stability profile at nowhere.safetensors"),
        (f'{{"model": "nowhere", "profile": "{lab.PROFILE}"}}', "there is no model at nowhere"),
        ('{"thresholds": {"false_positive_rate": 2}}', "thresholds: false_positive_rate is 2"),
        ('{"thresholds": {"false_alarms": 0.01}}', "thresholds: .*false_alarms"),
        ('{"steps": 200}', "raise max_steps"),
        ('{"max_prompt": 10000}', "max_body: .* needs up to 121024"),
        ('{"max_connections": 20}', "max_connections: .* need 26"),
        ('{"send_seconds": 0}', "send_seconds: Input should be greater than 0"),
    ],
)
def test_settings_that_cannot_work_end_the_start_with_a_sentence(serving, tmp_path, monkeypatch, content, message):
    file = tmp_path / "settings.json"
    file.write_text(content)
    monkeypatch.setattr(sys, "argv", ["serving", str(file)])
    monkeypatch.setattr(serving.connections.Server, "run", lambda *_, **__: pytest.fail("the service started"))
    with pytest.raises(SystemExit) as stopped:
        serving.__main__.main()
    assert re.match("serving: .*" + message, str(stopped.value))


def test_a_file_of_settings_that_is_not_there(serving):
    with pytest.raises(serving.settings.SettingsError, match=r"nowhere\.json cannot be read"):
        serving.settings.read_settings("nowhere.json")


def test_a_profile_of_another_model_ends_the_start(serve, serving, tmp_path):
    profile = StabilityProfile.load(lab.PROFILE)
    other = dataclasses.replace(profile, settings=dataclasses.replace(profile.settings, model_hash="another"))
    path = other.save(tmp_path / "other.safetensors")
    with pytest.raises(serving.settings.SettingsError, match="no image could be scored with the profile"):
        serve(profile=str(path))


def test_a_shared_autoencoder_that_is_cast_to_decode_ends_the_start(serve, serving, pipe, monkeypatch):
    monkeypatch.setattr(type(pipe), "upcast_vae", lambda _: None, raising=False)
    monkeypatch.setattr(type(pipe.vae), "dtype", torch.float16)
    with pytest.raises(serving.settings.SettingsError, match="set concurrency to 1"):
        serve(concurrency=2)


# --- side by side -----------------------------------------------------------------------------------------------------

REQUESTS = [
    {"prompt": MEMORIZED, "seed": 1},
    {"prompt": ORDINARY, "seed": 2, "steps": 12},
    {"prompt": OTHERS[0], "seed": 3, "guidance_scale": 5.0},
    {"prompt": ORDINARY, "seed": 4, "guidance_scale": 1.0},
    {"prompt": OTHERS[1], "seed": 5, "steps": 6},
    {"prompt": MEMORIZED, "seed": 6, "guidance_scale": 9.0},
]


def test_requests_side_by_side_are_those_one_after_the_other(serve, pipe):
    client = serve(concurrency=3)
    alone = [ask(client, accept="application/json", **body).json() for body in REQUESTS]
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        together = list(pool.map(lambda body: ask(client, accept="application/json", **body).json(), REQUESTS))
    assert together == alone
    assert len({answer["image"] for answer in alone}) == len(REQUESTS)
    assert {answer["trace"]["verdict"] for answer in alone} == {"stable", "corrected"}
    assert not pipe.unet._forward_hooks


@contextlib.contextmanager
def held(pipe):
    """Holds every image under way in its network; gives how many are, and the event that lets them go on."""
    inside, go = [], threading.Event()

    def hold(*_):
        inside.append(1)
        assert go.wait(20)

    hook = pipe.unet.register_forward_pre_hook(hold)
    try:
        yield inside, go
    finally:
        go.set()
        hook.remove()


def until(condition):
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def test_beyond_the_line_requests_are_turned_away_and_the_rest_are_served(serve, pipe):
    client = serve(concurrency=1, queue=1, steps=4)
    wanted = [ask(client, ORDINARY, seed=seed).content for seed in range(2)]
    with ThreadPoolExecutor(2) as pool, held(pipe) as (inside, go):
        waiting = [pool.submit(ask, client, ORDINARY, seed=0)]
        until(lambda: inside)
        waiting.append(pool.submit(ask, client, ORDINARY, seed=1))
        until(lambda: metrics_of(client)["admitted",] == 2)
        assert client.get("/healthz").json() == {"status": "ok"}
        answer = ask(client, ORDINARY)
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["error"] == "busy"
        go.set()
        assert [future.result().content for future in waiting] == wanted
        assert len(inside) >= 2
    assert ask(client, ORDINARY, seed=1).content == wanted[1]
    until(lambda: metrics_of(client)["admitted",] == 0)
    assert metrics_of(client)["requests_total", "turned_away"] == 1


@contextlib.contextmanager
def listening(app):
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def test_a_client_that_leaves_gives_up_its_place_and_disturbs_nobody(serve, pipe, serving, monkeypatch):
    monkeypatch.setattr(serving.app, "LOOK", 0.05)
    client = serve(concurrency=1, queue=2, steps=4)
    wanted = ask(client, ORDINARY, seed=1).content
    with listening(client.app) as address, ThreadPoolExecutor(3) as pool, held(pipe) as (inside, go):

        def post(seed, timeout):
            body = {"prompt": ORDINARY, "seed": seed}
            return httpx.post(f"{address}/images", json=body, timeout=timeout)

        def sampled():
            return metrics_of(client)["sampling_seconds_count",]

        before = sampled()
        running = pool.submit(post, 0, 1.0)
        until(lambda: inside)
        queued, staying = pool.submit(post, 2, 1.0), pool.submit(post, 1, 30)
        for future in (running, queued):
            with pytest.raises(httpx.ReadTimeout):
                future.result()
        until(lambda: metrics_of(client)["requests_total", "abandoned"] == 2)
        go.set()
        assert staying.result().content == wanted
        # The one under way was painted to its end, the one that waited never began.
        assert sampled() - before == 2
        until(lambda: metrics_of(client)["admitted",] == 0)


# --- what breaks ------------------------------------------------------------------------------------------------------


def test_an_image_whose_guard_fails_is_served_unscored(serve, monkeypatch):
    client = serve(policy=ALLOW)
    watched = ask(client)
    monkeypatch.setattr("memorization_guard.adapters.sampling.fingerprint", lambda _: 1 / 0)
    answer = ask(client)
    assert (answer.status_code, answer.headers["X-Memorization-Verdict"]) == (200, "unscored")
    assert answer.content == watched.content
    assert "Watching ended early: division by zero" in ask(client, accept="application/json").json()["trace"]["note"]
    assert metrics_of(client)["verdicts_total", "unscored"] == 2


def test_an_image_whose_monitor_fails_half_way_is_served_unscored(serve, monkeypatch):
    client, original = serve(), StabilityMonitor._check_batch

    def fails(self, batch):
        if self.evaluations == 3:
            raise RuntimeError("no more")
        original(self, batch)

    wanted = ask(client, ORDINARY)
    monkeypatch.setattr(StabilityMonitor, "_check_batch", fails)
    answer = ask(client, ORDINARY)
    assert (answer.status_code, answer.headers["X-Memorization-Verdict"]) == (200, "unscored")
    assert answer.content == wanted.content


def test_a_failed_image_costs_no_other_and_quotes_no_prompt(serve, pipe, caplog):
    client = serve(policy=ALLOW)
    wanted = ask(client, ORDINARY).content

    def fail(*_):
        raise RuntimeError(f"cannot paint {MEMORIZED}")

    hook = pipe.unet.register_forward_pre_hook(fail)
    answer = ask(client)
    hook.remove()
    assert answer.status_code == 500
    assert answer.json() == {"error": "failed", "message": "the image could not be made"}
    assert "RuntimeError" in caplog.text
    assert MEMORIZED not in caplog.text
    assert ask(client, ORDINARY).content == wanted
    assert metrics_of(client)["requests_total", "failed"] == 1


def test_nothing_of_a_prompt_leaves_but_in_the_image(serve, caplog, capfd):
    """Also not what a text encoder cuts off, which diffusers would print."""
    client = serve(policy=ALLOW)
    with caplog.at_level(logging.DEBUG, logger="serving"):
        answers = [ask(client, "xylophone " * 90), ask(client, "xylophone", steps=0), ask(client, "xylophone")]
    said = [caplog.text, *capfd.readouterr(), client.get("/metrics").text]
    said += [str(answer.headers) for answer in answers]
    assert not any("xylophone" in text for text in said)
    assert all(str(answer.headers).isascii() for answer in answers)


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_prometheus_is_told_what_was_done(serve):
    client = serve(policy={"triggered": "mitigate", "unscored": "refuse"})
    assert all(value == 0 for (name, *_), value in metrics_of(client).items() if not name.endswith("_created"))
    answers = [ask(client), ask(client, ORDINARY), ask(client, OTHERS[0]), ask(client, OTHERS[1], guidance_scale=1.0)]
    found = metrics_of(client)
    outcomes = {labels[0]: v for (name, *labels), v in found.items() if name == "requests_total"}
    assert outcomes == {"served": 1, "mitigated": 3, "refused": 0, "failed": 0, "turned_away": 0, "abandoned": 0}
    verdicts = {labels[0]: v for (name, *labels), v in found.items() if name == "verdicts_total"}
    assert verdicts == {"stable": 1, "corrected": 3, "likely copy": 0, "mild": 0, "strong": 0, "unscored": 0}
    assert found["corrected_images_total",] == 3
    assert found["corrected_steps_total",] == sum(int(a.headers["X-Memorization-Corrected-Steps"]) for a in answers) > 2
    assert found["sampling_seconds_count",] == found["overhead_seconds_count",] == 4
    # Most of it is the search for the words of the three that triggered.
    assert 0 < found["overhead_seconds_sum",] < found["sampling_seconds_sum",]


def test_the_package_does_not_know_the_service():
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "memorization_guard").rglob("*.py")]
    assert sources
    assert not any("fastapi" in source or "prometheus" in source for source in sources)
