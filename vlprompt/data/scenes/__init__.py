"""Scenes: images drawn on the fly from a seed, with labels, captions, masks and boxes."""

from __future__ import annotations

from vlprompt.data.scenes.attributes import held_out_pairs, list_styles
from vlprompt.data.scenes.captions import Caption, caption, facts
from vlprompt.data.scenes.pairs import caption_pairs, masks, throughput
from vlprompt.data.scenes.render import Rendered, render
from vlprompt.data.scenes.sheet import contact_sheet
from vlprompt.data.scenes.spec import SceneObject, SceneSpec, draw_object, draw_scene
from vlprompt.data.scenes.tasks import build, held_out_classes, list_tasks

__all__ = [
    "Caption",
    "Rendered",
    "SceneObject",
    "SceneSpec",
    "build",
    "caption",
    "caption_pairs",
    "contact_sheet",
    "draw_object",
    "draw_scene",
    "facts",
    "held_out_classes",
    "held_out_pairs",
    "list_styles",
    "list_tasks",
    "masks",
    "render",
    "throughput",
]
