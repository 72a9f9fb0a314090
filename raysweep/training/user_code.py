"""Finding a user's function by its name, `module:function`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysweep.errors import UserError


def load_function(name: str, folder: str | Path, key: str) -> Callable[..., Any]:
    """The function that `name` says, as `module:function`.

    Modules are looked for in `folder` (that of the search-space file), in the current one, and
    among what is installed. `key` is what named it, for the messages. Raises UserError in one line
    where it cannot be imported, or is no function.
    """
    for place in (os.getcwd(), str(folder)):
        if place not in sys.path:
            sys.path.insert(0, place)
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # whatever the user's module does when it is imported
        if isinstance(error, KeyboardInterrupt):
            raise
        missing = isinstance(error, ModuleNotFoundError) and error.name == module_name.split(".")[0]
        hint = f": it must lie in {folder}, or be installed" if missing else where(error)
        raise UserError(
            f"{key} {name} cannot be imported: {type(error).__name__}: {error}{hint}"
        ) from error
    found = getattr(module, function_name, None)
    if found is None:
        near = difflib.get_close_matches(function_name, dir(module), n=1)
        hint = f": did you mean {module_name}:{near[0]}?" if near else ""
        raise UserError(f"{key} {name}: {module_name} has no {function_name}{hint}")
    if not callable(found):
        raise UserError(f"{key} {name} is no function but {type(found).__name__}")
    return found


def where(error: BaseException) -> str:
    """The last line of a user's own code that an error passed, as ` (train.py:41)`."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        ours = os.sep + "raysweep" + os.sep + "training" + os.sep in file
        if "site-packages" not in file and not file.startswith("<") and not ours:
            name = Path(file).name
            if not file.startswith(os.path.dirname(os.__file__)):
                place = f" ({name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place
