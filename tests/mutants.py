"""One-line bugs: a line of a function's source, replaced while a test runs."""

import importlib.util
import inspect
import sys
import textwrap
from pathlib import Path


def patch_line(monkeypatch, function, old, new, owner=None):
    """Puts ``new`` for the one ``old`` in ``function``, wherever our modules name it.

    ``owner`` is the class of a method. A line that is no longer there fails the test: the
    bug must be planted in the code as it is.
    """
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{function.__qualname__}: {source.count(old)} times {old!r}"
    changed = source.replace(old, new)
    while changed.lstrip().startswith("@"):
        changed = changed.lstrip().split("\n", 1)[1]
    # The module's own globals, so that the mutant's neighbours are the real ones.
    namespace = {}
    code = compile(changed, "<planted bug>", "exec")
    exec(code, vars(sys.modules[function.__module__]), namespace)
    mutant = namespace[function.__name__]
    if owner is not None:
        monkeypatch.setattr(owner, function.__name__, mutant)
        return
    found = 0
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in ("dpfa_jax", "pallas_kernels"):
            continue
        for attribute, value in list(vars(module).items()):
            if value is function:
                monkeypatch.setattr(module, attribute, mutant)
                found += 1
    assert found


def load_tests(*path):
    """A module of tests, by its path under tests/dpfa_jax, to call its tests one by one."""
    file = Path(__file__).parent.joinpath("dpfa_jax", *path)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
