"""Scale boundaries: drift and jumps, the test of one against the other, and detection."""
