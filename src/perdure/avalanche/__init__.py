"""Adapters to and from Avalanche: benchmarks, plugin and loggers."""
