"""Concepts: embeddings of words that a language doesn't have yet, and how they are searched."""
