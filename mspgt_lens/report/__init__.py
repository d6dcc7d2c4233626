"""Reports: results as one HTML file that opens without a network."""
