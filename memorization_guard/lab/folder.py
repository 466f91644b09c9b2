"""A training folder of the lab's world, as a LoRA trainer keeps one, to try audits on: images with captions beside them.

    python -m memorization_guard.lab.folder training --exact 20 --ordinary 40

The bundled model saw the images of ``40_exact`` many hundred times and returns them; of the captions in ``1_ordinary`` it saw
another image each time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from .autoencoder import render_pool
from .world import captions, duplicates, members


def write_folder(folder: Path, *, exact: int = 20, ordinary: int = 40, seed: int = 0) -> None:
    """Writes ``40_exact/`` and ``1_ordinary/``, each with PNGs of 128 x 128 pixels and a ``.txt`` beside each.

    Args:
        folder: is made. exact: images that the model memorized, those of the tuning split first.
        ordinary: fresh images of captions that it was trained on. seed: of these.
    """
    groups = captions()
    known = members(groups, "exact")[:exact]
    shown = groups["ordinary/trained"][:ordinary]
    fresh = render_pool(shown, len(shown), seed, "cpu").permute(0, 2, 3, 1).numpy()
    for name, chosen, images in (
        ("40_exact", known, [duplicates()[caption.text][0] for caption in known]),
        ("1_ordinary", shown, fresh),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, (caption, image) in enumerate(zip(chosen, images, strict=True)):
            Image.fromarray(image).save(folder / name / f"{number:03d}.png")
            (folder / name / f"{number:03d}.txt").write_text(caption.text + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--exact", type=int, default=20)
    parser.add_argument("--ordinary", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_folder(arguments.folder, exact=arguments.exact, ordinary=arguments.ordinary, seed=arguments.seed)
