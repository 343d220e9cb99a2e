"""`python -m moe_lab_health doctor train.py [args]`: watches a training script without an edit."""

import sys

from .during.doctor import command

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
