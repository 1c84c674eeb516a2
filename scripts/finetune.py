"""``dppo finetune`` as a script."""

import sys

from dppo.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
