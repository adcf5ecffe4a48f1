"""Stage 2: sites, prompt modules, hooks, and the wrapped model."""
