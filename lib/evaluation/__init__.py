"""Embeddings of a split to scores, ranks, metrics and tables."""
