"""`python -m fastvlp` is `vlp`."""

import sys

from fastvlp.cli import main

sys.exit(main())
