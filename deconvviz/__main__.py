"""``python -m deconvviz``."""

import sys

from deconvviz.cli import main

sys.exit(main())
