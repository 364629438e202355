"""GRAM: prompts meta-learned on captioned images, and a function that regulates their gradients later.

Paper: Li et al., "Gradient-Regulated Meta-Prompt Learning for Generalizable Vision-Language Models", ICCV 2023, arXiv
2303.06571. There is no public code, and only the abstract's claims could be checked: prompt initialisation and a light
regulator are learned together, from unlabelled image-caption pairs; cross-modal hierarchical clustering makes the
tasks; text prompts, visual prompts and both together (UNIGRAM) are covered. Everything below that level is a
reconstruction: which modality clusters at which level, sizes, the forms of the regulator and the first-order outer
step. Each file says what it takes from where.
"""

from __future__ import annotations

__all__: list[str] = []
