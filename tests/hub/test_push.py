"""Uploads by the real client to a Hub on loopback, what goes wrong on the way, and adapters read from there."""

import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from poc_lora.adapters.adapter import read_adapter, write_adapter
from poc_lora.cli import app as cli
from poc_lora.errors import AdapterError, HubError, RequestError
from poc_lora.evaluation.variants import find_variants
from poc_lora.hub import push as pushing
from poc_lora.hub.push import push, summary
from poc_lora.merging.folders import merge_folders
from tests.hub.conftest import make_run, small_adapter, snapshot
from tests.hub.server import READ_TOKEN, TOKEN, Fault

CLAIMS = {f".eval_results/poc-lora-{name}.yaml" for name in "social_i_qa piqa winogrande openbookqa boolq".split()}
CLAIMS |= {f".eval_results/poc-lora-{name}.yaml" for name in "arc-challenge arc-easy hellaswag".split()}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
EXPECTED = ADAPTER | CLAIMS | {"README.md", "merge.json", "results.json", "results.md"}
EXPECTED |= {"figures/curves.svg", "figures/spectrum.png"}
COMMIT = r"/commit/"


def there(hub, revision="main", repo="me/demo"):
    return {p: c for p, c in hub.repos[repo].files(revision).items() if p != ".gitattributes"}


def test_exactly_the_allowed_files_arrive_in_one_commit_of_a_private_repository(hub, run):
    before = snapshot(run)
    done = push(run, "me/demo")
    assert set(there(hub)) == EXPECTED
    assert hub.repos["me/demo"].private
    assert done.commit == hub.repos["me/demo"].refs["main"]
    assert len(hub.repos["me/demo"].log) == 2  # the Hub's own, and ours
    assert there(hub)["adapter_model.safetensors"] == (run / "merged/adapter_model.safetensors").read_bytes()
    assert there(hub)["README.md"].decode() == done.card
    assert snapshot(run) == before


def test_all_brings_the_single_adapters_and_public_a_public_repository(hub, run):
    done = push(run, "me/demo", all=True, public=True)
    members = {f"adapters/{i:02d}/{name}" for i in range(2) for name in ADAPTER}
    assert set(there(hub)) == EXPECTED | members
    assert not hub.repos["me/demo"].private
    assert "the repository is public" in summary(done)


def test_a_single_adapter_goes_by_itself(hub, run):
    push(run / "adapters" / "01", "me/demo")
    assert set(there(hub)) == EXPECTED - {"merge.json", "figures/curves.svg", "figures/spectrum.png"}


def test_an_unchanged_push_makes_no_commit_and_says_so(hub, run):
    push(run, "me/demo", all=True)
    commits, hub.asked[:] = list(hub.repos["me/demo"].log), []
    done = push(run, "me/demo", all=True)
    assert hub.repos["me/demo"].log == commits
    assert hub.requests("POST", COMMIT) == hub.requests("PUT", "/lfs/") == 0
    assert done.commit is None
    assert "the repository has all 20 files already: no commit was made" in summary(done)


def test_only_what_changed_is_committed(hub, run):
    push(run, "me/demo")
    (run / "figures" / "curves.svg").write_text("<svg>other</svg>")
    push(run, "me/demo")
    assert hub.repos["me/demo"].written == ["figures/curves.svg"]
    assert there(hub)["figures/curves.svg"] == b"<svg>other</svg>"


def test_results_of_other_weights_do_not_stay(hub, run):
    push(run, "me/demo")
    hub.repos["me/demo"].commit(hub.repos["me/demo"].files() | {"notes.txt": b"theirs"})
    (run / "eval" / "results.json").unlink()
    done = push(run, "me/demo")
    assert set(there(hub)) == EXPECTED - CLAIMS - {"results.json", "results.md"} | {"notes.txt"}
    assert "removed: results.json, which is not part of this upload" in summary(done)


def test_a_revision_is_a_branch_made_where_missing(hub, run):
    hub.add("me/demo")
    for _ in range(2):
        push(run, "me/demo", revision="v2")
    assert there(hub) == {}
    assert set(there(hub, "v2")) == EXPECTED
    assert hub.requests("POST", COMMIT) == 1


def test_an_existing_public_repository_is_not_taken_for_a_private_one(hub, run):
    hub.add("me/demo", private=False)
    with pytest.raises(RequestError, match="public already"):
        push(run, "me/demo")
    assert there(hub) == {}


@pytest.mark.parametrize("repo_id", ["demo", "a/b/c", "me/", "me/a b", "me/x.git", "../x", "me/a--b"])
def test_a_bad_name_is_refused_before_anything_is_sent(hub, run, repo_id):
    with pytest.raises(RequestError, match="not a repository's name"):
        push(run, repo_id)
    assert hub.asked == []


@pytest.mark.parametrize("revision", ["refs/pr/1", "a" * 40, "-x", "a..b", "a b", ""])
def test_what_is_no_branch_is_refused_before_anything_is_sent(hub, run, revision):
    with pytest.raises(RequestError, match="not a branch"):
        push(run, "me/demo", revision=revision)
    assert hub.asked == []


def test_what_we_would_not_read_is_not_sent(hub, run):
    write_adapter(small_adapter(3), run / "adapters" / "02")
    weights = run / "adapters" / "02" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="not a readable safetensors"):
        push(run, "me/demo", all=True)
    assert hub.asked == []


# What goes wrong on the way


def test_a_file_that_the_repository_ignores_is_missed(hub, run):
    hub.add("me/demo", {".gitignore": b"results.md\n"})
    with pytest.raises(HubError, match=r"the commit lacks results\.md"):
        push(run, "me/demo")


def test_another_commit_in_between_is_seen_and_ours_comes_on_top(hub, run):
    repo = hub.add("me/demo")
    hub.faults = [Fault("POST", COMMIT, act=lambda: repo.commit(repo.files() | {"notes.txt": b"theirs"}))]
    done = push(run, "me/demo")
    assert hub.requests("POST", COMMIT) == 2
    assert set(there(hub)) == EXPECTED | {"notes.txt"}
    assert done.commit == repo.refs["main"]


def test_a_repository_that_never_rests_ends_in_an_error(hub, run):
    hub.faults = [Fault("POST", COMMIT, 412, times=99)]
    with pytest.raises(HubError, match="keeps changing") as problem:
        push(run, "me/demo")
    assert problem.value.exit_status == 1
    assert hub.requests("POST", COMMIT) == 1 + len(pushing.WAITS)
    assert there(hub) == {}


@pytest.mark.parametrize(
    ("status", "path"), [(500, "/repos/create"), (502, "/demo$"), (503, COMMIT), (504, COMMIT), (429, COMMIT)]
)
def test_a_passing_failure_is_tried_again(hub, run, status, path):
    method = "GET" if path == "/demo$" else "POST"
    hub.faults = [Fault(method, path, status)]
    push(run, "me/demo")
    assert set(there(hub)) == EXPECTED
    assert len(hub.repos["me/demo"].log) == 2


def test_a_large_file_that_fails_once_is_sent_again(hub, run):
    hub.faults = [Fault("PUT", "/lfs/", 500)]  # the library tries that request again itself, after a second
    push(run, "me/demo")
    assert set(there(hub)) == EXPECTED


def test_a_large_file_that_is_refused_ends_in_an_error_and_no_commit(hub, run):
    before = snapshot(run)
    hub.faults = [Fault("PUT", "/lfs/", 403, times=9, body='{"error": "quota exceeded"}')]
    with pytest.raises(RequestError, match="quota exceeded"):
        push(run, "me/demo")
    assert there(hub) == {}
    assert snapshot(run) == before


def test_a_hub_that_keeps_failing_ends_in_an_error(hub, run):
    before = snapshot(run)
    hub.faults = [Fault("POST", COMMIT, 503, times=99)]
    with pytest.raises(HubError, match=r"could not be reached, or failed: .*HTTP 503"):
        push(run, "me/demo")
    assert there(hub) == {}
    assert snapshot(run) == before
    hub.faults, hub.asked[:] = [], []
    push(run, "me/demo")
    assert hub.requests("PUT", "/lfs/") == 0  # what was sent is not sent again
    assert set(there(hub)) == EXPECTED


def test_no_attempt_follows_when_patience_has_run_out(hub, run, monkeypatch):
    monkeypatch.setattr(pushing, "PATIENCE_SECONDS", -1)
    hub.faults = [Fault("POST", COMMIT, 503, times=99)]
    with pytest.raises(HubError):
        push(run, "me/demo")
    assert hub.requests("POST", COMMIT) == 1


def test_a_commit_whose_answer_was_lost_is_found_done(hub, run, monkeypatch):
    monkeypatch.setattr(pushing, "TIMEOUT_SECONDS", 0.3)
    hub.faults = [Fault("POST", COMMIT, delay=0.6)]  # committed, but answered too late
    done = push(run, "me/demo")
    assert hub.requests("POST", COMMIT) == 1
    assert len(hub.repos["me/demo"].log) == 2
    assert done.commit == hub.repos["me/demo"].refs["main"]
    assert set(hub.repos["me/demo"].written) == EXPECTED


def test_a_commit_answered_by_an_error_is_found_done(hub, run):
    hub.faults = [Fault("POST", COMMIT, 504, after=True)]
    assert push(run, "me/demo").commit == hub.repos["me/demo"].refs["main"]
    assert set(there(hub)) == EXPECTED
    assert len(hub.repos["me/demo"].log) == 2


def test_a_hub_that_says_nothing_is_given_up(hub, run, monkeypatch):
    monkeypatch.setattr(pushing, "TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(pushing, "WAITS", (0.01,))
    hub.faults = [Fault("POST", "/repos/create", 200, times=9, delay=0.4)]
    with pytest.raises(HubError, match="timed out"):
        push(run, "me/demo")
    assert hub.requests("POST", "/repos/create") == 2


def test_a_hub_that_is_not_there_is_given_up(hub, run):
    hub.close()
    with pytest.raises(HubError, match="could not be reached"):
        push(run, "me/demo")


def test_the_library_s_settings_are_as_they_were(hub, run, capfd):
    from huggingface_hub.utils import are_progress_bars_disabled, get_session

    before = get_session().timeout, are_progress_bars_disabled()
    push(run, "me/demo")
    assert (get_session().timeout, are_progress_bars_disabled()) == before
    assert "B/s" not in capfd.readouterr().err  # no bars where there is no terminal


@pytest.mark.parametrize(
    ("token", "repo_id", "expected"),
    [
        (None, "me/demo", "no token"),
        ("hf_nobodysToken", "me/demo", "HTTP 401"),
        (READ_TOKEN, "me/demo", "this token may only read"),
        (TOKEN, "them/demo", "you may not create a repository of them"),
    ],
)
def test_who_may_not_write_is_told_how_to(hub, run, monkeypatch, token, repo_id, expected):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RequestError, match=expected) as problem:
        push(run, repo_id)
    assert "hf auth login" in str(problem.value)
    assert hub.requests("POST", COMMIT) == 0
    assert hub.repos == {}


def test_a_place_that_is_not_there_is_named(hub, run):
    hub.faults = [Fault("POST", "/repos/create", 404, body='{"error": "no such organisation"}')]
    with pytest.raises(RequestError, match=r"no such organisation \(HTTP 404\)") as problem:
        push(run, "me/demo")
    assert problem.value.where == "me/demo"


def test_metadata_that_the_hub_refuses_are_told(hub, run):
    body = '{"errors": [{"message": "license is not valid"}], "warnings": []}'
    hub.faults = [Fault("POST", "/validate-yaml", 400, body=body)]
    with pytest.raises(HubError, match="license is not valid"):
        push(run, "me/demo", licence="nonsense")
    assert there(hub) == {}


def test_a_stored_login_is_used(hub, run, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(TOKEN + "\n")
    push(run, "me/demo")
    assert set(there(hub)) == EXPECTED


# Tokens


@pytest.mark.parametrize(
    ("status", "path"),
    [
        *((s, COMMIT) for s in (400, 401, 403, 404, 412, 500)),
        (401, "/repos/create"),
        (422, "/preupload/"),
        (403, "/lfs/"),
    ],
)
def test_a_token_that_comes_back_in_an_answer_goes_no_further(hub, run, monkeypatch, caplog, status, path):
    monkeypatch.setattr(pushing, "WAITS", ())
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    method = "PUT" if path == "/lfs/" else "POST"
    hub.faults = [
        Fault(method, path, status, times=99, body='{"error": "AUTH denied"}', headers={"X-Error-Message": TOKEN})
    ]
    caplog.set_level("INFO")
    caplog.set_level("DEBUG", logger="huggingface_hub")
    with pytest.raises((RequestError, HubError)) as problem:
        push(run, "me/demo")
    error = problem.value
    told = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    assert error.__context__ is None
    assert error.__cause__ is None
    assert TOKEN not in told + caplog.text + repr(vars(error))


@pytest.mark.parametrize(
    ("own", "body"), [("of-no-usual-form-0123", "AUTH denied"), (TOKEN, "hf_anothersToken0123 denied")]
)
def test_tokens_of_any_form_or_person_are_blotted_out(hub, run, monkeypatch, own, body):
    monkeypatch.setenv("HF_TOKEN", own)
    hub.faults = [Fault("POST", "/repos/create", 403, body=json.dumps({"error": body}))]
    with pytest.raises(RequestError, match="<token> denied") as problem:
        push(run, "me/demo")
    assert not re.search("0123", str(problem.value))


def program(hub, tmp_path, *arguments, **environment):
    """Run the command line as a program, with the settings of the environment that the library reads at import."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "OMP_WAIT_POLICY": "passive",
    }
    return subprocess.run(
        [sys.executable, "-m", "poc_lora", *map(str, arguments)],
        env=plain | settings | environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )


def test_the_program_pushes_and_merges_and_its_token_is_nowhere(hub, run, tmp_path):
    """As a user does it: push two adapters, merge them from the Hub."""
    push(run / "adapters" / "00", "me/a0", revision="v0")
    hub.faults = [Fault("POST", COMMIT, 500, body='{"error": "AUTH"}')]
    loud = {"HF_HUB_VERBOSITY": "debug", "HF_DEBUG": "1", "PYTHONWARNINGS": "always"}
    pushed = program(hub, tmp_path, "push", "run/adapters/01", "me/a1", **loud)
    assert pushed.returncode == 0, pushed.stderr
    assert f"the repository: {hub.url}/me/a1\nnext: poc-lora merge me/a1" in pushed.stdout
    assert "13 files uploaded in commit" in pushed.stdout
    merged = program(hub, tmp_path, "merge", "me/a0@v0", "me/a1", "--out", "out", **loud)
    assert merged.returncode == 0, merged.stderr
    ours, theirs = read_adapter(run / "merged"), read_adapter(tmp_path / "out")
    for name, factors in ours.modules.items():
        other = theirs.modules[name]
        torch.testing.assert_close(other.B @ other.A, factors.B @ factors.A)
    sources = json.loads((tmp_path / "out" / "merge.json").read_text())["sources"]
    assert [s["hub_commit"] for s in sources] == [hub.repos["me/a0"].refs["v0"], hub.repos["me/a1"].refs["main"]]

    assert TOKEN not in pushed.stdout + pushed.stderr + merged.stdout + merged.stderr
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) > 20
    assert not [p for p in written if TOKEN.encode() in p.read_bytes()]
    assert not [path for path, content in there(hub, repo="me/a1").items() if TOKEN.encode() in content]


def test_the_traceback_of_a_failed_download_shows_no_token(hub, tmp_path):
    done = program(hub, tmp_path, "merge", "me/none@main", "--out", "out", POC_LORA_TRACEBACK="1")
    assert done.returncode == 2, done.stderr
    assert "HTTPStatusError" in done.stderr
    assert "direct cause of the following exception" in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_the_command_line_refuses_without_a_traceback(hub, run, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    monkeypatch.setattr(sys, "argv", ["poc-lora", "push", str(run), "me/demo"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert "\npoc-lora: the Hub does not let you upload: this token may only read (HTTP 403)" in "\n" + told.err
    assert READ_TOKEN not in told.out + told.err


# Dry run


def test_a_dry_run_needs_no_network_and_no_token(run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)  # and tests are offline
    before = snapshot(run)
    done = push(run, "me/demo", all=True, dry_run=True)
    lines = summary(done)
    assert "base model, as the card names it on the Hub: org/base (else give --base-model)" in lines
    assert {line.split()[0] for line in lines[:20]} == EXPECTED | {
        f"adapters/{i:02d}/{name}" for i in range(2) for name in ADAPTER
    }
    size = (run / "merged" / "adapter_model.safetensors").stat().st_size
    assert any(line.split() == ["adapter_model.safetensors", f"{size:,}", "bytes"] for line in lines)
    assert "\n".join(lines).endswith("\n\n" + done.card.rstrip("\n"))
    assert not any("\n" in line for line in lines)  # the terminal escapes line breaks
    assert snapshot(run) == before


def test_offline_is_said_to_be_the_reason(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        push(run, "me/demo")


# Reading from the Hub


@pytest.fixture
def adapters(hub, tmp_path):
    """Two repositories with an adapter each; the second has another one on a branch."""
    folders = [tmp_path / f"a{i}" for i in range(3)]
    for i, folder in enumerate(folders):
        write_adapter(small_adapter(i), folder)
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
    hub.add("org/a", contents[0], private=False)
    repo = hub.add("org/b", contents[1], private=False)
    repo.commit(contents[2], "v2")
    return folders


def test_adapters_are_merged_from_the_hub_by_name_branch_and_commit(hub, adapters, tmp_path):
    expected = merge_folders([adapters[0], adapters[2]], tmp_path / "expected")
    b = hub.repos["org/b"].refs["v2"]
    for i, name in enumerate(["org/b@v2", f"org/b@{b}"]):
        report = merge_folders(["org/a", name], tmp_path / f"out{i}")
        assert [s.sha256 for s in report.sources] == [s.sha256 for s in expected.sources]
        assert [s.hub_commit for s in report.sources] == [hub.repos["org/a"].refs["main"], b]
        files = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("expected", f"out{i}")]
        assert files[0] == files[1]


def test_a_second_merge_fetches_nothing_again(hub, adapters, tmp_path):
    merge_folders(["org/a"], tmp_path / "one")
    hub.asked.clear()
    merge_folders(["org/a"], tmp_path / "two")
    assert hub.requests("GET", "/resolve/") == 0


@pytest.mark.parametrize("token", [None, READ_TOKEN])
@pytest.mark.parametrize(
    ("source", "kind"),
    [("org/empty", {}), ("org/gated", {"gated": True}), ("org/none", None), ("org/a@none", None)],
)
def test_what_cannot_be_had_is_a_refusal_that_names_it(hub, adapters, tmp_path, monkeypatch, source, kind, token):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    if kind is not None:
        hub.add(source, private=False, **kind)
    with pytest.raises(AdapterError, match=r"cannot be fetched from the Hub|the repository lacks") as problem:
        merge_folders([source], tmp_path / "out")
    assert problem.value.where == source.partition("@")[0]
    assert problem.value.exit_status == 2
    assert not (tmp_path / "out").exists()


def test_an_evaluation_reads_adapters_from_the_hub(hub, adapters, tmp_path):
    subjects = find_variants([Path("org/a"), Path("org/b@v2")], out=tmp_path / "out")
    assert subjects.base == "org/base"
    for name, folder in (("a", adapters[0]), ("b", adapters[2])):
        (factors, *_), (expected, *_) = (
            list(x.modules.values()) for x in (subjects.adapters[name], read_adapter(folder))
        )
        assert torch.equal(factors.A, expected.A)


@pytest.mark.parametrize(("source", "kind"), [("org/empty", {}), ("org/gated", {"gated": True})])
def test_an_evaluation_of_what_cannot_be_had_is_refused(hub, tmp_path, monkeypatch, source, kind):
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    hub.add(source, private=False, **kind)
    with pytest.raises(AdapterError, match=r"cannot be fetched from the Hub|the repository lacks"):
        find_variants([Path(source)], out=tmp_path / "out")


def test_a_private_adapter_needs_a_token(hub, adapters, tmp_path, monkeypatch):
    hub.repos["org/a"].private = True
    with monkeypatch.context() as without:
        without.delenv("HF_TOKEN")
        with pytest.raises(AdapterError, match="cannot be fetched"):
            merge_folders(["org/a"], tmp_path / "out")
    merge_folders(["org/a"], tmp_path / "out")


def test_the_server_is_a_hub_to_the_library(hub, run):
    """What our pushes rest on, asked for directly."""
    push(run, "me/demo")
    api = HfApi()
    assert set(api.list_repo_files("me/demo")) == EXPECTED | {".gitattributes"}
    assert api.model_info("me/demo").private


def test_a_run_of_another_base_folder_is_pushed_under_the_name_given(hub, tmp_path):
    make_run(tmp_path / "local", base=str(tmp_path / "secret" / "model"))
    push(tmp_path / "local", "me/demo", all=True, base_model="org/base")
    assert not [
        path for path, content in there(hub).items() if b"secret" in content or str(tmp_path).encode() in content
    ]
