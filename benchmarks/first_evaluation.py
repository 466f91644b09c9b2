"""What the verdict is made of, on many prompts: only the beginning of every run is sampled, so that a thousand take minutes.

    python benchmarks/first_evaluation.py --model FOLDER --world FOLDER --sampler Euler:30 --split evaluation --json FILE

The reference prompts are evaluated first, then every group's prompts, several seeds each: the share of ordinary ones that
fall below each nominal rate, the share of memorized ones that do, AUC and TPR at 1 % FPR of the verdict and of the signals
alone; all of it again with fewer references, and with memorized prompts among them; and the shares with negative prompts,
which the references do not have. Nothing is fitted here, and no prompt or seed is used for two purposes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from samplers import lab_arguments, reference_runs, sampled_lab, write_result
from tqdm import tqdm

from memorization_guard import Trace
from memorization_guard.core.judge import decided
from memorization_guard.core.reference import Tail, memorized
from memorization_guard.statistics import detection_with_intervals, rate_with_interval

#: Seeds of a prompt, by group.
SEEDS = {"ordinary": 2, "settled": 4, "near": 4, "rare": 4, "exact": 4, "template": 4, "quarter": 4, "sixteenth": 4}
NOMINAL = (0.1, 0.01, 0.005, 0.001)
REFERENCES = (50, 100, 200, 400)
#: A negative prompt of the kind that people use for everything.
LONG = "worst quality, low quality, blurry, watermark, text, ugly, deformed, extra fingers, jpeg artifacts"
#: Groups that are sampled with negative prompts too, and how many of their prompts.
WITH_NEGATIVE = {"ordinary": 200, "settled": 30, "exact": 30, "template": 24}
FIRST_SEED = {"tuning": 3_000_000, "evaluation": 4_000_000}


@dataclass
class Beginnings:
    """Of each image: its prompt, and what the first evaluation and the network's two answers say, ``[N]``."""

    prompts: list[str]
    detail: np.ndarray
    asked: np.ndarray
    guidance: np.ndarray

    @classmethod
    def of(cls, traces: Sequence[Trace], prompts: Sequence[str]) -> Beginnings:
        columns = [[trace.detail, trace.asked, trace.guidance_norm[0]] for trace in traces]
        return cls(list(prompts), *np.array(columns, dtype=np.float64).T)

    def p_values(self, references: Beginnings) -> np.ndarray:
        """As the judge has them: by the first evaluation, and where that is suspicious by the answers."""
        first = Tail(np.log(references.detail)).p_value(self.detail)
        return decided(first, Tail(np.log(references.asked)).p_value(self.asked))

    def part(self, chosen: np.ndarray) -> Beginnings:
        prompts = [self.prompts[number] for number in chosen]
        return Beginnings(prompts, self.detail[chosen], self.asked[chosen], self.guidance[chosen])


def begun(pipe: Any, texts: Sequence[str], first_seed: int, *, bar: Any, **keywords: Any) -> Beginnings:
    """The beginnings of one run a text, seeds counted up."""
    traces: list[Trace] = []
    for made in reference_runs(pipe, texts, first_seed, "first", **keywords):
        traces += made
        bar.update(len(made))
    return Beginnings.of(traces, texts)


def figures(groups: dict[str, Beginnings], references: Beginnings) -> dict[str, Any]:
    """Shares below each nominal rate, and detection against the ordinary prompts, by group."""
    p_values = {name: group.p_values(references) for name, group in groups.items()}
    scores = {
        name: {
            "verdict": -np.log(p_values[name]),
            "detail, first evaluation": group.detail,
            "detail, asked": group.asked,
            "guidance norm, first evaluation": group.guidance,
        }
        for name, group in groups.items()
    }
    ordinary, result = groups["ordinary"], {}
    for name, group in groups.items():
        row: dict[str, Any] = {
            "images": len(group.prompts),
            "prompts": len(set(group.prompts)),
            "below": {f"{rate:g}": rate_with_interval(p_values[name] <= rate, group.prompts) for rate in NOMINAL},
        }
        if name != "ordinary":
            row["detection"] = {
                signal: detection_with_intervals(values, scores["ordinary"][signal], group.prompts, ordinary.prompts)
                for signal, values in scores[name].items()
            }
        result[name] = row
    return result


def shares(images: Beginnings, references: Beginnings) -> dict[str, float]:
    """Share of images below each nominal rate."""
    p_values = images.p_values(references)
    return {f"{rate:g}": float((p_values <= rate).mean()) for rate in NOMINAL}


def negatives(texts: Sequence[str], ordinary: Sequence[str], memorized: Sequence[str]) -> dict[str, list[str]]:
    """Negative prompts of several kinds, one for each of ``texts``; ``ordinary`` and ``memorized`` are of another split."""
    return {
        "short": ["blurry" for _ in texts],
        "long": [LONG for _ in texts],
        "its own first words": [" ".join(text.split()[:4]) for text in texts],
        "another ordinary prompt": [ordinary[number % len(ordinary)] for number in range(len(texts))],
        "a memorized prompt": [memorized[number % len(memorized)] for number in range(len(texts))],
    }


def main() -> None:
    parser = lab_arguments(__doc__, batch=16)
    parser.add_argument("--split", default="evaluation", choices=FIRST_SEED)
    arguments = parser.parse_args()
    lab, pipe, steps = sampled_lab(arguments)
    texts = {group: [text for text in lab.prompts(group, arguments.split) for _ in range(n)] for group, n in SEEDS.items()}
    other_split = "tuning" if arguments.split == "evaluation" else "evaluation"
    planted, elsewhere = lab.prompts("exact", other_split), lab.prompts("ordinary", other_split)
    with_negative = {group: lab.prompts(group, arguments.split)[:count] for group, count in WITH_NEGATIVE.items()}
    negative = {group: negatives(prompts, elsewhere, planted) for group, prompts in with_negative.items()}
    keywords: dict[str, Any] = {"steps": steps, "guidance": arguments.guidance, "batch": arguments.batch}
    total = sum(map(len, texts.values()))
    total += sum(len(members) for of_kind in negative.values() for members in of_kind.values())
    with tqdm(total=len(lab.prompts("reference")) + len(planted) + total, unit="prompt") as bar:
        started = time.perf_counter()
        references = begun(pipe, lab.prompts("reference"), 0, **keywords, bar=bar)
        seconds = time.perf_counter() - started
        others = begun(pipe, planted, FIRST_SEED[arguments.split] - 100_000, **keywords, bar=bar)
        groups = {
            group: begun(pipe, prompts, FIRST_SEED[arguments.split] + 10_000 * number, **keywords, bar=bar)
            for number, (group, prompts) in enumerate(texts.items())
        }
        against: dict[str, Any] = {}
        for number, (group, prompts) in enumerate(with_negative.items()):
            first = FIRST_SEED[arguments.split] + 100_000 + 10_000 * number
            for kind, members in negative[group].items():
                images = begun(pipe, prompts, first, **keywords, negative=members, bar=bar)
                against.setdefault(kind, {})[group] = {"images": len(members), **shares(images, references)}
    started = time.perf_counter()
    image = {"num_inference_steps": steps, "guidance_scale": arguments.guidance, "output_type": "latent"}
    pipe(lab.prompts("reference")[:10], **image)
    ten_images = time.perf_counter() - started

    count = len(references.prompts)
    mixed = Beginnings(
        references.prompts + others.prompts,
        *(np.concatenate([getattr(references, name), getattr(others, name)]) for name in ("detail", "asked", "guidance")),
    )
    apart = memorized(mixed.asked)
    left = mixed.part(np.setdiff1d(np.arange(count + len(others.prompts)), apart))
    result = {
        "sampler": arguments.sampler,
        "groups": figures(groups, references),
        "by_references": {
            str(size): {group: shares(members, references.part(np.arange(size))) for group, members in groups.items()}
            for size in REFERENCES
            if size <= count
        },
        "with_negative_prompts": against,
        "memorized_among_the_references": {
            "planted": len(planted),
            "found": int(sum(number >= count for number in apart)),
            "ordinary_taken_for_them": int(sum(number < count for number in apart)),
            "exact_triggered": shares(groups["exact"], left)["0.005"],
        },
        "cost": {
            "references": count,
            "seconds_of_200": seconds * 200 / count,
            "seconds_of_ten_images": ten_images,
        },
    }
    write_result(result, arguments.json)


if __name__ == "__main__":
    main()
