"""Preparing data sets: everything behind `python -m lib.prepare`."""
