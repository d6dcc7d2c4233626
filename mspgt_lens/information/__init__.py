"""Information in closed form, from the second moments of one pass."""
