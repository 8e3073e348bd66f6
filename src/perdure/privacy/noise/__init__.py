"""Noise behind private releases: keyed, discrete and correlated."""
