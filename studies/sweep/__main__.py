"""Does the default sweep find as good a run as random and grid search, in fewer steps?"""
import sys

from .run import main

if __name__ == "__main__":
    sys.exit(main())
