"""The benchmark: one config in, records, a table and a page out; see docs/protocol.md for what the figures mean."""

from attnzoo.extras import require

require("pydantic", "yaml", "rich", "scipy", "jinja2")
