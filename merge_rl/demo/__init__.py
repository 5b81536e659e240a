"""The embedded digits run."""
