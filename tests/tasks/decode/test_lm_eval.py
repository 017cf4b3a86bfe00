"""A swapped model in EleutherAI's harness, which knows nothing of it."""

import pytest

import attnzoo
from tests.tasks.decode import llm

pytest.importorskip("lm_eval", reason="lm-eval is not installed; it comes with attnzoo[dev]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    llm.write_task(folder)
    return folder


def results(model, folder):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    host = HFLM(pretrained=model, tokenizer=llm.tokenizer(), batch_size=2, device="cpu", max_length=512)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    out = simple_evaluate(host, tasks=["tiny_choice"], task_manager=manager, bootstrap_iters=0, log_samples=True)
    samples = sorted(out["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
    return [float(score[0]) for sample in samples for score in sample["filtered_resps"]]


@pytest.mark.timeout(300)
def test_a_swapped_model_runs_in_lm_eval_and_a_large_budget_gives_dense_results(folder, model, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dense = results(model, folder)
    assert len(dense) == 18
    attnzoo.replace_attention(model, "keydiff", budget=512, block_size=16)
    assert results(model, folder) == pytest.approx(dense, abs=1e-3)
    attnzoo.restore_attention(model)
    attnzoo.replace_attention(model, "keydiff", budget=16, block_size=16)
    small = results(model, folder)
    assert small != pytest.approx(dense, abs=1e-3)
    attnzoo.restore_attention(model)
    assert results(model, folder) == pytest.approx(dense, abs=1e-6)
