"""Rules for book-keeping, one layer type or family of types a file."""
