"""The command line: parse, build, call, print. Commands import what they need when they run."""

__all__ = ["main"]
