"""Training: the perceiver's towers, stage 1, and stage 2, that of an adapter."""
