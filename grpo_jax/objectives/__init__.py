"""The family of objectives: one registry per axis, and a table of their choices."""
