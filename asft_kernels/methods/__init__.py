"""What methods need beyond a loss, one folder each. A folder can be deleted: nothing outside of it names it.

A folder may have these modules, which are looked for here:

    hooks.py         `Hooks`, a `asft_kernels.training.hooks.Method`: what training with it needs
    data_command.py  `asft data NAME INPUT OUTPUT`, row by row: `add_arguments(parser)` and `run(args)`
    commands.py      further ones of `asft data`: `COMMANDS`, name -> a module with these two functions
    compiled.py      `launch(dtype, every=...)`: launches its kernels once, for the report on compiled code
"""

import importlib
import importlib.util
import pkgutil
from types import ModuleType


def modules(name: str) -> dict[str, ModuleType]:
    """Imports the module called `name` of every method's folder that has one: method -> module."""
    folders = (found.name for found in pkgutil.iter_modules(__path__) if found.ispkg)
    paths = {folder: f"{__name__}.{folder}.{name}" for folder in folders}
    return {folder: importlib.import_module(path) for folder, path in paths.items() if importlib.util.find_spec(path)}
