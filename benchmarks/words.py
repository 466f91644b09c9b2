"""Which words call a copy up, and what is left of copy and prompt without them, beside steering away from the prompt.

    python benchmarks/words.py --model FOLDER --world FOLDER --sampler Euler:30 --json FILE

Prompts of the evaluation split are sampled from the same noise unguarded, steered, and without the words that were found.
Counted are copies, the share of the caption's attributes that an image shows (with a trained classifier beside the model), and
how many of the words found are the name that the captions of a duplicated image end in. The ``near`` group has the same
captions with other names: what the images would show if the model did not remember. Nothing is chosen here.
"""

from __future__ import annotations

from typing import Any

from samplers import lab_arguments, sampled_lab, share, texts_of, write_result
from tqdm import tqdm
from verdict import Sampled, copies, sample

from memorization_guard import Mode, StabilityProfile, Thresholds
from memorization_guard.core.settings import Correction
from memorization_guard.diffusers import calibrate
from memorization_guard.lab import PROFILE, Lab, attributes
from memorization_guard.statistics import mean_with_interval

#: How many prompts of each group; one image each.
COUNTS = {"exact": 30, "template": 24, "near": 30, "settled": 30, "ordinary": 100}
#: Groups that have a training image.
DUPLICATED = ("exact", "template")
FIRST_SEED = 9_000_000
#: How the images are made.
WAYS: dict[str, tuple[Mode, Correction]] = {
    "unguarded": ("off", "keep"),
    "steered": ("mitigate", "steer"),
    "kept": ("mitigate", "keep"),
}


def seen(lab: Lab, group: str, made: Sampled) -> dict[str, Any]:
    """Copies among the images of a group that has them, and attributes seen."""
    row: dict[str, Any] = {}
    if group in DUPLICATED:
        row["copies"] = share(copies(lab, made)["count"], len(made.prompts))
    if (lab.model / attributes.FILE).is_file():
        accuracy = attributes.attribute_accuracy(made.images, made.prompts, lab)
        row["attributes_seen"] = mean_with_interval(accuracy, made.prompts)
    return row


def told(made: Sampled) -> dict[str, Any]:
    """Of how many images that triggered words were told, how many, and how many of them are of the caption's name."""
    names = [set(text.split()[-2:]) for text in made.prompts]
    triggered = [(name, trace.words) for name, trace in zip(names, made.traces, strict=True) if trace.trigger_step is not None]
    found = [(name, set(words.words)) for name, words in triggered if words is not None]
    return {
        "triggered": len(triggered),
        "told": len(found),
        "with_a_word_of_the_name": sum(bool(name & words) for name, words in found),
        "words": sum(len(words) for _, words in found),
        "words_of_the_name": sum(len(name & words) for name, words in found),
    }


def main() -> None:
    parser = lab_arguments(__doc__, batch=8)
    arguments = parser.parse_args()
    lab, pipe, steps = sampled_lab(arguments)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": arguments.guidance}
    own = lab.model / PROFILE.name
    if own.is_file():
        profile = StabilityProfile.load(own)
    else:
        profile = calibrate(pipe, lab.prompts("reference"), batch_size=arguments.batch, progress=True, **options)
    groups: dict[str, Any] = {}
    for number, (group, count) in enumerate(tqdm(COUNTS.items(), unit="group")):
        texts, first = texts_of(lab, group, "evaluation", count), FIRST_SEED + 1000 * number
        row = groups[group] = {"images": count}
        for way, (mode, correction) in WAYS.items():
            thresholds = Thresholds(correction=correction)
            made = sample(pipe, profile, texts, first, mode, arguments.batch, thresholds=thresholds, **options)
            row[way] = seen(lab, group, made)
            if way == "kept":
                row["words"] = told(made)
            if mode != "off" and not any(trace.trigger_step is not None for trace in made.traces):
                break  # nothing is corrected, whichever way
    write_result({"sampler": arguments.sampler, "guidance": arguments.guidance, "groups": groups}, arguments.json)


if __name__ == "__main__":
    main()
