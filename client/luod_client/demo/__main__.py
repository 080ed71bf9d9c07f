"""`python -m luod_client.demo`: as `luoctl demo`."""

import sys

from luod_client.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
