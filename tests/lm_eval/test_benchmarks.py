"""LongBench and RULER, as the harness has them, through a bounded cache.

`longbench.jsonl` is a toy copy of LongBench's format, written by hand, a document for each of its 16 English tasks: the
prompts and metrics are the harness's, the data set itself is on the hub. RULER's prompts come out of its generator.
"""

import json
import statistics
import sys
from pathlib import Path

import pytest
import yaml

import attnzoo
from tests.lm_eval import harness
from tests.tasks.decode import llm

TASKS = Path(pytest.importorskip("lm_eval.tasks").__file__).parent
TaskManager = sys.modules["lm_eval.tasks"].TaskManager
DOCUMENTS = [json.loads(line) for line in Path(__file__).with_name("longbench.jsonl").read_text("utf-8").splitlines()]
ENGLISH = {  # the metric of each, as in table 1 of LongBench (Bai et al. 2024, https://arxiv.org/abs/2308.14508)
    "narrativeqa": "qa_f1_score",
    "qasper": "qa_f1_score",
    "multifieldqa_en": "qa_f1_score",
    "hotpotqa": "qa_f1_score",
    "2wikimqa": "qa_f1_score",
    "musique": "qa_f1_score",
    "gov_report": "rouge_score",
    "qmsum": "rouge_score",
    "multi_news": "rouge_score",
    "trec": "classification_score",
    "triviaqa": "qa_f1_score",
    "samsum": "rouge_score",
    "passage_count": "count_score",
    "passage_retrieval_en": "retrieval_score",
    "lcc": "code_sim_score",
    "repobench-p": "code_sim_score",
}
GROUPS = Path(__file__).parents[2] / "configs" / "lm_eval"
SWAP = {"attention": "keydiff", "budget": 0.2, "block_size": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(llm.save(tmp_path_factory.mktemp("llm")))


def swapped():
    return attnzoo.replace_attention(llm.tiny_llama(), SWAP["attention"], budget=0.2, block_size=64)


def write_task(folder, path, **keys):
    """A task of the harness with other `keys`, and an answer cut to what a test can wait for."""
    short = {"max_gen_toks": 8, "do_sample": False, "until": []}
    content = {"include": str(TASKS / path), "generation_kwargs": short, **keys}
    (folder / Path(path).name).write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.fixture(scope="module")
def longbench(tmp_path_factory):
    """A folder with LongBench's English tasks on the toy copy."""
    pytest.importorskip("rouge", reason="lm-eval[longbench] is not installed; it comes with attnzoo[dev]")
    folder = tmp_path_factory.mktemp("longbench")
    for document in DOCUMENTS:
        data = folder / f"{document['dataset']}.jsonl"
        data.write_text(json.dumps(document) + "\n", encoding="utf-8")
        write_task(
            folder,
            f"longbench/{document['dataset']}.yaml",
            dataset_path="json",
            dataset_name=None,
            dataset_kwargs={"data_files": {"test": str(data)}},
        )
    return folder


@pytest.fixture(autouse=True)
def own_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("evaluate.load", lambda name: pytest.fail(f"{name} is looked for on the hub"))


def test_the_16_english_tasks_of_longbench_run_with_their_own_metrics(model, longbench):
    arguments = {"pretrained": model, **SWAP}
    found = harness.evaluate("attnzoo", arguments, ["longbench_en"], [str(longbench), str(GROUPS)], batch_size=4)
    scores = {name.removeprefix("longbench_"): found["results"][f"longbench_{name}"]["score,none"] for name in ENGLISH}
    assert found["groups"]["longbench_en"]["score,none"] == pytest.approx(statistics.fmean(scores.values()))
    assert set(found["results"]) == {"longbench_en", *(f"longbench_{name}" for name in ENGLISH)}
    alone = swapped()
    for document in DOCUMENTS:
        name = f"longbench_{document['dataset']}"
        metrics = {key.partition(",")[0] for key in found["results"][name] if key.endswith(",none")}
        assert {metric for metric in metrics if "stderr" not in metric} == {"score", ENGLISH[document["dataset"]]}
        (sample,) = found["samples"][name]
        prompt = sample["arguments"][0][0]
        assert document["context"] in prompt
        assert sample["filtered_resps"] == [harness.says(alone, prompt, 8)]


def test_the_metrics_of_longbench_know_a_right_answer(longbench):
    manager = TaskManager(include_path=str(longbench), include_defaults=False)
    for document in DOCUMENTS:
        name = f"longbench_{document['dataset']}"
        task, metric = manager.load([name])["tasks"][name], ENGLISH[document["dataset"]]
        right, wrong = (task.process_results(document, [said]) for said in (document["answers"][0], "none, nowhere"))
        assert right["score"] == right[metric] == pytest.approx(1)
        assert wrong["score"] == wrong[metric] < 0.5


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2"])
def test_rulers_generator_makes_prompts_for_a_bounded_cache(model, name, monkeypatch, tmp_path):
    pytest.importorskip("wonderwords", reason="lm-eval[ruler] is not installed; it comes with attnzoo[dev]")
    import nltk
    import wonderwords

    class FewWords(wonderwords.RandomWord):
        """All pairs of an adjective and a noun, which it sorts, are six million."""

        def __init__(self):
            super().__init__()
            self._categories = {kind: found[:99] for kind, found in self._categories.items()}

    monkeypatch.setattr(wonderwords, "RandomWord", FewWords)
    monkeypatch.setattr(nltk.data, "find", lambda name: name)  # else it downloads what only essays need
    monkeypatch.setattr("evaluate.load", lambda name: None)  # it knows no metric named by a length, and goes on
    length = 1000
    metric = {"metric": str(length), "aggregation": "mean", "higher_is_better": True}
    write_task(tmp_path, f"ruler/{name}.yaml", metric_list=[metric])

    lengths = {"pretrained": model, "max_seq_lengths": [length]}
    (task,) = (
        TaskManager(include_path=str(tmp_path), include_defaults=False, metadata=lengths).load([name])["tasks"].values()
    )

    def samples(kind, **swap):
        arguments = {"pretrained": model, **swap}
        found = harness.evaluate(kind, arguments, [task], str(tmp_path), batch_size=2, limit=2)
        assert 0 <= found["results"][name][f"{length},none"] <= 1
        return found["samples"][name]

    dense = [sample["filtered_resps"] for sample in samples("hf")]
    assert [sample["filtered_resps"] for sample in samples("attnzoo", **SWAP | {"budget": length})] == dense
    small = samples("attnzoo", **SWAP)
    assert [sample["filtered_resps"] for sample in small] != dense
    alone = swapped()
    for sample in small:
        prompt = sample["arguments"][0][0]
        assert all(output in prompt for output in sample["doc"]["outputs"])
        assert 600 < len(prompt) < length
        assert sample["filtered_resps"] == [harness.says(alone, prompt, 8)]
