"""Paths, schedules and solvers that turn noise into samples."""
