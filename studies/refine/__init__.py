"""Does weighing singular values anew by gradients help a finished adapter? See README.md in this folder."""
