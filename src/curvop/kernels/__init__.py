"""Floor 1: what is differentiated and how its products are computed. Knows torch only."""
