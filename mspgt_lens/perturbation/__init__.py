"""Perturbations of blocks and scales, and how far predictions move under them."""
