"""The learner: one model on a stream, in one loop."""
