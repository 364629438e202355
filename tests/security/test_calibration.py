"""Thresholds that clean images of the user's set, in memory, in a folder's scan and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlprompt
from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.core.seeding import numpy_rng
from vlprompt.learners import create_learner
from vlprompt.security.folder import scan_folder
from vlprompt.security.scan import calibrated, scan


def images_with_corners(greys: list[int]) -> list[Image.Image]:
    images = []
    for grey in greys:
        pixels = np.zeros((40, 40, 3), np.uint8)
        pixels[20:, 20:] = grey
        images.append(Image.fromarray(pixels))
    return images


def test_clean_images_set_the_threshold_and_the_report_says_what_it_promises(corner: Any) -> None:
    clean = images_with_corners(list(range(0, 200, 10)))  # 20: the rank of 0.1 is ceil(21 * 0.9) = 19
    report = scan(images_with_corners([170, 180, 190, 255]), corner, calibrate=clean, false_alarms=0.1)
    assert [row["verdict"] for row in report] == ["clean", "clean", "poisoned", "poisoned"]

    calibration = report.calibration
    assert calibration is not None
    assert (calibration.images, calibration.unreadable, calibration.false_alarms) == (20, 0, 0.1)
    assert report.threshold == calibration.threshold
    assert "20 clean images" in str(calibration)
    assert "at most 10 %" in str(calibration)
    assert scan(clean, corner).calibration is None


def test_what_can_not_be_promised_is_refused(corner: Any, tmp_path: Path) -> None:
    clean = images_with_corners([0] * 18)
    with pytest.raises(DataError, match=r"18 clean images can't promise a rate of 0\.05: at least 19"):
        scan(clean, corner, calibrate=clean)
    with pytest.raises(DataError, match="give one"):
        scan(clean, corner, calibrate=clean, threshold=0.5)

    (tmp_path / "broken.png").write_text("no image")
    for number, image in enumerate(images_with_corners([0] * 19)):
        image.save(tmp_path / f"{number}.png")
    assert calibrated(tmp_path, corner).unreadable == 1


def test_a_folders_scan_records_its_calibration_and_is_not_continued_with_another(
    corner: Any, image_folder: Path, tmp_path: Path
) -> None:
    calibration = calibrated(images_with_corners(list(range(0, 200, 10))), corner, 0.1)
    scan_folder(image_folder, corner, tmp_path / "out", calibration=calibration)
    facts = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert facts["calibration"]["false_alarms"] == 0.1
    assert facts["threshold"] == calibration.threshold
    assert "at most 10 %" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(CheckpointError, match="differ"):
        scan_folder(image_folder, corner, tmp_path / "out", resume=True)


def test_the_command_calibrates(command: Any, backbone: Backbone, tmp_path: Path) -> None:
    vlprompt.save(create_learner("dbom", vlprompt.create_backbone("tiny"), ["a", "b"]), tmp_path / "detector")
    rng = numpy_rng(0, "calibrate")
    for part in ("clean", "suspect"):
        (tmp_path / part).mkdir()
        for number in range(19):
            pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / f"{number}.png")

    words = ("scan", tmp_path / "suspect", "--detector", tmp_path / "detector", "--output", "out")
    answer = command(*words, "--calibrate", tmp_path / "clean")
    assert answer.status in (0, 3), answer.err
    assert "was set by 19 clean images" in answer.out
    refused = command(*words, "--calibrate", tmp_path / "clean", "--false-alarms", 0.01)
    assert refused.status == 2
    assert "at least 99 are needed" in refused.err
    assert command(*words, "--calibrate", tmp_path / "clean", "--threshold", 0.5).status == 2
