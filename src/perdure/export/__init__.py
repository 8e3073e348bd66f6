"""Trained models as files that run without perdure, each with a model card.

    from perdure.export import export_learner
    export_learner(learner, "exported", to="onnx")

The exported files predict as the strategy does, including masks of classes and heads in closed
form. They are loaded, run and compared with the learner's predictions before they are put into the
folder. Options are pruning, int8 weights and distillation to a smaller model (student).
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
