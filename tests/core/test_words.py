"""Which words call a copy up, and a run that goes on without them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memorization_guard import StabilityMonitor, Thresholds, Trace
from memorization_guard.core import words
from memorization_guard.core.reference import Tail
from memorization_guard.core.words import MOST, ORDINARY, REMEMBERED, Memory, Words, find, places

from .test_monitor import with_answers

TAIL = Tail(np.log(np.random.default_rng(0).lognormal(0, 0.1, 400)))
PROMPT = "a picture of a green ring on tiles, from wosol dethax"


def remembering(*keys, needed=None, asked=None):
    """The detail of prompts of which each of the keys calls the copy up to a part; ``needed`` of them do by themselves."""

    def detail(texts):
        if asked is not None:
            asked.append(list(texts))
        found = [sum(key in text for key in keys) for text in texts]
        return np.array([1.0 if count < (needed or 1) else 2.0 + count for count in found])

    return detail


@pytest.mark.parametrize(("keys", "needed"), [(("wosol", "dethax"), 1), (("ring",), 1), (("green", "tiles", "wosol"), 1)])
def test_the_words_that_call_a_copy_up_are_found_and_no_others(keys, needed):
    found = find(PROMPT, remembering(*keys, needed=needed), TAIL)
    assert found.words == keys
    assert found.p_value >= ORDINARY
    assert max(found.p_values) < 0.01
    assert not any(key in found.text for key in keys)


def test_of_words_that_are_needed_together_one_is_enough():
    found = find(PROMPT, remembering("wosol", "dethax", needed=2), TAIL)
    assert len(found.words) == 1
    assert found.words[0] in ("wosol", "dethax")


def test_a_word_that_turns_out_not_to_matter_comes_back():
    """*red* makes the copy more likely, and without the two keys there is none, with or without it."""

    def detail(texts):
        left = [sum(key in text for key in ("wosol", "dethax")) for text in texts]
        return np.array(
            [2.0 + ("red" in text) + 0.4 * count if count else 1.0 for text, count in zip(texts, left, strict=True)]
        )

    assert find("a red ring on tiles from wosol dethax", detail, TAIL).words == ("wosol", "dethax")


def test_where_too_much_of_the_prompt_calls_it_up_no_words_are_told():
    asked = []
    assert find(PROMPT, lambda texts: remembering(asked=asked)(texts) + 5, TAIL) is None
    assert len(asked) <= MOST
    assert find("ring", remembering("ring"), TAIL) is None
    assert find("", remembering("ring"), TAIL) is None
    assert find(PROMPT, lambda texts: np.full(len(texts), math.nan), TAIL) is None


def test_no_words_are_told_where_the_network_gives_no_number_for_one_of_them():
    def detail(texts):
        return np.where(np.array(texts) == PROMPT.replace("wosol ", ""), math.nan, remembering("wosol", "dethax")(texts))

    assert find(PROMPT, detail, TAIL) is None


def test_a_long_prompt_is_looked_at_in_groups_first():
    text = " ".join(f"word{number}" for number in range(200)) + ", wosol in the middle " + " ".join("more" for _ in range(100))
    asked = []
    assert find(text, remembering("wosol", asked=asked), TAIL).words == ("wosol",)
    assert max(map(len, asked)) <= 21  # 16 groups, then the words of one
    assert len(asked) <= 3


@pytest.mark.parametrize(
    ("text", "key", "wanted"),
    [
        ("a (red cat:1.3), 8k", "red", "a (cat:1.3), 8k"),
        ("a cat, by wosol, 8k", "wosol", "a cat, by, 8k"),
        ("wosol, a cat", "wosol", "a cat"),
        ("a cat embedding:foo-1.pt here", "foo", "a cat here"),
        ("ein Bild von Müller, groß", "Müller", "ein Bild von, groß"),
        ("a [fox:wosol:0.5] AND a cat", "wosol", "a [fox::0.5] AND a cat"),
    ],
)
def test_markup_stays_whole_and_a_weight_is_no_word(text, key, wanted):
    asked = []
    assert find(text, remembering(key, asked=asked), TAIL).text == wanted
    assert all(("AND" in one) == ("AND" in text) and ("1.3" in one) == ("1.3" in text) for texts in asked for one in texts)


def test_words_are_remembered_and_held_against_one_question():
    memory, asked = Memory(), []
    found = memory.find("model", PROMPT, remembering("wosol", "dethax", asked=asked), TAIL)
    assert len(asked) > 1
    asked.clear()
    again = memory.find("model", PROMPT, remembering("wosol", "dethax", asked=asked), TAIL)
    assert again == found
    assert asked == [[found.text]]
    # What else a run has, such as an image that guides it, calls the copy up by another word.
    assert memory.find("model", PROMPT, remembering("ring", asked=asked), TAIL).words == ("ring",)


@pytest.mark.parametrize("other", [("another", PROMPT, TAIL), ("model", PROMPT + ", 8k", TAIL), ("model", PROMPT, None)])
def test_of_another_model_prompt_or_references_nothing_is_remembered(other):
    memory, asked = Memory(), []
    memory.find("model", PROMPT, remembering("wosol"), TAIL)
    model, text, tail = other
    tail = tail or Tail(np.log(np.random.default_rng(1).lognormal(0, 0.1, 400)))
    memory.find(model, text, remembering("wosol", asked=asked), tail)
    assert len(asked[0]) > 1


def test_nothing_is_remembered_of_an_unknown_model_and_never_too_much():
    memory, asked = Memory(), []
    for _ in range(2):
        asked.clear()
        memory.find(None, PROMPT, remembering("wosol", asked=asked), TAIL)
        assert len(asked[0]) > 1
    for number in range(REMEMBERED + 1):
        memory.find("model", f"wosol {number}", remembering("wosol"), TAIL)
    for number, questions in ((0, 2), (REMEMBERED, 1)):  # the first was given up
        asked.clear()
        memory.find("model", f"wosol {number}", remembering("wosol", asked=asked), TAIL)
        assert len(asked) == questions


@given(st.data())
def test_the_places_of_words_are_those_that_were_left_out(data):
    """Of words that come again and again, with marks between them."""
    parts = st.tuples(
        st.sampled_from(["cat", "Cat", "m\u00fcller", "\u732b", "x", "embedding:x"]), st.sampled_from([" ", ", ", " (", ") "])
    )
    text = "".join(part for pair in data.draw(st.lists(parts, min_size=1, max_size=9)) for part in pair)
    spans = words._spans(text)
    out = sorted(data.draw(st.sets(st.sampled_from(spans), max_size=MOST)))
    said = [text[slice(*span)] for span in out]
    found = places(text, said, words._without(text, out))
    assert [text[slice(*span)] for span in found] == said
    assert found == sorted(set(found))
    kept = [text[slice(*span)] for span in spans if span not in found]
    assert kept == [text[slice(*span)] for span in spans if span not in out]


@pytest.mark.parametrize(
    ("text", "said", "without", "wanted"),
    [
        ("a cat, by a cat", ["cat"], "a cat, by a", [(12, 15)]),
        ("a cat, by a cat", ["cat"], "a, by a cat", [(2, 5)]),
        ("a (\U0001f431 cat:1.3)", ["cat"], "a (\U0001f431:1.3)", [(5, 8)]),
        ("a cat", ["dog"], "a", []),
        ("another prompt", ["cat"], "a", []),
        ("a cat", ["cat"] * 1000, "a", []),
        ("", [], "", []),
    ],
)
def test_places_are_told_of_the_prompt_alone_that_words_were_told_for(text, said, without, wanted):
    assert places(text, said, without) == wanted


class Spoken:
    """The prompts of a run of the world's: while one holds ``key``, it is memorized."""

    def __init__(self, world, texts, x, sigma=14.0, fails=False):
        self.world, self.texts, self.x, self.sigma, self.fails = world, texts, x, sigma, fails
        self.asked, self.chosen = [], None
        self.latest = None  # what the network saw last: the run's own latent, or noise

    def _predictions(self, x, texts):
        factors = [2.0 if "wosol" in text else 1.0 for text in texts]
        return self.world.predictions(x, self.sigma, (503,) * len(x), factors)[0]

    def ask(self, noise, sample, texts):
        if self.fails:
            raise RuntimeError("out of memory")
        self.asked.append((sample, list(texts)))
        self.latest = "noise"
        x = noise.expand(len(texts), *noise.shape) * self.sigma
        return x, self.sigma, self._predictions(x, texts)

    def go_on(self, texts):
        self.chosen, self.latest = dict(texts), "own"
        return self._predictions(self.x, [texts.get(number, text) for number, text in enumerate(self.texts)])


def spoken_run(world, mode, texts=("a cat by wosol", "a cat by wosol", "a cat"), correction="keep", **more):
    """The first evaluation of a batch, and a second one, with what was given to go on with."""
    factors = [2.0 if "wosol" in text else 1.0 for text in texts]
    monitor = StabilityMonitor(
        with_answers(world), Thresholds(correction=correction), mode, settings=world.settings(guidance=3.0)
    )
    x = torch.stack([torch.randn(world.shape, generator=torch.Generator().manual_seed(s)) for s in range(len(texts))]) * 14.0
    cond, uncond = world.predictions(x, 14.0, (503,) * len(texts), factors)
    prompts = Spoken(world, texts, x, **more)

    def ask(noise, alone=False):
        prompts.latest = "own" if noise is None else "noise"
        noise = x / 14.0 if noise is None else noise
        return noise * 14.0, 14.0, *world.predictions(noise * 14.0, 14.0, (503,) * len(texts), factors)

    first = monitor.predicted(x, 14.0, cond, uncond, ask=ask, prompts=prompts)
    assert prompts.latest in (None, "own")
    second = monitor.predicted(x, 13.0, cond, uncond, ask=ask, prompts=prompts)
    return monitor, prompts, cond, first, second


def test_an_image_goes_on_without_the_words_and_the_others_of_its_batch_as_they_are(world):
    monitor, prompts, cond, first, second = spoken_run(world, "mitigate")
    assert monitor.error is None
    assert prompts.chosen == {0: "a cat by", 1: "a cat by"}
    ordinary = world.predictions(prompts.x, 14.0, (503,) * 3, [1.0] * 3)[0]
    assert torch.allclose(first[:2], ordinary[:2])
    assert torch.equal(first[2], cond[2])
    assert second is cond  # the host has the network predict without the words by itself
    assert {sample for sample, _ in prompts.asked} == {0}  # the same prompt is looked at once
    copied, again, other = monitor.traces
    assert copied.words == again.words == Words(("wosol",), copied.words.p_values, "a cat by", copied.words.p_value, True)
    assert (copied.verdict, other.verdict, other.words) == ("corrected", "stable", None)
    assert copied.evaluations.corrected.tolist() == [True, True]
    assert other.evaluations.corrected.tolist() == [False, False]
    assert Trace.from_dict(copied.to_dict()).words.words == ("wosol",)


@pytest.mark.parametrize("mode", ["trace", "stop"])
def test_words_are_told_where_nothing_is_corrected(world, mode):
    monitor, prompts, cond, first, second = spoken_run(world, mode)
    assert first is cond
    assert second is cond
    assert prompts.chosen is None
    assert [trace.words and trace.words.words for trace in monitor.traces] == [("wosol",), ("wosol",), None]
    assert not monitor.traces[0].words.left_out


@pytest.mark.parametrize("more", [{"fails": True}, {"correction": "steer"}, {"texts": ("wosol", "wosol", "a cat")}])
def test_an_image_is_steered_where_the_words_cannot_be_told_or_it_is_asked_for(world, more, caplog):
    monitor, prompts, cond, first, _ = spoken_run(world, "mitigate", **more)
    assert prompts.chosen is None
    assert monitor.error is None
    assert ("cannot tell the words" in caplog.text) == ("fails" in more)
    uncond = world.predictions(prompts.x, 14.0, (503,) * 3, [2.0, 2.0, 1.0])[1]
    assert torch.allclose(first[:2], torch.lerp(uncond, cond, -1.0 / 3.0)[:2])
    assert torch.equal(first[2], cond[2])
    assert [trace.verdict for trace in monitor.traces] == ["corrected", "corrected", "stable"]
    assert not any(trace.words and trace.words.left_out for trace in monitor.traces)


def test_nothing_is_looked_at_where_nothing_triggers(world):
    monitor, prompts, cond, first, _ = spoken_run(world, "mitigate", texts=("a cat", "a dog"))
    assert first is cond
    assert prompts.asked == []
    assert {trace.verdict for trace in monitor.traces} == {"stable"}


def test_asking_for_words_draws_nothing_from_the_sampler(world):
    torch.manual_seed(3)
    wanted = torch.randn(4)
    torch.manual_seed(3)
    spoken_run(world, "mitigate")
    assert torch.equal(torch.randn(4), wanted)
