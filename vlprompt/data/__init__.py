"""Data sets: the catalogue, few-shot sampling, folders of one's own, drawn scenes, transforms, feature cache."""
