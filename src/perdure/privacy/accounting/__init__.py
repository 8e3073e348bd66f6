"""From charges to epsilon, and from epsilon to noise."""
