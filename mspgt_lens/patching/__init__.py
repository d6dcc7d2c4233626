"""Activation patching: by block, position and head, and by scale."""
