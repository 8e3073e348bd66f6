"""Facts about a training that has not begun, for rules that examine it."""
