"""Write the API reference as HTML pages from the docstrings: `python scripts/build_api_docs.py api`.

Needs pdoc (`pip install 'moe-gpu[dev]'`) and no network. A warning, such as a name that cannot be imported or an
annotation that cannot be read, is an error: one line each, and exit status 1.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

# The package's public names, and the modules that the documents import from by name.
MODULES = ("moe_gpu", "moe_gpu.training", "moe_gpu.metrics", "moe_gpu.results", "moe_gpu.live.status")


def build(directory: Path) -> list[str]:
    """Write the pages into a folder; returns the warnings."""
    import pdoc
    import pdoc.render

    pdoc.render.configure(docformat="markdown", show_source=False, search=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc(*MODULES, output_directory=directory)
    return [" ".join(str(one.message).split()) for one in caught]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder for the pages")
    arguments = parser.parse_args()
    try:
        found = build(arguments.directory)
    except ImportError as error:
        print(f"{parser.prog}: error: {error}; pip install 'moe-gpu[dev]'", file=sys.stderr)
        return 1
    for line in found:
        print(f"{parser.prog}: warning: {line}", file=sys.stderr)
    print(f"pages: {arguments.directory / 'index.html'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
