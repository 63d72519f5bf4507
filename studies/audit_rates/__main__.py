"""How often is an audit wrong, and how often does it find what is there? See README.md in this folder."""
import sys

from .run import main

if __name__ == "__main__":
    sys.exit(main())
