"""The decode evaluation: what cache eviction costs a language model in quality, and what it saves."""
