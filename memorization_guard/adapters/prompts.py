"""The prompts of a diffusers run, as far as its text encoders saw them, and other prompts in their place.

What ``encode_prompt`` of a pipeline gave is found again among what the network is given; there, what it makes of another
prompt takes its place.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .network import Call, Network, called_with, mapped

log = logging.getLogger(__name__)

#: The argument of a network that is the prompt's.
PROMPT = "encoder_hidden_states"


class Encoded:
    """A call of ``encode_prompt``: its prompts, and what came of them.

    Args:
        encode: the pipeline's own method. arguments, keywords: what it was called with. result: what it gave.

    Attributes:
        texts: the prompt of every image. tensors: what came of them, and ``None`` for what came of negative prompts.

    Raises:
        ValueError: if the prompts are not known: they were given as embeddings, or each text encoder has another one.
    """

    def __init__(
        self, encode: Callable[..., Any], arguments: tuple[Any, ...], keywords: Mapping[str, Any], result: Any
    ) -> None:
        call = inspect.signature(encode).bind(*arguments, **keywords)
        given = dict(call.arguments)
        prompt = given.get("prompt")
        if prompt is None:
            raise ValueError("the prompt was given as embeddings")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        for name, other in given.items():
            if name.startswith("prompt_") and not name.endswith("embeds") and other not in (None, prompt, prompts):
                raise ValueError(f"{name} is another prompt")
        repeats = next((count for name, count in given.items() if name.startswith("num_") and name.endswith("_per_prompt")), 1)
        self._encode, self._given = encode, given
        self.texts = [text for text in prompts for _ in range(repeats)]
        of_prompts = [one is not None for one in self.again(prompts[:1])]
        self.tensors = [one if known else None for one, known in zip(_tensors(result), of_prompts, strict=True)]

    def again(self, texts: Sequence[str]) -> list[Tensor | None]:
        """What comes of other prompts, one an image; in the order of ``tensors``."""
        given = dict(self._given)
        for name in given:
            if name.startswith("prompt_") or name.startswith("negative_") or name.endswith("_embeds"):
                given[name] = None
            elif name.startswith("num_") and name.endswith("_per_prompt"):
                given[name] = 1
        given["prompt"] = list(texts)
        if "do_classifier_free_guidance" in given:
            given["do_classifier_free_guidance"] = False
        return _tensors(self._encode(**given))


class OtherPrompts:
    """:class:`~memorization_guard.core.asking.Prompts` of a run: has its network evaluate other prompts.

    Nothing is encoded or compared before the texts are asked for.

    Args:
        encoded: the arguments of :class:`Encoded`. network: of the run. call: that of its first evaluation with the prompts.
    """

    def __init__(self, encoded: tuple[Any, ...], network: Network, call: Call) -> None:
        self._arguments, self._network, self._call = encoded, network, call
        self._known: dict[int, tuple[Tensor, list[tuple[int, int]]]] = {}
        self._chosen: dict[int, list[Tensor | None]] = {}
        self._replaced: dict[int, tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def _encoded(self) -> Encoded:
        return Encoded(*self._arguments)

    @functools.cached_property
    def texts(self) -> Sequence[str]:
        """The prompt of every image; empty where the network is given something else than ``encode_prompt`` made of it."""
        try:
            if len(self._encoded.texts) == self._network.batch and self._places(self._call.keywords.get(PROMPT)):
                return self._encoded.texts
        except (TypeError, ValueError) as error:
            log.debug("Memorization Guard cannot tell words: %s", error)
        return [""] * self._network.batch

    def ask(self, noise: Tensor, sample: int, texts: Sequence[str]) -> tuple[Tensor, float, Tensor]:
        """As in :class:`~memorization_guard.core.asking.Prompts`; in batches no larger than the run's own."""
        length = len(called_with(self._call.arguments, self._call.keywords)[0])
        batch, latents, denoised = self._network.batch, [], []
        for start in range(0, len(texts), batch):
            some = texts[start : start + batch]
            made, count = self._encoded.again(some), len(some)
            rows = torch.arange(length // batch).repeat_interleave(count) * batch + sample

            def for_some(tensor: Tensor, made: list[Tensor | None] = made, rows: Tensor = rows, count: int = count) -> Tensor:
                if tensor.ndim == 0 or len(tensor) != length:
                    return tensor
                picked = tensor[rows.to(tensor.device)]
                for part, which in self._places(tensor):
                    picked[part * count : (part + 1) * count] = _given(made[which], tensor)
                return picked

            arguments, keywords = (mapped(given, for_some) for given in (self._call.arguments, self._call.keywords))
            call = replace(self._call, arguments=arguments, keywords=keywords)
            found = self._network.asked(call, noise.expand(count, *noise.shape))
            latents.append(found.x)
            denoised.append(found.denoised(found.cond))
        return torch.cat(latents), -1.0, torch.cat(denoised)

    def go_on(self, texts: Mapping[int, str]) -> Tensor:
        """As in :class:`~memorization_guard.core.asking.Prompts`."""
        self._chosen = {sample: self._encoded.again([text]) for sample, text in texts.items()}
        try:
            found = self._network.asked(replace(self._call, keywords=self.chosen(self._call.keywords)), None)
        except BaseException:
            self._chosen = {}  # the run goes on with its own
            raise
        return found.denoised(found.cond)

    def chosen(self, keywords: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments of a call of the network, with the prompts that the run goes on with."""
        if not self._chosen or not self._places(keywords.get(PROMPT)):
            return keywords
        return mapped(keywords, self._with_chosen)

    def _with_chosen(self, tensor: Tensor) -> Tensor:
        places = self._places(tensor)
        if not places:
            return tensor
        if id(tensor) not in self._replaced:
            other = tensor.clone()
            for part, which in places:
                for sample, outputs in self._chosen.items():
                    other[part * self._network.batch + sample] = _given(outputs[which], tensor)[0]
            self._replaced[id(tensor)] = tensor, other
        return self._replaced[id(tensor)][1]

    def _places(self, tensor: Any) -> list[tuple[int, int]]:
        """Which parts of a batch are given what the text encoders made of the prompts, and which of it: ``(part, number)``.

        Pipelines hand the same tensors over at every step: those are compared once, which waits for the device.
        """
        batch = self._network.batch
        if not isinstance(tensor, Tensor) or tensor.ndim == 0 or len(tensor) % batch:
            return []
        if id(tensor) in self._known:
            return self._known[id(tensor)][1]
        found = [
            (part, which)
            for part, rows in enumerate(tensor.split(batch))
            for which, output in enumerate(self._encoded.tensors)
            if output is not None and output.shape == rows.shape and torch.equal(_given(output, rows), rows)
        ]
        if found:
            self._known[id(tensor)] = tensor, found  # kept, so that its number stays its own; latents are not
        return found


def _given(output: Tensor | None, like: Tensor) -> Tensor:
    assert output is not None
    return output.to(like)


def _tensors(result: Any) -> list[Tensor | None]:
    """What a pipeline's encode_prompt gives, in its order; ``None`` for what is no tensor."""
    values = result if isinstance(result, (tuple, list)) else [result]
    return [value if isinstance(value, Tensor) else None for value in values]
