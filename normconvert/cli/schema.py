"""``normconvert schema``: what a recipe may say, for editors and checkers."""

from __future__ import annotations

from normconvert.cli.app import MANY, register


@register(short_help="Print the JSON Schema of recipes.", rich_help_panel=MANY)
def schema() -> int:
    """Print the JSON Schema of recipes, by which editors complete and check them."""
    import json

    from normconvert.recipes.model import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    return 0
