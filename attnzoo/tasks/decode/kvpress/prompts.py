"""What every row of a comparison with kvpress is asked."""

from __future__ import annotations

from typing import Any

from attnzoo.bench.record import Count, Entry, NonNegative
from attnzoo.errors import AttnZooError
from attnzoo.tasks.decode import lm as decode
from attnzoo.tasks.decode.kvpress.config import Comparison, Setting
from attnzoo.tasks.decode.needles import Format, Sample, make_samples
from attnzoo.tasks.decode.text import load_text


class Prompt(Entry):
    """A sample, and where its question begins."""

    ids: tuple[int, ...]
    question_at: Count
    answers: tuple[str, ...]
    depth: NonNegative
    limit: Count

    def context(self, setting: Setting) -> int:
        """Tokens that are compressed."""
        return self.question_at if setting == "question_after" else len(self.ids)


def prompts_of(config: Comparison) -> tuple[list[Prompt], str]:
    """Make the prompts once, for both sides; give also the SHA-256 of their text."""
    text, tokenizer = load_text(config.text), decode.load_tokenizer(config.model)
    samples = make_samples(text, tokenizer, kind="single", count=config.samples, tokens=config.tokens, seed=config.seed)
    prompts = []
    for sample in samples:
        room = len(tokenizer(f"{sample.answers[0]},", add_special_tokens=False).input_ids)
        prompts.append(
            Prompt(
                ids=sample.ids,
                question_at=question_start(sample, tokenizer),
                answers=sample.answers,
                depth=sample.depths[0],
                limit=room + decode.ROOM_FOR_WORDS,
            )
        )
    return prompts, text.sha256


def question_start(sample: Sample, tokenizer: Any, form: Format | None = None) -> int:
    """Number of the token at which the question begins, the empty line before it included.

    Raises
    ------
    AttnZooError
        If the prompt holds no question in the words of `form`.
    """
    opening = "\n\n" + (form or Format()).question.partition("{key}")[0].rstrip()
    for start in range(len(sample.ids) - 1, 0, -1):
        if tokenizer.decode(sample.ids[start:]).startswith(opening):
            return start
    raise AttnZooError(f"sample {sample.index} does not end with a question that begins {opening.strip()!r}")
