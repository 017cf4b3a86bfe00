"""Needles in a haystack of real prose: prompts that ask for numbers hidden in them, in the manner of RULER.

RULER: What's the Real Context Size of Your Long-Context Language Models? (Hsieh et al. 2024),
https://arxiv.org/abs/2404.06654. As there, the prompt opens with an instruction, needles stand between sentences, the
question comes last and the answer is begun for the model; greedy answers are scored by recall of the numbers asked for.

Differs from the paper: numbers have 5 digits and keys are short, so that a model of 135M parameters can follow; depths
are spread evenly over the samples instead of drawn; the number of needles is fixed for each kind.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from attnzoo.errors import ConfigError
from attnzoo.tasks.decode.text import Text

Kind = Literal["single", "multi_key", "multi_value"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NEEDLES: dict[Kind, int] = {"single": 1, "multi_key": 4, "multi_value": 3}
DIGITS = 5
_WORDS = (
    "amber anchor badger barley basket beacon birch bottle bramble bronze butter candle canyon carpet castle cedar "
    "cherry chimney clover cobalt copper coral cotton crystal daisy dolphin donkey eagle ember falcon feather fiddle "
    "flint forest fossil garden garlic ginger glacier goblet granite harbor harvest hazel heron honey island ivory "
    "jacket jasmine juniper kettle ladder lagoon lantern lavender lemon lilac lobster magnet mango maple marble meadow "
    "melon mirror mustard nutmeg oyster paddle panther parrot pearl pebble pepper pigeon pillow planet plum pumpkin "
    "quartz rabbit raven ribbon saddle saffron salmon sparrow spider teapot thunder tiger tulip turtle velvet violin "
    "walnut willow window yarrow"
)
KEYS = tuple(_WORDS.split())


@dataclass(frozen=True)
class Format:
    """The words of a prompt; ``{key}`` and ``{value}`` are filled in, and `many` asks for several values.

    The words were chosen among five wordings, with and without the chat template, on the dense SmolLM2-135M-Instruct
    alone (8 prompts of 2,000 tokens of each kind: 8 of 8, 8 of 8 and 13 of 24 numbers found).
    `chat` puts the prompt into the tokenizer's chat template, if it has one, with `begun` as the start of the answer.
    """

    instruction: str = (
        "A special magic number is hidden within the following text. Remember it: you will be asked for it."
    )
    needle: str = "The special magic number for {key} is {value}."
    question: str = "What is the special magic number for {key} in the text above?"
    begun: str = "The special magic number for {key} is"
    many: str = "What are the special magic numbers for {key} in the text above? There are {count}."
    many_begun: str = "The special magic numbers for {key} are"
    chat: bool = True


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes
    ----------
    kind
        ``single``: one needle. ``multi_key``: several keys, one asked for. ``multi_value``: several values of one key,
        all asked for.
    index
        Its place among the samples of its kind.
    ids
        The whole prompt, of exactly the number of tokens asked for.
    answers
        The numbers asked for.
    depths
        Of each answer's needle: 0 at the start of the haystack, 1 at its end.
    question_at
        Number of the token at which the question begins, the empty line before it included.
    seed, text_sha256
        What it was made from.
    """

    kind: Kind
    index: int
    ids: tuple[int, ...]
    answers: tuple[str, ...]
    depths: tuple[float, ...]
    seed: int
    text_sha256: str
    question_at: int = 0


def make_samples(
    text: Text,
    tokenizer: Any,
    *,
    kind: Kind,
    count: int,
    tokens: int,
    seed: int,
    form: Format | None = None,
) -> list[Sample]:
    """Make `count` prompts of exactly `tokens` tokens; the same arguments give the same prompts.

    The depths of the asked needles are the middles of `count` (times their number) equal parts of the haystack,
    shuffled by the seed. Each haystack is a run of whole sentences of the text from a place drawn with the seed (two
    samples may share sentences); only its first sentence is cut, so that the length is exact.

    Raises
    ------
    ConfigError
        If the text is too short for a prompt, or `tokens` leave no room for a haystack.
    """
    form = form or Format()
    maker = _Maker(text, tokenizer, form, kind, tokens, seed)
    order = random.Random(f"depths {kind} {count} {seed}").sample(range(count), count)
    return [maker.sample(index, (order[index] + 0.5) / count) for index in range(count)]


def found(sample: Sample, answer: str) -> tuple[bool, ...]:
    """Say of each number asked for whether it stands in the answer, as a number of its own."""
    numbers = set(re.findall(r"\d+", answer))
    return tuple(value in numbers for value in sample.answers)


class _Maker:
    """Puts prompts together out of token ids: pieces are tokenized apart, so that lengths add up exactly."""

    def __init__(self, text: Text, tokenizer: Any, form: Format, kind: Kind, tokens: int, seed: int) -> None:
        self.text, self.tokenizer, self.form = text, tokenizer, form
        self.kind, self.tokens, self.seed = kind, tokens, seed
        self.sentences = self._encode_all(_sentences(text.text))
        self.before = [0]
        for ids in self.sentences:
            self.before.append(self.before[-1] + len(ids))

    def sample(self, index: int, depth: float) -> Sample:
        """Make one prompt whose asked needle (or the mean of them) is at `depth`."""
        draw = random.Random(f"needles {self.kind} {index} {self.seed}")
        number = NEEDLES[self.kind]
        several = self.kind == "multi_value"
        keys = draw.sample(KEYS, 1 if several else number)
        values = self._values(draw, number)
        wanted = keys[0]
        head, tail = self._frame(wanted, number if several else 1)
        needles = [self._encode(" " + self._needle(keys[i % len(keys)], values[i])) for i in range(number)]
        room = self.tokens - len(head) - len(tail) - sum(map(len, needles))
        hay = self._haystack(draw, room)
        if several:
            depths = [(i + depth) / number for i in range(number)]
        else:
            depths = [depth, *(draw.random() for _ in range(number - 1))]
        ids, placed = _hide(hay, needles, depths)
        asked = number if several else 1
        return Sample(
            self.kind,
            index,
            (*head, *ids, *tail),
            tuple(values[:asked]),
            tuple(placed[:asked]),
            self.seed,
            self.text.sha256,
            len(head) + len(ids),
        )

    def _needle(self, key: str, value: str) -> str:
        return self.form.needle.format(key=key, value=value)

    def _values(self, draw: random.Random, number: int) -> list[str]:
        """Draw numbers that differ and that the text does not hold itself."""
        values: list[str] = []
        while len(values) < number:
            value = str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))
            if value not in values and value not in self.text.text:
                values.append(value)
        return values

    def _frame(self, key: str, asked: int) -> tuple[list[int], list[int]]:
        """Give the ids before and after the haystack."""
        form = self.form
        question = (form.question if asked == 1 else form.many).format(key=key, count=asked)
        begun = (form.begun if asked == 1 else form.many_begun).format(key=key, count=asked)
        head, tail = f"{form.instruction}\n\n", f"\n\n{question}"
        if form.chat and getattr(self.tokenizer, "chat_template", None):
            hole = "\u241f"
            message = [{"role": "user", "content": head + hole + tail}]
            whole = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            head, _, tail = whole.partition(hole)
            return self._encode(head), self._encode(tail + begun)
        return [*self.tokenizer("").input_ids, *self._encode(head)], self._encode(f"{tail} {begun}")

    def _haystack(self, draw: random.Random, room: int) -> list[list[int]]:
        """Give sentences that follow one another and have `room` tokens in all."""
        if room < 1:
            raise ConfigError(
                f"a {self.kind} prompt of {self.tokens} tokens leaves no room for a haystack; ask for more"
            )
        last = len(self.sentences)
        ends = [end for end in range(1, last + 1) if self.before[end] >= room]
        if not ends:
            raise ConfigError(
                f"{self.text.name} has {self.before[last]:,} tokens, fewer than the {room:,} of one haystack; "
                "ask for shorter prompts, or give a longer text"
            )
        end = draw.choice(ends)
        hay: list[list[int]] = []
        while room > 0:
            end -= 1
            hay.append(self.sentences[end][-room:])
            room -= len(hay[-1])
        return hay[::-1]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False).input_ids]


def _sentences(text: str) -> list[str]:
    """Cut a text where sentences end; each keeps the white space before it."""
    return re.findall(r"\s*\S.*?(?:[.!?][\"')\]\u201d\u2019]*(?=\s)|(?=\n\n)|\Z)", text, flags=re.DOTALL)


def _hide(hay: list[list[int]], needles: list[list[int]], depths: Sequence[float]) -> tuple[list[int], list[float]]:
    """Put needles between sentences, as near to their depths as can be; give the ids and the depths that came out."""
    ends = [0]
    for sentence in hay:
        ends.append(ends[-1] + len(sentence))
    total = ends[-1]
    gaps = [_nearest(ends, depth * total) for depth in depths]
    ids: list[int] = []
    for gap in range(len(ends)):
        for needle, place in zip(needles, gaps, strict=True):
            if place == gap:
                ids += needle
        if gap < len(hay):
            ids += hay[gap]
    return ids, [ends[gap] / total for gap in gaps]


def _nearest(values: Sequence[int], wanted: float) -> int:
    """Index of the value nearest to `wanted`."""
    return min(range(len(values)), key=lambda index: abs(values[index] - wanted))
