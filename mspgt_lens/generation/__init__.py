"""Text written under interventions, and what is measured of it."""
