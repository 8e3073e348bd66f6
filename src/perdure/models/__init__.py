"""Models with a fixed full-width head, and the bodies and layers they are built from.

Import a function that makes a model for vectors and images (`mlp`, `cnn`, `mobilenet`, `resnet18`,
`transformer`, or `build` for a `ModelConfig`) or for sequences (`lstm`, `gru`, `decoder`). Import
`wrap` for your own model or a model of another library, `low_rank` for adapters on any model,
`frozen` for a fixed feature extractor (with `Scattering` or `RandomConvolutions`), or a model on a
frozen transformer (`prompted`, `composed`, `adapted`). `synthetic_records` draws records from a
trained model with a generator (`generative`).
"""

from perdure.models.bodies import LARGEST_GROUP_COUNT
from perdure.models.classifier import Classifier
from perdure.models.classifiers import build, cnn, mlp, mobilenet, resnet18
from perdure.models.config import ModelConfig
from perdure.models.cosine_head import CosineHead, cosines, directions
from perdure.models.decoder import Decoder, decoder
from perdure.models.frozen import Fixed, FixedNorm, Frozen, frozen
from perdure.models.gru import gru
from perdure.models.low_rank import LowRankLinear, low_rank
from perdure.models.low_rank_adapters import Adapted, adapted
from perdure.models.lstm import lstm
from perdure.models.prompts import Composed, Prompted, composed, prompted
from perdure.models.random_convolutions import RandomConvolutions, random_filters
from perdure.models.scattering import Scattering
from perdure.models.synthetic_records import synthetic_records
from perdure.models.vae import Generative, generative
from perdure.models.vision_transformer import Transformer, from_timm, tiny, transformer
from perdure.models.wrapped import Wrapped, wrap

__all__ = [
    "LARGEST_GROUP_COUNT",
    "Adapted",
    "Classifier",
    "Composed",
    "CosineHead",
    "Decoder",
    "Fixed",
    "FixedNorm",
    "Frozen",
    "Generative",
    "LowRankLinear",
    "ModelConfig",
    "Prompted",
    "RandomConvolutions",
    "Scattering",
    "Transformer",
    "Wrapped",
    "adapted",
    "build",
    "cnn",
    "composed",
    "cosines",
    "decoder",
    "directions",
    "from_timm",
    "frozen",
    "generative",
    "gru",
    "low_rank",
    "lstm",
    "mlp",
    "mobilenet",
    "prompted",
    "random_filters",
    "resnet18",
    "synthetic_records",
    "tiny",
    "transformer",
    "wrap",
]
