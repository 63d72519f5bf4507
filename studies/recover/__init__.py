"""Does a cut adapter recover with a few more steps? ``python -m studies.recover``."""
