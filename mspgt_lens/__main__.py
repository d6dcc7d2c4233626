"""``python -m mspgt_lens``, and what ``torchrun -m mspgt_lens`` starts: the command."""

import sys

from mspgt_lens.cli import main

if __name__ == "__main__":
    sys.exit(main())
