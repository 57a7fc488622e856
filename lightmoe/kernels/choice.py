"""Which kernels a launch runs, said before anything is started."""

from __future__ import annotations

from lightmoe.errors import MachineError
from lightmoe.kernels.library import FOLDER, REMEDY, architecture_for, read_manifest

_REFERENCE_DTYPE = "float32"


def choose_kernels(dtype: str, compute_capability: tuple[int, int]) -> str:
    """The kernels of a GPU by name, and why: liblight_ops for 16 bits, else the reference.

    MachineError where liblight_ops is needed and was not built, or not for this card.
    """
    if dtype == _REFERENCE_DTYPE:
        return "reference (float32)"
    major, minor = compute_capability
    manifest = read_manifest(FOLDER)
    otherwise = f"or take --dtype {_REFERENCE_DTYPE} or --device cpu"
    if manifest is None:
        raise MachineError(
            f"{dtype} on a GPU needs liblight_ops, which is not built in {FOLDER};"
            f" build it: {REMEDY}, {otherwise}"
        )
    architecture = architecture_for(10 * major + minor, manifest.kernels)
    if architecture is None:
        built = ", ".join(sorted(manifest.kernels)) or "none"
        raise MachineError(
            f"liblight_ops in {FOLDER} has no kernels for sm_{major}{minor} (built: {built});"
            f" build them: {REMEDY} ARCHS={major}{minor}, {otherwise}"
        )
    return f"liblight_ops sm_{architecture} ({dtype})"
