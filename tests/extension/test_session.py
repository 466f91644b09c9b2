"""The WebUI half without a host: how it is loaded beside others, and what an image's infotext brings back."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from memorization_guard import NoiseLevel, RunSettings, Thresholds, evidence
from memorization_guard.core.monitor import STOPPED

ROOT = Path(__file__).parents[2]

#: A host of mock modules, and other extensions' modules in the places where theirs would be.
LOAD = """
import importlib.abc, importlib.util, json, runpy, sys, types
from unittest.mock import MagicMock

class Host(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modules", "gradio"):
            return importlib.util.spec_from_loader(name, self, is_package=True)
    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        if spec.name == "modules.scripts":
            module.Script = type("Script", (), {})
        if spec.name == "modules.paths":
            module.models_path = "."
        if spec.name == "modules.ui_components":
            module.InputAccordion = object
        return module
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Host())
names = "nodes", "extension", "js", "core", "live", "session", "memorization_guard"
others = {name: types.ModuleType(name) for name in names}
sys.modules.update(others)
path, before = list(sys.path), set(sys.modules)
file = ROOT + "/scripts/memorization_guard.py"
first = runpy.run_path(file, run_name="memorization_guard.py")
pack = sys.modules["memorization_guard_pack"]
second = runpy.run_path(file, run_name="memorization_guard.py")
import modules.scripts
ours = [n for n in sys.modules if n not in before and str(getattr(sys.modules[n], "__file__", "")).startswith(ROOT)]
print(json.dumps({
    "scripts": [n for n, v in first.items() if isinstance(v, type) and issubclass(v, modules.scripts.Script)],
    "path": path == sys.path,
    "others": all(sys.modules[name] is module for name, module in others.items()),
    "names": sorted({name.split(".")[0] for name in ours}),
    "parts": sorted({".".join(name.split(".")[1:2]) for name in ours}),
    "fresh": sys.modules["memorization_guard_pack"] is not pack,
    "comfy": [name for name in sys.modules if name.split(".")[0] in ("comfy", "comfy_api", "server", "folder_paths")],
}))
"""


@pytest.fixture(scope="module")
def session(load_extension):
    """``extension/session.py``; it needs no host."""
    return load_extension("session")


def test_the_script_loads_under_a_name_of_its_own_beside_others():
    run = subprocess.run(
        [sys.executable, "-c", f"ROOT = {str(ROOT)!r}\n{LOAD}"], capture_output=True, text=True, cwd=ROOT.parent, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    # Over the API the accordion has to be found before the script of the same title.
    assert found["scripts"] == ["MemorizationGuardAccordion", "MemorizationGuardScript"]
    assert found["path"]
    assert found["others"]
    assert found["names"] == ["memorization_guard_pack"]
    assert "nodes" not in found["parts"]
    assert found["fresh"]
    assert not found["comfy"]


def test_each_folder_that_the_host_reads_holds_one_thin_file():
    for folder in ("scripts", "javascript"):
        (file,) = [file for file in (ROOT / folder).iterdir() if file.is_file()]
        assert file.stem == "memorization_guard"
    assert len((ROOT / "scripts/memorization_guard.py").read_text(encoding="utf-8").splitlines()) < 30
    # The host would run an installer at every start.
    assert not (ROOT / "install.py").exists()


@pytest.mark.parametrize(
    "chosen",
    [
        ("trace", "None"),
        ("mitigate", "folder/model euler 20, cfg 7.5", 0.01, 0.5, 2.0),
        ("mitigate", "a: b", None, 0.5),
        ("stop", "model", 0.0001, -1, 3),
        ("mitigate", "model", 0.005, -1, 3, "steer"),
    ],
)
def test_an_infotext_brings_the_choice_back(session, chosen):
    options = session.Options.of(*chosen)
    # As the host writes and reads it: every value is text.
    fields = {name: str(value) for name, value in options.infotext().items()}
    assert session.Options.from_infotext(fields) == options


def test_only_what_differs_is_written(session):
    assert session.Options().infotext() == {"Memorization Guard": "trace"}
    options = session.Options(thresholds=Thresholds(false_positive_rate=0.01))
    assert options.infotext() == {"Memorization Guard": "trace", "Memorization Guard false_positive_rate": 0.01}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"Steps": "20", "Memorization Guard verdict": "likely copy"},
        {"Memorization Guard": "guess"},
        {"Memorization Guard": "trace", "Memorization Guard false_positive_rate": "a lot"},
        {"Memorization Guard": "trace", "Memorization Guard false_positive_rate": "-1"},
    ],
)
def test_an_infotext_of_others_or_written_by_hand_brings_nothing(session, fields):
    assert session.Options.from_infotext(fields) is None


def test_the_result_of_a_pasted_image_is_told(session):
    fields = {"Memorization Guard": "trace", "Memorization Guard verdict": "likely copy", "Memorization Guard score": "5.21"}
    fields |= {"Memorization Guard trigger step": "3", "Memorization Guard hires verdict": "unscored"}
    assert session.pasted_result(fields) == "likely copy, score 5.21, trigger step 3; hires unscored"
    fields["Memorization Guard rarity"] = "1 in 20,000"
    assert session.pasted_result(fields) == "likely copy, rarity 1 in 20,000, score 5.21, trigger step 3; hires unscored"
    fields["Memorization Guard words"] = "red, cat"
    assert session.pasted_result(fields).startswith("likely copy, rarity 1 in 20,000, words red, cat, score 5.21")
    assert session.pasted_result({"Steps": "20"}) == ""


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("guess", "None"), "the mode is 'guess'; known: off, trace, mitigate, stop"),
        (("trace", "None", 0), "false_positive_rate is 0"),
        (("trace", "None", "published", 3, 14), "the published method edits latents between solver steps"),
    ],
)
def test_bad_choices_say_what_is_wrong(session, arguments, why):
    with pytest.raises(ValueError, match=why):
        session.Options.of(*arguments)


def test_the_published_method_is_refused_and_its_constants_are_not_offered(session):
    offered = ["false_positive_rate", "steering_guidance", "gamma", "correction"]
    assert [field.name for field in session.HOST_CONSTANTS] == offered
    with pytest.raises(ValueError, match="which only diffusers allows"):
        session.Options(thresholds=Thresholds(method="published"))


class Processing:
    """As much of the host's processing object as a session looks at."""

    def __init__(self, batch_size=1, n_iter=1):
        self.batch_size, self.n_iter, self.iteration = batch_size, n_iter, 0
        self.all_prompts = [f"prompt {i}" for i in range(batch_size * n_iter)]
        self.prompts = self.all_prompts[:batch_size]
        self.extra_generation_params = {}
        self.comments = {}
        self.is_hr_pass = False

    def comment(self, text):
        self.comments[text] = 1


def sample(session_, p, scale=1.0):
    """A run of three steps of every image of a batch."""
    import torch

    monitor = session_.new_monitor(p, RunSettings(steps=3, prediction_type="epsilon"), NoiseLevel.from_sigma)
    x = [torch.randn(p.batch_size, 4, 8, 8, generator=torch.Generator().manual_seed(i)) * scale for i in range(4)]
    for i in range(3):
        monitor.predicted(x[i], 10.0 - i, x[i] / 2, x[i] / 3)
        monitor.latent(x[i], NoiseLevel.from_sigma(10.0 - i), evaluated=True)
    monitor.latent(x[3], NoiseLevel.from_sigma(0.0), evaluated=False)
    session_.end_run(p)


def infotext(p, **scope):
    """What the host's ``create_infotext`` makes of our fields."""
    values = {n: v(p=p, **scope) if callable(v) else v for n, v in p.extra_generation_params.items()}
    return {name: value for name, value in values.items() if value is not None}


def test_every_image_of_every_batch_has_its_own_verdict(session):
    p, sent = Processing(batch_size=2, n_iter=2), []

    class Live:
        def send(self, task, event):
            sent.append((task, event))

    one = session.Session(session.Options(), None, live=Live(), task="task(a)", first=5)
    one.write_infotext(p)
    # The host writes an infotext before anything is sampled, too.
    assert infotext(p, index=0, all_prompts=p.all_prompts) == {"Memorization Guard": "trace"}
    for p.iteration in range(2):
        p.prompts = p.all_prompts[2 * p.iteration : 2 * p.iteration + 2]
        sample(one, p)
        assert infotext(p, index=1, all_prompts=p.prompts)["Memorization Guard verdict"] == "unscored"
    assert infotext(p, index=3, all_prompts=p.all_prompts)["Memorization Guard verdict"] == "unscored"
    assert "Memorization Guard verdict" not in infotext(p, index=0, all_prompts=p.prompts, use_main_prompt=True)
    assert [len(runs) for runs in one.report(p)] == [1, 1, 1, 1]
    kinds = [(task, event["kind"], event.get("title"), event.get("first")) for task, event in sent if event["kind"] != "step"]
    assert kinds == [
        ("task(a)", "begin", "images 5-6", 5),
        ("task(a)", "end", None, None),
        ("task(a)", "begin", "images 7-8", 7),
        ("task(a)", "end", None, None),
    ]
    assert sum(event["kind"] == "step" for _, event in sent) == 6
    assert len({event["run"] for _, event in sent}) == 2
    del sent[:]
    gallery = SimpleNamespace(infotexts=["grid", "5", "6", "7", "8", "8"], index_of_first_image=1)  # one more is the graph's
    one.tell_images(p, gallery)
    assert [event["infotexts"] for _, event in sent] == [["5", "6", "grid"], ["7", "8", "grid"]]
    gallery = SimpleNamespace(infotexts=["5", "6", "7", "8"], index_of_first_image=0)
    one.tell_images(p, gallery)
    assert [event["infotexts"] for _, event in sent[2:]] == [["5", "6"], ["7", "8"]]
    # The next call of the task has runs of other names.
    another = session.Session(session.Options(), None, live=Live(), task="task(a)")
    sample(another, p)
    assert len({event["run"] for _, event in sent}) == 3


def test_an_image_says_that_it_was_protected_only_where_it_was(session):
    """Mode mitigate without a profile makes the copy: its infotext and the page say so."""
    p = Processing()
    one = session.Session(session.Options(mode="mitigate"), None, live=None, task=None)
    one.write_infotext(p)
    sample(one, p)
    written = infotext(p, index=0, all_prompts=p.all_prompts)
    assert written["Memorization Guard"] == "mitigate, not judged"
    of_grid = infotext(p, index=0, all_prompts=p.all_prompts, use_main_prompt=True)
    assert of_grid == {"Memorization Guard": "mitigate, not judged"}
    assert session.Options.from_infotext(written).mode == "mitigate"
    (said,) = one.said
    assert said.startswith("No profile was given: nothing is judged, and mode mitigate does nothing.")
    # What reads the fields without the host gets text too.
    assert json.loads(json.dumps(p.extra_generation_params, default=lambda _: None))["Memorization Guard"] == "mitigate"
    for trace in one.runs[0].traces:
        trace.verdict = "corrected"
    assert infotext(p, index=0, all_prompts=p.all_prompts)["Memorization Guard"] == "mitigate"


def test_a_hires_pass_is_told_apart(session):
    p = Processing()
    one = session.Session(session.Options(), None, live=None, task=None)
    one.write_infotext(p)
    sample(one, p)
    p.is_hr_pass = True
    sample(one, p)
    fields = infotext(p, index=0, all_prompts=p.all_prompts)
    assert fields["Memorization Guard verdict"] == fields["Memorization Guard hires verdict"] == "unscored"
    assert [run["hires"] for run in one.report(p)[0]] == [False, True]


def test_a_reference_that_is_stopped_as_it_should_says_nothing_and_one_that_fails_does(session):
    import torch

    p = Processing()
    one = session.Session(session.Options(), None, live=None, task=None, serves="first")
    for error in (None, ValueError("no prediction")):
        monitor = one.new_monitor(p, RunSettings(steps=3, prediction_type="epsilon"), NoiseLevel.from_sigma)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        monitor.predicted(x, 10.0, x / 2, x / 3)
        assert monitor.should_stop
        monitor.end(STOPPED)
        if error is not None:
            monitor.fail(error)
        one.end_run(p)
        assert [str(error) in comment for comment in p.comments] == ([] if error is None else [True])


class Saving:
    """As much of the host's ``ImageSaveParams`` as a session looks at, and its way of writing a file."""

    def __init__(self, p, filename, color="red"):
        self.p, self.filename = p, str(filename)
        self.image = Image.new("RGB", (8, 8), color)
        self.pnginfo = {"parameters": "a fox\nSteps: 3"}

    def save(self, session_, in_image=True):
        session_.before_save(self, in_image)
        self.image.putpixel((0, 0), (1, 2, 3))  # as an extension that comes later
        chunks = PngInfo()
        for name, value in self.pnginfo.items():
            chunks.add_text(name, str(value))
        self.image.save(self.filename, pnginfo=chunks)
        session_.save_trace(self)
        return Path(self.filename)


def test_evidence_is_saved_in_the_image_that_is_being_saved_and_beside_it(session, tmp_path):
    p = Processing(batch_size=2)
    one = session.Session(session.Options(), None, live=None, task=None)
    sample(one, p)
    grid = Saving(p, tmp_path / "grid.png").save(one)
    assert list(tmp_path.iterdir()) == [grid]
    one.saving = 0, 1
    file = Saving(p, tmp_path / "00001-1.png").save(one)
    beside = tmp_path / "00001-1.stability.json"
    assert json.loads(beside.read_text(encoding="utf-8")) == json.loads(Image.open(file).text[evidence.KEY])
    found = evidence.verify(file)
    assert (found.pixels, found.settings, found.unaltered, found.image, found.batch) == ("match", "match", True, 0, 1)
    assert found.traces[0].steps.update_norm == pytest.approx(one.runs[0].traces[1].steps.update_norm, rel=1e-6)
    mask = Saving(p, tmp_path / "00001-1-mask.png").save(one)
    assert evidence.KEY not in Image.open(mask).text
    assert len(list(tmp_path.iterdir())) == 4


def test_where_the_host_writes_no_infotext_or_no_png_evidence_lies_beside_the_image_only(session, tmp_path):
    p = Processing()
    one = session.Session(session.Options(), None, live=None, task=None)
    sample(one, p)
    p.is_hr_pass = True
    sample(one, p)
    one.saving = 0, 0
    file = Saving(p, tmp_path / "a.png").save(one, in_image=False)
    assert evidence.KEY not in Image.open(file).text
    assert evidence.verify(file).runs == ("", "hires")
    one.saving = 0, 0
    saving = Saving(p, tmp_path / "b.jpg")
    assert evidence.verify(saving.save(one)).pixels == "unknown"
    assert evidence.KEY not in saving.pnginfo


def test_evidence_that_fails_is_said_and_the_image_saved(session, tmp_path):
    p = Processing()
    one = session.Session(session.Options(), None, live=None, task=None)
    sample(one, p)
    for name in ("a.png", "b.png"):
        one.saving = 0, 0
        saving = Saving(p, tmp_path / name)
        saving.pnginfo["parameters"] = {("no", "text"): 1}
        assert saving.save(one).exists()
    assert len(list(tmp_path.iterdir())) == 2
    assert [comment for comment in p.comments if "no evidence in the image" in comment] == list(p.comments)
    assert len(p.comments) == 1


def test_a_trace_that_cannot_be_saved_is_said_and_loses_nothing(session, tmp_path, caplog):
    p = Processing()
    one = session.Session(session.Options(), None, live=None, task=None)
    sample(one, p)
    one.saving = 0, 0
    saving = Saving(p, tmp_path / "missing" / "image.png")
    one.before_save(saving, True)
    one.save_trace(saving)
    assert "could not save the trace" in caplog.text


def test_a_page_that_cannot_be_told_loses_nothing(session, caplog):
    class Live:
        def send(self, task, event):
            raise RuntimeError("no page")

    p = Processing()
    one = session.Session(session.Options(), None, live=Live(), task="task(a)")
    sample(one, p)
    assert one.report(p)[0][0]["trace"]["steps"]["sigma"] == [10.0, 9.0, 8.0]
    assert "could not show the graph" in caplog.text
