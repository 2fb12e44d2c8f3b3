"""Noise schedules and solvers, one file each."""
