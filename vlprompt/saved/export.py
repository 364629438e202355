"""A learner as one file that runs without this library: ONNX, or a program of ``torch.export``.

What is learned collapses into the image tower and a classifier: class weights that don't depend on the image are
computed once and stored. The file says how images are prepared and what the classes are called.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlprompt.core.errors import VLPromptError, first_line
from vlprompt.core.files import write_atomic
from vlprompt.core.paths import user_path
from vlprompt.core.version import package_version
from vlprompt.learners import Learner

__all__ = ["FACTS", "ExportError", "export", "export_module", "run_onnx", "session"]

FACTS = "vlprompt"
"""The key of the metadata, a JSON text: see :func:`export`."""

_INPUT = "images"
_OUTPUT = "logits"
_TOLERANCE = 1e-4  # of the largest logit
_HINT = "pip install 'vlprompt[export]'"


class ExportError(VLPromptError):
    """A learner that can't be exported, or whose file gives other logits."""


def export(learner: Learner, path: str | Path, *, int8: bool = False) -> Path:
    """Write a classifier as one file and check that it gives the same logits.

    The file takes ``images`` (B, 3, H, W), float32, prepared as its metadata say, for any B, and gives ``logits``
    (B, C). The metadata ``vlprompt`` is a JSON text with ``classnames``, ``preprocess`` (size, mean, std,
    interpolation, resize_mode), ``method``, ``backbone``, ``int8`` and ``version``.
    :class:`vlprompt.saved.exported.ExportedClassifier` reads it, and so does ``vlprompt predict``.

    Args:
        learner: What was trained, on a backbone in float32.
        path: ``*.onnx`` for ONNX, ``*.pt2`` for a program of ``torch.export``; replaced if it is there.
        int8: Store the weights of matrix products in eight bits; ONNX alone. Logits then differ: measure it.

    Returns:
        The path.

    Raises:
        ExportError: If a package is missing, the ending is another one, the backbone is in reduced precision, or the
            file gives other logits (more than 1e-4 of the largest).
    """
    height, width = learner.backbone.image_size
    facts = {
        "method": learner.method,
        "classnames": list(learner.classnames),
        "preprocess": learner.backbone.fingerprint["preprocess"],
        "backbone": {"name": learner.backbone.name, "id": learner.backbone.fingerprint["id"]},
    }
    if learner.backbone.vision.dtype != torch.float32:
        raise ExportError(
            f"the backbone runs in {learner.backbone.vision.dtype}; load the learner on one in float32 to export it."
        )
    return export_module(learner, (height, width), path, facts, int8=int8)


def export_module(
    module: nn.Module,
    size: tuple[int, int],
    path: str | Path,
    facts: Mapping[str, Any],
    *,
    int8: bool = False,
    any_batch: bool = True,
) -> Path:
    """Write any function of (B, 3, H, W) images; see :func:`export`, also for errors.

    Args:
        module: The function. Gradients are not exported.
        size: (H, W).
        path: Where to.
        facts: What is known of it; plain values.
        int8: See :func:`export`.
        any_batch: Whether B is free; else it is 1.
    """
    target = user_path(path)
    if target.suffix not in (".onnx", ".pt2"):
        raise ExportError(
            f"{path}: the ending says what is written: .onnx (ONNX) or .pt2 (a program of torch.export)."
        )
    if int8 and target.suffix != ".onnx":
        raise ExportError("int8 is written to .onnx files alone.")

    record = {**facts, "int8": int8, "version": package_version()}
    text = json.dumps(record, ensure_ascii=False)
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3 if any_batch else 1, 3, *size, generator=generator).to(device)

    with _evaluation(module), torch.no_grad():
        expected = module(images)  # class weights are computed here, and stay what they are
        program = _traced(module, images, any_batch)
        if target.suffix == ".pt2":
            content = io.BytesIO()
            torch.export.save(program, content, extra_files={FACTS: text})
            write_atomic(target, lambda out: _write(out, content.getvalue()))
            outputs = [torch.export.load(str(target)).module()(part) for part in (images, images[:1])]
        else:
            model = _onnx(program, text, int8).SerializeToString()
            write_atomic(target, lambda out: _write(out, model))
            outputs = [run_onnx(session(target), part.cpu()).to(device) for part in (images, images[:1])]

    if not int8:
        _check(target, outputs, [expected, expected[:1]])
    return target


def session(path: Path) -> Any:
    """Return an onnxruntime session of a file, on the processor.

    Raises:
        ExportError: If onnxruntime is missing, or the file is no model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(f"ONNX models are run by onnxruntime ({error}): {_HINT}.") from error

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own kinds of errors have no common base
        raise ExportError(f"{path} is no ONNX model that onnxruntime can run: {first_line(error)}") from error


def run_onnx(running: Any, images: Tensor) -> Tensor:
    """Return what a session gives for (B, 3, H, W) images."""
    (logits,) = running.run([_OUTPUT], {_INPUT: np.ascontiguousarray(images.float().numpy())})
    return torch.from_numpy(logits)


class _Function(nn.Module):
    """Names the input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.module(images)
        return result


def _traced(module: nn.Module, images: Tensor, any_batch: bool) -> torch.export.ExportedProgram:
    """Return the program of a module, with the weights that it reads and no others."""
    shapes = {_INPUT: {0: torch.export.Dim("batch")} if any_batch else {}}
    program = torch.export.export(_Function(module), (images,), dynamic_shapes=shapes)

    graph = program.module()
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.graph.erase_node(node)
    graph.recompile()

    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name, _ in [*graph.named_parameters(), *graph.named_buffers()]:
        if name not in read:
            owner, _, last = name.rpartition(".")
            delattr(graph.get_submodule(owner), last)
    return torch.export.export(graph, (images,), dynamic_shapes=shapes)


def _onnx(program: torch.export.ExportedProgram, facts: str, int8: bool) -> Any:
    """Return an ONNX model."""
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch translates with it)
    except ImportError as error:
        raise ExportError(
            f"ONNX files are written by the packages onnx and onnxscript ({error}): {_HINT}."
        ) from error

    with _quiet():
        translated = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[_INPUT], output_names=[_OUTPUT]
        )
    assert translated is not None
    model = translated.model_proto
    if int8:
        model = _quantised(model)
    onnx.helper.set_model_props(model, {FACTS: facts})
    return model


def _quantised(model: Any) -> Any:
    """Return a model whose matrix products have weights of eight bits, one scale for each output."""
    import tempfile

    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="vlprompt-export-") as folder, _quiet():
        before = Path(folder) / "float.onnx"
        after = Path(folder) / "int8.onnx"
        onnx.save(model, str(before))
        quantize_dynamic(
            before,
            after,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
        )
        return onnx.load(str(after))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _check(path: Path, outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Refuse a file that gives other logits, for several images or for one."""
    for output, right in zip(outputs, expected, strict=True):
        difference = float((output - right).abs().max())
        largest = max(1.0, float(right.abs().max()))
        if not difference <= _TOLERANCE * largest:
            raise ExportError(
                f"{path} was written, but its logits differ from the learner's by {difference:.2g}, of at most "
                f"{largest:.2g}: don't use it, and report this with the learner's name and the version of torch."
            )


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what exporters tell their developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
