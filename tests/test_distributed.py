"""Ranks that agree, and ranks that do not, fail, die, hang or are told to stop: real processes, and none is left."""

import json
import signal
import time

import pytest
import torch

from poc_lora import distributed
from poc_lora.distributed import Ranks, open_ranks
from poc_lora.errors import RequestError
from tests.launch import finish, processes

SCRIPT = """
import os, sys, time, torch
from poc_lora import distributed
from poc_lora.errors import DataError, PocLoraError
distributed.POLL_SECONDS, distributed.POLLS_UNTIL_GONE, distributed.GRACE_SECONDS = 0.1, 30, 3
def work(group):
{body}
try:
    with distributed.open_ranks(torch.device('cpu')) as group:
        work(group)
except PocLoraError as problem:
    if not problem.reported_elsewhere:
        print(problem, file=sys.stderr)
    sys.exit(problem.exit_status)
"""


def run(size, body, **environment):
    lines = "\n".join("    " + line for line in body.strip("\n").split("\n"))
    return processes(size, "-c", SCRIPT.format(body=lines), **environment)


def test_alone_nothing_is_exchanged():
    alone = Ranks()
    assert alone.gather({"a": (1, 2)}) == [{"a": [1, 2]}]
    alone.require_equal({"a": 1})
    with pytest.raises(RequestError) as problem, alone.raise_on_all():
        raise RequestError("wrong")
    assert not problem.value.reported_elsewhere


def test_what_ranks_gather_comes_in_their_order_again_and_again():
    body = """
for number in range(20):
    values = group.gather([number, group.process_index])
    assert values == [[number, rank] for rank in range(3)], values
group.require_equal({"same": 1})
print("fine")
"""
    with run(3, body) as started:
        assert [(status, out) for status, out, _ in finish(started)] == 3 * [(0, "fine\n")]


def test_a_request_that_one_rank_finds_wrong_ends_all_with_one_message():
    body = """
with group.raise_on_all():
    if group.process_index == 1:
        raise DataError("no rows", where="rows.json")
"""
    with run(3, body) as started:
        ended = finish(started)
    assert [status for status, _, _ in ended] == [2, 2, 2]
    assert "process 1: no rows\n  - where: rows.json" in ended[0][2]
    assert ["no rows" in errors for _, _, errors in ended] == [True, False, False]


def test_one_mistake_made_by_all_is_told_once():
    body = """
with group.raise_on_all():
    raise DataError("no rows")
"""
    with run(2, body) as started:
        first, second = finish(started)
    assert (first[0], second[0]) == (2, 2)
    assert "no rows" in first[2]
    assert "process" not in first[2]
    assert "no rows" not in second[2]


def test_ranks_with_different_settings_are_named():
    with run(2, 'group.require_equal({"optim.lr": 1e-4 * (1 + group.process_index), "seed": 0})') as started:
        first, second = finish(started)
    assert (first[0], second[0]) == (2, 2)
    assert "optim.lr is 0.0001 in process 0, but 0.0002 in process 1" in first[2]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_rank_ends_the_others(failing):
    body = f"""
group.gather("started")
if group.process_index == {failing}:
    raise RuntimeError("the disk caught fire")
group.gather("never")
"""
    with run(3, body) as started:
        ended = finish(started, within=30)
    assert all(status != 0 for status, _, _ in ended)
    told = [errors for _, _, errors in ended if f"process {failing} failed: the disk caught fire" in errors]
    assert len(told) == 1
    assert "Traceback" in ended[failing][2]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("stuck", [False, True])
def test_a_killed_rank_is_noticed_even_by_ranks_that_are_stuck(victim, stuck):
    body = """
group.gather("started")
print("ready", flush=True)
group.heartbeat("at step 7")
if group.process_index == {} or {}:
    time.sleep(1000)
group.gather("never")
"""
    with run(2, body.format(victim, stuck)) as started:
        for process in started:
            assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)  # for a sign of life to be seen
        started[victim].kill()
        began = time.monotonic()
        _, errors = started[1 - victim].communicate(timeout=30)
    assert time.monotonic() - began < 15
    assert started[1 - victim].returncode == 1
    assert f"process {victim} failed: its process has ended" in errors
    assert "the same command again, and train with --resume" in errors


@pytest.mark.parametrize("how", ["busy", "stopped"])
def test_a_rank_that_hangs_is_named_with_what_it_did(how):
    body = """
group.gather("started")
print("ready", flush=True)
group.heartbeat("at step 7")
if group.process_index == 1:
    time.sleep(1000)
group.gather("never")
"""
    with run(2, body, POC_LORA_HANG_SECONDS="2" if how == "busy" else "60") as started:
        for process in started:
            assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        if how == "stopped":
            started[1].send_signal(signal.SIGSTOP)
        _, errors = started[0].communicate(timeout=30)
        assert started[0].returncode == 1
        assert (
            "process 1 failed: no progress: at step 7" if how == "busy" else "process 1 failed: its process has ended"
        ) in errors
        assert "at step 7" in errors
        if how == "busy":
            assert started[1].wait(timeout=30) == 1


def test_a_request_to_stop_reaches_every_rank():
    body = """
group.gather("started")
print("ready", flush=True)
while not group.stop.is_set():
    time.sleep(0.01)
group.gather("saved")
"""
    with run(3, body) as started:
        for process in started:
            assert process.stdout.readline() == "ready\n"
        started[2].send_signal(signal.SIGTERM)
        assert [status for status, _, _ in finish(started, within=30)] == [0, 0, 0]


@pytest.mark.parametrize("plugin", ["DEEPSPEED", "FSDP"])
def test_plugins_of_accelerate_are_refused_with_what_to_use_instead(monkeypatch, plugin):
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(RequestError, match=r"model\.shard"), open_ranks(torch.device("cpu")):
        pass


def test_a_machine_that_slept_is_no_dead_rank():
    signs = distributed._Heartbeats("elsewhere", 1)
    for polls in range(1, 4):
        assert signs.problem(json.dumps([polls, 1, "at step 1"])) is None
    for _ in range(distributed.POLLS_UNTIL_GONE - 1):
        assert signs.problem(json.dumps([3, 1, "at step 1"])) is None
    assert "has ended" in signs.problem(json.dumps([3, 1, "at step 1"]))
