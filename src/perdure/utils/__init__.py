"""Small helpers without knowledge of learning: files, seeds, hashing, the machine."""
