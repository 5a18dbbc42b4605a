"""Uploads an adapter and its card to the Hugging Face Hub, in one commit, or in none if nothing has changed.

A retry starts from the beginning, on top of the branch's latest commit. So a commit whose answer was lost is not made
twice, and no part of an upload is ever visible without the rest.

huggingface_hub finds the token (HF_TOKEN, or the one that `hf auth login` stored). Its errors contain the request with
its headers, so only their messages are passed on, without the token.
"""

import contextlib
import fnmatch
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, get_token
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from poc_lora.artifacts.run_folder import RESULTS, RESULTS_TABLE, TASK_RESULTS
from poc_lora.errors import HubError, PocLoraError, RequestError
from poc_lora.hub.card import EVAL_RESULTS, eval_results_files, model_card
from poc_lora.hub.collect import File, collect
from poc_lora.hub_ids import is_repo_id

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each retry
PATIENCE_SECONDS = 300.0  # no retry after that: the library retries requests itself
TIMEOUT_SECONDS = 60.0  # without an answer; the library's default is no timeout

# Files with accuracies. Those that are not part of an upload are removed: they belong to other weights.
CLAIMS = (RESULTS, RESULTS_TABLE, TASK_RESULTS, EVAL_RESULTS.format("*"))

LOG_IN = "log in with hf auth login, or set HF_TOKEN, to a token that may write there"

_BRANCH = re.compile(r"(?!refs/|[0-9a-f]{40}$)\w[\w.-]*(/[\w-][\w.-]*)*", re.ASCII)
_TOKEN = re.compile(r"\bhf_\w{8,}")


@dataclass(frozen=True)
class Pushed:
    """The result of a push, or the plan of a dry run.

    Attributes:
        card: The text of README.md.
        base_model: The Hub id of the base model.
        left_out: Files that were not uploaded, with the reasons.
        url, private: The repository's URL, and whether it is private; None in a dry run.
        commit: The id of the commit; None if nothing had changed, and in a dry run.
        removed: The files that the commit removed.
    """

    repo_id: str
    files: tuple[File, ...] = field(repr=False)
    card: str = field(repr=False)
    base_model: str
    left_out: dict[str, str]
    url: str | None = None
    commit: str | None = None
    removed: tuple[str, ...] = ()
    private: bool | None = None


def push(
    adapter_or_run: str | Path,
    repo_id: str,
    *,
    all: bool = False,
    public: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    base_model: str | None = None,
    licence: str | None = None,
) -> Pushed:
    """Uploads an adapter, or a run's merged adapter, with a model card.

    An existing README.md is replaced. Results on the Hub that are not part of this upload are removed. Nothing local
    is written.

    Args:
        adapter_or_run: The folder of an adapter or of a run.
        repo_id: The repository, ORG/NAME, created if it does not exist.
        all: Whether to upload the run's single adapters too, to adapters/00 and so on.
        public: Whether the repository may be public. A new one is then created public.
        revision: The branch, created if it does not exist. Default: main.
        dry_run: Only return the plan, which needs no network and no token.
        base_model: The base model's Hub id, required if the adapter names a local folder.
        licence: An identifier such as apache-2.0. By default the card states none.

    Raises:
        AdapterError, ConfigError, RunError: The adapter or a file of the run is invalid or missing. Nothing is sent.
        RequestError: An argument, the token or the repository is refused.
        HubError: The Hub cannot be reached or keeps failing.
    """
    if not is_repo_id(repo_id) or repo_id.endswith(".git") or "--" in repo_id or ".." in repo_id:
        raise RequestError(
            f"{repo_id!r} is not a repository's name", where="REPO_ID", fix="such as your-name/my-adapter"
        )
    if revision is not None and (not _BRANCH.fullmatch(revision) or ".." in revision):
        raise RequestError(f"{revision!r} is not a branch to commit to", where="--revision", fix="such as v2")
    subject = collect(Path(adapter_or_run), members=all, base_model=base_model)
    card = model_card(subject, repo_id, revision=revision, licence=licence)
    files = (File("README.md", card.encode()), *subject.files, *eval_results_files(subject.evaluation))
    plan = Pushed(repo_id, files, card, subject.base_model, subject.left_out)
    if dry_run:
        return plan
    return _with_retries(_Upload(plan, public=public, branch=revision or "main"))


def summary(pushed: Pushed) -> list[str]:
    """Describes a push in lines for the terminal; for a dry run, everything that would be sent."""
    lines = []
    if pushed.url is None:
        width = max(len(file.path) for file in pushed.files)
        lines += [f"{file.path:<{width}}  {file.size:>13,} bytes" for file in pushed.files]
        lines += [f"{'in all':<{width}}  {sum(file.size for file in pushed.files):>13,} bytes"]
    elif pushed.commit is None:
        lines.append(f"the repository has all {len(pushed.files)} files already: no commit was made")
    else:
        lines.append(f"{len(pushed.files)} files uploaded in commit {pushed.commit[:12]}")
        lines += [f"removed: {path}, which is not part of this upload" for path in pushed.removed]
    lines += [f"left out: {path} ({reason})" for path, reason in pushed.left_out.items()]
    # A Hub id and a relative path look alike, so the user has to check.
    lines.append(f"base model, as the card names it on the Hub: {pushed.base_model} (else give --base-model)")
    if pushed.private is not None:
        lines.append("the repository is private" if pushed.private else "the repository is public")
    return [*lines, "", *pushed.card.splitlines()] if pushed.url is None else lines


def next_step(pushed: Pushed) -> tuple[str, str]:
    """Returns where the result is, and what to run next."""
    if pushed.url is None:
        return "nothing was sent: this was a dry run", "the same without --dry-run"
    return f"the repository: {pushed.url}", f"poc-lora merge {pushed.repo_id} OTHER_ADAPTER... --out merged"


@dataclass
class _Upload:
    """An upload and what its attempts must remember."""

    plan: Pushed
    public: bool  # whether the repository may be public
    branch: str
    parent: str | None = None  # the commit on which the first attempt was based
    removed: tuple[str, ...] = ()  # the files that any attempt has asked to remove
    api: HfApi = field(default_factory=HfApi)

    def attempt(self) -> Pushed:
        """Commits what differs from the branch. Raises the library's errors, RequestError and HubError."""
        repo_id = self.plan.repo_id
        if get_token() is None:
            raise RequestError("there is no token to upload with", where=repo_id, fix=LOG_IN)
        url = str(self.api.create_repo(repo_id, private=not self.public, exist_ok=True))
        private = bool(self.api.model_info(repo_id).private)
        if not private and not self.public:
            fix = "add --public, or make the repository private in its settings"
            raise RequestError("the repository is public already", where=repo_id, fix=fix)
        if self.branch != "main":
            self.api.create_branch(repo_id, branch=self.branch, exist_ok=True)
        head = self.api.model_info(repo_id, revision=self.branch).sha
        self.parent = self.parent or head
        ours = {file.path for file in self.plan.files}
        stale = {path for path in self.api.list_repo_files(repo_id, revision=head) if _is_claim(path)} - ours
        self.removed = tuple(sorted({*self.removed, *stale}))
        # create_commit leaves out files that have not changed, and makes no empty commit.
        commit = self.api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(file.path, file.content) for file in self.plan.files),
                *(CommitOperationDelete(path, is_folder=False) for path in sorted(stale)),
            ],
            commit_message="Upload an adapter with poc-lora",
            revision=self.branch,
            parent_commit=head,
        )
        if missing := ours - set(self.api.list_repo_files(repo_id, revision=commit.oid)):
            what = f"the commit lacks {', '.join(sorted(missing))}"
            raise HubError(what, where=repo_id, fix="check whether the repository's .gitignore excludes them")
        # An earlier attempt whose answer was lost may have made the commit.
        made = None if commit.oid == self.parent else commit.oid
        return replace(self.plan, url=url, private=private, commit=made, removed=self.removed)


def _with_retries(upload: _Upload) -> Pushed:
    """Retry failures that may pass, with longer and longer waits."""
    started = time.monotonic()
    for wait in (*WAITS, math.inf):
        try:
            with _settings():
                return upload.attempt()
        except PocLoraError:
            raise
        except Exception as problem:  # the library raises many kinds
            error, may_pass = _as_error(problem, upload.plan.repo_id)
        if not may_pass or wait == math.inf or time.monotonic() - started > PATIENCE_SECONDS:
            raise error  # out here the library's error is not its context
        time.sleep(wait)
    raise AssertionError("the last wait is infinite")


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Sets the library's timeout, and hides its progress bars unless stderr is a terminal."""
    before = get_session().timeout
    get_session().timeout = TIMEOUT_SECONDS
    hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        get_session().timeout = before
        if hide:
            enable_progress_bars()


def _as_error(problem: BaseException, repo_id: str) -> tuple[PocLoraError, bool]:
    """Returns the error to raise for an error of the library, and whether a retry may help."""
    chain = [problem]  # failed uploads of large files come wrapped, with the answer in their cause
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    answered = next((link for link in chain if getattr(link, "response", None) is not None), None)
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        said, status, may_pass = "the library is set to work offline (HF_HUB_OFFLINE)", 0, False
    elif answered is None:
        said, status = _one_line(f"{type(problem).__name__}: {problem}"), 0
        may_pass = any(type(link).__module__.startswith("httpx") for link in chain)
    else:
        status = int(answered.response.status_code)  # type: ignore[attr-defined]
        said = f"{_one_line(getattr(answered, 'server_message', None) or str(answered))} (HTTP {status})"
        may_pass = status in (408, 409, 412, 429) or status >= 500
    error: PocLoraError
    if status in (401, 403):
        error = RequestError(f"the Hub does not let you upload: {said}", where=repo_id, fix=LOG_IN)
    elif status == 404:
        fix = "check the user's or organisation's name, and that your token may write there"
        error = RequestError(f"not found on the Hub: {said}", where=repo_id, fix=fix)
    elif status in (409, 412):
        fix = "wait until other uploads to it have ended, and push again"
        error = HubError(f"the repository keeps changing: {said}", where=repo_id, fix=fix)
    elif may_pass:
        fix = "try again later: files already sent are not sent again, and nothing is visible before the commit"
        error = HubError(f"the Hub could not be reached, or failed: {said}", where=repo_id, fix=fix)
    else:
        error = HubError(f"the upload failed: {said}", where=repo_id, fix="see the Hub's message")
    return error, may_pass


def _one_line(text: str) -> str:
    """The text on one line, without the token."""
    text = " ".join(text.split())
    secrets = [os.environ.get("HF_TOKEN")]
    with contextlib.suppress(Exception):  # it may have to ask for a new one
        secrets.append(get_token())
    for secret in filter(None, secrets):
        text = text.replace(secret.strip() or secret, "<token>")
    return _TOKEN.sub("<token>", text)[:300]


def _is_claim(path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, claim) for claim in CLAIMS)
