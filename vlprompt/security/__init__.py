"""Backdoor triggers in pictures: putting them in, finding them, and what they do to a classifier."""
