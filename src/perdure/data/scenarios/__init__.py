"""Streams of experiences.

Splits by class, by time and by domain, permuted and rotated copies, classes that come back,
one-pass and blurry streams: one kind a file.

Which privacy history (*partition*) a record belongs to is decided here:

- Where a record's experience is a function of the record itself and of public facts (its label and
  the class order; a hash of its id and a public seed), adding or removing one record touches one
  experience only. Experiences are then disjoint partitions, called experience-0, experience-1, and
  so on.
- Where the same record turns up in several experiences (permuted and rotated copies), its id and
  the partition of its origin stay with it: one image is one record, and its uses compose.
- Where the place of a record depends on which *other* records are present (a cut after every so
  many records; a hash of ids that are positions; a number of pieces that follows the number of
  records), adding one record moves others. Such a stream says `assigned_by_record = False`, and no
  guarantee under add/remove adjacency holds for it.

Sizes are public. Every splitter takes `declared_size`; where a data set declares the size of its
training part, the sizes of experiences follow from it and from public shares, every class counting
the same. Where nothing is declared, the realised sizes are declared public.
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
