"""The P·Λ·Q adapter, the set of them in a model, and everything done to it without deciding anything."""
