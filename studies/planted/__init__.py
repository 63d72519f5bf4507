"""Which method finds ranks that are known? See README.md in this folder."""
