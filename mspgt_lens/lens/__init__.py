"""A lens on what every layer predicts: fitted, scored, kept, and read through."""
