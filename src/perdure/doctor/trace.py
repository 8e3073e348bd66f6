"""Measurements of a training, for rules that watch it."""
