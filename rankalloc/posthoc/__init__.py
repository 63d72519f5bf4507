"""Adapters from what has been trained already: the same score → budget → allocate → apply, without a training run."""
