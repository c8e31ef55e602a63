"""A door hands out the public names of a package. A room is imported when one of its names is first asked for."""
import sys
from importlib import import_module
from typing import Callable


def door(
    package: str,            # its full name
    rooms: dict[str, str],   # module below the package -> its public names, with blanks between
) -> tuple[list[str], Callable, Callable]:  # `__all__`, `__getattr__` and `__dir__` of the package
    "What a package needs to hand out names of its modules lazily. Asking for another name raises AttributeError."
    homes = {name: room for room, names in rooms.items() for name in names.split()}

    def find(name: str):
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return list(homes), find, names
