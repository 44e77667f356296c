"""Names and block-wise quantisers."""
