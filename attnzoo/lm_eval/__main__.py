"""The harness's own command line, which knows the model ``attnzoo`` too: see `attnzoo.lm_eval`."""

from __future__ import annotations

import sys

from attnzoo.command import run_script
from attnzoo.lm_eval import register


def main() -> int:
    """Run the command line on `sys.argv`; give the exit status, as in `attnzoo.command`."""

    def evaluate() -> None:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()

    return run_script(evaluate, resume="with --use_cache PATH the harness keeps the answers that it has")


if __name__ == "__main__":
    sys.exit(main())
