"""Adapters on disk: read, write, other tools' names, which base they belong to, a library of them."""
