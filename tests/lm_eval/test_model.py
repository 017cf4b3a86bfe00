"""The harness's model ``attnzoo``: as dense where nothing is evicted, else as requests one by one."""

import contextlib
import importlib
import json
import sys
from dataclasses import dataclass
from importlib import metadata

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

import attnzoo
from attnzoo.errors import AssetError, MissingExtraError, OptionError, SwapError, UnknownNameError
from attnzoo.eviction.keydiff import KeyDiff
from attnzoo.hosts.versions import cache_arguments, output_cache
from tests.lm_eval import harness
from tests.tasks.decode import llm

SAY = """
task: tiny_say
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{label}}}}"
generation_kwargs: {{max_gen_toks: 30, do_sample: false, until: []}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and tasks: prompts of different lengths, to be answered or continued."""
    folder = tmp_path_factory.mktemp("lm_eval")
    llm.save(folder / "model")
    (folder / "tasks").mkdir()
    llm.write_task(folder / "tasks")
    words = llm.prose(400).split()
    docs = [{"context": " ".join(words[40 * i : 40 * i + 6 * (i + 1)]), "label": str(i)} for i in range(5)]
    data = folder / "tasks" / "say.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    (folder / "tasks" / "say.yaml").write_text(SAY.format(data=data), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def own_caches(monkeypatch, folder):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def evaluate(folder, swap=None, tasks=("tiny_choice", "tiny_say"), batch_size=3):
    """Log-likelihoods of continuations, with whether they are greedy, and answers."""
    arguments = f"pretrained={folder / 'model'},max_length=512" + (f",{swap}" if swap else "")
    found = harness.evaluate("attnzoo" if swap else "hf", arguments, list(tasks), str(folder / "tasks"), batch_size)
    choices = found["samples"].get("tiny_choice", ())
    likelihoods = [response for sample in choices for response in sample["filtered_resps"]]
    answers = [sample["filtered_resps"][0] for sample in found["samples"].get("tiny_say", ())]
    return [(float(score), str(greedy) == "True") for score, greedy in likelihoods], answers, found


@pytest.fixture(scope="module")
def dense(folder):
    return evaluate(folder)


@pytest.mark.parametrize(
    "swap",
    [
        "attention=caote,budget=512,block_size=16",
        "attention=snapkv,budget=1.0,window=8,schedule=prompt",
        "attention=keydiff,budget=512,schedule=step",
    ],
)
def test_a_budget_that_holds_everything_gives_dense_results(folder, dense, swap):
    likelihoods, answers, found = evaluate(folder, swap)
    assert len(likelihoods) == 18
    assert [score for score, _ in likelihoods] == pytest.approx([score for score, _ in dense[0]], abs=1e-3)
    assert [greedy for _, greedy in likelihoods] == [greedy for _, greedy in dense[0]]
    assert answers == dense[1]
    assert found["results"]["tiny_choice"]["acc,none"] == dense[2]["results"]["tiny_choice"]["acc,none"]


@pytest.mark.parametrize("name", ["h2o", "caote"])
def test_a_small_budget_gives_what_requests_give_one_by_one(folder, dense, name):
    likelihoods, answers, _ = evaluate(folder, f"attention={name},budget=0.25,block_size=8,recent=2")
    model = attnzoo.replace_attention(llm.tiny_llama(), name, budget=0.25, block_size=8, recent=2)
    expected = []
    for sample in dense[2]["samples"]["tiny_choice"]:
        for context, continuation in sample["arguments"]:
            context, continuation = encode(context), encode(continuation)
            with torch.no_grad():
                logits = model(torch.tensor([context + continuation[:-1]])).logits[0, -len(continuation) :]
            expected.append(scored(logits, continuation))
    assert_equal(likelihoods, expected)
    assert [score for score, _ in likelihoods] != pytest.approx([score for score, _ in dense[0]], abs=0.1)
    prompts = [sample["arguments"][0][0] for sample in dense[2]["samples"]["tiny_say"]]
    assert answers == [harness.says(model, prompt, 30) for prompt in prompts]
    assert answers != dense[1]


def test_with_one_eviction_a_prompt_the_context_is_the_prompt(folder, dense):
    """Held against the dense model, whose cache is cut by hand after the context, by KeyDiff's formula."""
    likelihoods, answers, _ = evaluate(folder, "attention=keydiff,budget=20,recent=0,block_size=1000,schedule=prompt")
    model, expected = llm.tiny_llama(), []
    for sample in dense[2]["samples"]["tiny_choice"]:
        for context, continuation in sample["arguments"]:
            context, continuation = encode(context), encode(continuation)
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                first = model(torch.tensor([context]), **cache_arguments(model, cache)).logits[0, -1:]
                for layer in cache.layers:
                    anchor = F.normalize(layer.keys, dim=-1).mean(2, keepdim=True)
                    kept = (-F.cosine_similarity(layer.keys, anchor, dim=-1)).topk(20).indices
                    kept = kept[..., None].expand(-1, -1, -1, 8)
                    layer.keys, layer.values = layer.keys.gather(2, kept), layer.values.gather(2, kept)
                places = torch.arange(len(context), len(context) + len(continuation) - 1)[None]
                more = model(
                    torch.tensor([continuation[:-1]]), position_ids=places, **cache_arguments(model, cache)
                ).logits[0]
            expected.append(scored(torch.cat([first, more]), continuation))
    assert_equal(likelihoods, expected)
    assert [score for score, _ in likelihoods] != pytest.approx([score for score, _ in dense[0]], abs=0.1)
    assert answers != dense[1]


def test_one_token_more_or_less_of_context_is_another_prompt(folder):
    """The harness takes requests with the same tokens together, wherever their contexts end."""
    host = model_of(folder, budget=4, schedule="prompt")
    tokens = encode("the quick brown fox jumps over it")
    requests = [(None, tokens[:cut], tokens[cut:]) for cut in (10, 20, len(tokens) - 1)]
    (together, alone) = host._loglikelihood_tokens(requests, disable_tqdm=True), []
    for request in requests:
        alone += host._loglikelihood_tokens([request], disable_tqdm=True)
    assert together == alone
    assert together[0][0] < together[1][0] < together[2][0]


def test_a_context_that_is_too_long_is_cut_as_the_harness_cuts_it(folder):
    """From the left; the last token is not read."""
    tokens = encode(llm.prose(100))[:300]
    request = (None, tokens[:-5], tokens[-5:])
    short = [(None, tokens[-101:-5], tokens[-5:])]
    for schedule in ("prompt", "block"):
        host = model_of(folder, budget=50, schedule=schedule, max_length=100)
        assert host._loglikelihood_tokens([request], disable_tqdm=True) == host._loglikelihood_tokens(
            short, disable_tqdm=True
        )


def test_rolling_likelihood_is_that_of_the_bounded_cache(folder):
    text = llm.prose(60)
    ids = [256, *encode(text)]
    for schedule in ("block", "prompt"):
        host = model_of(folder, budget=16, block_size=16, schedule=schedule)
        (found,) = host.loglikelihood_rolling([type("Asked", (), {"args": (text,)})()], disable_tqdm=True)
        with torch.no_grad():
            if schedule == "block":
                logits = host.model(torch.tensor([ids[:-1]])).logits[0]
            else:
                first = host.model(torch.tensor([ids[:1]]))
                held = output_cache(first)
                held.end_prompt()
                rest = host.model(torch.tensor([ids[1:-1]]), **cache_arguments(host.model, held)).logits[0]
                logits = torch.cat([first.logits[0], rest])
        assert found == pytest.approx(scored(logits, ids[1:])[0], rel=1e-5)


def test_the_results_say_what_was_evaluated(folder):
    base = {"normalize": False}
    arguments = {"pretrained": str(folder / "model"), "attention": "caote", "budget": 0.5, "base_options": base}
    found = harness.evaluate("attnzoo", arguments, ["tiny_choice"], str(folder / "tasks"))["config"]
    assert found["attention"].startswith("Caote(budget=0.5, budgets='uniform', profile=None, block_size=128")
    assert "base_options={'normalize': False}" in found["attention"]
    assert found["attnzoo_version"] == metadata.version("attnzoo")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, OptionError, r"attention= is missing.*keydiff.*--model hf"),
        (
            {"attention": "padre"},
            OptionError,
            r"attention=padre is a mixer, not an eviction policy; those are streaming",
        ),
        ({"attention": "keydif"}, UnknownNameError, "keydiff"),
        ({"attention": "keydiff"}, OptionError, "'keydiff' needs budget="),
        ({"attention": "keydiff", "budget": 10, "windw": 3}, OptionError, r"no option 'windw'.*budget.*anchor"),
        ({"attention": "keydiff", "budget": 10, "window": 3}, OptionError, "'keydiff' has no option 'window'"),
        ({"attention": "keydiff", "budget": 1.5}, OptionError, "budget must be a whole number, or a share"),
        ({"attention": "keydiff", "budget": "many"}, OptionError, "budget"),
        ({"attention": "h2o", "budget": 10, "normalize": "yes"}, OptionError, "normalize"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(arguments, error, words):
    from attnzoo.lm_eval.model import AttnZooLM

    with pytest.raises(error, match=words):
        AttnZooLM("no-such-model", device="cpu", **arguments)


def test_an_option_named_as_the_harness_names_its_own_is_refused(folder):
    from attnzoo.lm_eval.model import AttnZooLM

    @dataclass(frozen=True, kw_only=True)
    class Rounded(KeyDiff):
        dtype: str = "float32"

    attnzoo.register_attention("rounded", "eviction", Rounded)
    try:
        with pytest.raises(OptionError, match="dtype: both 'rounded' and the harness"):
            AttnZooLM("no-such-model", attention="rounded", budget=4, dtype="float16")
        host = AttnZooLM(str(folder / "model"), attention="rounded", budget=4, device="cpu")
        assert host.policy.dtype == "float32", "an option that is not given is no trouble"
    finally:
        attnzoo.unregister_attention("rounded")


def test_a_model_that_cannot_be_loaded_is_an_error_in_words(tmp_path):
    from attnzoo.lm_eval.model import AttnZooLM

    with pytest.raises(AssetError, match=r"the model .* cannot be loaded"):
        AttnZooLM(str(tmp_path / "none"), attention="knorm", budget=4, device="cpu")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(AssetError, match=r"the model .* cannot be loaded"):
        AttnZooLM(str(tmp_path), attention="knorm", budget=4, device="cpu")


def test_a_model_that_is_given_is_swapped_where_it_is_asked(folder):
    model = llm.tiny_llama()
    model_of(model, budget=16, where="model.layers.1", tokenizer=llm.tokenizer())
    assert [layer.attention for layer in attnzoo.swap_report(model).layers] == [None, "knorm"]
    with pytest.raises(SwapError, match=r"where='model\.layers\.7' matches none"):
        model_of(folder, budget=16, where="model.layers.7")


def test_the_command_is_the_harnesss_own(folder, monkeypatch, capsys):
    from lm_eval import tasks

    from attnzoo.lm_eval.__main__ import main

    manager = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda **given: manager(include_defaults=False, **given))
    command = [
        "attnzoo.lm_eval",
        "--model",
        "attnzoo",
        "--tasks",
        "tiny_choice",
        "--include_path",
        str(folder / "tasks"),
    ]
    command += ["--device", "cpu", "--batch_size", "2", "--model_args"]
    monkeypatch.setattr(
        sys, "argv", [*command, f"pretrained={folder / 'model'},attention=caote,budget=64,block_size=8"]
    )
    assert main() == 0
    said = capsys.readouterr().out
    assert "attnzoo ({'pretrained'" in said
    assert "|tiny_choice|" in said
    monkeypatch.setattr(sys, "argv", [*command, f"pretrained={folder / 'model'},attention=caote,budgt=64"])
    assert main() == 2
    said = capsys.readouterr().err
    assert "error: 'caote' has no option 'budgt'" in said
    assert "'budget'" in said
    assert "Traceback" not in said


def test_its_help_says_what_attnzoo_adds(monkeypatch, capsys):
    from attnzoo.lm_eval.__main__ import main

    monkeypatch.setattr(sys, "argv", ["attnzoo.lm_eval", "--help"])
    with contextlib.suppress(SystemExit):
        main()
    said = capsys.readouterr().out
    ours = said.index("--model attnzoo --model_args pretrained=MODEL,attention=caote,budget=1024")
    assert ours < said.index("usage:")


def test_an_asset_is_known_by_its_name(folder, monkeypatch):
    from attnzoo.lm_eval import model

    monkeypatch.setattr(model, "model_folder", {"smollm": folder / "model"}.get)
    assert model.AttnZooLM("smollm", attention="knorm", budget=16, device="cpu").policy.budget == 16


def test_it_is_imported_without_the_harness_and_asks_for_it(monkeypatch):
    monkeypatch.setattr(attnzoo, "lm_eval", attnzoo.lm_eval)  # to be put back
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval" or name.startswith("attnzoo.lm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    module = importlib.import_module("attnzoo.lm_eval")
    with pytest.raises(MissingExtraError, match="pip install lm_eval"):
        module.register()


def model_of(folder, **options):
    harness.register()
    from attnzoo.lm_eval.model import AttnZooLM

    pretrained = str(folder / "model") if hasattr(folder, "joinpath") else folder
    return AttnZooLM(pretrained, attention="knorm", device="cpu", **options)


def encode(text):
    return llm.tokenizer()(text).input_ids


def scored(logits, tokens):
    scores, wanted = F.log_softmax(logits, -1), torch.tensor(tokens)
    return scores.gather(1, wanted[:, None]).sum().item(), bool((logits.argmax(-1) == wanted).all())


def assert_equal(found, expected):
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
