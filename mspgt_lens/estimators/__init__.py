"""Mutual information of plain arrays, by several estimators behind one interface."""
