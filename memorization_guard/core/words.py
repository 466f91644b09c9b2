"""Which words of a prompt call a copy up: those without which it is an ordinary prompt (ours).

A prompt that triggered is looked at without each of its words, by the same measure that it was judged by: the detail of what
the network answers in noise. The word that it is most ordinary without is left out, and so on, until what is left is ordinary.
Words that turn out not to matter come back. ``docs/evaluation.md`` has what was measured: how often these are the words that
the copy was trained with, and what the image is without them.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .reference import Tail

#: P-value from which a prompt counts as ordinary here: without the word that is missed, copies came back on the lab's tuning
#: split at 0.1, and none at this.
ORDINARY = 0.4

#: So many prompts are tried at once, at most; of a longer prompt, groups of words first.
CANDIDATES = 16

#: At most this many words are left out, and never more than half of them.
MOST = 6

#: Of so many prompts, the latest, a process remembers the words.
REMEMBERED = 1000

# Numbers behind a colon are weights, and AND and BREAK are commands of the WebUI.
_WORD = re.compile(r":\s*[\d.]+|\b(?:AND|BREAK)\b|(?P<word>embedding:[\w.-]+|\w[\w'\u2019-]*)")


@dataclass(frozen=True)
class Words:
    """The words that call a copy up, in the order of the prompt.

    Attributes:
        words: each, as it stands in the prompt.
        p_values: of the prompt with that one put back: the smaller, the more it does by itself.
        text: the prompt without them. p_value: of that.
        left_out: whether the image was sampled without them.
    """

    words: tuple[str, ...]
    p_values: tuple[float, ...]
    text: str
    p_value: float
    left_out: bool = False

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; inverse of :meth:`from_dict`."""
        return {
            "words": list(self.words),
            "p_values": [float(f"{p_value:.4g}") for p_value in self.p_values],
            "text": self.text,
            "p_value": float(f"{self.p_value:.4g}"),
            "left_out": self.left_out,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Words:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            KeyError, TypeError: if it is something else.
        """
        words, p_values, text, p_value, left_out = (data[field.name] for field in fields(cls))
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in (*words, text)):
            raise TypeError("the words of a prompt are no list of texts")
        # What is no number compares as False, and JSON has no such numbers.
        if len(words) != len(p_values) or not all(0 <= share <= 1 for share in (*p_values, p_value)):
            raise TypeError("the words of a prompt have no share of ordinary prompts each")
        return cls(tuple(words), tuple(float(one) for one in p_values), text, float(p_value), bool(left_out))


class Memory:
    """Finds words, and remembers them for other seeds, second passes and further images of the same prompt."""

    def __init__(self) -> None:
        self._found: OrderedDict[Hashable, Words] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, model: Hashable | None, text: str, detail: Callable[[list[str]], np.ndarray], tail: Tail) -> Words | None:
        """As :func:`find`. What is remembered is held against one question, since a run may differ in more than its prompt.

        Args:
            model: what tells models apart, and the noise that they are asked in. ``None`` remembers nothing.
        """
        key = (model, tail.fingerprint, text)
        with self._lock:
            if (known := self._found.get(key)) is not None:
                self._found.move_to_end(key)
        if known is not None and (p_value := float(tail.p_value(detail([known.text]))[0])) >= ORDINARY:
            return replace(known, p_value=p_value)
        found = find(text, detail, tail)
        if found is not None and model is not None:
            with self._lock:
                self._found[key] = found
                self._found.move_to_end(key)
                if len(self._found) > REMEMBERED:
                    self._found.popitem(last=False)
        return found


def find(text: str, detail: Callable[[list[str]], np.ndarray], tail: Tail) -> Words | None:
    """The smallest set of words, as far as leaving one out after the other finds it, without which a prompt is ordinary.

    Args:
        text: the prompt.
        detail: of several prompts, as it was taken of ``text`` when it was judged: ``[N]``.
        tail: where ordinary prompts are.

    Returns:
        ``None`` where there is none: the copy hangs on too many of the words.
    """
    spans = _spans(text)
    if len(spans) < 2:
        return None

    def details(choices: Sequence[Sequence[int]]) -> np.ndarray:
        return detail([_without(text, [spans[i] for i in left_out]) for left_out in choices])

    def best(choices: list[list[int]]) -> tuple[int, float]:
        """The choice that leaves the most ordinary prompt, and the p-value of that."""
        found = details(choices)
        number = int(np.argmin(found))
        return number, float(tail.p_value(found[number : number + 1])[0])

    out: list[int] = []
    p_value = 0.0
    while not p_value >= ORDINARY:
        if len(out) >= min(MOST, len(spans) // 2):
            return None
        rest = [i for i in range(len(spans)) if i not in out]
        if len(rest) > CANDIDATES:
            groups = [part.tolist() for part in np.array_split(rest, CANDIDATES)]
            rest = groups[best([out + group for group in groups])[0]]
        number, p_value = best([[*out, i] for i in rest])
        out.append(rest[number])
    out.sort()
    while True:
        alone = details([[i for i in out if i != word] for word in out])
        if np.isnan(alone).any():
            return None  # how much a word does cannot be said
        number = int(np.argmin(alone))
        without = float(tail.p_value(alone[number : number + 1])[0])
        if len(out) == 1 or not without >= ORDINARY:
            break
        # What is left is ordinary with that word too: it comes back.
        p_value = without
        out.pop(number)
    return Words(
        words=tuple(text[slice(*spans[i])] for i in out),
        p_values=tuple(tail.p_value(alone).tolist()),
        text=_without(text, [spans[i] for i in out]),
        p_value=p_value,
    )


def places(text: str, words: Sequence[str], without: str) -> list[tuple[int, int]]:
    """Where the words stand that were left out of a prompt; of a word that stands there twice, which of the two it was.

    Args:
        text: the prompt. words, without: as :class:`Words` has them, ``without`` being its ``text``.

    Returns:
        Start and end of each, in order; nothing where that cannot be told, as of another prompt than they were told for.
    """
    spans, kept = _spans(text), [without[slice(*span)] for span in _spans(without)]
    if len(words) > MOST or len(words) + len(kept) != len(spans):
        return []
    # By how many of the words have been passed: which they were, where the rest of the prompt is what was kept.
    ways: dict[int, tuple[int, ...]] = {0: ()}
    for i, span in enumerate(spans):
        word = text[slice(*span)]
        further: dict[int, tuple[int, ...]] = {}
        for passed, chosen in ways.items():
            if i - passed < len(kept) and kept[i - passed] == word:
                further.setdefault(passed, chosen)
            if passed < len(words) and words[passed] == word:
                further.setdefault(passed + 1, (*chosen, i))
        ways = further
    return [spans[i] for i in ways.get(len(words), ())]


def marked(prompt: str, words: Sequence[str] | None, without: str | None) -> list[str]:
    """A prompt in pieces, every second of which is one of the words that call an image up; in one piece where none were told.

    Args:
        words, without: as :func:`places` has them.
    """
    pieces, end = [], 0
    for start, after in places(prompt, words or (), without or ""):
        pieces += [prompt[end:start], prompt[start:after]]
        end = after
    return [*pieces, prompt[end:]]


def _spans(text: str) -> list[tuple[int, int]]:
    """Where the words of a prompt are."""
    return [match.span() for match in _WORD.finditer(text) if match["word"]]


def _without(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text without some of its words, nor what they leave doubled."""
    for start, end in sorted(spans, reverse=True):
        text = text[:start] + text[end:]
    text = re.sub(r"\s+(?=[\s,.;)\]}])|(?<=[(\[{])\s+", "", text)
    return re.sub(r"(?<=,),+", "", text).strip(" ,")
