"""Language models with a bounded cache in EleutherAI's lm-evaluation-harness, as its model ``attnzoo``.

    python -m attnzoo.lm_eval --model attnzoo --model_args pretrained=NAME,attention=caote,budget=1024 --tasks TASKS

The harness knows the models that it ships and has no entry points for others, so its own command ``lm_eval`` cannot
find this one. The command above registers it and hands over to the harness's command line; in Python, call `register`
before ``lm_eval.simple_evaluate(model="attnzoo", ...)``. Nothing here needs the harness until then.
"""

from __future__ import annotations

import importlib

from attnzoo.extras import require


def register() -> None:
    """Make the model ``attnzoo`` known to the harness; what it takes is told in `attnzoo.lm_eval.model.AttnZooLM`.

    Raises
    ------
    MissingExtraError
        If transformers or the harness is not installed.
    """
    require("transformers", "accelerate", "peft", extra="llm")
    require("lm_eval", extra=None)
    importlib.import_module("attnzoo.lm_eval.model")  # which registers its class
