import pytest
import torch

import attnzoo
from attnzoo.errors import ConfigError
from attnzoo.tasks.decode import lm as decode
from attnzoo.tasks.decode.decoder import twin
from attnzoo.tasks.decode.needles import Sample
from tests.tasks.decode import llm


@pytest.mark.parametrize("length", [2, decode.CHUNK, decode.CHUNK + 1, 2 * decode.CHUNK + 2])
def test_nll_is_the_models_own(model, length):
    ids = torch.arange(length) % 251
    scored = decode.nll(model, ids)
    with torch.no_grad():
        loss = model(ids[None], labels=ids[None]).loss
    assert len(scored.nll) == length - 1
    assert sum(scored.nll) / (length - 1) == pytest.approx(float(loss), rel=1e-5)
    assert scored.cache.held == 2 * 2 * 2 * 8 * 4 * length  # keys and values, layers, heads, width, bytes


def test_nll_goes_through_the_evicting_cache(model):
    ids = torch.arange(200) * 7 % 251
    dense = decode.nll(model, ids)
    attnzoo.replace_attention(model, "streaming", budget=16, block_size=8)
    small = decode.nll(model, ids)
    assert small.nll[:16] == pytest.approx(dense.nll[:16], abs=1e-4)
    assert small.nll[100:] != pytest.approx(dense.nll[100:], abs=1e-3)
    assert small.cache.entries < dense.cache.entries / 5
    attnzoo.restore_attention(model)
    attnzoo.replace_attention(model, "keydiff", budget=200, block_size=8)
    assert decode.nll(model, ids).nll == pytest.approx(dense.nll, abs=1e-4)


@pytest.mark.parametrize("cut", [1, 20, 38])
def test_nll_after_a_prompt(model, cut):
    """The same tokens score the same, dense or in blocks; a policy that waits for the prompt's end evicts at it."""
    ids = torch.arange(40) * 7 % 251
    whole = decode.nll(model, ids).nll
    assert decode.nll(model, ids, cut).nll == pytest.approx(whole[-cut:], abs=1e-4)
    attnzoo.replace_attention(model, "streaming", budget=8, block_size=4)
    assert decode.nll(model, ids, cut).nll == pytest.approx(decode.nll(model, ids).nll[-cut:], abs=1e-4)
    attnzoo.restore_attention(model)
    attnzoo.replace_attention(model, "streaming", budget=8, block_size=4, schedule="prompt")
    assert decode.nll(model, ids).nll == pytest.approx(whole, abs=1e-4)
    scored = decode.nll(model, ids, cut)
    assert scored.nll[0] == pytest.approx(whole[-cut], abs=1e-4)
    assert scored.cache.entries < decode.nll(model, ids).cache.entries / 3


class Says:
    """A model that says given tokens one after another."""

    device = torch.device("cpu")
    generation_config = None

    def __init__(self, tokens):
        self.tokens = list(tokens)
        self.steps = 0

    def forward(self, ids, use_cache, logits_to_keep=0, past_key_values=None):
        self.steps += 1
        logits = torch.zeros(1, 1, 257)
        logits[0, 0, self.tokens.pop(0) if self.tokens else 65] = 1
        return type("Out", (), {"logits": logits, "past_key_values": None})()

    __call__ = forward


def sample(*answers):
    return Sample("single", 0, (1, 2, 3), answers, (0.5,) * len(answers), 0, "")


@pytest.mark.parametrize(
    ("said", "hits", "text"),
    [
        (" 12345. More", (True,), " 12345."),
        (" 123456", (False,), None),
        ("\n\nIt is 12345\nno", (True,), None),
        (" no\n12345", (False,), " no\n"),
    ],
)
def test_an_answer_ends_where_it_is_complete(tokenizer, said, hits, text):
    model = Says(tokenizer(said).input_ids)
    answer = decode.retrieve(model, tokenizer, sample("12345"))
    assert answer.hits == hits
    assert text is None or answer.text == text
    assert model.steps <= len("12345,") + decode.ROOM_FOR_WORDS


def test_an_answer_ends_at_an_end_token(tokenizer):
    answer = decode.retrieve(
        Says([*tokenizer("12345").input_ids, tokenizer.eos_token_id]), tokenizer, sample("12345", "9")
    )
    assert answer.text == "12345"
    assert answer.hits == (True, False)


def test_retrieve_says_what_generate_says(model, tokenizer):
    prompt = Sample("single", 0, tuple(tokenizer("What is it? It is").input_ids), ("12345",), (0.5,), 0, "")
    mine = decode.retrieve(model, tokenizer, prompt)
    ids = torch.tensor([prompt.ids])
    theirs = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(theirs[0, ids.shape[1] :]).startswith(mine.text[:8])
    assert mine.cache.held > 0


def test_a_folder_is_a_model_and_anything_else_is_refused(saved, tmp_path):
    folder, _ = saved
    model = decode.load_model(str(folder))
    assert not model.training
    assert decode.longest(str(folder)) == 1024
    assert decode.load_tokenizer(str(folder))("ab").input_ids == llm.tokenizer()("ab").input_ids
    for load in (decode.load_model, decode.load_tokenizer, decode.longest):
        with pytest.raises(ConfigError, match="transformers cannot"):
            load(str(tmp_path))


def test_a_twin_shares_weights_and_is_swapped_alone(model):
    second = twin(model)
    attnzoo.replace_attention(second, "streaming", budget=8, block_size=4)
    assert {id(p) for p in second.parameters()} == {id(p) for p in model.parameters()}
    ids = torch.arange(100)
    assert decode.nll(model, ids).cache.entries > decode.nll(second, ids).cache.entries


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        (None, {}),
        ("streaming", {"budget": 8, "block_size": 4}),
        ("h2o", {"budget": 8, "block_size": 4, "schedule": "prompt"}),
        ("tova", {"budget": 8, "schedule": "step"}),
    ],
)
def test_tokens_that_are_decoded_score_as_in_one_call(model, attention, options):
    calls = []
    model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    if attention is not None:
        attnzoo.replace_attention(model, attention, **options)
    ids = torch.arange(40) * 7 % 251
    whole = decode.nll(model, ids, 24)
    for step in (1, 5):
        calls.clear()
        assert decode.nll(model, ids, 24, step).nll == pytest.approx(whole.nll, abs=1e-4)
        assert calls == [16, *([1] * 24 if step == 1 else [5, 5, 5, 5, 4])]


@pytest.mark.parametrize(("scored", "step"), [(None, None), (24, None), (24, 1)])
def test_the_divergence_from_dense_is_that_of_the_whole_distributions(model, scored, step):
    small = attnzoo.replace_attention(twin(model), "streaming", budget=8, block_size=4)
    ids = torch.arange(40) * 7 % 251
    found = decode.nll(small, ids, scored, step, model)
    with torch.no_grad():
        p, q = (one(ids[None]).logits[0, :-1].double().log_softmax(-1) for one in (model, small))
    wanted = (p.exp() * (p - q)).sum(-1)[-(scored or 39) :]
    assert found.kl == pytest.approx(wanted.tolist(), abs=1e-4)
    assert found.nll == decode.nll(small, ids, scored, step).nll
    assert max(found.kl) > 0.01
    assert max(decode.nll(model, ids, scored, step, model).kl) < 1e-5
    assert decode.nll(model, ids, scored, step).kl == ()


class Predicts:
    """A model with the same logits everywhere."""

    device = torch.device("cpu")

    def __init__(self, *logits):
        self.logits = torch.tensor(logits)

    def __call__(self, ids, use_cache):
        logits = self.logits.expand(1, ids.shape[1], -1)
        return type("Out", (), {"logits": logits, "past_key_values": None})()


def test_tokens_that_both_models_mask_add_nothing_to_the_divergence():
    ids, nothing = [0, 1, 0], -float("inf")
    same = decode.nll(Predicts(1.0, 2.0, nothing), ids, dense=Predicts(1.0, 2.0, nothing))
    assert same.kl == (0.0, 0.0)
    never = decode.nll(Predicts(1.0, 2.0, nothing), ids, dense=Predicts(1.0, 2.0, 0.0))
    assert never.kl == (float("inf"),) * 2


ENTRIES = [*range(30, 34), *range(94, 98)]  # of 100 tokens: the first four are gone, the last four among the recent


@pytest.mark.parametrize(
    ("attention", "options", "held"),
    [
        ("streaming", {"budget": 16, "block_size": 4, "sink": 4}, 0.5),
        ("streaming", {"budget": 16, "block_size": 4, "sink": 4, "schedule": "prompt"}, 0.5),
        ("keydiff", {"budget": 120, "block_size": 4}, 1.0),
        ("softmax", {}, None),
    ],
)
def test_the_needles_entries_that_are_still_held(model, tokenizer, attention, options, held):
    attnzoo.replace_attention(model, attention, **options)
    prompt = Sample("single", 0, tuple(range(100)), ("12345",), (0.3,), 0, "", 0, tuple(ENTRIES))
    assert decode.retrieve(model, tokenizer, prompt).held == held


def test_needles_that_layers_hold_differently_are_held_in_the_mean(model, tokenizer):
    attnzoo.replace_attention(model, "streaming", budget=16, block_size=4, where="model.layers.0.self_attn")
    attnzoo.replace_attention(model, "keydiff", budget=120, block_size=4, where="model.layers.1.self_attn")
    prompt = Sample("single", 0, tuple(range(100)), ("12345",), (0.3,), 0, "", 0, tuple(ENTRIES))
    assert decode.retrieve(model, tokenizer, prompt).held == 0.75


@pytest.mark.parametrize("schedule", [None, "block", "prompt"])
def test_each_of_several_questions_has_the_cache_as_it_was_after_the_text(model, tokenizer, schedule):
    """Dense, and where blocks end alike: as if each were asked alone after the same text."""
    if schedule is not None:
        attnzoo.replace_attention(model, "streaming", budget=16, block_size=4, schedule=schedule)
    text, questions = tuple(range(50)), [tuple(range(60, 66)), tuple(range(90, 99)), tuple(range(60, 66))]
    answers = ("1", "2", "1")
    about = ((0.5,) * 3, 0, "", len(text), (1, 2), tuple(questions[1:]))
    together = decode.retrieve(model, tokenizer, Sample("several", 0, text + questions[0], answers, *about))
    alone = []
    for ids, answer in zip(questions, answers, strict=True):
        only = Sample("several", 0, text + ids, (answer, answer), (0.5,) * 2, 0, "", len(text), (1, 2), (ids,))
        single = Sample("single", 0, text + ids, (answer,), (0.5,), 0, "")
        alone.append(decode.retrieve(model, tokenizer, only if schedule == "prompt" else single).text.split("\n")[0])
    said = together.text.split("\n")
    assert said == alone
    assert said[0] == said[2] != said[1]
    assert len(together.hits) == 3
