"""Builds liblight_ops: kernels with NVRTC, the C++ library and its binding with the C++ compiler.

Needs no CUDA toolkit and no GPU. Compiled programs are kept under their hash in `--cache`, so only
what changed is compiled again; `--out` then holds exactly what was asked for.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import instances
import nvrtc
import toolchain
from instances import FOLDER, Program

CHECKOUT = FOLDER.parent
INTERFACE = (FOLDER / "light_ops.h").read_text(encoding="utf-8")
BYTES_PER_JOB = 1536 << 20  # a CuTe program's compilation takes about 1.2 GB
COMMON_OPTIONS = (
    "-std=c++17",
    "--device-as-default-execution-space",
    "--diag-suppress=64,1055",  # CuTe's anonymous structs
)
HOST_OPTIONS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
HOPPER = 90
_ARCHITECTURE = re.compile(r"(\d{2,3})(ptx)?")
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """`75` is machine code for sm_75, `75ptx` the PTX of compute_75, for newer cards too."""

    number: int
    as_ptx: bool

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """Read `75` or `75ptx`; raises ValueError with the remedy."""
        found = _ARCHITECTURE.fullmatch(text)
        if found is None:
            raise ValueError(f"architecture {text!r} is unknown; give such as 75, 90 or 75ptx")
        return cls(int(found[1]), found[2] is not None)

    @property
    def folder(self) -> str:
        """The folder of its programs."""
        return f"{self.number}ptx" if self.as_ptx else str(self.number)

    @property
    def suffix(self) -> str:
        """The suffix of its programs' files."""
        return ".ptx" if self.as_ptx else ".cubin"

    @property
    def option(self) -> str:
        """NVRTC's name of it."""
        # Hopper's warpgroup instructions are of sm_90a, which no later card runs.
        exact = "a" if self.number == HOPPER else ""
        return f"--gpu-architecture={'compute' if self.as_ptx else 'sm'}_{self.number}{exact}"


@dataclasses.dataclass(frozen=True)
class Job:
    """One program for one architecture, and where its result is kept."""

    program: Program
    architecture: Architecture
    options: tuple[str, ...]
    library: Path
    cached: Path  # without suffix

    @property
    def image(self) -> Path:
        """The compiled file in the cache."""
        return self.cached.with_suffix(self.architecture.suffix)

    @property
    def record(self) -> Path:
        """What ptxas said of it; written last, so it says that the image is whole."""
        return self.cached.with_suffix(".json")


def main() -> int:
    """Build what the command line asks for; 1 where something does not compile."""
    arguments = parse_arguments()
    try:
        build(arguments)
    except (nvrtc.CompileError, toolchain.ToolchainError, ValueError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--arch", default="native", help="75,80,86,89,90,75ptx or native")
    parser.add_argument("--instances", default="", help="regular expression over program names")
    parser.add_argument("--one-per-stem", action="store_true", help="the first instance of each")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "lightmoe/kernels/lib")
    parser.add_argument("--cache", type=Path, default=CHECKOUT / "build/kernels")
    parser.add_argument("--toolchain", type=Path, default=CHECKOUT / "build/toolchain")
    parser.add_argument("--jobs", type=int, default=default_jobs())
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--kernels-only", action="store_true", help="no library, no binding")
    only.add_argument("--host-only", action="store_true", help="no kernels")
    return parser.parse_args()


def default_jobs() -> int:
    """As many compilations at once as there are cores and memory for."""
    pages, page_bytes = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), pages * page_bytes // BYTES_PER_JOB))


def build(arguments: argparse.Namespace) -> None:
    """Build what was asked for into `--out`."""
    tools = toolchain.find(arguments.toolchain)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.host_only:
        build_kernels(arguments, tools)
    if not arguments.kernels_only:
        build_host(arguments.out, tools)


def build_kernels(arguments: argparse.Namespace, tools: toolchain.Toolchain) -> None:
    """Compile the programs for the architectures, and write the manifest."""
    architectures = parse_architectures(arguments.arch)
    jobs = [
        make_job(program, architecture, tools, arguments.cache)
        for architecture in architectures
        for program in select(architecture.number, arguments.instances, arguments.one_per_stem)
    ]
    if not jobs:
        raise ValueError(f"no instance matches {arguments.instances!r}")
    arguments.cache.mkdir(parents=True, exist_ok=True)
    compile_all([job for job in jobs if not job.record.exists()], arguments.jobs)
    assemble(jobs, arguments.out)


def parse_architectures(text: str) -> list[Architecture]:
    """The architectures of a comma-separated list; `native` stands for those of the cards here."""
    names = [name for part in text.split(",") for name in (cards() if part == "native" else [part])]
    if not names:
        raise ValueError("no NVIDIA card here; say what to build for: --arch 75,90")
    return [Architecture.parse(name) for name in dict.fromkeys(names)]


def cards() -> list[str]:
    """Architectures for the cards present, as nvidia-smi tells; others are named and left out."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    capabilities = done.stdout.split() if done.returncode == 0 else []
    nearest = {
        capability: instances.nearest(int(capability.replace(".", "")))
        for capability in capabilities
    }
    for capability, architecture in sorted(nearest.items()):
        if architecture is None:
            print(f"no kernels for cards of compute capability {capability}: left out")
    return sorted({str(architecture) for architecture in nearest.values() if architecture})


def select(architecture: int, pattern: str, one_per_stem: bool) -> list[Program]:
    """The programs asked for."""
    programs = [p for p in instances.programs(architecture) if re.search(pattern, p.name)]
    if one_per_stem:
        first: dict[str, Program] = {}
        for program in programs:
            first.setdefault(program.stem, program)
        return list(first.values())
    return programs


def make_job(
    program: Program, architecture: Architecture, tools: toolchain.Toolchain, cache: Path
) -> Job:
    """The job of a program: its options, and the hash of everything that its result depends on."""
    defines = [f"-D{name}={value}" for name, value in program.defines.items()]
    options = [architecture.option, *COMMON_OPTIONS, *program.options, *defines]
    if not architecture.as_ptx:
        options.append("--ptxas-options=-v")
    folders = [f"-I{folder}" for folder in (FOLDER, *tools.includes)]
    found = fingerprint(program.source, options)
    cached = cache / f"{program.name}-{architecture.folder}-{found}"
    nvrtc_library = tools.nvrtc(architecture.number)
    return Job(program, architecture, (*options, *folders), nvrtc_library, cached)


def fingerprint(source: Path, options: Sequence[str]) -> str:
    """A hash of the compiler, its options, the source and its headers, but of no folder's name."""
    settings = [option for option in options if not option.startswith("-I")]
    wheels = (*toolchain.WHEELS, *toolchain.HOPPER_WHEELS)
    digest = hashlib.sha256(" ".join([*wheels, *settings]).encode())
    for path in sources(source):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def sources(path: Path) -> list[Path]:
    """A source and the headers of this folder that it includes, directly or not."""
    found: dict[Path, None] = {}
    waiting = [path]
    while waiting:
        current = waiting.pop()
        if current in found or not current.exists():
            continue
        found[current] = None
        names = _INCLUDE.findall(current.read_text(encoding="utf-8"))
        waiting += [folder / name for name in names for folder in (current.parent, FOLDER)]
    return list(found)


def compile_all(jobs: list[Job], num_processes: int) -> None:
    """Compile the jobs in processes of their own; raises the first error once all are done."""
    if not jobs:
        return
    start, failures = time.monotonic(), list[BaseException]()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_processes, context) as pool:
        futures = {pool.submit(compile_one, job): job for job in jobs}
        for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
            job = futures[future]
            what = f"{job.program.name} for {job.architecture.folder}"
            if (error := future.exception()) is not None:
                failures.append(error)
                print(f"[{number}/{len(jobs)}] {what} failed", flush=True)
            else:
                print(f"[{number}/{len(jobs)}] {what} {future.result():.1f} s", flush=True)
    print(f"compiled {len(jobs) - len(failures)} programs in {time.monotonic() - start:.0f} s")
    if failures:
        raise failures[0]


def compile_one(job: Job) -> float:
    """Compile one program into the cache; returns the seconds it took."""
    start = time.monotonic()
    compiled = nvrtc.compile_program(
        job.library, job.program.source, list(job.options), as_ptx=job.architecture.as_ptx
    )
    if not job.cached.name.endswith(fingerprint(job.program.source, job.options)):
        raise nvrtc.CompileError(f"{job.program.source.name} changed meanwhile; build again")
    job.image.write_bytes(compiled.image)
    job.record.write_text(json.dumps([dataclasses.asdict(usage) for usage in compiled.usages]))
    return time.monotonic() - start


def assemble(jobs: list[Job], out: Path) -> None:
    """Make `out` hold the programs of these jobs and no others, and say in the manifest what."""
    architectures: dict[str, list[dict[str, object]]] = {}
    for job in jobs:
        folder = out / job.architecture.folder
        if job.architecture.folder not in architectures:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        shutil.copyfile(job.image, folder / f"{job.program.name}{job.architecture.suffix}")
        entries = architectures.setdefault(job.architecture.folder, [])
        entries += describe(job)
    for folder in out.iterdir():
        if _ARCHITECTURE.fullmatch(folder.name) and folder.name not in architectures:
            shutil.rmtree(folder)
    found = re.search(r"LIGHT_OPS_ABI (\d+)", INTERFACE)
    assert found is not None, "light_ops.h says its version"
    manifest = {
        "abi": int(found[1]),
        "compiler": toolchain.WHEELS[1],
        "architectures": architectures,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))
    print(f"{len(jobs)} programs for {', '.join(architectures)} in {out}")


def describe(job: Job) -> list[dict[str, object]]:
    """The manifest's entries of a program: one for each of its kernels; PTX has no figures yet."""
    program = job.program
    common = {"program": program.name, "stem": program.stem, "threads": program.threads}
    if job.architecture.as_ptx:
        kernels = re.findall(r"\.entry (\w+)\(", job.image.read_text())
        return [{"name": kernel, **common} for kernel in kernels]
    usages = json.loads(job.record.read_text())
    return [{"name": usage.pop("kernel"), **common, **usage} for usage in usages]


def build_host(out: Path, tools: toolchain.Toolchain) -> None:
    """Compile liblight_ops.so and, for this Python, its binding; both into `out`."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise ValueError(f"no C++ compiler {compiler!r}; install one: apt-get install g++")
    host_sources = sorted(map(str, (FOLDER / "host").glob("*.cpp")))
    library = out / "liblight_ops.so"
    run([compiler, *HOST_OPTIONS, "-shared", "-Wl,--no-undefined", f"-I{FOLDER}", *host_sources,
         "-o", str(library), "-ldl", "-pthread"])  # fmt: skip
    binding = out / f"_light_ops{sysconfig.get_config_var('EXT_SUFFIX')}"
    python = sysconfig.get_paths()["include"]
    run([compiler, *HOST_OPTIONS, "-shared", f"-I{FOLDER}", f"-isystem{tools.pybind11}",
         f"-isystem{python}", str(FOLDER / "binding.cpp"), "-o", str(binding), f"-L{out}",
         "-llight_ops", "-Wl,-rpath,$ORIGIN"])  # fmt: skip
    print(f"{library.name} and {binding.name} in {out}")


def run(command: list[str]) -> None:
    """Run the C++ compiler; raises with its first complaint."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed:\n{done.stderr}")


if __name__ == "__main__":
    sys.exit(main())
