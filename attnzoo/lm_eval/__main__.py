"""The harness's own command line, which knows the model ``attnzoo`` too: see `attnzoo.lm_eval`."""

from __future__ import annotations

import sys

from attnzoo.command import run_script
from attnzoo.lm_eval import register

HELP = """attnzoo adds a model to the harness, whose own help follows:

  python -m attnzoo.lm_eval --model attnzoo --model_args pretrained=MODEL,attention=caote,budget=1024 --tasks arc_easy

  pretrained   a folder, a name on the Hugging Face hub, or an asset of attnzoo such as smollm2_135m_instruct
  attention    an eviction policy (attnzoo list eviction); its options beside it: budget=0.25, schedule=prompt
  where        which layers, as in attnzoo.replace_attention
  and all that the harness's model hf takes: dtype, max_length, ...
"""


def main() -> int:
    """Run the command line on `sys.argv`; give the exit status, as in `attnzoo.command`."""

    def evaluate() -> None:
        register()
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(HELP)
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()

    return run_script(evaluate, resume="with --use_cache PATH the harness keeps the answers that it has")


if __name__ == "__main__":
    sys.exit(main())
