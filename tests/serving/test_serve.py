"""Laws of ``scope serve`` with real vLLM: what the config says is what answers, and nothing of it stays behind."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_server import PYTHON, READY_S, free_port

from scope_opd.cli.main import main
from scope_opd.teacher.local import LocalTeacher
from scope_opd.types import Rollout
from scope_opd.zoo import model_path
from scope_opd.zoo.task import load_rows
from scope_opd.zoo.tokenizer import build_tokenizer
from teacher_kit import teacher_of

pytestmark = [pytest.mark.serving, pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="no SCOPE_VLLM_PYTHON")]

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"SCOPE_SAMPLER_KEY": "sk-of-the-sampler-123456", "SCOPE_TEACHER_KEY": "sk-of-the-teacher-123456"}
TEMPERATURE = 0.6


class Served:
    """Both servers of configs/vllm_cpu.toml: the teacher by ``scope serve``, the student by what ``--print`` prints."""

    def __init__(self, folder: Path) -> None:
        self.ports = {"teacher": free_port(), "student": free_port()}
        self.models = folder / "zoo"
        assert main(["zoo", "copy", str(self.models), "--head-dim", "32"]) == 0
        self._sets = ["--set", f"serving.python={PYTHON}", "--set", f"run.dir={folder / 'run'}"]
        self._sets += ["--set", f"model.path={self.models / 'student'}"]
        for kind, table in (("teacher", "teacher"), ("student", "rollout")):
            self._sets += ["--set", f'{table}.base_urls="http://127.0.0.1:{self.ports[kind]}/v1"']
        self.environment = {**os.environ, **KEYS}
        self.log = (folder / "student.log").open("w+")
        printed = subprocess.run(
            self.command("student", "--print"), env=self.environment, capture_output=True, text=True, check=True
        )
        assert not any(key in printed.stdout + printed.stderr for key in KEYS.values())
        self.student = subprocess.Popen(
            ["sh", "-c", printed.stdout], env=self.environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        self.teacher = subprocess.Popen(
            self.command("teacher", "--temperature", str(TEMPERATURE)), env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.said: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def command(self, kind: str, *more: str) -> list[str]:
        config = str(ROOT / "configs" / "vllm_cpu.toml")
        return [sys.executable, "-m", "scope_opd", "serve", kind, config, *self._sets, *more]

    def _read(self) -> None:
        assert self.teacher.stdout is not None
        for line in self.teacher.stdout:
            self.said.append(line)
            self._lines.put(line)

    def wait(self) -> Served:
        end = time.monotonic() + READY_S
        while not self._lines.get(timeout=max(0.1, end - time.monotonic())).startswith("ready: "):
            assert self.teacher.poll() is None, self.said[-20:]
        while time.monotonic() < end:
            assert self.student.poll() is None, (self.log.seek(0), self.log.read()[-3000:])
            try:
                if httpx.get(f"http://127.0.0.1:{self.ports['student']}/health").status_code == 200:
                    return self
            except httpx.HTTPError:
                time.sleep(0.5)
        raise AssertionError("the student's server did not get ready")

    def close(self) -> None:
        self.teacher.terminate()
        try:
            self.teacher.wait(60)
        finally:
            self.teacher.kill()
            if members(self.student.pid):
                os.killpg(self.student.pid, signal.SIGKILL)
            self.student.wait()
            assert self.teacher.stdout is not None
            self.teacher.stdout.close()
            self.log.close()


def members(group: int) -> list[int]:
    """Living processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    both = Served(tmp_path_factory.mktemp("serve"))
    try:
        yield both.wait()
    finally:
        both.close()


def test_each_server_answers_to_its_name_and_its_key_alone(served: Served) -> None:
    sampler, teacher = KEYS.values()
    for kind, right, wrong in (("student", sampler, teacher), ("teacher", teacher, sampler)):
        models = f"http://127.0.0.1:{served.ports[kind]}/v1/models"
        for key in (None, wrong):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            assert httpx.get(models, headers=headers).status_code == 401
        (model,) = httpx.get(models, headers={"Authorization": f"Bearer {right}"}).json()["data"]
        assert (model["id"], model["max_model_len"]) == (f"zoo-{kind}", 129)
    asleep = {
        kind: httpx.get(f"http://127.0.0.1:{port}/is_sleeping").status_code for kind, port in served.ports.items()
    }
    assert asleep == {"student": 200, "teacher": 404}


def test_the_copy_at_a_temperature_scores_as_the_teacher_in_process_does_there(served: Served) -> None:
    tokenizer = build_tokenizer()
    rollouts = []
    for number, row in enumerate(load_rows("heldout")[:24]):
        prompt = tokenizer(row["problem"], add_special_tokens=False)["input_ids"]
        answer = [3 + (7 * number + 5 * place) % 50 for place in range(40)]
        rollouts.append(Rollout(f"r{number}", f"g{number}", prompt, answer, [0.0] * 40, finish_reason="length"))
    model = AutoModelForCausalLM.from_pretrained(model_path("teacher")).eval()
    expected = asyncio.run(LocalTeacher(model, temperature=TEMPERATURE).score(rollouts))
    url = f"http://127.0.0.1:{served.ports['teacher']}/v1"
    with teacher_of(url, key=KEYS["SCOPE_TEACHER_KEY"], model="zoo-teacher", client={"start_s": 60.0}) as teacher:
        found = asyncio.run(teacher.score(rollouts))
    gaps = [
        abs(a - b)
        for one, other in zip(found, expected, strict=True)
        for a, b in zip(one.logprobs or [], other.logprobs or [], strict=True)
    ]
    print(f"\n{len(gaps)} tokens at temperature {TEMPERATURE}, largest difference {max(gaps):.2g}")
    assert len(gaps) == 24 * 40
    assert max(gaps) <= 1e-4


def test_sampled_log_probs_are_those_at_the_sampling_temperature(served: Served) -> None:
    model = AutoModelForCausalLM.from_pretrained(served.models / "student").eval()
    prompt = [2, 5, 9, 12]
    answer = httpx.post(
        f"http://127.0.0.1:{served.ports['student']}/v1/completions",
        headers={"Authorization": f"Bearer {KEYS['SCOPE_SAMPLER_KEY']}"},
        json={"model": "zoo-student", "prompt": prompt, "max_tokens": 12, "temperature": TEMPERATURE, "seed": 1,
              "logprobs": 0, "return_token_ids": True, "ignore_eos": True},
        timeout=120,
    ).json()["choices"][0]  # fmt: skip
    ids = [*prompt, *answer["token_ids"]]
    with torch.no_grad():
        rows = (model(torch.tensor([ids])).logits[0].double() / TEMPERATURE).log_softmax(-1)
    expected = [float(rows[place - 1, ids[place]]) for place in range(len(prompt), len(ids))]
    assert answer["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)


def test_a_port_that_is_taken_is_one_line(served: Served) -> None:
    answer = subprocess.run(
        served.command("student"), env=served.environment, capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 2
    assert answer.stderr.splitlines()[-1].startswith(f"error: http://127.0.0.1:{served.ports['student']}/v1: the port")


def test_ctrl_c_leaves_nothing_and_no_key_was_shown(served: Served) -> None:
    (ready,) = [line for line in served.said if line.startswith("ready: ")]
    group = int(ready.partition("(process ")[2].split(")")[0])
    assert len(members(group)) >= 2
    served.teacher.send_signal(signal.SIGINT)
    assert served.teacher.wait(60) == 0
    assert members(group) == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{served.ports['teacher']}/health")
    served.log.seek(0)
    assert not any(key in "".join(served.said) + served.log.read() for key in KEYS.values())
