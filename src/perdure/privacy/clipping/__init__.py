"""Per-record clipping: bound the influence of one record on a sum."""
