"""Adapters to and from Opacus."""
