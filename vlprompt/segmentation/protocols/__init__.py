"""Kinds of segmentation experiments: comparing methods, searching options, searching concepts."""
