"""Where the corpus comes from: the packages, in order, and the files that count in each of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One permissively licensed package: its name, its folder in site-packages, its licence."""

    name: str
    folder: str
    licence: str


STDLIB = Source("cpython", "", "PSF-2.0")
HELD_OUT_PACKAGE = "networkx"  # never trained on, not one file of it

# The order decides which of two near duplicates is kept: the first.
SOURCES: tuple[Source, ...] = (
    Source("networkx", "networkx", "BSD-3-Clause"),
    Source("flask", "flask", "BSD-3-Clause"),
    Source("requests", "requests", "Apache-2.0"),
    Source("urllib3", "urllib3", "MIT"),
    Source("click", "click", "BSD-3-Clause"),
    Source("werkzeug", "werkzeug", "BSD-3-Clause"),
    Source("jinja2", "jinja2", "BSD-3-Clause"),
    Source("starlette", "starlette", "BSD-3-Clause"),
    Source("rich", "rich", "MIT"),
    Source("typer", "typer", "MIT"),
    Source("pytest", "_pytest", "MIT"),
    Source("pyparsing", "pyparsing", "MIT"),
    Source("black", "black", "MIT"),
    Source("mypy", "mypy", "MIT"),
    Source("pydantic", "pydantic", "MIT"),
    Source("aiohttp", "aiohttp", "Apache-2.0"),
    Source("tornado", "tornado", "Apache-2.0"),
    Source("celery", "celery", "BSD-3-Clause"),
    Source("ipython", "IPython", "BSD-3-Clause"),
    Source("mpmath", "mpmath", "BSD-3-Clause"),
    Source("numpy", "numpy", "BSD-3-Clause"),
    Source("scipy", "scipy", "BSD-3-Clause"),
    Source("pandas", "pandas", "BSD-3-Clause"),
    Source("scikit-learn", "sklearn", "BSD-3-Clause"),
    Source("scikit-image", "skimage", "BSD-3-Clause"),
    Source("statsmodels", "statsmodels", "BSD-3-Clause"),
    Source("sympy", "sympy", "BSD-3-Clause"),
    Source("matplotlib", "matplotlib", "PSF-based"),
    Source("django", "django", "BSD-3-Clause"),
    Source("sqlalchemy", "sqlalchemy", "MIT"),
    Source("twisted", "twisted", "MIT"),
    Source("sphinx", "sphinx", "BSD-2-Clause"),
    Source("nltk", "nltk", "Apache-2.0"),
    Source("spacy", "spacy", "MIT"),
    Source("xarray", "xarray", "Apache-2.0"),
    Source("dask", "dask", "BSD-3-Clause"),
    Source("distributed", "distributed", "BSD-3-Clause"),
    Source("numba", "numba", "BSD-2-Clause"),
    Source("astropy", "astropy", "BSD-3-Clause"),
    Source("fonttools", "fontTools", "MIT"),
    Source("kivy", "kivy", "MIT"),
    Source("bokeh", "bokeh", "BSD-3-Clause"),
    Source("wagtail", "wagtail", "BSD-3-Clause"),
    Source("cirq-core", "cirq", "Apache-2.0"),
    Source("qiskit", "qiskit", "Apache-2.0"),
    Source("sktime", "sktime", "BSD-3-Clause"),
    Source("streamlit", "streamlit", "Apache-2.0"),
    Source("jax", "jax", "Apache-2.0"),
    Source("keras", "keras", "Apache-2.0"),
    Source("torch", "torch", "BSD-3-Clause"),
    Source("transformers", "transformers", "Apache-2.0"),
    Source("ray", "ray", "Apache-2.0"),
    Source("mlflow", "mlflow", "Apache-2.0"),
    Source("vllm", "vllm", "Apache-2.0"),
    Source("nova", "nova", "Apache-2.0"),
    Source("cinder", "cinder", "Apache-2.0"),
    Source("neutron", "neutron", "Apache-2.0"),
)

# Copies of other projects, tables, and packages that an environment put into the library folder.
SKIPPED_FOLDERS = frozenset(
    (
        *("_vendor", "vendor", "vendored", "extern", "externals", "third_party", "thirdparty"),
        *("thirdparty_files", "site-packages", "lib2to3", "encodings", "cjkencodings", "locale"),
        *("migrations", "idlelib", "__pycache__"),
    )
)


def python_files(root: Path) -> Iterator[str]:
    """Relative paths of the .py files under root, sorted, without the skipped folders."""
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name.lower() not in SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py"):
                yield os.path.relpath(os.path.join(folder, name), root)


def find_jobs(site: list[Path], stdlib: list[Path]) -> Iterator[tuple[str, str, str]]:
    """(source, root, path) of every candidate file; the library of the newest Python first."""
    for root in stdlib:
        for path in python_files(root):
            yield STDLIB.name, str(root), path
    for source in SOURCES:
        homes = [folder for folder in site if (folder / source.folder).is_dir()]
        if not homes:
            raise FileNotFoundError(f"package {source.name}: no folder {source.folder} in --site")
        for path in python_files(homes[0] / source.folder):
            yield source.name, str(homes[0]), f"{source.folder}/{path}"


def version_of(source: Source, site: list[Path]) -> str:
    """The installed version, from the package's .dist-info folder."""
    wanted = source.name.replace("-", "_").lower()
    for folder in site:
        for info in sorted(folder.glob("*.dist-info")):
            name, _, version = info.name.removesuffix(".dist-info").partition("-")
            if name.replace("-", "_").lower() == wanted:
                return version.partition("+")[0]
    raise FileNotFoundError(f"package {source.name}: no .dist-info folder in --site")
