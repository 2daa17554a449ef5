"""Searching pictures: one vector a picture finds candidates, the exact score ranks them (docs/search.md).

from lib.search import Index
for found in Index.open("INDEX").query("two dogs", top=10):
    print(found.path, found.score)
"""

from lib.search.index import Found, Index

__all__ = ["Found", "Index"]
