"""Configurations that repeat the field's tables on 1B, 3B and 8B models: their data, their metrics, what they need."""
