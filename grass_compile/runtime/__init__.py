"""Real tensors: the optimizer, its compact state, selections, update rules and the eager reference."""
