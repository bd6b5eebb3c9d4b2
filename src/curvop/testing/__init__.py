"""Dense reference matrices by independent routes, and comparison of arrays."""
