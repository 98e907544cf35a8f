"""Programs that measure; their tables are in docs/figures."""
