"""The decode evaluation: what cache eviction costs a language model in quality, and what it saves.

- `config`: its schema. `record`: the lines it writes.
- `plan`: what is run on what. `run`: the loop, over one process or several. `canary`: checks that the run itself works.
- `summary`: one record per row, out of the samples. `report`, `page`, `plots`: what a reader sees.
"""
