"""The comparison with kvpress, which needs an environment of its own: one process per row, on the same prompts.

- `config`: its schema and its rows. `prompts`: what every row is asked. `record`: the lines it writes.
- `environment`: where kvpress is installed. `worker`: one row, run by either side's interpreter. `process`: that
  worker, seen from here. `run`: the loop. `table`: what a reader sees.
"""
