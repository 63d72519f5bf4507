"""The controller, and what surrounds one training run."""
