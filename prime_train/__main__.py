"""`python -m prime_train` is `prime-train`."""

import sys

from .cli import main

sys.exit(main())
