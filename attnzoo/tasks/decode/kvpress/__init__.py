"""The comparison with kvpress, which needs an environment of its own: one process per row, on the same prompts.

- `config`: its schema and its rows. `quality`: pass keys found, and the two sides beside each other.
- `environment`: where kvpress is installed. `worker`: one row, run by either side's interpreter. `task`: the cells.
"""
