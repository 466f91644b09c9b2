"""Other prompts in the place of a run's own: what the host's text encoders make of them, where its network is given those.

The host calls back before every evaluation with a row for each prompt of each image. For an image that is to go on with
another prompt its row is exchanged there, so that the sampler, guidance and other extensions find a run of that prompt. The
host's own conditioning, which it keeps for the next generation, is never touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from modules import devices, prompt_parser, shared
from torch import Tensor

from . import hosts

#: What the host gives for prompts: a tensor ``[rows, tokens, channels]``, or several by name.
Rows = Any


class Texts:
    """The prompts of a run, and what is made of others.

    Args:
        denoiser: the host's ``CFGDenoiser``.
    """

    def __init__(self, denoiser: Any) -> None:
        self._denoiser = denoiser
        self._shape: Sequence[int] = ()  # of the latents
        self._rows: Rows = None  # of the present evaluation
        self._chosen: dict[int, str] = {}  # what images go on with
        self._made: tuple[Any, list[Any]] = None, []  # for that conditioning of the host, of those

    @property
    def _batch(self) -> list[list[Any]]:
        """The host's conditioning: for every image a list, one a prompt that AND joins."""
        batch: list[list[Any]] = self._denoiser.sampler.sampler_extra_args["cond"].batch
        return batch

    @property
    def places(self) -> list[int]:
        """The row of each image's first prompt."""
        return list(itertools.accumulate(map(len, self._batch[:-1]), initial=0))

    def of_images(self) -> list[str]:
        """The prompt of every image; empty where there is no telling: AND joins several, it changes with the steps, or the
        network is given something else than the host makes of it."""
        batch, p = self._batch, self._denoiser.p
        texts = p.hr_prompts if getattr(p, "is_hr_pass", False) else p.prompts
        if len(texts) != len(batch):
            return [""] * len(batch)
        plain = [text for text, prompts in zip(texts, batch, strict=True) if len(prompts) == 1 and _is_plain(prompts[0])]
        made = dict(zip(plain, self._encoded(plain), strict=True))
        return [
            text if text in made and _same(made[text], picked(self._rows, [place])) else ""
            for text, place in zip(texts, self.places, strict=True)
        ]

    def rows(self, texts: Sequence[str]) -> Rows:
        """What is made of other prompts, a row each, as long as those of the present evaluation."""
        return _stacked(self._encoded(texts), self._rows)

    def choose(self, texts: Mapping[int, str]) -> None:
        """Has the run go on with other prompts for these images."""
        self._chosen, self._made = dict(texts), (None, [])

    def given(self, rows: Rows, shape: Sequence[int]) -> Rows:
        """Takes in the rows of the next evaluation, and gives them with the prompts that were chosen.

        Args:
            shape: of the latents that are evaluated.
        """
        # The host pads what it has by name in place.
        self._rows, self._shape = picked(rows, slice(None)), shape
        return self.chosen() if self._chosen else rows

    def chosen(self) -> Rows:
        """The rows of the present evaluation, with the prompts that were chosen; those of other images are bit-identical."""
        conditioning = self._denoiser.sampler.sampler_extra_args["cond"]
        if self._made[0] is not conditioning:  # the first time, and when the refiner takes over, with encoders of its own
            self._made = conditioning, self._encoded(list(self._chosen.values()))
        places = self.places
        rows = self._rows
        return _replaced(rows, [places[image] for image in self._chosen], _stacked(self._made[1], rows))

    def _encoded(self, texts: Sequence[str]) -> list[Any]:
        """What the host makes of prompts, of each without the axis of the batch."""
        if not texts:
            return []
        p = self._denoiser.p
        hires = getattr(p, "is_hr_pass", False)
        # Beside the text, some text encoders are told these.
        settings = SimpleNamespace(
            width=p.hr_upscale_to_x if hires else p.width,
            height=p.hr_upscale_to_y if hires else p.height,
            distilled_cfg_scale=getattr(p, "hr_distilled_cfg" if hires else "distilled_cfg_scale", None),
        )
        prompts = prompt_parser.SdConditioning(texts, copy_from=settings)
        with hosts.text_encoders(shared.sd_model, self._shape), devices.autocast():
            made = prompt_parser.get_multicond_learned_conditioning(shared.sd_model, prompts, p.steps).batch
        return [prompt.schedules[0].cond for prompt, *_ in made]


class OtherPrompts:
    """:class:`~memorization_guard.core.asking.Prompts` of a run's present evaluation.

    Args:
        texts: the run's.
        in_noise: gives the latents that noise stands for, and their noise level.
        asked: gives predictions with prompts, from latents, noise level, an image to take all else from, and rows.
        again: gives those of the present evaluation, with other rows for all images.
    """

    def __init__(
        self,
        texts: Texts,
        in_noise: Callable[[Tensor], tuple[Tensor, float]],
        asked: Callable[[Tensor, float, int, Rows], Tensor],
        again: Callable[[Rows], Tensor],
    ) -> None:
        self._texts = texts
        self._in_noise, self._asked, self._again = in_noise, asked, again
        self._known: list[str] | None = None
        self._made: tuple[Sequence[str], Rows] = (), None  # of what was asked last, in another noise

    @property
    def texts(self) -> Sequence[str]:
        """The prompt of every image; empty where it is not known."""
        if self._known is None:
            self._known = self._texts.of_images()
        return self._known

    def ask(self, noise: Tensor, sample: int, texts: Sequence[str]) -> tuple[Tensor, float, Tensor]:
        """As in :class:`~memorization_guard.core.asking.Prompts`; in batches no larger than the run's own."""
        latents, predictions = [], []
        batch = len(self.texts)
        if self._made[0] != texts:
            self._made = texts, self._texts.rows(texts)
        for start in range(0, len(texts), batch):
            count = len(texts[start : start + batch])
            latent, level = self._in_noise(noise.expand(count, *noise.shape))
            predictions.append(self._asked(latent, level, sample, picked(self._made[1], slice(start, start + count))))
            latents.append(latent)
        return torch.cat(latents), level, torch.cat(predictions)

    def go_on(self, texts: Mapping[int, str]) -> Tensor:
        """As in :class:`~memorization_guard.core.asking.Prompts`."""
        self._texts.choose(texts)
        try:
            return self._again(self._texts.chosen())
        except Exception:
            self._texts.choose({})  # the image is steered
            raise


def _is_plain(prompt: Any) -> bool:
    """Whether one of the host's joined prompts has no weight of its own, and is the same at all steps."""
    return bool(prompt.weight == 1 and len(prompt.schedules) == 1)


def _by_name(change: Callable[..., Tensor], rows: Rows, *others: Any) -> Rows:
    """``change`` of tensors, or of each of several by name."""
    if not isinstance(rows, dict):
        return change(rows, *others)
    return type(rows)({name: change(tensor, *(other[name] for other in others)) for name, tensor in rows.items()})


def _stacked(conditions: Sequence[Any], like: Rows) -> Rows:
    """Rows of what was made of several prompts; shorter ones are padded as the host pads them in a batch."""

    def stacked(like: Tensor, *conditions: Tensor) -> Tensor:
        return torch.stack([_padded(each, like) for each in conditions]).to(like)

    return _by_name(stacked, like, *conditions)


def _padded(condition: Tensor, like: Tensor) -> Tensor:
    if condition.shape == like.shape[1:]:
        return condition
    missing = like.shape[1] - len(condition) if condition.ndim == 2 else 0
    if missing <= 0:
        raise ValueError(f"a prompt becomes {tuple(condition.shape)}, in the place of {tuple(like.shape[1:])}")
    return torch.cat([condition, condition[-1:].expand(missing, -1)])


def picked(rows: Rows, places: list[int] | slice) -> Rows:
    """These of the rows."""
    return _by_name(lambda tensor: tensor[places], rows)


def _replaced(rows: Rows, places: Sequence[int], others: Rows) -> Rows:
    def replaced(tensor: Tensor, others: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[list(places)] = others
        return changed

    return _by_name(replaced, rows, others)


def _same(condition: Any, row: Rows) -> bool:
    """Whether the host gives its network what it makes of a prompt; in another batch it may be rounded otherwise."""
    made = _stacked([condition], row)
    pairs = [(made, row)] if isinstance(row, Tensor) else [(made[name], row[name]) for name in row]
    return all(torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-3) for one, other in pairs)
