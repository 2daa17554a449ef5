"""Tensors to embeddings to scores. Knows nothing of files, flags or epochs.

Shape letters used here and beside the code:
    B pairs of a batch   I images   C captions   R regions of an image
    N tokens of the longest caption   W words of all captions, packed one after the other   D shared dimensions
"""
