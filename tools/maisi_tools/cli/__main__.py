"""`python -m maisi_tools.cli`, and so also under torchrun."""

import sys

from maisi_tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
