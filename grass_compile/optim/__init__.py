"""What users construct: optimizers, parameter groups, update rules."""
