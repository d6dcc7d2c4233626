"""The trained H-VIB probe: hierarchical stochastic readers of every site, at every beta."""
