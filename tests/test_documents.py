"""What the documents claim is what a file says."""

import json
import re

import pytest

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

    def with_interval(name, digits):
        return [f"{row[name]:.{digits}f} ({'-'.join(f'{end:.{digits}f}' for end in row[f'{name}_95'])})" for row in p_value]

    cells = {
        "AUC of the p-value": with_interval("auc", 3),
        "TPR at 1 % FPR": with_interval("tpr_at_1_fpr", 2),
        "copies without mitigation": [f"{row['traced']['count']} of {row['traced']['of']}" for row in copies],
        "copies left": [f"{row['mitigated']['count']} of {row['mitigated']['of']}" for row in copies],
    }
    for name, values in cells.items():
        assert f"| {name} | {' | '.join(values)} |" in text, name
    for rate, words in (("0.1", "10 %"), ("0.01", "1 %")):
        assert re.search(rf"{ordinary[rate]['count']} of 100 ordinary images[^.]*nominal {words}", text), words
