"""Frozen layers: which can be adapted, as which matrix, and how layer and update are computed fast."""
