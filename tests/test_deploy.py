"""The files under deploy/: each passes the linter of its kind, and does what it says as far as that can be seen here.

Their schedulers are not here: SLURM's commands are stand-ins that start the tasks of a job on this machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
import yaml

from scope_opd.config import load_config

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
SCRIPTS = sorted([*DEPLOY.glob("slurm/*.sbatch"), *DEPLOY.glob("**/*.sh")])
BATCH = sorted(DEPLOY.glob("slurm/*.sbatch"))
MANIFESTS = sorted(DEPLOY.glob("kubernetes/*.yaml"))
PAPER = ROOT / "configs" / "paper" / "deepseek_r1_distill_qwen_1_5b.toml"


def named(path: Path) -> str:
    return path.name


def documents() -> list[dict[str, Any]]:
    return [each for path in MANIFESTS for each in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in documents() if each["kind"] == kind}


@pytest.mark.parametrize("path", SCRIPTS, ids=named)
def test_scripts_pass_shellcheck(path: Path) -> None:
    linter = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or "shellcheck"
    done = subprocess.run([linter, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


SBATCH = {
    "job-name": r"[\w-]+", "nodes": r"\d+", "ntasks-per-node": r"\d+", "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+", "time": r"(\d+-)?\d+:\d\d:\d\d", "signal": r"(B:|R:)?[A-Z]+(@\d+)?", "requeue": None,
    "open-mode": "append|truncate", "output": r"[\w%./-]+",
}  # fmt: skip
"""Options of sbatch that are used, and what their values look like."""


@pytest.mark.parametrize("path", BATCH, ids=named)
def test_sbatch_reads_every_directive(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    code = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    components = 1
    for number, line in enumerate(lines):
        if not line.startswith("#SBATCH"):
            continue
        assert number < code, f"sbatch stops reading at line {code + 1}; {line!r} stands below"
        if line == "#SBATCH hetjob":
            components += 1
            continue
        option, _, value = line.removeprefix("#SBATCH --").partition("=")
        pattern = SBATCH[option]
        assert re.fullmatch(pattern, value) if pattern else not value, line
    assert components == (2 if path.stem == "paper" else 1)


# --- SLURM, run with stand-ins ---------------------------------------------------------------------------------------

STAND_INS = {
    "scontrol": 'printf "%s\\n" ${3//,/ }',
    "curl": "exit 0",
    # Starts the tasks of a step, hands SIGTERM on to them, and ends with the worst of their exit codes.
    "srun": """
        group=0
        while [[ $1 == --* ]]; do case $1 in --het-group=*) group=${1#*=} ;; esac; shift; done
        if [[ $group == 1 ]]; then nodes=(c) each=4; else nodes=(${NODES//,/ }) each=$EACH; fi
        pids=() number=0 worst=0
        trap 'kill -TERM "${pids[@]}"' TERM
        for node in "${nodes[@]}"; do for ((k = 0; k < each; k++)); do
          SLURM_PROCID=$number SLURM_LOCALID=$k SLURM_NTASKS=$((each * ${#nodes[@]})) NODE=$node "$@" &
          pids+=($!) number=$((number + 1))
        done; done
        for pid in "${pids[@]}"; do
          code=0; wait "$pid" || code=$?
          while kill -0 "$pid" 2> /dev/null; do code=0; wait "$pid" || code=$?; done
          ((code > worst)) && worst=$code
        done
        exit $worst""",
    "scope": """
        key=${SCOPE_TEACHER_KEY+set}
        seen="$1|$SLURM_PROCID|$NODE|${CUDA_VISIBLE_DEVICES-}|${RANK-}|${LOCAL_RANK-}|${WORLD_SIZE-}|${MASTER_ADDR-}"
        (IFS=$'\\t'; echo "$seen|$key|$*") >> "$LOG"
        if [[ $1 == serve ]]; then exec sleep 60; fi
        if [[ -n ${LONG-} ]]; then sleep 30 & trap "kill $!; exit 143" TERM; wait; fi""",
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job whose commands are stand-ins."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in STAND_INS.items():
        path = commands / name
        path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        path.chmod(0o755)
    keys = tmp_path / "keys"
    keys.write_text("SCOPE_TEACHER_KEY=secret-of-the-teacher\nSCOPE_SAMPLER_KEY=secret-of-the-samplers\n")
    return {
        "PATH": f"{commands}:/usr/bin:/bin", "HOME": str(tmp_path), "LOG": str(tmp_path / "log"), "NODES": "a,b",
        "EACH": "8", "SCOPE_KEYS": str(keys), "SLURM_JOB_NODELIST_HET_GROUP_0": "a,b",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "c",
    }  # fmt: skip


def start(script: str, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(DEPLOY / "slurm" / script), *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output; whatever still runs of the job is a failure, and is killed."""
    try:
        output, _ = process.communicate(timeout=30)
        assert left_of(process.pid) == []
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def left_of(session: int) -> list[str]:
    """Processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = path.read_text().rpartition(") ")
            state, _, _, own = rest.split()[:4]
            if int(own) == session and state not in "ZX":
                found.append(name)
    return found


def calls(environment: dict[str, str]) -> list[dict[str, Any]]:
    names = ("command", "task", "node", "gpu", "rank", "local", "world", "leader", "key", "arguments")
    found = [
        dict(zip(names, line.split("|"), strict=True))
        for line in Path(environment["LOG"]).read_text(encoding="utf-8").splitlines()
    ]
    return [call | {"arguments": call["arguments"].split("\t")} for call in found]


class TestThePapersJob:
    def test_every_server_is_where_the_config_says_and_every_rank_has_its_number(self, cluster: dict[str, str]) -> None:
        code, output = end(start("paper.sbatch", cluster, str(PAPER), "--set", "run.dir=/shared/runs/x"))
        assert code == 0, output
        found = calls(cluster)
        servers = [call for call in found if call["command"] == "serve"]
        ranks = [call for call in found if call["command"] == "train"]
        assert len(servers) == 20
        assert {call["rank"] for call in ranks} == {str(number) for number in range(16)}
        for call in servers:
            kind, replica = call["arguments"][1], int(call["arguments"][-1])
            config = load_config(call["arguments"][2], call["arguments"][4:-2:2])
            urls = config.teacher.base_urls if kind == "teacher" else config.rollout.base_urls
            assert len(urls) == {"teacher": 4, "student": 16}[kind]
            place, port = urlsplit(urls[replica]).hostname, urlsplit(urls[replica]).port
            gpus = {"teacher": 4, "student": 8}[kind]
            assert (place, call["gpu"], port) == (
                call["node"], str(replica % gpus), {"teacher": 8201, "student": 8101}[kind] + replica % gpus,
            )  # fmt: skip
        for call in ranks:
            assert (int(call["local"]), call["world"], call["leader"]) == (int(call["rank"]) % 8, "16", "a")
            assert call["arguments"][-1] == "--resume"
            assert load_config(call["arguments"][1], call["arguments"][3:-1:2]).run.dir == "/shared/runs/x"
        assert {call["key"] for call in found} == {"set"}
        assert "secret-of" not in output + Path(cluster["LOG"]).read_text()

    def test_a_signal_reaches_the_ranks_and_no_server_is_left(self, cluster: dict[str, str]) -> None:
        process = start("paper.sbatch", cluster | {"LONG": "1"}, str(PAPER))
        log, until = Path(cluster["LOG"]), time.monotonic() + 20
        while not log.exists() or log.read_text().count("train|") < 16:
            assert time.monotonic() < until, "the ranks were not started"
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        code, output = end(process)
        assert code == 143, output


def test_on_one_node_scope_launch_does_it_all(cluster: dict[str, str]) -> None:
    code, output = end(
        start("one_node.sbatch", cluster | {"NODES": "a", "EACH": "1"}, "run.toml", "--set", "run.seed=1")
    )
    assert code == 0, output
    assert [call["arguments"] for call in calls(cluster)] == [
        ["launch", "run.toml", "--set", "run.seed=1", "--resume"],
    ]


# --- Ray -------------------------------------------------------------------------------------------------------------


def test_the_ray_cluster_is_what_rays_schema_and_its_own_checks_ask_for() -> None:
    path = DEPLOY / "ray" / "cluster.yaml"
    spec = find_spec("ray")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    schema = Path(spec.submodule_search_locations[0]) / "autoscaler" / "ray-schema.json"
    cluster = yaml.safe_load(path.read_text(encoding="utf-8"))
    jsonschema.validate(cluster, json.loads(schema.read_text(encoding="utf-8")))
    check = (
        "import sys, yaml; from ray.autoscaler._private.util import prepare_config, validate_config\n"
        "validate_config(prepare_config(yaml.safe_load(open(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check, str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for line in (
        *cluster["head_start_ray_commands"],
        *cluster["worker_start_ray_commands"],
        *cluster["setup_commands"],
    ):
        assert subprocess.run(["bash", "-n", "-c", line], check=False).returncode == 0, line


def test_what_is_submitted_to_ray_is_the_command_that_was_meant(tmp_path: Path) -> None:
    tool = tmp_path / "ray"
    tool.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    tool.chmod(0o755)
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "run.toml").touch()
    done = subprocess.run(
        [DEPLOY / "ray" / "submit.sh", folder / "run.toml", "--set", "run.dir=x y"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert "--runtime-env" not in done.stdout  # nothing of the environment travels with the job
    shell = done.stdout.splitlines()[-1]
    assert shell.startswith("cd ")
    words = subprocess.run(
        ["bash", "-c", shell.replace("exec scope", "printf '%s\\n' \"$PWD\"")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert words[0] == str(folder)
    assert words[1:7] == ["train", "run.toml", "--launcher", "ray", "--address", "auto"]
    assert words[-1] == "run.dir=x y"
    load_config(None, [value for option, value in pairwise(words) if option == "--set"])


# --- Kubernetes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MANIFESTS, ids=named)
def test_manifests_have_no_field_that_kubernetes_does_not_know(path: Path) -> None:
    for each in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        kubernetes_validate.validate(each, "1.31", strict=True)
        kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)


def pods() -> dict[str, dict[str, Any]]:
    return {
        each["metadata"]["name"]: each["spec"]["template"]
        for each in documents()
        if each["kind"] in ("StatefulSet", "Job")
    }


class TestTheManifestsAgree:
    def test_the_config_names_every_server_and_no_other(self) -> None:
        config = load_config(DEPLOY / "kubernetes" / "run.toml")
        services = of_kind("Service")
        for name, urls in (("teacher", config.teacher.base_urls), ("sampler", config.rollout.base_urls)):
            group = of_kind("StatefulSet")[name]
            port = services[name]["spec"]["ports"][0]["port"]
            assert group["spec"]["serviceName"] == name
            assert urls == [f"http://{name}-{k}.{name}:{port}/v1" for k in range(group["spec"]["replicas"])]
            kind = "teacher" if name == "teacher" else "student"
            command = pods()[name]["spec"]["containers"][0]["command"]
            assert command == ["scope", "serve", kind, "/config/run.toml", "--replica", "$(REPLICA)"]

    def test_services_and_policies_select_pods_that_are_there(self) -> None:
        labels = {name: pod["metadata"]["labels"]["app"] for name, pod in pods().items()}
        for name, service in of_kind("Service").items():
            assert service["spec"]["selector"] == {"app": labels[name]}
            assert service["spec"]["clusterIP"] == "None"
        policy = of_kind("NetworkPolicy")["scope-servers"]["spec"]
        assert policy["podSelector"]["matchExpressions"][0]["values"] == [labels["teacher"], labels["sampler"]]
        assert policy["ingress"][0]["from"] == [{"podSelector": {"matchLabels": {"app": labels["trainer"]}}}]

    def test_the_ranks_find_one_another(self) -> None:
        job = of_kind("Job")["trainer"]["spec"]
        command = job["template"]["spec"]["containers"][0]["command"]
        assert job["completions"] == job["parallelism"] == 2
        assert "--nnodes=2" in command
        assert f"--master-addr=trainer-0.{job['template']['spec']['subdomain']}" in command
        assert command[-2:] == ["/config/run.toml", "--resume"]
        gpus = job["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        assert f"--nproc-per-node={gpus}" in command
        compile(job["template"]["spec"]["initContainers"][0]["command"][2], "wait-for-servers", "exec")

    def test_keys_come_from_the_secret_and_are_nowhere_else(self) -> None:
        config = load_config(DEPLOY / "kubernetes" / "run.toml")
        wanted = {"teacher": {config.teacher.api_key_env}, "sampler": {config.rollout.api_key_env}}
        wanted["trainer"] = wanted["teacher"] | wanted["sampler"]
        for name, pod in pods().items():
            given = {each["name"]: each for each in pod["spec"]["containers"][0]["env"]}
            keys = {variable for variable in given if "KEY" in variable}
            assert keys == wanted[name]
            for variable in keys:
                assert given[variable]["valueFrom"]["secretKeyRef"]["name"] == "scope-keys"
            assert pod["spec"]["automountServiceAccountToken"] is False
