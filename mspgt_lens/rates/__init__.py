"""The rate that a layer needs: how little one site can pass on, and what predictions lose by it."""
