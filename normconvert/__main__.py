"""``python -m normconvert``."""

from __future__ import annotations

from normconvert.cli import main

if __name__ == "__main__":
    main()
