"""Benchmarks of speed: one program per question, each run as a script."""
