"""Drawn views of the world with a mask for everything in them: streets, coasts, rooms, retinas, surfaces.

They stand in for photographs where a decoder of masks is trained: rough shapes in plausible places, filled with noise
in plausible colours. No photograph is in them.
"""

from pretraining.views.drawing import WORDS, View, drawn_view

__all__ = ["WORDS", "View", "drawn_view"]
