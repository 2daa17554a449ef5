"""`scenes`: the data set that this project draws itself, for its demo and its tests.

Pictures of coloured shapes with five captions each, and region features computed from their pixels:
world (what is there) -> drawing (pixels) and captions (words); features (pixels -> boxes and numbers); vocabulary;
generator (batches of all this); writer (files).
"""

from lib.prepare.scenes.writer import split_sizes, write_scenes

__all__ = ["split_sizes", "write_scenes"]
