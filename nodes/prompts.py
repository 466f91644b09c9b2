"""The prompt of a run, found again among the texts of its workflow, and other prompts in its place.

A conditioning carries what a text encoder made of a text, and not the text. So once a run has triggered, the texts of its
workflow are encoded again with the CLIP that the guard was given: a text of which the very same comes is the run's prompt, and
what comes of another takes its place.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from .runs import texts_behind

#: Evaluates Gaussian noise ``[B, ...]`` at the model's highest noise level with another positive conditioning alone, or with
#: ``None`` the run's present latent with all of its own: gives latents, noise level, and the predictions with the prompt.
Answer = Callable[[Tensor | None, Mapping[str, Any] | None], tuple[Tensor, Tensor, Tensor]]

#: What a conditioning is called that is ready to be sampled with.
TEXT, POOLED = "cross_attn", "pooled_output"


def encoded(clip: Any, texts: Sequence[str]) -> list[Any]:
    """The conditioning of each text."""
    return [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts]


class Encoder:
    """A guard's CLIP, and the texts that prompts are looked for among.

    Args:
        texts: gives them while a run is sampled.
    """

    def __init__(self, clip: Any, texts: Callable[[], Sequence[str]] = texts_behind) -> None:
        self._clip = clip
        self.texts = texts

    def encoded(self, text: str) -> Mapping[str, Tensor] | None:
        """The tensors that come of a text, by their names in a conditioning; ``None`` where it takes several conditionings."""
        (made,) = encoded(self._clip, [text])
        if len(made) != 1:
            return None
        ((tensor, options),) = made
        return {TEXT: tensor, **{name: value for name, value in options.items() if isinstance(value, Tensor)}}


class RunConditioning:
    """The positive conditioning of a run, and others made in its likeness.

    Args:
        guider: samples the run; its conditionings are the run's own, and are given up with it.
        noise, latent_image, denoise_mask, seed: what they were prepared with.
    """

    def __init__(
        self,
        encoder: Encoder,
        guider: Any,
        noise: Tensor,
        latent_image: Tensor | None,
        denoise_mask: Tensor | None,
        seed: int | None,
    ) -> None:
        self._encoder, self._guider, self._noise = encoder, guider, noise
        self._with = {"latent_image": latent_image, "denoise_mask": denoise_mask, "seed": seed}
        self._encoded: dict[str, Mapping[str, Tensor] | None] = {}

    @property
    def _all(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._guider.conds["positive"]
        return found

    def texts(self, batch: int) -> list[str]:
        """The prompt of every image; empty where no text of the workflow is."""
        if len(self._all) != 1 or not isinstance(self._all[0].get(TEXT), Tensor):
            return [""] * batch
        found = [""] * min(batch, len(self._all[0][TEXT]))
        with self._encoding():
            for text in self._encoder.texts():
                for row, known in enumerate(found):
                    if not known and self._made(row, self._encode(text)):
                        found[row] = text
                if all(found):
                    break
        return [found[image % len(found)] for image in range(batch)]

    def alike(self, texts: Sequence[str], most: int) -> int:
        """How many of the first texts, up to ``most``, fit into one conditioning: a long one may take more of it."""
        with self._encoding():
            shapes = [{name: value.shape for name, value in self._tensors(text).items()} for text in texts[:most]]
        return next((count for count, shape in enumerate(shapes) if shape != shapes[0]), len(shapes))

    def of(self, texts: Sequence[str | None]) -> Mapping[str, Any]:
        """The run's conditioning with another text for every image, or for ``None`` the image's own.

        Raises:
            RuntimeError: if they do not fit into one.
        """
        own = self._all[0]
        with self._encoding():
            made = [None if text is None else self._tensors(text) for text in texts]
        names = next(one.keys() for one in made if one is not None)
        tensors = {
            name: torch.cat([_row(own[name], i) if one is None else one[name].to(own[name]) for i, one in enumerate(made)])
            for name in names
        }
        other = {**own, **tensors, "uuid": uuid.uuid4()}
        patcher = self._guider.model_patcher
        prepared: list[Mapping[str, Any]] = comfy.samplers.encode_model_conds(
            patcher.model.extra_conds, [other], self._noise, patcher.load_device, "positive", **self._with
        )
        return prepared[0]

    @contextmanager
    def replaced(self, other: Mapping[str, Any]) -> Iterator[None]:
        """Has the run go on with another conditioning, unless this is left by an error."""
        own = self._all[:]
        self._all[:] = [dict(other)]
        try:
            yield
        except BaseException:
            self._all[:] = own
            raise

    def _made(self, row: int, tensors: Mapping[str, Tensor] | None) -> bool:
        """Whether a row of the run's conditioning is what came of a text."""
        own = self._all[0]
        if tensors is None or (isinstance(own.get(POOLED), Tensor) and POOLED not in tensors):
            return False
        return all(
            isinstance(own.get(name), Tensor) and torch.equal(_row(own[name], row), tensor.to(own[name]))
            for name, tensor in tensors.items()
        )

    def _encode(self, text: str) -> Mapping[str, Tensor] | None:
        if text not in self._encoded:
            self._encoded[text] = self._encoder.encoded(text)
        return self._encoded[text]

    def _tensors(self, text: str) -> Mapping[str, Tensor]:
        tensors = self._encode(text)
        if tensors is None:
            raise ValueError("the text encoder makes several conditionings of a text")
        return tensors

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """Where texts may be encoded: a text encoder may take the place of the model on the device, which then comes back."""
        known = len(self._encoded)
        try:
            yield
        finally:
            if len(self._encoded) > known:
                guider = self._guider
                comfy.sampler_helpers.prepare_sampling(
                    guider.model_patcher, self._noise.shape, guider.conds, guider.model_options
                )


class OtherPrompts:
    """:class:`~memorization_guard.core.asking.Prompts` at a run's first evaluation.

    Batches are always of the run's own size: what else belongs to its images (masks, images of a ControlNet) has that size.
    """

    def __init__(self, conditioning: RunConditioning, batch: int, answer: Answer) -> None:
        self._conditioning, self._batch, self._answer = conditioning, batch, answer
        self._texts: list[str] | None = None

    @property
    def texts(self) -> Sequence[str]:
        """The prompt of every image; empty where it is not known, and nothing can be told of it."""
        if self._texts is None:
            self._texts = self._conditioning.texts(self._batch)
        return self._texts

    def ask(self, noise: Tensor, sample: int, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """As in :class:`~memorization_guard.core.asking.Prompts`; all images of the batch serve, whichever it is asked of."""
        latents, predictions, sigma = [], [], None
        start = 0
        while start < len(texts):
            count = self._conditioning.alike(texts[start:], self._batch)
            some = texts[start : start + count]
            other = self._conditioning.of([*some, *[some[-1]] * (self._batch - count)])
            x, sigma, cond = self._answer(noise.expand(self._batch, *noise.shape), other)
            latents.append(x[:count])
            predictions.append(cond[:count])
            start += count
        assert sigma is not None
        x = torch.cat(latents)
        return x, sigma[:1].expand(len(x)), torch.cat(predictions)

    def go_on(self, texts: Mapping[int, str]) -> Tensor:
        """As in :class:`~memorization_guard.core.asking.Prompts`."""
        with self._conditioning.replaced(self._conditioning.of([texts.get(image) for image in range(self._batch)])):
            return self._answer(None, None)[2]


def _row(tensor: Tensor, image: int) -> Tensor:
    """What an image of a batch is given of a conditioning, as ComfyUI repeats it."""
    return tensor[image % len(tensor)][None]
