"""Protocols: which cells make up a result, and how it is computed from them. One file each.

A protocol plans and computes; training and scoring a cell is :mod:`vlprompt.classification.experiment`'s.
"""

from __future__ import annotations

from vlprompt.classification.protocols.across import Across
from vlprompt.classification.protocols.base import Protocol
from vlprompt.classification.protocols.base_to_new import BaseToNew
from vlprompt.classification.protocols.class_incremental import ClassIncremental
from vlprompt.classification.protocols.few_shot import Elevater, FewShot
from vlprompt.classification.protocols.meta import MetaTraining
from vlprompt.classification.protocols.multitask import MultiTaskProtocol
from vlprompt.classification.protocols.transfer import Transfer

__all__ = ["Protocol", "protocol_of"]

_PROTOCOLS: dict[str, Protocol] = {
    "coop-fewshot": FewShot(),
    "elevater": Elevater(),
    "base-to-new": BaseToNew(),
    "cross-dataset": Across(),
    "domain-generalisation": Across(),
    "multitask": MultiTaskProtocol(),
    "transfer": Transfer(),
    "meta": MetaTraining(),
    "class-incremental": ClassIncremental(),
}


def protocol_of(name: str) -> Protocol:
    """Return the protocol that a configuration names."""
    return _PROTOCOLS[name]
