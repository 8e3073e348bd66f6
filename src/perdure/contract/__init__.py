"""The contract between strategies and the learner: all that a strategy author reads."""
