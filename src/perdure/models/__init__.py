"""Classifiers with a fixed full-width head, and the bodies and layers they are built from."""
