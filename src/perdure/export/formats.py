"""File formats of exported models; each class writes a predictor's files and loads them again."""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from perdure.errors import ConfigError, ExportError
from perdure.export.predictor import STATE, WEIGHTS, Predictor, read_predictor, write_predictor
from perdure.utils.extras import imported

Runner = Callable[..., Tensor]
"""Function that runs exported files: from inputs (n, ...) to outputs.

On task-incremental streams the second argument is the task (n,) of every record.
"""

INPUTS = "inputs"
TASK = "task"
OUTPUTS = "outputs"
TRACED_ROWS = 3
"""Number of rows of the input with which a model is traced; 0 and 1 would become constants."""


class Format(ABC):
    """Base class of file formats for exported models.

    Class attributes:
    name: name in `--to`.
    files: names of the files that it writes.
    """

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]]

    @abstractmethod
    def write(self, predictor: Predictor, row: Tensor, folder: Path) -> None:
        """Write the files of a predictor.

        Args:
            predictor: predictor to write.
            row: blank input of shape (1, ...); no record, because a format may keep it.
            folder: an existing folder.

        Raises:
            ExportError: if the format cannot store the predictor.
        """

    @abstractmethod
    def load(self, predictor: Predictor, folder: Path) -> Runner:
        """Return a function that runs the model from the files alone, to check them.

        Args:
            predictor: predictor that was written; its classes are used, but no parameter.
            folder: folder of the files.
        """


class Safetensors(Format):
    """Two safetensors files: weights of the bare model, and other tensors of the predictor."""

    name = "safetensors"
    files = (WEIGHTS, STATE)

    def write(self, predictor: Predictor, row: Tensor, folder: Path) -> None:
        """Write the weights and the other tensors of the predictor."""
        write_predictor(predictor, folder)

    def load(self, predictor: Predictor, folder: Path) -> Runner:
        """Read both files into a copy of the model whose parameters were erased before."""
        bare = copy.deepcopy(predictor.model)
        with torch.no_grad():
            for value in bare.state_dict().values():
                value.zero_()
        return read_predictor(folder, model=bare, strategy=predictor.strategy)


class TorchExport(Format):
    """A program of `torch.export`; `torch.export.load` runs it without perdure."""

    name = "torch-export"
    files = ("model.pt2",)

    def write(self, predictor: Predictor, row: Tensor, folder: Path) -> None:
        """Trace the predictor and write the program."""
        program = traced(predictor, row)
        program.example_inputs = None  # they would be written, too
        with _told(self.name):
            torch.export.save(program, folder / self.files[0])

    def load(self, predictor: Predictor, folder: Path) -> Runner:
        """Load the program."""
        loaded: Runner = torch.export.load(folder / self.files[0]).module()
        return loaded


class Onnx(Format):
    """An ONNX graph; onnxruntime and others run it without torch."""

    name = "onnx"
    files = ("model.onnx",)

    def write(self, predictor: Predictor, row: Tensor, folder: Path) -> None:
        """Trace the predictor and write the graph."""
        for package in ("onnx", "onnxscript", "onnxruntime"):
            imported(package, "export", f"the format {self.name}")
        program = traced(predictor, row)
        names = [INPUTS, TASK][: 1 + predictor.by_task]
        with _told(self.name):
            made = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=names, output_names=[OUTPUTS]
            )
            assert made is not None
            made.save(folder / self.files[0])

    def load(self, predictor: Predictor, folder: Path) -> Runner:
        """Open the graph in onnxruntime, on the processor."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            folder / self.files[0], options, providers=["CPUExecutionProvider"]
        )
        names = [each.name for each in session.get_inputs()]

        def run(*given: Tensor) -> Tensor:
            rows = {name: value.numpy() for name, value in zip(names, given, strict=False)}
            return torch.from_numpy(session.run([OUTPUTS], rows)[0])

        return run


FORMATS: dict[str, Format] = {each.name: each for each in (Safetensors(), TorchExport(), Onnx())}
"""Formats by name."""


def format_of(name: str) -> Format:
    """Return a format by its name.

    Raises:
        ConfigError: if there is none of this name.
    """
    if name not in FORMATS:
        raise ConfigError.of("to", name, FORMATS)
    return FORMATS[name]


def traced(predictor: Predictor, row: Tensor) -> ExportedProgram:
    """Trace a predictor to a program of `torch.export` that takes any number of records.

    Args:
        predictor: predictor to trace; buffers on which no output depends are left out.
        row: (1, ...) blank input.

    Raises:
        ExportError: if torch cannot trace the model or the strategy.
    """
    rows = (row.expand(TRACED_ROWS, *row.shape[1:]).contiguous(),)
    given = (*rows, torch.zeros(TRACED_ROWS, dtype=torch.int64)) if predictor.by_task else rows
    with _told("torch-export"), torch.no_grad():
        program = _trace(predictor, given)
        unused = _unused_buffers(program)
        if unused:
            program = _trace(predictor.without(unused), given)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # it names files of this machine
    return program


def _trace(predictor: Predictor, given: tuple[Tensor, ...]) -> ExportedProgram:
    rows = torch.export.Dim("records")
    return torch.export.export(predictor, given, dynamic_shapes=({0: rows},) * len(given))


def _unused_buffers(program: ExportedProgram) -> list[str]:
    """Return the names of the predictor's own buffers that no node of the graph reads."""
    placed = program.graph_signature.inputs_to_buffers
    return [
        placed[node.name]
        for node in program.graph.nodes
        if node.op == "placeholder"
        and node.name in placed
        and not node.users
        and "." not in placed[node.name]
    ]


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Context manager that turns any exception of torch's exporters into an ExportError.

    Warnings of the exporters are not shown.

    Raises:
        ExportError: in place of the exporter's own exception.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # exporters raise errors of many kinds, public and private
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ExportError(
            f"the predictor cannot be written as {name} ({type(error).__name__}: {reason}); "
            "allowed: a model and a strategy that torch.export can trace; use tensor operations "
            "instead of Python branches on values, or export to safetensors"
        ) from error
