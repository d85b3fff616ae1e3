"""A run as charts: which ones, drawn as SVG, as pictures, and gathered on one page."""
