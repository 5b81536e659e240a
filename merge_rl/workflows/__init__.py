"""Use cases: they receive built objects."""
