"""``python -m scope_opd``: the command line without its script."""

import sys

from scope_opd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
