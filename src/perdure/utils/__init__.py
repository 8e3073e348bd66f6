"""Small general helpers: files, seeds, hashing, information about the machine.

Import `derive` and `generator` for random numbers that follow from one seed, `chunks` and
`row_slices` for pieces of rows that fit into memory, `evaluating` to put a module into evaluation
mode, `ignores_mode` to find out if this changes nothing, `store_rows` for the results of a
benchmark, and `Extensions` to find extensions (one per file).
"""

from perdure.utils.checked_fields import CheckedFields
from perdure.utils.chunking import chunks, row_slices
from perdure.utils.denormals import flushed
from perdure.utils.environment import command, machine, store_rows, versions
from perdure.utils.extensions import Extensions, is_proper_subclass
from perdure.utils.hashing import normals, uniforms
from perdure.utils.modules import evaluating, ignores_mode
from perdure.utils.pieces import pieces
from perdure.utils.seeding import derive, generator, seeded
from perdure.utils.vmapped import number_unless_vmapped

__all__ = [
    "CheckedFields",
    "Extensions",
    "chunks",
    "command",
    "derive",
    "evaluating",
    "flushed",
    "generator",
    "ignores_mode",
    "is_proper_subclass",
    "machine",
    "normals",
    "number_unless_vmapped",
    "pieces",
    "row_slices",
    "seeded",
    "store_rows",
    "uniforms",
    "versions",
]
