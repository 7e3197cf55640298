"""An extension of griffe: fields in docstrings of transformers' form become a list.

transformers' `auto_docstring` reads ``name (`type`, *optional*, defaults to `value`):`` with the description in the
next lines. Markdown would join all fields to one paragraph.
"""

import re

from griffe import Extension, Object


FIELD = re.compile(r"^(\w+) \((`.*)\):\n((?: {4}.*\n?)+)", re.MULTILINE)


class DocstringFields(Extension):
    """Rewrites the docstrings that hold such fields."""

    def on_object(self, *, obj: Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = FIELD.sub(r"- **\1** (\2):\n\3", obj.docstring.value)
