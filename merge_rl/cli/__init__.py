"""The command line: parse, build, call a workflow, print."""
