"""Do adaptive ranks help on punctuation and on part-of-speech tags? Audits, with all their data."""
