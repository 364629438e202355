"""Data sets: the catalogue, few-shot draws, sources of files, drawn scenes, transforms, the feature cache."""

from vlprompt.data.base import ImageDataset, Reader, Sample
from vlprompt.data.cache import PREFIX_GIB, FeatureCache
from vlprompt.data.cards import Card, cards_dir, load_card
from vlprompt.data.catalog import load_dataset
from vlprompt.data.decoding import Decoding, read_image
from vlprompt.data.fewshot import base_new, few_shot
from vlprompt.data.images import FileReader, VerificationReport, verify
from vlprompt.data.names import default_root, list_datasets
from vlprompt.data.segmentation.catalog import load_segmentation
from vlprompt.data.transforms import AUGMENTATIONS, Augmentation

__all__ = [
    "AUGMENTATIONS",
    "PREFIX_GIB",
    "Augmentation",
    "Card",
    "Decoding",
    "FeatureCache",
    "FileReader",
    "ImageDataset",
    "Reader",
    "Sample",
    "VerificationReport",
    "base_new",
    "cards_dir",
    "default_root",
    "few_shot",
    "list_datasets",
    "load_card",
    "load_dataset",
    "load_segmentation",
    "read_image",
    "verify",
]
