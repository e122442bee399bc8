"""python -m vlmtrim.runtime.engines: build the engines of a bundle on this machine."""

from __future__ import annotations

import sys

from vlmtrim.runtime.engines.build import main

if __name__ == "__main__":
    sys.exit(main())
