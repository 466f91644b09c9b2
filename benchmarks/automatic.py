"""What a profile that made itself of our own prompts is worth on a lab model: its cost, what triggers, and what is left.

    python benchmarks/automatic.py --model FOLDER --world FOLDER --json FILE

The lab's prompts are captions of its own world, and ours are not, so this is the hard case. Every image is of the evaluation
split and begins from a noise of its own. Detection is that of the first evaluation; mitigated images are sampled to the end,
memorized ones beside the same without the guard.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

from samplers import lab_arguments, reference_runs, sampled_lab, share, write_result
from verdict import copies, sample

from memorization_guard.automatic import PROMPTS, user_folder
from memorization_guard.core.profile import StabilityProfile
from memorization_guard.diffusers import guard

#: Images of each group that are judged, a number of seeds a prompt, and of how many prompts mitigated ones are sampled.
SEEDS = {"ordinary": 1, "settled": 4, "near": 4, "exact": 4, "template": 4}
MITIGATED = {"ordinary": 100, "exact": 30, "template": 24}
NOMINAL = (0.1, 0.01, 0.005, 0.001)
FIRST_SEED = 12_000_000


def profile_of(pipe: Any) -> StabilityProfile:
    """The profile that makes itself, in a folder of its own."""
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    with guard(pipe, "auto"):
        (file,) = user_folder().iterdir()
    return StabilityProfile.load(file)


def cost(pipe: Any, texts: list[str], turns: int = 3, **options: Any) -> dict[str, Any]:
    """Seconds that a profile and ten images of 30 and 50 steps take, the median of some turns."""
    taken: dict[str, list[float]] = {"profile": [], "30": [], "50": []}
    for _ in range(turns):
        for name, seconds in taken.items():
            started = time.perf_counter()
            if name == "profile":
                profile_of(pipe)
            else:
                pipe(texts, **(options | {"num_inference_steps": int(name)}), output_type="latent")
            seconds.append(time.perf_counter() - started)
    medians = {name: sorted(seconds)[turns // 2] for name, seconds in taken.items()}
    return {"profile": medians.pop("profile"), "ten_images_of_steps": medians}


def main() -> None:
    arguments = lab_arguments(__doc__, batch=10).parse_args()
    lab, pipe, steps = sampled_lab(arguments)
    options = {"num_inference_steps": steps, "guidance_scale": arguments.guidance}
    seconds = cost(pipe, lab.prompts("reference")[:10], **options)
    profile = profile_of(pipe)
    groups: dict[str, Any] = {}
    for number, (group, seeds) in enumerate(SEEDS.items()):
        texts = [text for text in lab.prompts(group, "evaluation") for _ in range(seeds)]
        how = {"steps": steps, "guidance": arguments.guidance, "batch": arguments.batch, "profile": profile}
        runs = reference_runs(pipe, texts, FIRST_SEED + 100_000 * number, "first", **how)
        found = [trace.p_value for traces in runs for trace in traces]
        known = [p_value for p_value in found if p_value is not None]
        below = {str(rate): share(sum(p_value <= rate for p_value in known), len(found)) for rate in NOMINAL}
        groups[group] = {"unscored": len(found) - len(known), "below": below}
        print(group, below, flush=True)
    mitigated: dict[str, Any] = {}
    for number, (group, count) in enumerate(MITIGATED.items()):
        texts, first = lab.prompts(group, "evaluation")[:count], FIRST_SEED + 1_000_000 + 100_000 * number
        made = sample(pipe, profile, texts, first, "mitigate", arguments.batch, **options)
        touched = sum(bool(trace.mitigated.any()) for trace in made.traces)
        mitigated[group] = {"touched": share(touched, len(texts))}
        if group != "ordinary":
            plain = sample(pipe, profile, texts, first, "off", arguments.batch, **options)
            mitigated[group] |= {
                "copies": share(copies(lab, plain)["count"], len(texts)),
                "left": share(copies(lab, made)["count"], len(texts)),
            }
        print(group, mitigated[group], flush=True)
    result = {
        "sampler": arguments.sampler,
        "prompts": PROMPTS,
        "seconds": seconds,
        "groups": groups,
        "mitigated": mitigated,
    }
    write_result(result, arguments.json)


if __name__ == "__main__":
    main()
