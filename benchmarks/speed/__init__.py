"""Benchmarks of speed: one program a question, run by its path."""
