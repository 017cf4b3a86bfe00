import pytest

from attnzoo.errors import ConfigError
from attnzoo.tasks.decode import needles
from attnzoo.tasks.decode.needles import KINDS, NEEDLES, Format, Sample, found, make_samples
from tests.tasks.decode import llm


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", [False, True])
def test_prompts_have_their_length_their_needles_and_the_question_last(text, kind, chat):
    tokenizer = llm.tokenizer(chat)
    samples = make_samples(text, tokenizer, kind=kind, count=6, tokens=900, seed=1)
    assert samples == make_samples(text, tokenizer, kind=kind, count=6, tokens=900, seed=1)
    assert samples != make_samples(text, tokenizer, kind=kind, count=6, tokens=900, seed=2)
    for sample in samples:
        prompt = tokenizer.decode(list(sample.ids))
        assert len(sample.ids) == 900
        assert prompt.startswith("<user>" if chat else Format().instruction[:10])
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
    assert found(sample, " 12345, and 54321.") == (True, True)
    assert found(sample, " 123456 or 5432") == (False, False)
    assert found(sample, "") == (False, False)


def test_sentences_lose_nothing(text):
    assert "".join(needles._sentences(text.text)) == text.text
