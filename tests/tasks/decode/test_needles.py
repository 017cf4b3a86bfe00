import hashlib
import json
from pathlib import Path

import pytest

from attnzoo.errors import ConfigError
from attnzoo.tasks.decode import needles
from attnzoo.tasks.decode.needles import INSTRUCTION, KINDS, SYNONYMS, TASKS, Sample, found, make_samples
from tests.tasks.decode import llm

NEEDLES = {"single": 1, "multi_key": 4, "multi_value": 3}


@pytest.mark.parametrize("kind", NEEDLES)
@pytest.mark.parametrize("chat", [False, True])
def test_prompts_have_their_length_their_needles_and_the_question_last(text, kind, chat):
    tokenizer = llm.tokenizer(chat)
    samples = make_samples(text, tokenizer, kind=kind, count=6, tokens=900, seed=1)
    assert samples == make_samples(text, tokenizer, kind=kind, count=6, tokens=900, seed=1)
    assert samples != make_samples(text, tokenizer, kind=kind, count=6, tokens=900, seed=2)
    for sample in samples:
        prompt = tokenizer.decode(list(sample.ids))
        assert len(sample.ids) == 900
        assert prompt.startswith("<user>" if chat else INSTRUCTION[:10])
        assert len(sample.answers) == len(sample.depths) == (3 if kind == "multi_value" else 1)
        assert all(prompt.count(value) == 1 and value not in text.text for value in sample.answers)
        assert prompt.count("special magic number for") >= NEEDLES[kind]
        assert prompt.rindex("What") > max(prompt.index(value) for value in sample.answers)
        hay, asked = prompt.rsplit("What", 1)
        for value, depth in zip(sample.answers, sample.depths, strict=True):
            assert abs(prompt.index(value) / len(hay) - depth) < 0.35
            key = next(key for key in needles.KEYS if f" for {key} is {value}." in prompt)
            assert asked.count(key) == 2
        assert prompt.endswith(("is", "are"))


def test_depths_are_spread_evenly_and_shuffled(text, tokenizer):
    samples = make_samples(text, tokenizer, kind="single", count=10, tokens=2000, seed=0)
    depths = [sample.depths[0] for sample in samples]
    assert depths != sorted(depths)
    assert sorted(depths) == pytest.approx([0.05 + 0.1 * i for i in range(10)], abs=0.04)


def test_what_is_too_short_is_refused(text, tokenizer):
    with pytest.raises(ConfigError, match="no room for a haystack"):
        make_samples(text, tokenizer, kind="single", count=1, tokens=50, seed=0)
    with pytest.raises(ConfigError, match="fewer than"):
        make_samples(text, tokenizer, kind="single", count=1, tokens=10**6, seed=0)


def test_a_number_is_found_as_a_whole(text):
    sample = Sample("multi_value", 0, (1,), ("12345", "54321"), (0.1, 0.9), 0, "")
    assert found(sample.answers, " 12345, and 54321.") == (True, True)
    assert found(sample.answers, " 123456 or 5432") == (False, False)
    assert found(sample.answers, "") == (False, False)


def test_sentences_lose_nothing(text):
    assert "".join(needles._sentences(text.text)) == text.text


@pytest.mark.parametrize(
    ("kind", "chat", "digest"),
    [
        ("single", False, "e34df6d8cc55"),
        ("single", True, "211804044016"),
        ("multi_key", False, "05d664fbd7bc"),
        ("multi_value", True, "02c5130d987c"),
    ],
)
def test_prompts_of_the_committed_records_stay_as_they_were(text, kind, chat, digest):
    samples = make_samples(text, llm.tokenizer(chat), kind=kind, count=3, tokens=900, seed=1)
    content = [[s.ids, s.answers, s.depths, s.question_at] for s in samples]
    assert hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12] == digest


def told(tokenizer, sample):
    """The needles that an answer needs, as one string."""
    return tokenizer.decode([sample.ids[at] for at in sample.needles_at])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", [False, True])
def test_what_an_answer_needs_stands_where_its_kind_says(text, kind, chat):
    tokenizer, (low, high) = llm.tokenizer(chat), TASKS[kind].place
    samples = make_samples(text, tokenizer, kind=kind, count=4, tokens=1600, seed=3)
    assert samples == make_samples(text, tokenizer, kind=kind, count=4, tokens=1600, seed=3)
    assert samples[:2] != make_samples(text, tokenizer, kind=kind, count=4, tokens=1600, seed=4)[:2]
    for sample in samples:
        assert len(sample.ids) == 1600
        assert len(sample.depths) == len(sample.answers)
        assert all(low - 0.04 <= depth <= high + 0.04 for depth in sample.depths)
        assert all(value in told(tokenizer, sample) and value not in text.text for value in sample.answers)
        if (low, high) != (0, 1):
            places = [at / len(sample.ids) for at in sample.needles_at]
            assert min(sample.needles_at) > 4
            assert max(places) < 0.5, "a policy with half the cache may protect the last 50%"
        end = tokenizer.decode(list(sample.ids[sample.question_at :]))
        asked = [end, *(tokenizer.decode(list(ids)) for ids in sample.others)]
        assert not any(value in question for value in sample.answers for question in asked)


def test_a_question_comes_first_or_between_and_is_not_repeated(text, tokenizer):
    for kind, low, high in (("question_first", 0, 0.2), ("question_between", 0.4, 0.6)):
        for sample in make_samples(text, tokenizer, kind=kind, count=3, tokens=1600, seed=0):
            prompt = tokenizer.decode(list(sample.ids))
            places = [
                at / len(prompt) for at in range(len(prompt)) if prompt[at:].lower().startswith("what is the special")
            ]
            assert len(places) == 1
            assert low < places[0] < high
            assert prompt.endswith("is")


def test_each_of_several_questions_asks_for_its_own_number(text, tokenizer):
    (sample,) = make_samples(text, tokenizer, kind="several", count=1, tokens=1600, seed=0)
    questions = [sample.ids[sample.question_at :], *sample.others]
    assert len(questions) == len(sample.answers) == 4
    for ids, value in zip(questions, sample.answers, strict=True):
        fact = tokenizer.decode(list(ids)).split("What is ")[1].split(" in the text")[0]
        assert f"{fact[1:]} is {value}." in told(tokenizer, sample)


def test_a_synonym_is_no_literal_match(text, tokenizer):
    words = [word for pair in SYNONYMS for word in pair]
    assert len(set(words)) == len(words)
    named = dict(SYNONYMS)
    for sample in make_samples(text, tokenizer, kind="synonym", count=4, tokens=1600, seed=0):
        key = told(tokenizer, sample).split(" for the ")[1].split()[0]
        question = tokenizer.decode(list(sample.ids[sample.question_at :]))
        before = tokenizer.decode(list(sample.ids[: sample.question_at]))
        assert question.count(f"for the {named[key]}") == 2
        assert key not in question
        assert f"the {named[key]}" not in before


def test_words_are_found_whole_and_in_any_case():
    assert found(("amber", "tiger"), " Amber, and tigers") == (True, False)
    assert found(("12345",), " number12345.") == (True,)


def test_the_docs_say_what_each_kind_measures():
    docs = (Path(__file__).parents[3] / "docs" / "eviction.md").read_text(encoding="utf-8")
    for kind, task in TASKS.items():
        assert f"| `{kind}` | {task.title} | {task.measures} |" in docs
