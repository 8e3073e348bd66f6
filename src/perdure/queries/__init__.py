"""Questions to a curator, and their exact and clipped sums."""
