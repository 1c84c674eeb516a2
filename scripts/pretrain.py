"""``dppo pretrain`` as a script."""

import sys

from dppo.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
