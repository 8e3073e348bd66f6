"""Records, experiences and streams: what a learner is given."""
