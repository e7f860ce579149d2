"""`python -m jaxengine.bench` is the command `jaxengine bench`."""

import sys

from jaxengine.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
