"""The training loop and what it needs: optimiser, logs, warnings."""
