"""What the documents claim is what a file says."""

import json
import math
import re

import jsonschema
import pytest

from memorization_guard import Trace, trace_schema

#: The models whose verdicts were measured, and what they are called.
MODELS = {"bundled": "bundled", "model-1": "model 1", "model-2": "model 2"}


@pytest.fixture
def docs(request):
    return request.config.rootpath / "docs"


def verdicts(docs):
    """The file of each model whose verdicts were measured, by its name."""
    return measured(docs, "verdict")


def measured(docs, what):
    """The file of each model of which something was measured, by its name."""
    files = {title: docs / f"{what}-{model}.json" for model, title in MODELS.items()}
    return {title: json.loads(file.read_text(encoding="utf-8")) for title, file in files.items() if file.exists()}


def verdict_rows(docs):
    """Share of images below each nominal rate, by group."""
    for title, found in verdicts(docs).items():
        for group, row in found["groups"].items():
            cells = [f"{row['images']} of {row['prompts']}"]
            cells += [with_interval(row["below"][rate], digits=3) for rate in ("0.1", "0.01", "0.005", "0.001")]
            yield f"| {title} | {group} | {' | '.join(cells)} |"


def detection_rows(docs):
    """AUC and TPR at 1 % FPR of the verdict and of the signals alone."""
    for title, found in verdicts(docs).items():
        for group in ("exact", "template", "quarter", "sixteenth"):
            for signal, row in found["groups"][group]["detection"].items():
                cells = [with_interval(row, "auc", 4), with_interval(row, "tpr_at_1_fpr")]
                yield f"| {title} | {group} | {signal} | {' | '.join(cells)} |"


def reference_rows(docs):
    """By the number of references, at the default rate."""
    for title, found in verdicts(docs).items():
        for size, row in found["by_references"].items():
            cells = [f"{row[group]['0.005']:.3f}" for group in ("ordinary", "settled", "exact", "template")]
            yield f"| {title} | {size} | {' | '.join(cells)} |"


def negative_rows(docs):
    """With negative prompts, which the references do not have, at the default rate."""
    for title, found in verdicts(docs).items():
        for kind, groups in found["with_negative_prompts"].items():
            cells = [f"{round(row['images'] * row['0.005'])} of {row['images']}" for row in groups.values()]
            yield f"| {title} | {kind} | {' | '.join(cells)} |"


def automatic_rows(docs):
    """What a profile that made itself is worth, by model and group, and what mitigation leaves with it."""
    for title, found in measured(docs, "automatic").items():
        for group, row in found["groups"].items():
            mitigated = found["mitigated"].get(group, {})
            counts = [row["below"][rate] for rate in ("0.1", "0.01", "0.005")]
            counts += [mitigated.get(name) for name in ("copies", "left")]
            cells = [title, group, *(count and count_with_interval(count) for count in counts)]
            yield "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def words_rows(docs):
    """Copies and attributes unguarded, steered and without the words that call the copy up."""
    for title, found in measured(docs, "words").items():
        for group, row in found["groups"].items():
            for way in ("unguarded", "steered", "kept"):
                if row.get(way):  # the classifier of attributes knows the bundled world alone
                    copies, seen = row[way].get("copies"), row[way].get("attributes_seen")
                    cells = [title, group, way, copies and count_with_interval(copies), seen and with_interval(seen)]
                    yield "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def told_rows(docs):
    """Of how many images words were told, and how many of these are what the captions were learnt by."""
    for title, found in measured(docs, "words").items():
        for group, row in found["groups"].items():
            if "words" in row:
                yield f"| {title} | {group} | {' | '.join(map(str, row['words'].values()))} |"


def mitigation_rows(docs):
    """What others' mitigation leaves and keeps, beside ours, and what it costs; times were not taken on an idle machine."""
    found = json.loads((docs / "peers-mitigation.json").read_text(encoding="utf-8"))
    for group, row in found["groups"].items():
        for method, values in row["methods"].items():
            cells = [with_interval(values["copies"]), with_interval(values["fidelity"]), f"{values['unchanged']['mean']:.2f}"]
            cost = found["costs"].get(group, {}).get(method)
            if cost is not None:
                calls = {"": cost["extra_calls"]["forward"], " backward": cost["extra_calls"]["backward"]}
                cells.append(", ".join(f"{count:.3g}{kind}" for kind, count in calls.items() if count) or "0")
                cells.append(f"{max(0, cost['extra_memory']) / 2**20:.1f} MiB")
            yield (
                "".join(f"| {cell} " for cell in [group, method, *cells, *[""] * (5 - len(cells))]).replace("|  ", "| ") + "|"
            )


def peers_measured(docs):
    """The file of each model that the peers were measured on, by its name."""
    names = {"bundled": "peers-detection.json", "model 2": "peers-detection-model-2.json"}
    return {title: json.loads((docs / name).read_text(encoding="utf-8")) for title, name in names.items()}


def network_calls(row):
    """Calls of the network beyond those of sampling, by kind."""
    named = {"forward": "", "jvp": " JVP", "backward": " backward"}
    return ", ".join(f"{count:.2g}{named[kind]}" for kind, count in row["extra_calls"].items() if count) or "0"


def peer_rows(docs):
    """The verdict beside the peers: steps it waits for, extra calls, AUC and TPR at 1 % FPR."""
    for title, found in peers_measured(docs).items():
        groups = {group: row["scores"] for group, row in found["groups"].items()}
        for name, steps in found["steps"].items():
            ordinary, exact = (network_calls(groups[group][name]) for group in ("ordinary", "exact"))
            cells = [str(steps), ordinary if ordinary == exact else f"{ordinary}; exact {exact}"]
            for group in ("exact", "template"):
                row = groups[group][name]
                cells += [with_interval(row, "auc", 3), with_interval(row, "tpr_at_1_fpr")]
            yield f"| {title} | {name} | {' | '.join(cells)} |"


def peer_control_rows(docs):
    """The share of the groups that are to be taken for ordinary above the score that 1 % of ordinary images pass."""
    for title, found in peers_measured(docs).items():
        for name in found["steps"]:
            cells = [with_interval(found["groups"][group]["scores"][name], "tpr_at_1_fpr") for group in ("settled", "rare")]
            yield f"| {title} | {name} | {' | '.join(cells)} |"


def peer_condition_rows(docs):
    """What the peers were measured with, and which do not apply."""
    for title, found in peers_measured(docs).items():
        sampler, _, steps = found["sampler"].partition(":")
        images = ", ".join(f"{row['images']} {group}" for group, row in found["groups"].items())
        yield f"- {title}: {sampler}, {steps} steps, guidance {found['guidance']:g}; {images} images."


def count_with_interval(row):
    low, high = row["interval"]
    return f"{row['count']} of {row['of']} ({100 * low:.1f}-{100 * high:.1f} %)"


def with_interval(row, name="mean", digits=2):
    """A figure and its 95 % interval."""
    low, high = row[f"{name}_95"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def audit_figures(docs):
    return json.loads((docs / "audit.json").read_text(encoding="utf-8"))


def audit_rows(docs):
    """What an audit found, by kind of prompt."""
    for kind, row in audit_figures(docs)["kinds"].items():
        images, prompts = row["triggered"], row["prompts_triggered"]
        low, high = (100 * bound for bound in images["interval"])
        cells = [images["of"], f"{images['count']}, {100 * images['rate']:.1f} %", f"{low:.1f} to {high:.1f} %"]
        cells += [f"{prompts['count']} of {prompts['of']}", f"{images['chance']:.1f}"]
        yield f"| {kind} | {' | '.join(map(str, cells))} |"


def audit_threshold_rows(docs):
    """The share of each kind that other thresholds would find."""
    kinds = audit_figures(docs)["kinds"]
    for rate in kinds["exact"]["below"]:
        cells = [f"{100 * kinds[kind]['below'][rate]:.1f} %" for kind in ("exact", "template", "rare", "ordinary")]
        yield f"| {rate} | {' | '.join(cells)} |"


def screening(docs):
    return json.loads((docs / "screening.json").read_text(encoding="utf-8"))


def screening_rate_rows(docs):
    """What an image of ordinary prompts takes, whole and screened."""
    ordinary = screening(docs)["ordinary"]
    for title, name in (("whole", "whole"), ("`--screen`", "screened")):
        row = ordinary[name]
        cells = [f"{row['images_per_processor_second']:.2f}", f"{row['images'] / row['seconds']:.2f}"]
        yield f"| {title} | {' | '.join(cells)} | {row['predictions_per_image']:.1f} | {row['bytes_per_image']:,.0f} |"
    times = [ordinary[f"times_by_{name}"] for name in ("processor", "clock", "predictions")]
    yield f"| times | {' | '.join(f'{value:.0f}' for value in times)} | |"


def screening_found_rows(docs):
    """What a whole audit found, and what the screened one found of it."""
    for kind, row in screening(docs)["kinds"].items():
        share = f"{100 * row['screened'] / row['whole']:.0f} %" if row["whole"] else "-"
        cells = [row["images"], row["whole"], row["screened"], share, row["only_screened"], row["sampled_whole"]]
        yield f"| {kind} | {' | '.join(map(str, cells))} |"


def screening_curve_rows(docs):
    """What would be found, and how fast, if images were sampled whole up to another p-value."""
    for row in screening(docs)["curve"]:
        found = [f"{100 * row[kind]['found']:.0f} %" for kind in ("exact", "template")]
        cells = [*found, f"{100 * row['ordinary']['sampled_whole']:.1f} %", f"{row['times_as_fast']:.1f}"]
        yield f"| {row['p_value']:g} | {' | '.join(cells)} |"


def screening_plan_rows(docs):
    """What ten million prompts would take on one core."""
    for row in screening(docs)["plan"]:
        hours = [row[f"{name}_hours"] for name in ("screening", "suspicious")]
        cells = [
            f"{row['sampled_whole']:,}",
            *(f"{value:,.0f}" for value in (*hours, sum(hours), row["hours_of_a_whole_audit"])),
        ]
        yield f"| {row['false_positive_rate']:g} | {' | '.join(cells)} |"


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


@pytest.mark.parametrize(
    "rows",
    [
        verdict_rows, detection_rows, reference_rows, negative_rows, automatic_rows, words_rows, told_rows,
        mitigation_rows,
        peer_rows, peer_control_rows, peer_condition_rows,
    ],
)  # fmt: skip
def test_the_tables_of_the_verdict_are_those_of_their_files(rows, docs):
    text = (docs / "evaluation.md").read_text(encoding="utf-8")
    expected = list(rows(docs))
    assert expected
    assert [row for row in expected if row not in text] == []


@pytest.mark.parametrize("rows", [audit_rows, audit_threshold_rows])
def test_the_tables_of_the_audit_are_those_of_its_file(rows, docs):
    text = (docs / "audit.md").read_text(encoding="utf-8")
    assert [row for row in rows(docs) if row not in text] == []
    found = audit_figures(docs)
    kept = [call["kept"] for call in found["calls"]]
    said = f"SIGKILL at {', '.join(map(str, kept[:-2]))} and {kept[-2]} images. After the fourth call there were"
    assert f"{said} {found['rows']:,} rows of {found['images']:,} different" in " ".join(text.split())


@pytest.mark.parametrize("rows", [screening_rate_rows, screening_found_rows, screening_curve_rows, screening_plan_rows])
def test_the_tables_of_screening_are_those_of_its_file(rows, docs):
    text = (docs / "audit.md").read_text(encoding="utf-8")
    assert [row for row in rows(docs) if row not in text] == []


def test_screening_meets_its_goals(docs):
    """Twenty times the prompts a second, 99 % of the exact and 95 % of the template prompts that a whole audit finds."""
    found, text = screening(docs), " ".join((docs / "audit.md").read_text(encoding="utf-8").split())
    ordinary, kinds = found["ordinary"], found["kinds"]
    assert min(ordinary["times_by_processor"], ordinary["times_by_predictions"]) >= 20
    assert ordinary["screened"]["images"] == ordinary["whole"]["images"]
    assert kinds["exact"]["screened"] >= 0.99 * kinds["exact"]["whole"] > 0
    assert kinds["template"]["screened"] >= 0.95 * kinds["template"]["whole"] > 0
    assert f"differ by at most {found['largest_difference_of_p_values']:.1g}" in text
    assert f"{found['near']:g} times the one that triggers" in text
    plan = found["plan"][0]
    assert f"{plan['seconds_of_a_suspicious_image']:.1f} s" in text
    assert f"{plan['gigabytes']:.0f} GB" in text
    whole, screened = (ordinary[name]["predictions_per_image"] for name in ("whole", "screened"))
    assert f"{whole:.1f} / {screened:.1f} at {found['steps']['ordinary']} steps" in text


def test_what_is_said_of_the_peers_is_in_their_files(docs):
    text = " ".join((docs / "evaluation.md").read_text(encoding="utf-8").split())
    found = {
        title: {group: row["scores"] for group, row in of["groups"].items()} for title, of in peers_measured(docs).items()
    }
    verdict, norm = "ours, verdict", "Wen, whole run"

    def pair(title, name, digits, where=""):
        one, other = (found[title]["template"][score][name] for score in (norm, verdict))
        return f"{one:.{digits}f}{where} (verdict: {other:.{digits}f})"

    bundled, flow = (
        pair(title, "auc", 3, f" on {of}") for title, of in zip(found, ("the bundled model", "model 2"), strict=True)
    )
    assert f"AUC is {bundled}, and {flow}." in text
    bundled, flow = (pair(title, "tpr_at_1_fpr", 2) for title in found)
    assert f"TPR at 1 % FPR is {bundled}, and {flow}." in text
    rates = [found[title]["settled"][norm]["tpr_at_1_fpr"] for title in found]
    assert f"mistakes {rates[0]:.2f} and {rates[1]:.2f} of settled prompts for memorized ones" in text
    rate = found["bundled"]["exact"][norm]["tpr_at_1_fpr"]
    assert f"on the bundled model it finds {rate:.2f} of exact images" in text
    for title, scores in found.items():
        steps = peers_measured(docs)[title]["steps"]
        early = {name: scores["template"][name] for name in steps if steps[name] <= 3}
        for figure in ("auc", "tpr_at_1_fpr"):
            assert max(early, key=lambda name: early[name][figure]) == verdict
        everything = [name for name in steps if scores["exact"][name]["tpr_at_1_fpr"] == 1]
        assert {verdict, "Wen, first step"} <= set(everything)
        calm = {name for name in steps if scores["settled"][name]["tpr_at_1_fpr"] * 30 < 1.5}
        assert {verdict, "Jeon, sharpness"} <= calm
        assert scores["template"]["Jeon, sharpness"]["tpr_at_1_fpr"] == 0
        above = [scores["exact"][name]["auc"] for name in ("Hessian difference", "Jeon, sharpness")]
        assert (above[0] > above[1]) == (title == "bundled")
    entropy = found["bundled"]["ordinary"]["Ren, entropy, first step"]["median"]
    assert f"an entropy of {entropy:.2f} of at most {math.log(32):.2f}" in text
    backwards = found["bundled"]["exact"]["Ren, entropy, first step"]["auc"]
    assert f"AUC {backwards:.2f} on exact images" in text


def readme_rows(docs):
    """The table in the README: Euler, 30 steps, every model that was measured."""
    for title, found in verdicts(docs).items():
        groups = found["groups"]
        for group in ("exact", "template"):
            row = groups[group]
            cells = [with_interval(row["detection"]["verdict"], "auc", 3), with_interval(row["below"]["0.005"])]
            yield f"| {title} | {group} | {' | '.join(cells)} |"
        for group in ("ordinary", "settled"):
            yield f"| {title} | {group} | | {with_interval(groups[group]['below']['0.005'], digits=3)} |"
    for group in ("exact", "template"):
        row = measured(docs, "words")["bundled"]["groups"][group]
        cells = [f"{row[way]['copies']['count']} of {row[way]['copies']['of']}" for way in ("unguarded", "kept", "steered")]
        cells += [with_interval(row[way]["attributes_seen"]) for way in ("unguarded", "kept", "steered")]
        yield f"| {group} | {' | '.join(cells)} |"


def test_the_figures_of_the_readme_are_those_of_their_files(docs):
    text = (docs.parent / "README.md").read_text(encoding="utf-8")
    assert [row for row in readme_rows(docs) if row not in text] == []
    groups = measured(docs, "words")["bundled"]["groups"]
    ordinary, near = (with_interval(groups[group]["unguarded"]["attributes_seen"]) for group in ("ordinary", "near"))
    assert f"Ordinary images show {ordinary} of theirs" in " ".join(text.split())
    assert f"but its key {near}" in " ".join(text.split())


def test_the_copies_of_model_1_are_those_of_its_file(docs):
    found = json.loads((docs / "copies-model-1.json").read_text(encoding="utf-8"))["samplers"]["Euler:30"]["copies"]
    (exact, left_exact), (template, left_template) = (
        (found[group]["traced"], found[group]["mitigated"]) for group in ("exact", "template")
    )
    text = " ".join((docs / "evaluation.md").read_text(encoding="utf-8").split())
    assert f"{exact['count']} of {exact['of']} exact prompts come back as copies" in text
    assert f"and {template['count']} of {template['of']} templates" in text
    assert f"mitigation leaves {left_exact['count']} and {left_template['count']}, which did not trigger" in text
    readme = " ".join((docs.parent / "README.md").read_text(encoding="utf-8").split())
    assert f"{template['count']} of its {template['of']} templates come back as copies at all" in readme


def test_the_copies_of_model_2_are_those_of_its_file(docs):
    found = json.loads((docs / "copies-model-2.json").read_text(encoding="utf-8"))["samplers"]["FlowMatchEuler:30"]
    (exact, left_exact), (template, left_template) = (
        (found["copies"][group]["traced"], found["copies"][group]["mitigated"]) for group in ("exact", "template")
    )
    text = " ".join((docs / "evaluation.md").read_text(encoding="utf-8").split())
    assert f"{exact['count']} of {exact['of']} exact prompts come back as copies, and {template['count']}" in text
    touched = found["touched"]["ordinary"]
    assert (
        f"mitigation leaves {left_exact['count']} and {left_template['count']}, and touches {touched['count']} of "
        f"{touched['of']} ordinary images"
    ) in text


def test_the_table_of_runs_in_turn_is_that_of_its_file(docs):
    text = (docs / "comfyui.md").read_text(encoding="utf-8")
    rows = []
    for found in json.loads((docs / "passes-comfyui.json").read_text(encoding="utf-8")):
        counts = [(found[group], what) for what in ("triggered", "copies", "left") for group in ("exact", "template")]
        counts.append((found["ordinary"], "touched"))
        cells = [found["name"], *(f"{row[what]} of {row['images']}" for row, what in counts)]
        rows.append(f"| {' | '.join(cells)} |")
        assert found["exact"]["left"] == found["ordinary"]["touched"] == 0
    assert rows
    assert "\n".join(rows) in text


def test_what_the_readme_says_of_samplers_is_in_their_table(docs):
    text = (docs / "comfyui.md").read_text(encoding="utf-8")
    table = text[text.index("<!-- samplers: begin -->") : text.index("<!-- samplers: end -->")]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 42
    _, identical, exact, template, ordinary, _, _, left, templates_left, touched = zip(*rows, strict=True)
    assert set(identical) == {"yes"}
    most = max(int(cell.split()[0]) for cell in templates_left)
    assert [set(column) for column in (exact, template, ordinary, left, touched)] == [
        {"30 of 30"}, {"13 of 16"}, {"0 of 100"}, {"0 of 30"}, {"0 of 100"}
    ]  # fmt: skip
    said = " ".join((docs.parent / "README.md").read_text(encoding="utf-8").split())
    assert (
        "Under each of ComfyUI's 42 samplers the guard found 30 of 30 exact images and 13 of 16 template images and touched 0 "
        f"of 100 ordinary ones. Mitigation left 0 of 30 exact copies, and at most {most} of 16 template copies."
    ) in said


def test_the_trace_that_is_shown_is_one(docs):
    (shown,) = re.findall(r"```json\n(.*?)```", (docs / "trace.md").read_text(encoding="utf-8"), re.DOTALL)
    data = json.loads(shown)
    jsonschema.Draft202012Validator(trace_schema()).validate(data)
    trace = Trace.from_dict(data)
    assert trace.to_dict() == data
    assert trace.p_value <= trace.thresholds.false_positive_rate
