"""Codecs: how attention keys and values become packed sign sketches, and what a reader needs to use them."""
