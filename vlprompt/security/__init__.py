"""Backdoor triggers in images: putting them in, finding them, and what they do to a classifier."""
