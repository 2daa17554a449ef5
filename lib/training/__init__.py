"""Training: read loop.py first."""
