"""Which method should be rankalloc's default? See README.md in this folder."""
