"""Exposure and noise of a whole stream, from declared sizes only."""
