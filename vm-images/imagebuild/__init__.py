"""Builds the guests that tests and the demo boot, from distribution packages.

Standard library only: this runs before the project's own environment need exist. Nothing built is
ever committed; it goes to a cache, one directory an image and version of its recipe.
"""

__all__: list[str] = []
