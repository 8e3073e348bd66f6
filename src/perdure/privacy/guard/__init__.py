"""Checks that refuse a model or loss which no guarantee covers, and repairs."""
