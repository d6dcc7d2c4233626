"""Layer profiles: one pass over the prompts, every curve from its moments."""
