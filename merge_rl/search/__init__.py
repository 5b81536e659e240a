"""Searchers: one file a family, all behind ask and tell."""
