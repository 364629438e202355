"""Miniature copies of the real data sets' layouts, written from their documentation and not by our readers.

Every image carries the class it was made for in its colour: (low byte, high byte, 7), so that a test can ask a loaded
image what it shows. Classes are given by their label on the card.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import yaml
from PIL import Image

from vlprompt.data import Card
from vlprompt.data.cards import SourceSpec

PER_CLASS = {"train": 3, "val": 1, "trainval": 10, "test": 2}


def colour(label: int) -> tuple[int, int, int]:
    return label % 256, label // 256, 7


def shown(image: Image.Image) -> int:
    """Return the label that an image's colour says."""
    red, green, blue = image.convert("RGB").getpixel((1, 1))  # type: ignore[misc]
    return red if red == green == blue else red + 256 * green  # grey images keep the low byte


def data_of(label: int, size: int = 4) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), colour(label)).save(out, "PNG")  # lossless, whatever the file's name says
    return out.getvalue()


def write_image(path: Path, label: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data_of(label))


def make(card: Card, source: SourceSpec, root: Path) -> dict[str, int]:
    """Write the layout that a source of a card reads; return the number of images per part of the layout."""
    return _MAKERS[source.kind](card, source.options, root)


def _images(card: Card, options: dict[str, Any], root: Path) -> dict[str, int]:
    folder = root / options["folders"][0]
    if options.get("lists"):
        own = [*(options.get("own_names") or options.get("class_folders") or ())]
        own = own or [str(i + 1) for i in range(len(card.classnames))]
        for part, spec in options["lists"].items():
            _LISTS[spec["format"]](folder, folder / options.get("images", ""), spec, own, part)
        return {p: PER_CLASS[p] * len(own) for p in options["lists"]}
    return _split_file(card, options, folder)


def _split_file(card: Card, options: dict[str, Any], folder: Path) -> dict[str, int]:
    content: dict[str, list[list[Any]]] = {"train": [], "val": [], "test": []}
    for part, rows in content.items():
        for label, name in enumerate(card.classnames):
            for i in range(PER_CLASS[part]):
                path = f"{name.replace('/', ' ').replace(' ', '_')}/{part}_{i}.jpg"
                write_image(folder / options.get("images", "") / path, label)
                rows.append([path, label, name.replace(" ", "_")])
    (folder / str(card.splits.file)).write_text(json.dumps(content))
    return {part: len(rows) for part, rows in content.items()}


def _text(folder: Path, images: Path, spec: dict[str, Any], own: list[str], part: str) -> None:
    lines = []
    for label, name in enumerate(own):
        for i in range(PER_CLASS[part]):
            stem = f"{name}/{part}{i}" if spec["label"] == "folder" else f"{part}_{label}_{i}"
            suffix = spec.get("suffix", "") or (".jpg" if spec["label"] == "folder" else "")
            write_image(images / f"{stem}{suffix}", label)
            listed = stem if spec.get("suffix") else f"{stem}{suffix}"
            ends = {"folder": "", "rest": f" {name}", "column": f" {name} 1 1"}
            lines.append(listed + ends[spec["label"]])
    path = folder / spec["path"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("# comment\n" + "\n".join(lines) + "\n")


def _folders(folder: Path, images: Path, spec: dict[str, Any], own: list[str], part: str) -> None:
    for label, name in enumerate(own):
        for i in range(PER_CLASS[part]):
            write_image(images / spec["path"] / name / f"{i:05d}.ppm", label)
        (images / spec["path"] / name / f"GT-{name}.csv").write_text("not an image")


def _table(folder: Path, images: Path, spec: dict[str, Any], own: list[str], part: str) -> None:
    rows = []
    for label, name in enumerate(own):
        for i in range(PER_CLASS[part]):
            path = f"{'img/' if spec['format'] == 'jsonl' else ''}{part}{label:03d}{i}.png"
            write_image(images / spec.get("prefix", "") / path, label)
            rows.append({spec["image"]: path, spec["label"]: int(name), "Width": 53})
    path = folder / spec["path"]
    if spec["format"] == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [spec["image"], "Width", spec["label"]], delimiter=spec["delimiter"])
        writer.writeheader()
        writer.writerows(rows)


def _flowers(folder: Path, images: Path, spec: dict[str, Any], own: list[str], part: str) -> None:
    """All parts share one numbering of images and one file of labels, both from 1."""
    if part != "train":
        return
    parts = {"train": "trnid", "val": "valid", "test": "tstid"}
    labels, ids = [], {key: [] for key in parts.values()}  # type: ignore[var-annotated]
    for name, key in parts.items():
        for label in range(len(own)):
            for _ in range(PER_CLASS[name]):
                labels.append(label + 1)
                ids[key].append(len(labels))
                write_image(images / f"image_{len(labels):05d}.jpg", label)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    scipy.io.savemat(folder / "setid.mat", {k: np.array([v]) for k, v in ids.items()})


def _cars(folder: Path, images: Path, spec: dict[str, Any], own: list[str], part: str) -> None:
    fields = ["bbox_x1", "class", "fname"]
    rows = np.zeros((1, PER_CLASS[part] * len(own)), dtype=[(f, object) for f in fields])
    for n in range(rows.shape[1]):
        label = n % len(own)
        write_image(images / spec["prefix"] / f"{n + 1:05d}.jpg", label)
        rows[0, n] = (np.array([[39]]), np.array([[int(own[label])]]), f"{n + 1:05d}.jpg")
    path = folder / spec["path"]
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"annotations": rows})


def _voc(folder: Path, images: Path, spec: dict[str, Any], own: list[str], part: str) -> None:
    """One file per class over all images; each image shows its class and, marked difficult, the next one."""
    names = [f"{part}{c:03d}{i}" for c in range(len(own)) for i in range(PER_CLASS[part])]
    (folder / spec["path"]).mkdir(parents=True, exist_ok=True)
    for c, name in enumerate(own):
        lines = []
        for n in names:
            main = int(n[len(part) : len(part) + 3])
            lines.append(f"{n} {' 1' if c == main else ' 0' if c == main + 1 else '-1'}")
        (folder / spec["path"] / f"{name}_{spec['part']}.txt").write_text("\n".join(lines) + "\n")
    for n in names:
        write_image(images / f"{n}.jpg", int(n[len(part) : len(part) + 3]))


def _arrays(card: Card, options: dict[str, Any], root: Path) -> dict[str, int]:
    folder = root / options["folders"][0]
    folder.mkdir(parents=True, exist_ok=True)
    count = len(card.classnames)
    own = list(options.get("own_numbers") or range(count))
    if options.get("names_file"):  # the data set's own order: sorted by name, written with underscores
        order = sorted(card.classnames)
        own = [order.index(name) for name in card.classnames]
        text = "\n".join(name.replace(" ", "_") for name in order)
        (folder / options["names_file"]).write_text(text + "\n\n")
    sizes = {}
    for part, files in options["parts"].items():
        size = PER_CLASS["trainval" if options.get("shares") and part == "train" else part] * count
        labels = [n % count for n in range(size)]
        _ARRAYS[options["format"]](folder, files, labels, [own[label] for label in labels])
        sizes[part] = len(labels)
    return sizes


def _pixels(labels: list[int], size: int) -> np.ndarray:
    """(N, size, size, 3); the top right pixel differs, so that turned images are noticed."""
    images = np.empty((len(labels), size, size, 3), dtype=np.uint8)
    images[:] = np.array([colour(label) for label in labels], dtype=np.uint8)[:, None, None, :]
    images[:, 0, -1] = 255
    return images


def _cifar(folder: Path, files: list[str], labels: list[int], own: list[int]) -> None:
    planes = _pixels(labels, 32).transpose(0, 3, 1, 2).reshape(len(labels), -1)
    fine = np.array(own, dtype=np.uint8)[:, None]
    head = [np.zeros_like(fine), fine] if "train.bin" in files or "test.bin" in files else [fine]
    records = np.concatenate([*head, planes], axis=1)
    for file, part in zip(files, np.array_split(records, len(files)), strict=True):
        part.tofile(folder / file)


def _idx(folder: Path, files: list[str], labels: list[int], own: list[int]) -> None:
    grey = _pixels(labels, 28)[..., 0]
    header = bytes([0, 0, 8, 3]) + np.array(grey.shape, ">i4").tobytes()
    (folder / files[0]).write_bytes(header + grey.tobytes())
    header = bytes([0, 0, 8, 1]) + np.array([len(own)], ">i4").tobytes()
    (folder / files[1]).write_bytes(
        gzip.compress(header + bytes(own))
    )  # packed under the unpacked name: both are read


def _svhn(folder: Path, files: list[str], labels: list[int], own: list[int]) -> None:
    digits = np.array([[10 if o == 0 else o] for o in own], dtype=np.uint8)
    scipy.io.savemat(folder / files[0], {"X": np.moveaxis(_pixels(labels, 32), 0, 3), "y": digits})


def _stl(folder: Path, files: list[str], labels: list[int], own: list[int]) -> None:
    _pixels(labels, 96).transpose(0, 3, 2, 1).tofile(folder / files[0])
    (np.array(own, dtype=np.uint8) + 1).tofile(folder / files[1])


def _h5(folder: Path, files: list[str], labels: list[int], own: list[int]) -> None:
    import h5py

    with h5py.File(folder / files[0], "w") as file:
        file["x"] = _pixels(labels, 96)
    with h5py.File(folder / files[1], "w") as file:
        file["y"] = np.array(own).reshape(-1, 1, 1, 1)


def _fer(folder: Path, files: list[str], labels: list[int], own: list[int]) -> None:
    path = folder / files[0]
    rows = [] if path.is_file() else ["emotion, Usage, pixels"]
    for label, number in zip(labels, own, strict=True):
        rows.append(f"{number},{files[1]},{' '.join([str(label)] * 48 * 48)}")
    with path.open("a") as file:
        file.write("\n".join(rows) + "\n")


def _synsets(card: Card, options: dict[str, Any], root: Path) -> dict[str, int]:
    from vlprompt.data.imagenet import synset_ids

    ids = synset_ids(str(card.synsets))
    sizes = {}
    for part, name in options.get("lists", {}).items():
        folder = root / options["folders"][0] / options["images"]
        paths = [f"{synset}/{part}_{i}.jpg" for i in range(PER_CLASS[part]) for synset in ids]
        for number, path in enumerate(paths):
            write_image(folder / path, number % len(ids))
        # The authors' paths begin at their working folder, and their numbers of classes are not ours.
        targets = [(7 + number) % len(ids) for number in range(len(paths))]
        content = {"data": [f"data/imagenet-r/{path}" for path in paths], "targets": targets}
        (folder.parent / name).write_text(yaml.safe_dump(content))
        sizes[part] = len(paths)
    for part, below in options.get("parts", {}).items():
        count = 3 if part == "train" else 1
        for label, synset in enumerate(ids):
            folder = root / options["folders"][0] / options.get("images", "") / below
            for i in range(count):
                write_image(
                    folder / (str(label) if options.get("numbered") else synset) / f"{synset}_{i}.JPEG", label
                )
        sizes[part] = count * len(ids)
    return sizes


def _voc_lists(card: Card, options: dict[str, Any], root: Path) -> dict[str, int]:
    folder = root / options["folders"][0]
    for split, part in options["parts"].items():
        spec = {"path": "ImageSets/Main", "part": part}
        _voc(folder, folder / options["images"], spec, list(options["own_names"]), split)
    return {split: PER_CLASS[split] * len(card.classnames) for split in options["parts"]}


def _coco_labels(card: Card, options: dict[str, Any], root: Path) -> dict[str, int]:
    """Each image shows its class twice, the next one as a crowd, and ids are neither 0.. nor in order."""
    folder = root / options["folders"][0]
    count = len(card.classnames)
    categories = [
        {"id": 3 * c + 1, "name": name, "supercategory": "x"} for c, name in enumerate(card.classnames)
    ]
    for split, part in options["parts"].items():
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for n in range(PER_CLASS[split] * count):
            name = f"COCO_{split}2014_{n:012d}.jpg"
            write_image(folder / part["images"] / name, n % count)
            images.append({"id": 1000 - n, "file_name": name, "width": 640, "height": 480})
            for label, crowd in ((n % count, 0), (n % count, 0), ((n + 1) % count, 1)):
                objects.append({"id": len(objects) + 1, "image_id": 1000 - n, "category_id": 3 * label + 1})
                objects[-1] |= {"iscrowd": crowd, "bbox": [1, 2, 3, 4], "area": 12.0}
        path = folder / part["annotations"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    return {split: PER_CLASS[split] * count for split in options["parts"]}


def _manifest(card: Card, options: dict[str, Any], root: Path) -> dict[str, int]:
    folder = root / "elevater" / options["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for part, index in options["index"].items():
        entries = []
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
            for label in range(len(card.classnames)):
                for i in range(PER_CLASS[part]):
                    name = f"some folder/{label}_{i}.jpg"
                    archive.writestr(name, data_of(label))
                    also = (label + 1) % len(card.classnames)
                    entries.append((name, [label, also] if card.multi_label else [label]))
        _write_index(folder / index, part, entries, list(card.classnames))
        sizes[part] = len(entries)
    return sizes


def _write_index(path: Path, part: str, entries: list[tuple[str, list[int]]], names: list[str]) -> None:
    if path.suffix == ".txt":
        lines = [f"{part}.zip@{name} {','.join(map(str, labels))}" for name, labels in entries]
        path.write_text("\n".join(lines) + "\n")
        return
    images = [{"id": i, "file_name": n, "zip_file": f"{part}.zip"} for i, (n, _) in enumerate(entries, 1)]
    marks = [
        {"image_id": i, "category_id": c + 1} for i, (_, labels) in enumerate(entries, 1) for c in labels
    ]
    categories = [{"id": i, "name": n} for i, n in enumerate(names, 1)]
    path.write_text(json.dumps({"images": images, "annotations": marks, "categories": categories}))


_LISTS = {
    "text": _text,
    "folders": _folders,
    "csv": _table,
    "jsonl": _table,
    "flowers": _flowers,
    "cars": _cars,
    "voc": _voc,
}
_ARRAYS = {"cifar": _cifar, "idx": _idx, "svhn": _svhn, "stl": _stl, "h5": _h5, "fer": _fer}
_MAKERS = {
    "images": _images,
    "arrays": _arrays,
    "synsets": _synsets,
    "manifest": _manifest,
    "voc": _voc_lists,
    "coco_labels": _coco_labels,
}
