"""An extension of griffe: `Example:` in a docstring is an examples section, and its doctest is shown as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^Example( \(.*\))?:$", re.MULTILINE)


class ExampleSections(griffe.Extension):
    """Renames `Example:` and `Example (of what):` to the `Examples:` that griffe knows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object once its docstring is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub("Examples:", obj.docstring.value)
