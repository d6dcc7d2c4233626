"""Figures: every ``plot_*`` takes results and returns a plotly figure."""
