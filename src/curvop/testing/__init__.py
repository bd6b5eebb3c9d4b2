"""Dense reference matrices, computed by an independent implementation, and a function that compares arrays."""
