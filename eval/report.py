"""Make the results page of the whole zoo out of all records in a folder: results.html, and the same as results.csv.

python eval/report.py docs/records                  both beside the records
python eval/report.py docs/records --output FOLDER  both there, with links back to the records
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from attnzoo.command import run_script


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("records", type=Path, help="a folder of records, such as docs/records")
    made.add_argument("--output", type=Path, metavar="FOLDER", help="where both files go; by default the same folder")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parser().parse_args(arguments)

    def body() -> None:
        from attnzoo.bench.results import write
        from attnzoo.tasks.results import COLUMNS, gather

        command = shlex.join(["python", "eval/report.py", *arguments])
        for path in write(gather(parsed.records), COLUMNS, parsed.output or parsed.records, command):
            print(path)

    return run_script(body, resume="nothing was written")


if __name__ == "__main__":
    sys.exit(main())
