"""Ranks on two nodes of a Ray cluster that asks for a token: here two nodes of one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightmoe.config import LaunchConfig
from lightmoe.errors import UsageError
from tests.models.folders import write_model

SECOND_NODE = "127.0.0.2"

DRIVER = f"""
import json, sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from lightmoe.worker.local_group import LocalWorkerGroup
from lightmoe.worker.ray_cluster import RayConfig, hosts_of
from lightmoe.worker.ray_group import RayWorkerGroup
from tests.sockets import listening_addresses
from tests.worker.groups import new_config
from tests.worker.test_ray_group import no_progress, one_step, plain

size = dict(num_cpus=2, object_store_memory=80 << 20)
cluster = Cluster(head_node_args=dict(size, include_dashboard=False), initialize_head=True)
cluster.add_node(**size, node_ip_address="{SECOND_NODE}")
config = new_config(Path(sys.argv[1]), 3)
group = RayWorkerGroup(config, RayConfig(address=cluster.address), no_progress)
threads = LocalWorkerGroup(config)
found = dict(
    hosts=hosts_of(group._group).ranks,
    equal=plain(one_step(group)) == plain(one_step(threads)),
    listening=[sorted(listening_addresses(rank.pid)) for rank in group.ranks],
)
print(json.dumps(found))
threads.close()
group.close()
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> dict[str, object]:
    """What a driver saw in a cluster of its own."""
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("tiny")
    write_model(folder)
    (home / ".ray").mkdir()
    token = home / ".ray" / "auth_token"
    token.write_text("0123456789abcdef" * 4, encoding="utf-8")
    token.chmod(0o600)
    environment = {
        **os.environ,
        "HOME": str(home),
        "PYTHONPATH": str(checkout),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder)],
        env=environment,
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert driver.returncode == 0, driver.stderr[-3000:]
    answer: dict[str, object] = json.loads(driver.stdout.strip().splitlines()[-1])
    return answer


def test_ranks_of_two_nodes_compute_what_threads_compute(found: dict[str, object]) -> None:
    hosts = found["hosts"]
    assert isinstance(hosts, list)
    assert sorted(host == SECOND_NODE for host in hosts) in (
        [False, False, True],
        [False, True, True],
    )
    assert found["equal"] is True


def test_ranks_of_two_nodes_listen_on_their_nodes_address_only(found: dict[str, object]) -> None:
    """gloo and the store; whatever listens everywhere is Ray's own."""
    hosts, listening = found["hosts"], found["listening"]
    assert isinstance(hosts, list)
    assert isinstance(listening, list)
    for host, addresses in zip(hosts, listening, strict=True):
        others = {address for address, _ in addresses} - {"0.0.0.0", "::", host}
        assert host in {address for address, _ in addresses}
        assert not others, others


def test_sharing_gpus_is_for_one_machine() -> None:
    with pytest.raises(UsageError, match="one machine; leave out address"):
        LaunchConfig(model="m", gpus=4, oversubscribe=True, address="127.0.0.1:1")
