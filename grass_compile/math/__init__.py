"""The arithmetic of the method: pure functions over tensors, traced or run; no state."""
