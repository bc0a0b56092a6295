"""``python -m deploykit`` is the deploykit command."""

import sys

from deploykit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
