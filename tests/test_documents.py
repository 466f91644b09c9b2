"""What the documents claim is what a file says."""

import json
import re

import jsonschema
import pytest

from memorization_guard import Trace, trace_schema

MODELS = {"bundled": "bundled", "model-1": "model 1"}
SIGNALS = ("p-value, -log10", "S_mem", "local score", "guidance norm, first evaluation", "uncalibrated score")


@pytest.fixture
def docs(request):
    return request.config.rootpath / "docs"


def figures(docs, model, when):
    return json.loads((docs / f"verdict-{model}-{when}.json").read_text(encoding="utf-8"))["samplers"]


def detection_rows(docs):
    """Before and after side by side: AUC and TPR at 1 % FPR of each signal."""
    for model, title in MODELS.items():
        before, after = (figures(docs, model, when) for when in ("before", "after"))
        for sampler, found in after.items():
            for group, signals in found["detection"].items():
                for signal in SIGNALS:
                    cells = []
                    for side in (before[sampler]["detection"][group].get(signal), signals.get(signal)):
                        cells.append("-" if not side else f"{side['auc']:.4f}, {side['tpr_at_1_fpr']:.2f}")
                    yield f"| {title}, {sampler.replace(':', ' ')} | {group} | {signal} | {' | '.join(cells)} |"


def verdict_rows(docs):
    """Before and after side by side: how many trigger at a nominal share."""
    for model, title in MODELS.items():
        before, after = (figures(docs, model, when) for when in ("before", "after"))
        for sampler, found in after.items():
            for group in ("ordinary", "exact", "template"):
                cells = []
                for side in (before[sampler], found):
                    cells += [str(side["triggered"][group][rate]["count"]) for rate in ("0.1", "0.01", "0.001")]
                of = found["triggered"][group]["0.1"]["of"]
                yield f"| {title}, {sampler.replace(':', ' ')} | {group}, {of} | {' | '.join(cells)} |"


def mitigation_rows(docs):
    """Copies without mitigation, and what either left; ordinary images touched."""
    for model, title in MODELS.items():
        before, after = (figures(docs, model, when) for when in ("before", "after"))
        for sampler, found in after.items():
            cells = []
            for group in ("exact", "template"):
                plain = found["copies"][group]["traced"]
                left = [side["copies"][group]["mitigated"]["count"] for side in (before[sampler], found)]
                cells.append(f"{plain['count']} of {plain['of']}: {left[0]}, {left[1]}")
            touched = [side["touched"]["ordinary"]["count"] for side in (before[sampler], found)]
            cells.append(f"{touched[0]}, {touched[1]} of {found['touched']['ordinary']['of']}")
            yield f"| {title}, {sampler.replace(':', ' ')} | {' | '.join(cells)} |"


def with_interval(row, name="mean", digits=2):
    """A figure and its 95 % interval."""
    low, high = row[f"{name}_95"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def lab_figures(docs):
    return json.loads((docs / "lab.json").read_text(encoding="utf-8"))


def lab_model_rows(docs):
    """What the model must show."""
    found = lab_figures(docs)
    groups = found["groups"]
    euler = found["samplers"]["Euler 30"]
    vae = found["autoencoder"]
    exact = groups["exact"]["detection"]
    for name, value in (
        ("autoencoder, PSNR on fresh ordinary renderings, worst channel", f"{min(vae['psnr_ordinary']):.1f} dB"),
        ("autoencoder, PSNR on the exact images, worst channel", f"{min(vae['psnr_exact']):.1f} dB"),
        ("classifier on fresh renderings through the autoencoder", f"{found['classifier']:.3f}"),
        ("attributes seen in ordinary samples, Euler 30", with_interval(euler["attributes_seen"])),
        ("AUC of the guidance norm on exact", with_interval(exact["guidance norm, mean"], "auc", 4)),
        ("AUC of S_mem on exact", with_interval(exact["S_mem"], "auc", 4)),
        ("correlation of two seeds of one ordinary caption", f"{found['two_seeds_of_an_ordinary_caption']:.2f}"),
        ("share of the pixel variance that a caption explains", f"{found['world']['caption_variance_share']:.2f}"),
    ):
        yield f"| {name} | {value} |"


def lab_sampler_rows(docs):
    """Copies of exact prompts by sampler."""
    for name, row in lab_figures(docs)["samplers"].items():
        yield f"| {name} | {with_interval(row['correlated_above_0.9'])} | {row['median_copy_score']:.2f} |"


def lab_detection_rows(docs):
    """Every group with anything to detect, by signal."""
    for group, row in lab_figures(docs)["groups"].items():
        for signal, found in row["detection"].items():
            cells = [with_interval(found, "auc", 4), with_interval(found, "tpr_at_1_fpr")]
            yield f"| {group} | {signal} | {' | '.join(cells)} |"


def lab_mitigation_rows(docs):
    """By group: what triggers, copies without and with mitigation, attributes seen without and with."""
    for group, row in lab_figures(docs)["groups"].items():
        before, after = row["before"], row["after"]
        cells = [
            f"{row['images']} of {row['prompts']}",
            with_interval(row["triggered"]),
            with_interval(before["copies"]),
            with_interval(after["copies"]),
            with_interval(before["attributes_seen"]),
            with_interval(after["attributes_seen"]),
        ]
        yield f"| {group} | {' | '.join(cells)} |"


@pytest.mark.parametrize("rows", [lab_model_rows, lab_sampler_rows, lab_detection_rows, lab_mitigation_rows])
def test_the_tables_of_the_lab_are_those_of_its_file(rows, docs):
    text = (docs / "lab.md").read_text(encoding="utf-8")
    expected = list(rows(docs))
    assert expected
    assert [row for row in expected if row not in text] == []


@pytest.mark.parametrize("rows", [detection_rows, verdict_rows, mitigation_rows])
def test_the_tables_of_the_rebuilt_core_are_those_of_their_files(rows, docs):
    text = (docs / "evaluation.md").read_text(encoding="utf-8")
    expected = list(rows(docs))
    assert expected
    assert [row for row in expected if row not in text] == []


def test_the_figures_of_the_readme_are_those_of_their_file(docs):
    """The table in the README: model 1, Euler, 30 steps."""
    text = (docs.parent / "README.md").read_text(encoding="utf-8")
    found = figures(docs, "model-1", "after")["Euler:30"]
    p_value = [found["detection"][group]["p-value, -log10"] for group in ("exact", "template")]
    copies = [found["copies"][group] for group in ("exact", "template")]
    ordinary = found["triggered"]["ordinary"]

    cells = {
        "AUC of the p-value": [with_interval(row, "auc", 3) for row in p_value],
        "TPR at 1 % FPR": [with_interval(row, "tpr_at_1_fpr") for row in p_value],
        "copies without mitigation": [f"{row['traced']['count']} of {row['traced']['of']}" for row in copies],
        "copies left": [f"{row['mitigated']['count']} of {row['mitigated']['of']}" for row in copies],
    }
    for name, values in cells.items():
        assert f"| {name} | {' | '.join(values)} |" in text, name
    for rate, words in (("0.1", "10 %"), ("0.01", "1 %")):
        assert re.search(rf"{ordinary[rate]['count']} of 100 ordinary images[^.]*nominal {words}", text), words


def test_the_readme_says_what_a_steered_image_loses(docs):
    text = (docs.parent / "README.md").read_text(encoding="utf-8")
    groups = lab_figures(docs)["groups"]
    sides = (groups["exact"]["after"], groups["ordinary"]["before"], groups["exact"]["before"])
    steered, ordinary, copied = (f"{100 * side['attributes_seen']['mean']:.0f} %" for side in sides)
    assert (
        f"it showed {steered} of the caption's attributes where ordinary images show {ordinary}, and the copies had "
        f"shown {copied}"
    ) in " ".join(text.split())


def test_the_trace_that_is_shown_is_one(docs):
    (shown,) = re.findall(r"```json\n(.*?)```", (docs / "trace.md").read_text(encoding="utf-8"), re.DOTALL)
    data = json.loads(shown)
    jsonschema.Draft202012Validator(trace_schema()).validate(data)
    trace = Trace.from_dict(data)
    assert trace.to_dict() == data
    assert trace.p_value <= trace.thresholds.false_positive_rate
