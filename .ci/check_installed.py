"""Run outside the checkout, whose path is the argument: the installed package is all of it."""

import importlib
import sys
from importlib.resources import files
from pathlib import Path

checkout = Path(sys.argv[1])
installed = Path(str(files("jaxengine")))
assert checkout not in installed.parents, f"{installed} is the checkout itself"

wanted = {
    path.relative_to(checkout / "jaxengine")
    for path in (checkout / "jaxengine").rglob("*")
    if path.is_file() and path.suffix != ".pyc" and path.name != "LOG.md"
}
for folder in ("models", "pallas_kernels"):
    wanted |= {path.relative_to(checkout) for path in (checkout / folder).glob("*.py")}
missing = sorted(str(path) for path in wanted if not (installed / path).is_file())
assert not missing, f"not in the wheel: {missing}"

modules = sorted(path for path in wanted if path.suffix == ".py")
for path in modules:
    name = ".".join(("jaxengine", *path.with_suffix("").parts)).removesuffix(".__init__")
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(f"{len(wanted)} files installed, {len(modules)} modules imported")
