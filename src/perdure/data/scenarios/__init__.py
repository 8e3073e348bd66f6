"""Scenarios: functions that make a stream of experiences from a data set.

Each file makes one kind of stream: splits by class, by time and by domain, permuted and rotated
copies, repeated classes, one-pass streams and blurry streams.

These functions decide the privacy history (*partition*) of each record:

- If the experience of a record depends only on the record and on public facts (its label and the
  class order, or a hash of its id and a public seed), adding or removing one record changes one
  experience only. Experiences are then separate partitions, called experience-0, experience-1, and
  so on.
- If the same record is in several experiences (permuted and rotated copies), it keeps its id and
  the partition of its source: one image is one record, and its privacy costs add up.
- If the experience of a record depends on *other* records (a cut after a fixed number of records; a
  hash of ids that are positions; a number of pieces that depends on the number of records), adding
  one record moves others. Then `assigned_by_record` of the stream is False, and no guarantee under
  add/remove adjacency holds.

Sizes are public. Every function has the argument `declared_size`. If a data set declares the size
of its training part, the sizes of experiences follow from it and from public shares, with equally
large classes. If no size is declared, the actual sizes are used and become public.
"""

from perdure.data.scenarios.attributes import by_domain, by_time
from perdure.data.scenarios.blurred_slices import blurry
from perdure.data.scenarios.class_slices import split
from perdure.data.scenarios.copies import joint, permute, permuted, rotate, rotated
from perdure.data.scenarios.pieces import online
from perdure.data.scenarios.places import hashable, placing_rule, public_coin
from perdure.data.scenarios.repeated_classes import repetition

__all__ = [
    "blurry",
    "by_domain",
    "by_time",
    "hashable",
    "joint",
    "online",
    "permute",
    "permuted",
    "placing_rule",
    "public_coin",
    "repetition",
    "rotate",
    "rotated",
    "split",
]
