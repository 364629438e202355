"""Classifying images: fitting, evaluating and predicting, protocols, experiments."""
