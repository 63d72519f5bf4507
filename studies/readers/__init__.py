"""What each reader makes of each layout; ``python -m studies.readers``."""
