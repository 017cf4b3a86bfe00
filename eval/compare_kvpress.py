"""Compare attnzoo with kvpress, side by side: same model, prompts and share of the cache kept, one process per row.

python eval/compare_kvpress.py configs/decode/kvpress.yaml [key=value ...]    run; an interrupted run resumes
python eval/compare_kvpress.py configs/decode/kvpress.yaml --only keydiff tova    only these policies, for now
python eval/compare_kvpress.py --report RECORDS.jsonl                         the table again, without running

kvpress pins an old transformers, so it has an environment of its own: the one whose interpreter `--python` names, or
one that this script makes in attnzoo's cache folder (about 6 GB, once).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from attnzoo.command import run_script
from attnzoo.errors import ConfigError
from attnzoo.tasks.decode.kvpress.config import load_config, rows_of
from attnzoo.tasks.decode.kvpress.environment import KVPRESS, kvpress_python
from attnzoo.tasks.decode.kvpress.run import run
from attnzoo.tasks.decode.kvpress.table import report
from attnzoo.tasks.decode.kvpress.task import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="a YAML config, such as configs/decode/kvpress.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted keys, values in YAML")
    parser.add_argument("--python", metavar="PATH", help=f"interpreter of an environment with kvpress {KVPRESS}")
    parser.add_argument("--only", nargs="+", default=[], metavar="POLICY", help="run only these policies")
    parser.add_argument("--report", type=Path, metavar="RECORDS", help="write the table of these records; run nothing")
    parsed = parser.parse_intermixed_args(arguments)
    if (parsed.config is None) == (parsed.report is None):
        parser.error("give either a config or --report RECORDS")

    def body() -> None:
        path = parsed.report
        if path is None:
            config = load_config(parsed.config, parsed.overrides)
            config.check_folder()
            known = [group[0].policy for group in rows_of(config)]
            if unknown := [name for name in parsed.only if name not in known]:
                raise ConfigError(f"--only: there is no policy {', '.join(unknown)}; policies: {', '.join(known)}")
            python = kvpress_python(parsed.python, say)
            lasting = [override for override in parsed.overrides if not override.startswith("output=")]
            command = shlex.join(["python", "eval/compare_kvpress.py", str(parsed.config), *lasting])
            path = run(config, python, command, parsed.only, say)
        print(report(path), end="")

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
