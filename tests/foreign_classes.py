"""Classes as other people's packages define them, for as long as a file is written."""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def foreign_classes(*names: str, base: type = object) -> Iterator[list[type]]:
    """Classes of these full names derived from ``base``, importable inside the context and gone after it."""
    made, modules = [], {}
    for name in names:
        module, _, attribute = name.rpartition(".")
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules:
                modules[path] = sys.modules[path] = types.ModuleType(path)
        made.append(type(attribute, (base,), {"__module__": module}))
        setattr(sys.modules[module], attribute, made[-1])
    try:
        yield made
    finally:
        for path in modules:
            del sys.modules[path]
