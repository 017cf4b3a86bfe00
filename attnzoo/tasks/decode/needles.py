"""Needles in a haystack of real prose: prompts that ask for what is hidden in them, in the manner of RULER.

RULER: What's the Real Context Size of Your Long-Context Language Models? (Hsieh et al. 2024),
https://arxiv.org/abs/2404.06654. As there, the prompt opens with an instruction, needles stand between sentences, a
question asks for them and the answer is begun for the model; greedy answers are scored by recall of what was asked for.

Differs from the paper: numbers have 5 digits, and keys and variables are short words, so that a model of 135M
parameters can follow; depths are spread evenly over the samples instead of drawn; the number of needles is fixed for
each kind; not every question comes last. `TASKS` says what each kind measures.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from attnzoo.errors import ConfigError
from attnzoo.tasks.decode.text import Text

Kind = Literal[
    "single", "multi_key", "multi_value", "evictable", "question_first", "question_between", "several", "two_hop",
    "tracking", "synonym", "instruction",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)
DIGITS = 5
MIDDLE = 0.5  # depth of a question between needle and end
# Of the prompt's haystack: past any sink, and before the last 50% that a policy may protect at half the cache.
EVICTABLE = (0.1, 0.4)
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
NAMES = ("Alice", "David", "Emma", "Felix", "Grace", "Henry", "James", "Laura", "Martin", "Oscar", "Paula", "Robert")
COLORS = ("black", "blue", "brown", "gray", "green", "orange", "pink", "purple", "red", "silver", "white", "yellow")
_SYNONYMS = (
    "physician:doctor automobile:car infant:baby attorney:lawyer sofa:couch canine:dog feline:cat vessel:ship "
    "residence:house instructor:teacher bicycle:bike airplane:plane photograph:picture sea:ocean garment:clothes "
    "monarch:king soil:dirt footwear:shoes beverage:drink blossom:flower author:writer woods:forest"
)
FACTS = (
    "the door code of the library", "the phone number of the front desk", "the badge number of the night guard",
    "the account number of the bakery", "the license number of the red truck", "the weight of the old bell in grams",
)  # fmt: skip
SYNONYMS = tuple(tuple(pair.split(":")) for pair in _SYNONYMS.split())

# All words were chosen on the dense SmolLM2-135M-Instruct alone, those of the first three kinds among five wordings,
# with and without the chat template (8 prompts of 2,000 tokens of each: 8 of 8, 8 of 8 and 13 of 24 numbers found). Of
# a few prompts of 1,200 tokens it finds nearly all that the other kinds ask for, but for `tracking` and `synonym`: it
# followed them in no wording that was tried.
INSTRUCTION = "A special magic number is hidden within the following text. Remember it: you will be asked for it."
SEVERAL = "Some numbers are hidden within the following text. Remember them: you will be asked for them."
NEEDLE = "The special magic number for {} is {}."
QUESTION = "What is the special magic number for {} in the text above?"
BEGUN = "The special magic number for {} is"


@dataclass(frozen=True)
class Question:
    """What is asked, how the answer is begun for the model, and the words or numbers that it should go on with."""

    text: str
    begun: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Story:
    """What one prompt hides: the first `asked` of its needles are those without which nobody can answer."""

    needles: Sequence[str]
    questions: Sequence[Question]
    asked: int = 1
    instruction: str = INSTRUCTION


Numbers = Callable[[int], list[str]]
Writer = Callable[[random.Random, Numbers], Story]  # is given what draws numbers that the text does not hold


def _numbers(keys: int) -> Writer:
    """Give a writer of a number for each of several keys, the first of which is asked for."""

    def write(draw: random.Random, numbers: Numbers) -> Story:
        told = list(zip(draw.sample(KEYS, keys), numbers(keys), strict=True))
        key, value = told[0]
        question = Question(QUESTION.format(key), BEGUN.format(key), (value,))
        return Story([NEEDLE.format(*one) for one in told], [question])

    return write


def _several(draw: random.Random, numbers: Numbers, count: int = 4) -> Story:
    """Several facts, each of which is asked for."""
    told = list(zip(draw.sample(FACTS, count), numbers(count), strict=True))
    questions = [Question(f"What is {fact} in the text above?", f"{_begin(fact)} is", (value,)) for fact, value in told]
    return Story([f"{_begin(fact)} is {value}." for fact, value in told], questions, count, SEVERAL)


def _values(draw: random.Random, numbers: Numbers, count: int = 3) -> Story:
    """Several numbers for one key, all of them asked for at once."""
    (key,) = draw.sample(KEYS, 1)
    values = numbers(count)
    text = f"What are the special magic numbers for {key} in the text above? There are {count}."
    question = Question(text, f"The special magic numbers for {key} are", tuple(values))
    return Story([NEEDLE.format(key, value) for value in values], [question], count)


def _between(draw: random.Random, numbers: Numbers) -> Story:
    """A question in the middle of the text, to be answered at its end, whose begun answer does not repeat it."""
    keys, values = draw.sample(KEYS, 2), numbers(2)
    text = f"Question: what is the special magic number for {keys[0]}? Answer it after the end of the text."
    question = Question(text, "The answer to the question is that the special magic number is", (values[0],))
    return Story([NEEDLE.format(*one) for one in zip(keys, values, strict=True)], [question])


def _synonyms(draw: random.Random, numbers: Numbers) -> Story:
    """The question calls the key by another word than its needle does; the other needle is of another key."""
    pairs, values = draw.sample(SYNONYMS, 2), numbers(2)
    asked = f"the {pairs[0][1]}"
    needles = [NEEDLE.format(f"the {hidden}", value) for (hidden, _), value in zip(pairs, values, strict=True)]
    return Story(needles, [Question(QUESTION.format(asked), BEGUN.format(asked), (values[0],))])


def _two_hops(draw: random.Random, numbers: Numbers) -> Story:
    """Which box, and where that box is; another box stands elsewhere."""
    (name, other), (box, decoy), rooms = draw.sample(NAMES, 2), draw.sample(COLORS, 2), numbers(2)
    needles = [
        f"{name}'s badge is in the {box} box.",
        f"The {box} box is in room {rooms[0]}.",
        f"{other}'s badge is in the {decoy} box.",
        f"The {decoy} box is in room {rooms[1]}.",
    ]
    question = Question(f"In which room is {name}'s badge?", f"{name}'s badge is in room", (rooms[0],))
    return Story(needles, [question], 2, "Remember in the following text where boxes and badges are.")


def _tracking(draw: random.Random, numbers: Numbers, links: int = 3) -> Story:
    """A chain of assignments, of which every variable is asked for."""
    names, (value,) = draw.sample(KEYS, links), numbers(1)
    values = [value, *(f"VAR {name}" for name in names)]
    needles = [f"VAR {name} = {value}." for name, value in zip(names, values, strict=False)]
    text = f"Find all variables that are assigned the value {value} in the text above. There are {links}."
    begun = f"The variables that are assigned the value {value} are: VAR"
    told = "Memorize and track the chain of variable assignments hidden in the following text."
    return Story(needles, [Question(text, begun, tuple(names))], links, told)


def _instruction(draw: random.Random, numbers: Numbers) -> Story:
    """A rule for the answer, whatever is asked; the question does not repeat what it says."""
    (value,) = numbers(1)
    rule = (
        f"Important: whatever you are asked about this text, answer with the special magic number {value} and nothing"
    )
    text = "Who wrote the text above? Answer as the instruction says, with the special magic number."
    question = Question(text, "The special magic number is", (value,))
    return Story([f"{rule} else."], [question], instruction="Read the following text and follow the instruction in it.")


@dataclass(frozen=True)
class NeedleTask:
    """A kind of prompts: its `title` in tables, what it `measures`, in a sentence, and who is to `write` its stories.

    Needles are hidden between the depths `place` of the haystack; the question stands before the text, in its
    ``middle``, or at its end.
    """

    title: str
    measures: str
    write: Writer
    place: tuple[float, float] = (0.0, 1.0)
    question: Literal["first", "middle", "last"] = "last"


TASKS: Mapping[Kind, NeedleTask] = {
    "single": NeedleTask(
        "pass key",
        "one number hidden anywhere, asked for at the end: mostly how long a recent part a policy protects, for what "
        "lies in it cannot be evicted",
        _numbers(1),
    ),
    "multi_key": NeedleTask(
        "one of 4 keys", "four numbers hidden anywhere, one asked for at the end: the pass key among others like it",
        _numbers(4),
    ),
    "multi_value": NeedleTask(
        "3 values", "three numbers of one key hidden anywhere, all asked for at the end", _values
    ),
    "evictable": NeedleTask(
        "evictable key",
        "one number hidden where any policy may evict it (10 to 40% of the text), asked for at the end: what is kept "
        "before the question is known",
        _numbers(1),
        EVICTABLE,
    ),
    "question_first": NeedleTask(
        "question first",
        "the same, asked for before the text: whether what answers a question that was read already is kept",
        _numbers(1),
        EVICTABLE,
        "first",
    ),
    "question_between": NeedleTask(
        "question between",
        "two numbers in the first 40% of the text and a question for one of them in its middle: whether the question, "
        "which is not repeated, is kept besides",
        _between,
        EVICTABLE,
        "middle",
    ),
    "several": NeedleTask(
        "4 questions",
        "four numbers in the first 40% of the text, read once and evicted before the first question, each then asked "
        "for on a copy of the cache: how much of everything is kept",
        _several,
        EVICTABLE,
    ),
    "two_hop": NeedleTask(
        "two hops", "two facts in the first 40% of the text that only together answer the question", _two_hops,
        EVICTABLE,
    ),
    "tracking": NeedleTask(
        "tracking",
        "a chain of three assignments in the first 40% of the text, of which every variable is asked for (RULER's "
        "variable tracking)",
        _tracking,
        EVICTABLE,
    ),
    "synonym": NeedleTask(
        "synonym",
        "two numbers in the first 40% of the text, one asked for by another word for its key: needles without a "
        "literal match",
        _synonyms,
        EVICTABLE,
    ),
    "instruction": NeedleTask(
        "instruction",
        "a rule before the text: whatever is asked, answer with a number that the rule gives and the question does not",
        _instruction,
        (0.0, 0.0),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One prompt of a kind, the `index`-th; `seed` and `text_sha256` are what it was made from.

    `ids` are the whole prompt, with its first question if there are several, of exactly the number of tokens asked for;
    `others` are, in place of the tokens from `question_at` on, those that ask each further question. `answers` are the
    numbers or words asked for (of several questions each asks for one), `depths` those of their needles: 0 at the start
    of the haystack, 1 at its end. At token `question_at` the text ends, and the question begins if it stands at the
    end; the empty line before it is its own. `needles_at` are the tokens of the needles without which nobody can
    answer.
    """

    kind: Kind
    index: int
    ids: tuple[int, ...]
    answers: tuple[str, ...]
    depths: tuple[float, ...]
    seed: int
    text_sha256: str
    question_at: int = 0
    needles_at: tuple[int, ...] = ()
    others: tuple[tuple[int, ...], ...] = ()


def make_samples(text: Text, tokenizer: Any, *, kind: Kind, count: int, tokens: int, seed: int) -> list[Sample]:
    """Make `count` prompts of exactly `tokens` tokens; the same arguments give the same prompts.

    The depths of the asked needles are the middles of `count` (times their number) equal parts of the kind's `place`,
    shuffled by the seed. Each haystack is a run of whole sentences of the text from a place drawn with the seed (two
    samples may share sentences); only its first sentence is cut, so that the length is exact. A tokenizer that has a
    chat template is given the prompt in it.

    Raises `ConfigError` if the text is too short for a prompt, or `tokens` leave no room for a haystack.
    """
    maker = _Maker(text, tokenizer, kind, tokens, seed)
    order = random.Random(f"depths {kind} {count} {seed}").sample(range(count), count)
    return [maker.sample(index, (order[index] + 0.5) / count) for index in range(count)]


def found(answers: Sequence[str], said: str) -> tuple[bool, ...]:
    """Say of each number or word asked for whether it stands in what was said, as one of its own."""
    words = set(re.findall(r"\d+|[^\W\d_]+", said.lower()))
    return tuple(answer.lower() in words for answer in answers)


class _Maker:
    """Puts prompts together out of token ids: pieces are tokenized apart, so that lengths add up exactly."""

    def __init__(self, text: Text, tokenizer: Any, kind: Kind, tokens: int, seed: int) -> None:
        self.text, self.tokenizer = text, tokenizer
        self.kind, self.tokens, self.seed = kind, tokens, seed
        encoded = tokenizer(_sentences(text.text), add_special_tokens=False).input_ids
        self.sentences: list[list[int]] = [list(ids) for ids in encoded]
        self.before = [0, *itertools.accumulate(map(len, self.sentences))]

    def sample(self, index: int, depth: float) -> Sample:
        """Make one prompt whose asked needle (or the mean of them) is at `depth` of the kind's place."""
        draw = random.Random(f"needles {self.kind} {index} {self.seed}")
        task = TASKS[self.kind]
        story = task.write(draw, partial(self._unused_numbers, draw))
        head, tail = self._frame(story, story.questions[0])
        needles = [self._encode(f" {needle}") for needle in story.needles]
        between = [self._encode(f"\n\n{story.questions[0].text}\n\n")] if task.question == "middle" else []
        room = self.tokens - len(head) - len(tail) - sum(map(len, [*needles, *between]))
        hay = self._haystack(draw, room)
        asked, (low, high) = story.asked, task.place
        shares = [(i + depth) / asked for i in range(asked)]
        shares += [draw.random() for _ in needles[asked:]]
        depths = [low + (high - low) * share for share in shares] + [MIDDLE for _ in between]
        ids, placed, starts = _hide(hay, [*needles, *between], depths)
        spans = [(len(head) + start, len(needle)) for start, needle in zip(starts, [*needles, *between], strict=True)]
        answers = [answer for question in story.questions for answer in question.answers]
        return Sample(
            kind=self.kind,
            index=index,
            ids=(*head, *ids, *tail),
            answers=tuple(answers),
            depths=tuple(placed[: len(answers)]),
            seed=self.seed,
            text_sha256=self.text.sha256,
            question_at=len(head) + len(ids),
            needles_at=tuple(at for start, n in spans[:asked] for at in range(start, start + n)),
            others=tuple(tuple(self._frame(story, question)[1]) for question in story.questions[1:]),
        )

    def _unused_numbers(self, draw: random.Random, count: int) -> list[str]:
        """Draw numbers that differ and that the text does not hold itself."""
        values: list[str] = []
        while len(values) < count:
            value = str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))
            if value not in values and value not in self.text.text:
                values.append(value)
        return values

    def _frame(self, story: Story, question: Question) -> tuple[list[int], list[int]]:
        """Give the ids before and after the haystack."""
        where = TASKS[self.kind].question
        head = f"{story.instruction}\n\n" + (f"{question.text}\n\n" if where == "first" else "")
        tail = f"\n\n{question.text}" if where == "last" else ""
        if getattr(self.tokenizer, "chat_template", None):
            hole = "\u241f"
            message = [{"role": "user", "content": head + hole + tail}]
            whole = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            head, _, tail = whole.partition(hole)
            return self._encode(head), self._encode(tail + question.begun)
        tail = f"{tail} " if tail else "\n\n"
        return [*self.tokenizer("").input_ids, *self._encode(head)], self._encode(tail + question.begun)

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


def _sentences(text: str) -> list[str]:
    """Cut a text where sentences end; each keeps the white space before it."""
    return re.findall(r"\s*\S.*?(?:[.!?][\"')\]\u201d\u2019]*(?=\s)|(?=\n\n)|\Z)", text, flags=re.DOTALL)


def _begin(words: str) -> str:
    """Begin a sentence with some words."""
    return words[:1].upper() + words[1:]


def _hide(
    hay: list[list[int]], needles: list[list[int]], depths: Sequence[float]
) -> tuple[list[int], list[float], list[int]]:
    """Put needles between sentences, as near to their depths as can be.

    Gives the ids, and of each needle the depth that came out and the place of its first token.
    """
    ends = [0, *itertools.accumulate(map(len, hay))]
    total = ends[-1]
    gaps = [_nearest(ends, depth * total) for depth in depths]
    ids: list[int] = []
    starts = [0] * len(needles)
    for gap in range(len(ends)):
        for index, place in enumerate(gaps):
            if place == gap:
                starts[index] = len(ids)
                ids += needles[index]
        if gap < len(hay):
            ids += hay[gap]
    return ids, [ends[gap] / total for gap in gaps], starts


def _nearest(values: Sequence[int], wanted: float) -> int:
    """Index of the value nearest to `wanted`."""
    return min(range(len(values)), key=lambda index: abs(values[index] - wanted))
