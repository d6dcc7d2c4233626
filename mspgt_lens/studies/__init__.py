"""Studies of whole models: everything measured at once, along training, across texts and models."""
