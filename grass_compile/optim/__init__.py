"""The part that users construct: optimizers, parameter groups, update rules."""
