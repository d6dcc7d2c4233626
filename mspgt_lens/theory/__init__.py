"""The theory tested: predictions, verdicts, and models compared."""
