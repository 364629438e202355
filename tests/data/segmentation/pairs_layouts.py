"""Miniature copies of segmentation data sets' layouts, written from their documentation and not by our readers.

Image i has its number in every pixel; its mask of class c is a bar of c + 1 columns from column i % 4 on, so
that a test can tell from a mask which pair it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (12, 9)  # width, height


def image_file(path: Path, number: int, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Lossless, whatever the name says.
    Image.new("RGB", size, (number % 256, number // 256, 7)).save(path, "PNG")


def bar(number: int, label: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray[Any, Any]:
    mask = np.zeros(size[::-1], np.uint8)
    mask[:, number % 4 : number % 4 + label + 1] = 1
    return mask


def mask_file(path: Path, mask: np.ndarray[Any, Any], inside: int = 255) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((mask * inside).astype(np.uint8)).save(path, "PNG")


def record(name: str, mask: str, prompts: dict[str, Any]) -> dict[str, Any]:
    """One record as MedVLSM writes it, with what we don't read."""
    return {
        "bbox": [0, 0, 3, 3], "cat": 0, "segment_id": name.partition(".")[0], "img_name": name, "mask_name": mask,
        "sentences": [{"idx": 0, "sent_id": 0, "sent": ""}], "sentences_num": 1, "prompts": prompts,
    }  # fmt: skip


def medvlsm(
    root: Path,
    counts: dict[str, int],
    p1: Sequence[Any],
    inner: dict[str, str] | None = None,
    mask_folders: bool = False,
) -> None:
    """images/, masks/, anns/: one record per image and entry of ``p1`` (phrase or list of phrases by class)."""
    number = 0
    for split, count in counts.items():
        records, place = [], (inner or {}).get(split, "")
        for i in range(count):
            name = f"{i:03d}.png" if inner and split == "test" else f"{number:03d}.png"
            image_file(root / "images" / place / name, number)
            for label, phrases in enumerate(p1):
                mask = f"mask_{label + 1}/{name}" if mask_folders else f"{name[:-4]}_{label}.png"
                mask_file(root / "masks" / place / mask, bar(number, label))
                records.append(
                    record(name, mask, {"p0": "", "p1": phrases, "p2": [f"wide {i}", f"tall {i}"]})
                )
            number += 1
        path = root / "anns" / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records))


def voc(root: Path, train: int = 20, val: int = 4) -> None:
    """VOCdevkit/VOC2012 as torchvision unpacks it: JPEG images, palette masks with a border of 255."""
    devkit = root / "VOCdevkit" / "VOC2012"
    for part, count, first in (("train", train, 0), ("val", val, 1000)):
        names = []
        for i in range(count):
            name = f"2007_{first + i:06d}"
            names.append(name)
            image_file(devkit / "JPEGImages" / f"{name}.jpg", first + i)
            values = np.zeros(SIZE[::-1], np.uint8)
            values[:, :2], values[:, 2:5], values[:, 5] = 1 + i % 20, 20, 255
            image = Image.fromarray(values).convert("P")
            image.putpalette([v for c in range(256) for v in (c * 7 % 256, c * 13 % 256, c * 29 % 256)])
            path = devkit / "SegmentationClass" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        path = devkit / "ImageSets" / "Segmentation" / f"{part}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(names) + "\n")


def cityscapes(root: Path, train: int = 20, val: int = 4) -> None:
    """leftImg8bit/<part>/<city>/*_leftImg8bit.png and gtFine/<part>/<city>/*_gtFine_labelIds.png, and colour files."""
    folder = root / "cityscapes"
    for part, count in (("train", train), ("val", val)):
        for i in range(count):
            stem = f"{part}/aachen/aachen_{i:06d}_000019"
            image_file(folder / "leftImg8bit" / f"{stem}_leftImg8bit.png", i + (part == "val") * 500)
            values = np.zeros(SIZE[::-1], np.uint8)
            values[:, :3], values[:, 3:4], values[:, 4:6] = 7, 26, 4
            mask_file(folder / "gtFine" / f"{stem}_gtFine_labelIds.png", values, 1)
            mask_file(folder / "gtFine" / f"{stem}_gtFine_instanceIds.png", values, 1)
