"""Training: the perceiver's towers and stage 1."""
