"""`python -m jaxengine` is the command `jaxengine`."""

import sys

from jaxengine.cli import main

if __name__ == "__main__":
    sys.exit(main())
