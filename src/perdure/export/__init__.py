"""Trained models as files that run without perdure, each with a model card.

    from perdure.export import export_learner
    export_learner(learner, "exported", to="onnx")

An artifact answers as the strategy's predictor does, masks and solved heads included. It is loaded
and run before it is left in the folder. Pruning, int8 weights and distillation to a student are
options.
"""

from perdure.export.card import ModelCard
from perdure.export.distillation import Distillation
from perdure.export.exporter import Exported, export_learner
from perdure.export.formats import FORMATS, Format
from perdure.export.predictor import Predictor, predictor_of, read_predictor

__all__ = [
    "FORMATS",
    "Distillation",
    "Exported",
    "Format",
    "ModelCard",
    "Predictor",
    "export_learner",
    "predictor_of",
    "read_predictor",
]
