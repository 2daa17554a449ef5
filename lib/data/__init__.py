"""Files on disk to batches of tensors. Knows nothing of models."""
