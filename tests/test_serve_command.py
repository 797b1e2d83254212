"""Laws of ``scope serve``: the command line follows from the config, the key is never in it, nothing is left behind.

Real servers are started in tests/serving/test_serve.py. The stand-in here does what a real one cannot be made to do in
a test: die with a message, ignore SIGTERM, take for ever.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scope_opd.cli.main import main
from scope_opd.cli.serve_command import describe
from scope_opd.config import Config, load_config
from scope_opd.errors import ConfigError
from scope_opd.serving.guarded import GRACE_S
from scope_opd.serving.launch import INSIDE, Launch, Served, chunk_tokens, plan_launch, root_cause
from tiny import save_pair

KEY = "sk-of-the-serve-tests-123"
STUDENT = ['rollout.base_urls=["http://127.0.0.1:8101/v1"]', "rollout.model=student"]
TEACHER = ['teacher.base_urls=["http://127.0.0.1:8102/v1", "http://localhost:8103"]', "teacher.model=teacher"]


def configured(*more: str) -> Config:
    return load_config(None, [*STUDENT, *TEACHER, *more])


def planned(kind: Any, *more: str, served: Served | None = None, on_cpu: bool = False, **options: Any) -> Launch:
    options = {"shell": {}, "cores": 3, **options}
    return plan_launch(configured(*more), kind, served or Served("m"), python="py", on_cpu=on_cpu, **options)


def option(launch: Launch, name: str) -> str:
    return launch.argv[launch.argv.index(name) + 1]


class TestFlags:
    def test_a_teacher_gives_as_many_likeliest_tokens_as_the_objective_asks_for(self) -> None:
        asked = ("objective.distill=topk_reverse_kl", "objective.topk=100")
        assert option(planned("teacher", *asked), "--max-logprobs") == "100"
        assert option(planned("student", *asked), "--max-logprobs") == "64"
        assert option(planned("teacher", "objective.topk=100"), "--max-logprobs") == "64"
        assert option(planned("teacher", *asked, "serving.teacher.max_logprobs=200"), "--max-logprobs") == "200"

    def test_a_teacher_bounds_its_chunks_and_serves_no_development_routes(self) -> None:
        launch = planned("teacher", served=Served("m", vocabulary=151_936))
        assert launch.argv[:3] == ("py", "-m", "vllm.entrypoints.openai.api_server")
        assert (option(launch, "--served-model-name"), option(launch, "--host"), option(launch, "--port")) == (
            "teacher", "127.0.0.1", "8102",
        )  # fmt: skip
        assert option(launch, "--max-num-batched-tokens") == "1152"
        assert "--enable-chunked-prefill" in launch.argv
        assert option(launch, "--generation-config") == "vllm"
        assert launch.env["VLLM_SERVER_DEV_MODE"] == "0"
        assert launch.env["PYTHONPATH"] == launch.env["VLLM_API_KEY"] == ""
        assert "--worker-extension-cls" not in launch.argv
        assert "--tensor-parallel-size" not in launch.argv

    def test_a_student_takes_new_weights_and_gives_the_log_probs_that_sampled(self) -> None:
        launch = planned("student")
        assert option(launch, "--logprobs-mode") == "processed_logprobs"
        assert option(launch, "--worker-extension-cls") == "scope_vllm.WeightReload"
        assert launch.env["VLLM_SERVER_DEV_MODE"] == "1"
        assert launch.env["PYTHONPATH"] == str(INSIDE)
        assert json.loads(option(launch, "--weight-transfer-config")) == {"backend": "scope"}
        assert "--enable-sleep-mode" not in launch.argv
        assert "--enable-sleep-mode" in planned("student", "rollout.sync=ipc", "rollout.colocated=true").argv

    def test_the_extension_is_where_the_servers_python_looks(self) -> None:
        extension = (INSIDE / "scope_vllm.py").read_text()
        assert "class WeightReload" in extension
        assert 'register_engine("scope"' in extension

    def test_settings_become_options_and_extra_ones_come_last(self) -> None:
        launch = planned(
            "teacher", "serving.teacher.max_num_seqs=32", "serving.teacher.gpu_memory_utilization=0.5",
            "serving.teacher.tensor_parallel_size=2", "serving.teacher.enforce_eager=true",
            "serving.teacher.dtype=bfloat16", "serving.teacher.max_num_batched_tokens=512",
            'serving.teacher.extra_args=["--seed", "7"]',
            served=Served("m", revision="abc", tokenizer="tok", trust_remote_code=True),
        )  # fmt: skip
        expected = {
            "--max-num-seqs": "32", "--gpu-memory-utilization": "0.5", "--tensor-parallel-size": "2",
            "--dtype": "bfloat16", "--max-num-batched-tokens": "512", "--revision": "abc", "--tokenizer": "tok",
        }  # fmt: skip
        assert {name: option(launch, name) for name in expected} == expected
        assert "--enforce-eager" in launch.argv
        assert "--trust-remote-code" in launch.argv
        assert launch.argv[-2:] == ("--seed", "7")

    def test_the_context_holds_prompt_response_and_one_more_as_far_as_the_model_can(self) -> None:
        lengths = ["data.max_prompt_tokens=100", "rollout.max_tokens=50", "eval.max_tokens=80"]
        assert option(planned("teacher", *lengths), "--max-model-len") == "151"
        assert option(planned("student", *lengths), "--max-model-len") == "181"
        assert option(planned("student", *lengths, served=Served("m", context=128)), "--max-model-len") == "128"
        more = [*lengths, "serving.student.max_model_len=4096"]
        assert option(planned("student", *more, served=Served("m", context=128)), "--max-model-len") == "4096"

    @pytest.mark.parametrize("vocabulary", [64, 32_000, 151_936, 262_144, None])
    def test_a_chunks_prompt_log_probs_fit_a_gibibyte(self, vocabulary: int | None) -> None:
        tokens = chunk_tokens(vocabulary)
        assert 256 <= tokens <= 8192
        assert 6 * tokens * (vocabulary or 262_144) <= 2**30
        assert chunk_tokens(10_000_000) == 256
        assert chunk_tokens(262_144, max_num_seqs=1024) == 1024  # vLLM refuses less than a token a sequence

    def test_a_model_that_says_its_sizes_is_read(self, tmp_path: Path) -> None:
        folder = save_pair(tmp_path / "m", context=128)
        served = describe(configured(f"teacher.path={folder}"), "teacher")
        assert (served.model, served.vocabulary, served.context) == (str(folder), 320, 128)
        values = json.loads((folder / "config.json").read_text())
        values["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0}
        (folder / "config.json").write_text(json.dumps(values))
        assert describe(configured(f"teacher.path={folder}"), "teacher").context is None
        assert Path(describe(configured(), "student").model).name == "student"


class TestEnvironment:
    def test_a_cpu_build_gets_what_it_needs_unless_the_shell_or_the_config_says_otherwise(self) -> None:
        assert planned("teacher", on_cpu=True).env["VLLM_CPU_KVCACHE_SPACE"] == "1"
        assert planned("teacher", on_cpu=True).env["OMP_NUM_THREADS"] == "3"
        assert not any(name.startswith("VLLM_CPU") for name in planned("teacher").env)
        shell = {"VLLM_CPU_KVCACHE_SPACE": "8"}
        assert "VLLM_CPU_KVCACHE_SPACE" not in planned("teacher", on_cpu=True, shell=shell).env
        given = 'serving.env={ VLLM_CPU_KVCACHE_SPACE = "4" }'
        assert planned("teacher", given, on_cpu=True, shell=shell).env["VLLM_CPU_KVCACHE_SPACE"] == "4"

    def test_a_folder_is_served_without_asking_the_hub(self, tmp_path: Path) -> None:
        assert planned("teacher", served=Served(str(tmp_path))).env["HF_HUB_OFFLINE"] == "1"
        assert "HF_HUB_OFFLINE" not in planned("teacher", served=Served("Qwen/Qwen3-8B")).env

    def test_modules_of_the_config_come_behind_the_extension(self) -> None:
        launch = planned("student", 'serving.env={ PYTHONPATH = "/x" }')
        assert launch.env["PYTHONPATH"] == f"{INSIDE}:/x"


class TestAddresses:
    def test_replicas_and_routes_are_chosen_by_number_and_name(self) -> None:
        assert (planned("teacher", replica=1).host, planned("teacher", replica=1).port) == ("localhost", 8103)
        routes = ["teacher.route_by=source", 'teacher.routes.math.base_urls="http://[::1]:9000/v1"',
                  "teacher.routes.math.model=maths", "teacher.routes.math.api_key_env=MATH_KEY"]  # fmt: skip
        launch = planned("teacher", *routes, route="math")
        assert (launch.host, launch.port, launch.model, launch.key_env) == ("::1", 9000, "maths", "MATH_KEY")
        with pytest.raises(ConfigError, match="no such route; expected one of: math"):
            planned("teacher", *routes, route="code")

    @pytest.mark.parametrize(
        ("kind", "more", "options", "message"),
        [
            ("teacher", ["teacher.base_urls=[]", "teacher.model=x"], {}, r"teacher\.base_urls is empty"),
            ("teacher", [], {"replica": 2}, r"--replica 2: teacher\.base_urls has 2; expected 0 to 1"),
            ("teacher", [], {"replica": -1}, "--replica -1"),
            ("student", [], {"route": "math"}, "--route math for the student"),
            ("teacher", ['teacher.base_urls="http://h:1/pool/v1"'], {}, "under /v1 alone.*proxy"),
            ("teacher", ['teacher.base_urls="https://h/v1"'], {}, "speaks http.*proxy"),
            ("student", ['rollout.base_urls="http://10.0.0.5:1/v1"'], {}, "development routes.*allow_unprotected"),
            ("teacher", ['serving.env={VLLM_API_KEY = "sk-x"}'], {}, "sets VLLM_API_KEY.*api_key_env"),
            ("student", ['serving.env={VLLM_SERVER_DEV_MODE = "0"}'], {}, "'1' for a student"),
            ("teacher", ['serving.teacher.extra_args=["--api-key=sk-hidden-123456"]'], {}, "has --api-key;"),
            ("teacher", ['serving.teacher.extra_args=["--api_key", "sk-hidden-123456"]'], {}, "has --api-key;"),
            ("teacher", ['serving.teacher.extra_args=["--port", "1"]'], {}, "has --port;"),
        ],
    )
    def test_what_cannot_be_served_is_one_line(
        self, kind: str, more: list[str], options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message) as error:
            planned(kind, *more, **options)
        assert "sk-" not in str(error.value)

    def test_other_machines_may_reach_what_the_user_lets_them(self) -> None:
        more = ['rollout.base_urls="http://10.0.0.5:1/v1"', "rollout.allow_unprotected_routes=true"]
        assert "anybody who reaches it" in planned("student", *more).warnings[0]
        assert planned("student", *more, "rollout.api_key_env=K").warnings == ()
        assert planned("teacher", 'teacher.base_urls="http://10.0.0.5:1/v1"', "teacher.api_key_env=K").warnings == ()
        with pytest.raises(ConfigError, match="development routes"):
            planned("teacher", 'teacher.base_urls="http://10.0.0.5:1/v1"', 'serving.env={VLLM_SERVER_DEV_MODE = "1"}')


class TestPrint:
    @pytest.fixture
    def recorder(self, tmp_path: Path) -> Path:
        """An interpreter that writes down how it was called."""
        file = tmp_path / "py thon"
        file.write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            "print(json.dumps({'argv': sys.argv[1:], 'env': dict(os.environ)}))\n"
        )
        file.chmod(0o755)
        return file

    @pytest.mark.parametrize("source", ["api_key_env", "api_key_file", None])
    def test_what_is_printed_runs_in_a_shell_as_it_would_be_started(
        self, source: str | None, recorder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MY_KEY", KEY)
        monkeypatch.setenv("VLLM_API_KEY", "of-another-server")
        (tmp_path / "it's a key").write_text(f"{KEY}\n")
        value = {"api_key_env": "MY_KEY", "api_key_file": f'"{tmp_path}/it\'s a key"'}.get(source or "")
        more = [f"rollout.{source}={value}"] if source else []
        launch = plan_launch(
            configured(*more, 'serving.student.extra_args=["--name", "a b $HOME"]'), "student", Served("m"),
            python=str(recorder), on_cpu=True, shell={}, cores=2,
        )  # fmt: skip
        assert KEY not in launch.shell()
        assert KEY not in shlex.join(launch.argv)
        assert KEY not in launch.env.values()
        answer = subprocess.run(["sh", "-c", launch.shell()], capture_output=True, text=True, check=True)
        called = json.loads(answer.stdout)
        assert called["argv"] == list(launch.argv[1:])
        assert called["env"]["VLLM_API_KEY"] == (KEY if source else "")
        assert {name: called["env"][name] for name in launch.env if name != "VLLM_API_KEY"} == {
            name: value for name, value in launch.env.items() if name != "VLLM_API_KEY"
        }

    def test_it_needs_no_vllm_and_no_key(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "my.toml").write_text("")
        sets = [word for text in [*STUDENT, "rollout.api_key_env=NOT_SET"] for word in ("--set", text)]
        assert main(["serve", "student", "my.toml", "--print", *sets, "--set", "serving.python=/no/python"]) == 0
        captured = capsys.readouterr()
        assert 'VLLM_API_KEY="$NOT_SET"' in captured.out
        assert "warning: serving.python = '/no/python': no such program" in captured.err
        assert [entry.name for entry in tmp_path.iterdir()] == ["my.toml"]


class TestTemperature:
    def run(self, folder: Path, *more: str) -> int:
        (folder / "my.toml").write_text("")
        sets = [*TEACHER, f"run.dir={folder / 'runs' / 'a'}", "serving.python=/no/python"]
        words = [word for text in sets for word in ("--set", text)]
        return main(["serve", "teacher", str(folder / "my.toml"), "--print", *words, *more])

    def test_a_copy_is_made_and_served_and_the_config_is_compared(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(tmp_path, "--temperature", "0.6") == 0
        captured = capsys.readouterr()
        (copy,) = (tmp_path / "runs" / "served").iterdir()
        assert f"--model {copy}" in captured.out
        assert "the copy is served at 0.6; expected the same" in captured.err
        assert "set teacher.served_temperature = 0.6" in captured.err
        weights = load_file(copy / "model.safetensors")["model.norm.weight"]
        zoo = Path(describe(configured(), "teacher").model)
        assert torch.equal(weights, (load_file(zoo / "model.safetensors")["model.norm.weight"].double() / 0.6).float())

        assert self.run(tmp_path, "--temperature", "0.6", "--set", "teacher.served_temperature=0.6") == 0
        captured = capsys.readouterr()
        assert "found the copy" in captured.err
        assert "as the config says" in captured.err
        other = ["--temperature", "0.6", "--copy-dir", str(tmp_path / "mine")]
        assert self.run(tmp_path, *other) == 0
        assert f"--model {tmp_path / 'mine'}" in capsys.readouterr().out
        assert self.run(tmp_path, "--set", f"teacher.path={copy}", "--set", "teacher.served_temperature=0.6") == 0
        assert "served at temperature" not in capsys.readouterr().err

    def test_a_config_that_expects_a_copy_and_gets_none_is_told(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(tmp_path, "--set", "teacher.served_temperature=0.6") == 0
        assert "zoo:teacher is served at temperature 1; expected the same" in capsys.readouterr().err

    def test_options_that_mean_nothing_are_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(tmp_path, "--copy-dir", "x") == 2
        assert self.run(tmp_path, "--temperature", "0") == 2
        assert main(["serve", "student", str(tmp_path / "my.toml"), "--temperature", "0.6"]) == 2
        assert main(["serve", "sampler", str(tmp_path / "my.toml")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert sum(line.startswith("error: ") for line in lines) == 4


STAND_IN = """
import http.server, os, signal, subprocess, sys, time

def arguments(name):
    return sys.argv[sys.argv.index(name) + 1]

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass

mode = os.environ["STAND_IN"]
print("my key is", os.environ.get("VLLM_API_KEY"), flush=True)
command = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]
child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
with open(os.environ["PIDS"], "w") as stream:
    stream.write(f"{os.getpid()} {child.pid}")
if mode == "dies":
    raise RuntimeError(f"no room for the cache, by the way the key is {os.environ['VLLM_API_KEY']}")
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode in ("slow", "stubborn"):
    time.sleep(600)
if mode == "waits":  # as vLLM does for clients whose answers will not come
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
server = http.server.HTTPServer((arguments("--host"), int(arguments("--port"))), Handler)
if mode == "leaves":
    for _ in range(2):
        server.handle_request()
    sys.exit(3)
server.serve_forever()
"""


class Serving:
    """``scope serve teacher`` in a process of its own, with the stand-in for vLLM."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pids, self.started = folder, folder / "pids", []
        module = folder / "modules" / "vllm" / "entrypoints" / "openai"
        module.mkdir(parents=True)
        for package in (module, module.parent, module.parent.parent):
            (package / "__init__.py").write_text("")
        (module / "api_server.py").write_text(STAND_IN)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]

    def start(self, mode: str, *more: str) -> subprocess.Popen[str]:
        (self.folder / "my.toml").write_text(
            f'[teacher]\nbase_urls = "http://127.0.0.1:{self.port}/v1"\nmodel = "t"\napi_key_env = "MY_KEY"\n'
            f'[serving]\npython = "{sys.executable}"\n[serving.env]\nPYTHONPATH = "{self.folder / "modules"}"\n'
            f'STAND_IN = "{mode}"\nPIDS = "{self.pids}"\n'
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "scope_opd", "serve", "teacher", str(self.folder / "my.toml"), *more],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "MY_KEY": KEY},
        )  # fmt: skip
        self.started.append(process)
        return process

    def wait_for_pids(self) -> list[int]:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if self.pids.exists() and len(found := self.pids.read_text().split()) == 2:
                return [int(pid) for pid in found]
            time.sleep(0.05)
        raise AssertionError("the stand-in did not start")

    def gone(self) -> bool:
        return all(not alive(int(pid)) for pid in self.pids.read_text().split())

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()
        for pid in self.pids.read_text().split() if self.pids.exists() else []:
            if alive(int(pid)):
                os.kill(int(pid), signal.SIGKILL)


def alive(pid: int) -> bool:
    """A zombie that nobody reaps is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    made = Serving(tmp_path)
    try:
        yield made
    finally:
        made.close()


class TestProcess:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_signal_ends_the_server_and_all_its_processes(self, number: signal.Signals, serving: Serving) -> None:
        process = serving.start("serves")
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"ready: t at http://127.0.0.1:{serving.port}/v1")
        process.send_signal(number)
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0
        assert serving.gone()
        assert "my key is ***" in log
        assert KEY not in log

    def test_a_signal_before_it_is_ready_ends_it_too(self, serving: Serving) -> None:
        process = serving.start("slow")
        serving.wait_for_pids()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
        assert serving.gone()

    def test_a_second_signal_does_not_wait_for_a_server_that_ignores_the_first(self, serving: Serving) -> None:
        process = serving.start("stubborn")
        serving.wait_for_pids()
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert time.monotonic() - begin < 12
        assert serving.gone()

    def test_a_server_that_dies_is_one_line_with_its_reason_and_without_its_key(self, serving: Serving) -> None:
        process = serving.start("dies")
        out, log = process.communicate(timeout=60)
        assert process.returncode == 1
        (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
        assert "ended before it was ready (exit code 1): RuntimeError: no room for the cache" in line
        assert KEY not in out + log
        assert serving.gone()

    def test_a_server_that_leaves_later_ends_the_command(self, serving: Serving) -> None:
        process = serving.start("leaves")
        assert process.stdout is not None
        process.stdout.readline()
        with socket.create_connection(("127.0.0.1", serving.port)) as client:
            client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        _, log = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "ended by itself (exit code 3)" in log
        assert serving.gone()

    def test_one_that_is_never_ready_is_given_up(self, serving: Serving) -> None:
        process = serving.start("slow", "--set", "serving.start_timeout_s=1")
        _, log = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "not ready after 1 s" in log
        assert serving.gone()

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a service of the Linux kernel")
    def test_a_killed_command_takes_its_server_with_it(self, serving: Serving) -> None:
        process = serving.start("serves")
        assert process.stdout is not None
        process.stdout.readline()
        server, _ = serving.wait_for_pids()
        process.kill()
        process.communicate()
        end = time.monotonic() + 20
        while alive(server) and time.monotonic() < end:
            time.sleep(0.05)
        assert not alive(server)

    def test_a_killed_command_takes_a_server_with_it_that_waits_for_its_clients(self, serving: Serving) -> None:
        process = serving.start("waits")
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        process.communicate()
        end = time.monotonic() + GRACE_S + 20
        while not serving.gone() and time.monotonic() < end:
            time.sleep(0.05)
        assert serving.gone()

    def test_a_port_in_use_is_one_line_and_starts_nothing(self, serving: Serving) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", serving.port))
            listener.listen()
            _, log = serving.start("serves").communicate(timeout=60)
        assert "error: http://127.0.0.1" in log
        assert "the port is in use" in log
        assert not serving.pids.exists()

    def test_an_address_of_another_machine_is_one_line(self, serving: Serving) -> None:
        process = serving.start("serves", "--set", 'teacher.base_urls="http://192.0.2.1:8000/v1"')
        _, log = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "start it on the machine that has this address" in log

    def test_a_python_without_vllm_is_one_line(self, serving: Serving) -> None:
        process = serving.start("serves", "--set", 'serving.env={ STAND_IN = "serves" }')
        _, log = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "has no vLLM; expected an environment with vLLM; set serving.python" in log

    def test_a_key_that_is_not_there_is_one_line(self, serving: Serving) -> None:
        _, log = serving.start("serves", "--set", "teacher.api_key_env=NOT_SET_ANYWHERE").communicate(timeout=60)
        assert "teacher.api_key_env = 'NOT_SET_ANYWHERE': the variable is not set" in log
        assert not serving.pids.exists()


def test_the_cause_is_the_first_error_of_the_log_and_the_last() -> None:
    log = [
        "(EngineCore pid=1) Traceback (most recent call last):",
        "(EngineCore pid=1) ValueError: 12 heads",
        "INFO: nothing",
        "RuntimeError: Engine core initialization failed.",
        "later",
    ]
    assert (
        root_cause(log)
        == "(EngineCore pid=1) ValueError: 12 heads ... RuntimeError: Engine core initialization failed."
    )
    assert root_cause(["one", "two", "three", "four"]) == "two ... three ... four"
    assert root_cause(
        ["pydantic_core.ValidationError: 1 validation error for X", "  Value error, too few", "more"]
    ) == ("pydantic_core.ValidationError: 1 validation error for X Value error, too few")
    assert root_cause([]) == ""
    assert len(root_cause(["ValueError: " + "x" * 1000])) <= 400
