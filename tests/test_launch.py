"""The wiring: what every `auto` becomes and why, and what is refused before anything starts."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

from lightmoe import launch
from lightmoe.config import LaunchConfig
from lightmoe.errors import CheckpointError, LightMoEError, MachineError, UsageError
from lightmoe.kernels import choice, library
from lightmoe.launch import listen, start_engine
from lightmoe.machine import Driver, Gpu
from lightmoe.worker import devices, fit
from lightmoe.worker.config import WorkerConfig
from lightmoe.worker.resolve import Resolved, kernels_for, resolve
from tests.models.folders import write_config, write_model

GIB = 1 << 30
NO_GPU = Driver()
BROKEN = Driver(error="Driver/library version mismatch")
TURING = Driver(
    version="535.183.01",
    gpus=(
        Gpu(
            name="RTX 2080 Ti",
            compute_capability=(7, 5),
            memory_bytes=11 * GIB,
            free_bytes=11 * GIB,
        ),
    )
    * 10,
)
H100 = Driver(
    version="580.65.06",
    gpus=(Gpu(name="H100", compute_capability=(9, 0), memory_bytes=80 * GIB, free_bytes=80 * GIB),),
)
LOSSY: dict[str, object] = {"overflow": "redirect", "deterministic": "off"}


def config(**values: object) -> LaunchConfig:
    return LaunchConfig(**{"model": "mixtral-lite", "gpus": 1} | values)


@pytest.fixture
def torch_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this torch could use the cards of the driver."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "read_cupy", lambda: ("cupy-cuda13x 14.2.0",))


@pytest.mark.usefixtures("torch_with_cuda")
@pytest.mark.parametrize(
    ("driver", "values", "device", "dtype", "transport", "reason"),
    [
        (NO_GPU, {}, "cpu", "float32", "local", "no GPU found"),
        (NO_GPU, {"gpus": 10}, "cpu", "float32", "gloo", "no GPU found"),
        (NO_GPU, {"device": "cpu"}, "cpu", "float32", "local", "the CPU was asked for"),
        (NO_GPU, {"dtype": "bfloat16"}, "cpu", "bfloat16", "local", "no GPU found"),
        (BROKEN, {}, "cpu", "float32", "local", "version mismatch"),
        (TURING, {}, "cuda", "float16", "local", "one rank on RTX 2080 Ti"),
        (TURING, {"dtype": "float32"}, "cuda", "float32", "local", "RTX 2080 Ti"),
        (TURING, {"device": "cpu"}, "cpu", "float32", "local", "asked for"),
        (
            TURING,
            {"gpus": 10},
            "cuda",
            "float16",
            "copy_engine",
            "10 ranks on 10 GPUs, the first RTX",
        ),
        (
            TURING,
            {"gpus": 3, "device": "cuda"},
            "cuda",
            "float16",
            "copy_engine",
            "3 ranks on 3 GPUs",
        ),
        (TURING, {"gpus": 3, "address": "auto"}, "cuda", "float16", "nccl", "3 ranks on 3 GPUs"),
        (TURING, {"gpus": 11}, "cpu", "float32", "gloo", "10 GPU(s) found for 11 ranks"),
        (TURING, {"gpus": 4, "transport": "nccl"}, "cuda", "float16", "nccl", "4 ranks"),
        (TURING, {"gpus": 4} | LOSSY, "cuda", "float16", "nccl", "4 ranks"),
        (H100, {"gpus": 10}, "cpu", "float32", "gloo", "1 GPU(s) found for 10 ranks"),
        (
            H100,
            {"gpus": 10, "oversubscribe": True},
            "cuda",
            "bfloat16",
            "copy_engine",
            "10 ranks on H100",
        ),
        (H100, {"gpus": 1, "oversubscribe": True}, "cuda", "bfloat16", "local", "one rank on H100"),
        (H100, {}, "cuda", "bfloat16", "local", "one rank on H100"),
        (H100, {"device": "cuda", "dtype": "float16"}, "cuda", "float16", "local", "H100"),
        (H100, {"transport": "local"}, "cuda", "bfloat16", "local", "H100"),
        (NO_GPU, {"gpus": 2, "transport": "gloo"}, "cpu", "float32", "gloo", "no GPU found"),
    ],
)
def test_auto_becomes_what_the_machine_has(
    driver: Driver,
    values: dict[str, object],
    device: str,
    dtype: str,
    transport: str,
    reason: str,
) -> None:
    resolved = resolve(config(**values), driver)

    assert (resolved.device, resolved.dtype, resolved.transport) == (device, dtype, transport)
    assert reason in resolved.reason


@pytest.mark.usefixtures("torch_with_cuda")
@pytest.mark.parametrize(
    ("driver", "values", "error", "message"),
    [
        (NO_GPU, {"device": "cuda"}, MachineError, "no GPU found; .*--device cpu"),
        (BROKEN, {"device": "cuda"}, MachineError, "does not answer .*version mismatch"),
        (
            H100,
            {"device": "cuda", "gpus": 10},
            UsageError,
            r"1 GPU\(s\) found for 10 ranks; use --gpus 1, or --oversubscribe",
        ),
        (NO_GPU, {"device": "cuda", "gpus": 10}, MachineError, "no GPU found; .*--device cpu"),
        (NO_GPU, {"oversubscribe": True, "gpus": 10}, MachineError, "no GPU found"),
        (TURING, {"gpus": 2, "transport": "gloo"}, UsageError, "gloo does not fit 2 ranks on GPUs"),
        (NO_GPU, {"gpus": 2, "transport": "nccl"}, UsageError, r"nccl .* CPU \(no GPU found\)"),
        (TURING, {"dtype": "bfloat16"}, UsageError, "2080 Ti has no bfloat16; use --dtype float16"),
        (NO_GPU, {"transport": "gloo"}, UsageError, "transport gloo does not fit one rank"),
        (
            TURING,
            {"gpus": 2, "transport": "copy_engine"} | LOSSY,
            UsageError,
            "overflow redirect, which waits for the host .*; take auto or nccl",
        ),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(
    driver: Driver, values: dict[str, object], error: type[LightMoEError], message: str
) -> None:
    with pytest.raises(error, match=message):
        resolve(config(**values), driver)


@pytest.mark.usefixtures("torch_with_cuda")
def test_without_cupy_several_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "read_cupy", tuple)

    resolved = resolve(config(gpus=2), TURING)
    assert (resolved.device, resolved.transport) == ("cpu", "gloo")
    assert resolved.reason == "10 GPU(s) found, but no cupy for the exchange between them"
    with pytest.raises(MachineError, match=r"install lightmoe\[cuda12\]"):
        resolve(config(gpus=2, device="cuda"), TURING)
    assert resolve(config(gpus=1), TURING).device == "cuda"


def test_a_torch_that_cannot_use_the_card_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert "cannot use the GPU under driver 580" in resolve(config(), H100).reason
    with pytest.raises(MachineError, match=r"torch .* under driver 580"):
        resolve(config(device="cuda"), H100)


def built(folder: Path, *architectures: str) -> Path:
    """A folder as `make kernels` leaves it, as far as the manifest goes."""
    kernels = {name: [{"name": "grouped_gemm"}] for name in architectures}
    content = {"abi": library.ABI, "architectures": kernels}
    (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("device", "dtype", "driver", "said"),
    [
        ("cpu", "float32", NO_GPU, "reference (the CPU)"),
        ("cpu", "bfloat16", H100, "reference (the CPU)"),
        ("cuda", "float32", H100, "reference (float32)"),
        ("cuda", "bfloat16", H100, "liblight_ops sm_90 (bfloat16)"),
        ("cuda", "float16", TURING, "liblight_ops sm_75 (float16)"),
    ],
)
def test_kernels_follow_from_device_and_dtype(
    device: str,
    dtype: str,
    driver: Driver,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "FOLDER", built(tmp_path, "75", "75ptx", "90"))

    resolved = Resolved(device=device, dtype=dtype, transport="local", reason="")
    assert kernels_for(resolved, driver) == said


@pytest.mark.parametrize(
    ("architectures", "driver", "dtype", "said"),
    [
        (None, H100, "bfloat16", "bfloat16 on a GPU needs liblight_ops, which is not built in"),
        (("75", "75ptx", "80"), H100, "bfloat16", "no kernels for sm_90 (built: 75, 75ptx, 80)"),
        (("80", "90"), TURING, "float16", "no kernels for sm_75 (built: 80, 90)"),
        ((), TURING, "float16", "no kernels for sm_75 (built: none)"),
    ],
)
@pytest.mark.usefixtures("no_ranks", "torch_with_cuda")
def test_missing_kernels_are_said_before_anything_starts(
    architectures: tuple[str, ...] | None,
    driver: Driver,
    dtype: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "read_driver", lambda: driver)
    folder = tmp_path if architectures is None else built(tmp_path, *architectures)
    monkeypatch.setattr(choice, "FOLDER", folder)

    message = refused({"device": "cuda", "dtype": dtype})

    assert message.startswith("MachineError: ")
    assert said in message
    assert "make kernels" in message
    assert "--dtype float32" in message


@pytest.mark.parametrize(
    ("capability", "built", "taken"),
    [
        ((9, 0), {"75", "80", "90"}, "90"),
        ((8, 9), {"80", "86", "90"}, "86"),
        ((8, 0), {"86", "89"}, None),
        ((12, 0), {"75", "90", "120"}, "120"),
        ((9, 0), {"75ptx"}, None),
    ],
)
def test_a_card_runs_the_newest_kernels_of_its_own_generation(
    capability: tuple[int, int], built: set[str], taken: str | None
) -> None:
    major, minor = capability

    assert library.architecture_for(10 * major + minor, built) == taken


def test_listen_takes_any_free_port() -> None:
    with listen("127.0.0.1", 0) as one, listen("127.0.0.1", 0) as other:
        assert one.getsockname()[0] == "127.0.0.1"
        assert one.getsockname()[1] != other.getsockname()[1] > 0


def test_a_port_in_use_names_port_and_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = rf"port {port} of 127\.0\.0\.1 .*process {os.getpid()}\).*give another --port"
        with pytest.raises(MachineError, match=message):
            listen("127.0.0.1", port)


def test_a_port_that_another_launch_has_reserved_is_in_use() -> None:
    with listen("127.0.0.1", 0) as reserved:
        port = reserved.getsockname()[1]
        with pytest.raises(MachineError, match=rf"port {port} of 127\.0\.0\.1 cannot be used"):
            listen("127.0.0.1", port)


def test_a_host_that_is_not_here_is_refused() -> None:
    with pytest.raises(MachineError, match=r"cannot listen on 192\.0\.2\.200 .* --host"):
        listen("192.0.2.200", 8000)


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be started by what follows."""

    def start(*_: object) -> None:
        pytest.fail("ranks were started")

    monkeypatch.setattr(launch, "RayWorkerGroup", start)


def test_ranks_are_told_who_is_near_whom(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkout: Path
) -> None:
    told = []

    def start(worker_config: WorkerConfig, *_: object) -> None:
        told.append(worker_config.nearness)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "RayWorkerGroup", start)
    text = (checkout / "topology" / "cpu-10.toml").read_text()
    machine, _ = text.split("[[fabrics]]")
    below = "".join(
        f'[nodes.socket{one}]\nkind = "socket"\nparent = "machine"\nlink = "memory"\n'
        for one in range(2)
    )
    halves = machine.replace('"machine", link', '"socket0", link', 4)
    halves = halves.replace('"machine", link', '"socket1", link')
    (tmp_path / "halves.toml").write_text(halves + below)
    for topology in ("auto", "cpu-10", str(tmp_path / "halves.toml")):
        with pytest.raises(KeyboardInterrupt):
            start_engine(config(gpus=6, topology=topology), lambda stage, done, total: None)
    assert told == [(), (), ((0, 0, 0, 0, 4, 4),)]


def refused(values: dict[str, object]) -> str:
    with pytest.raises(LightMoEError) as raised:
        start_engine(config(**values), lambda stage, done, total: None)
    assert "\n" not in str(raised.value)
    return f"{type(raised.value).__name__}: {raised.value}"


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": "no-such-model"}, "ModelNotFoundError: no model named 'no-such-model'"),
        ({"model": "mixtral-8x7b"}, "--load-format dummy"),
        ({"max_model_len": 4096}, "UsageError: --max-model-len 4096 is over the 2048 positions"),
        ({"memory_limit": "1MiB"}, "a rank may use 1.0 MiB"),
        ({"memory_limit": "64MiB", "max_model_len": 2048}, None),
        ({"gpus": 10, "device": "cuda"}, "MachineError: no GPU found; see `lightmoe doctor`"),
    ],
)
def test_what_cannot_work_is_said_before_ranks_start(
    values: dict[str, object], said: str | None
) -> None:
    if said is None:
        with pytest.raises(pytest.fail.Exception, match="ranks were started"):
            start_engine(config(**values), lambda stage, done, total: None)
    else:
        assert said in refused(values)


@pytest.mark.usefixtures("no_ranks")
def test_too_little_free_memory_for_so_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "free_ram_bytes", lambda: 2 * GIB)

    assert "2.0 GiB of memory are free, 10 ranks need 3.7 GiB" in refused({"gpus": 10})

    monkeypatch.setattr(fit, "free_ram_bytes", lambda: None)
    assert "does not tell its free memory; give --memory-limit" in refused({"gpus": 10})


@pytest.mark.usefixtures("no_ranks")
def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, checkout: Path) -> None:
    folder = write_model(tmp_path / "small")
    shutil.copy(checkout / "models" / "mixtral-lite" / "tokenizer.json", folder)

    assert "tokenizer has 3072 tokens, the model 50" in refused({"model": str(folder)})


@pytest.mark.usefixtures("no_ranks")
def test_a_checkpoint_is_checked_before_ranks_start(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "small")
    write_config(folder, hidden_size=32)

    assert refused({"model": str(folder)}).startswith(f"{CheckpointError.__name__}: tensor")


@pytest.mark.usefixtures("no_ranks")
def test_a_broken_generation_config_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "small")
    (folder / "generation_config.json").write_text(json.dumps([1]), encoding="utf-8")

    assert "generation_config.json holds a list" in refused({"model": str(folder)})
