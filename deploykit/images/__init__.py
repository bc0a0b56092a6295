"""From what a user has of an image to what a model is called with.

``find`` lists the image files below a folder, ``decode`` turns a file, bytes or pixels in memory into an upright
8-bit picture, and ``preprocess`` resizes, crops and normalises that as the weights were trained.
"""

from deploykit.optional import require

require("PIL.Image")
