"""Studies of rankalloc, one package for each question: ``python -m studies.<question>``. See README.md here."""
