"""Finds the packages; everything else about the project is in pyproject.toml.

The cards in datasets/ and the run files in configs/ stay at the top of the repository, where people look for
them, and are installed as vlprompt/cards/ and vlprompt/configs/, where an installed library finds them.
"""

from __future__ import annotations

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vlprompt", "vlprompt.*"]), "vlprompt.cards", "vlprompt.configs"],
    package_dir={"vlprompt.cards": "datasets", "vlprompt.configs": "configs"},
)
