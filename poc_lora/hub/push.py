"""`push`: an adapter and its card to the Hugging Face Hub, in one commit, or in none where all is there already.

What is tried again is the whole of it: look at what the Hub has, and commit what differs on top of what was seen. So
a commit whose answer was lost is found done, a commit that came between is seen, and no half of an upload shows.

The token is the library's business (HF_TOKEN, or what `hf auth login` stored). Errors of the library are not passed
on, since they hold the request with its headers: what they say is, without the token.
"""

import contextlib
import fnmatch
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
)

from poc_lora.artifacts.run_folder import RESULTS, RESULTS_TABLE
from poc_lora.errors import HubError, PocLoraError, RequestError
from poc_lora.hub.card import EVAL_RESULTS, eval_results_files, model_card
from poc_lora.hub.collect import File, collect
from poc_lora.hub_ids import is_repo_id

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before another attempt
PATIENCE_SECONDS = 300.0  # no other attempt after that: the library has tried each request several times already
TIMEOUT_SECONDS = 60.0  # without a sign of life; the library's own clients wait for ever

# Claims about an adapter's accuracy. Those that an upload does not bring anew are removed: they are of another one.
CLAIMS = (RESULTS, RESULTS_TABLE, EVAL_RESULTS.format("*"))

LOG_IN = "log in with hf auth login, or set HF_TOKEN, to a token that may write there"

_BRANCH = re.compile(r"(?!refs/|[0-9a-f]{40}$)\w[\w.-]*(/[\w-][\w.-]*)*", re.ASCII)
_TOKEN = re.compile(r"\bhf_\w{8,}")


@dataclass(frozen=True)
class Pushed:
    """What a push did, or would do: its files and card, the base model that it names, what was left out and why.

    commit: its id; None where nothing had changed, and in a dry run. url: of the repository; None in a dry run.
    changed, removed: paths that the commit wrote and removed. private: the repository's state.
    """

    repo_id: str
    files: tuple[File, ...]
    card: str
    base_model: str
    left_out: dict[str, str]
    url: str | None = None
    commit: str | None = None
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    private: bool | None = None


def push(
    adapter_or_run: Path,
    repo_id: str,
    *,
    all: bool = False,
    public: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    base_model: str | None = None,
    licence: str | None = None,
) -> Pushed:
    """Upload an adapter, or a run's merged adapter, to the repository `repo_id` (org/name), with a card.

    all: a run's single adapters too, in adapters/00 and so on. public: create the repository public; an existing one
    is left as it is, and a public one needs this. revision: the branch, created where missing; default main.
    dry_run: no network, no token. base_model: the base model's Hub id where the adapter names a folder. licence: such
    as apache-2.0; none is stated by default.

    The card and the results are those of this upload: a README.md that is there is replaced, results that are there
    and not in this upload are removed. Nothing local is written.

    Raises AdapterError, ConfigError, RunError, RequestError before anything is sent; RequestError where the token or
    the name is refused; HubError where the Hub cannot be reached or keeps failing, which changes nothing there.
    """
    if not is_repo_id(repo_id) or repo_id.endswith(".git") or "--" in repo_id or ".." in repo_id:
        raise RequestError(
            f"{repo_id!r} is not a repository's name", where="REPO_ID", fix="such as your-name/my-adapter"
        )
    if revision is not None and (not _BRANCH.fullmatch(revision) or ".." in revision):
        raise RequestError(f"{revision!r} is not a branch to commit to", where="--revision", fix="such as v2")
    subject = collect(adapter_or_run, members=all, base_model=base_model)
    card = model_card(subject, repo_id, revision=revision, licence=licence)
    files = (File("README.md", card.encode()), *subject.files, *eval_results_files(subject.evaluation))
    plan = Pushed(repo_id, files, card, subject.base_model, subject.left_out)
    if dry_run:
        return plan
    return _until_done(_Upload(plan, public=public, branch=revision or "main"))


def summary(pushed: Pushed) -> list[str]:
    """What is told of a push at its end; of a dry run, all that would be sent."""
    lines = []
    if pushed.url is None:
        width = max(len(file.path) for file in pushed.files)
        lines += [f"{file.path:<{width}}  {file.size:>13,} bytes" for file in pushed.files]
        lines += [f"{'in all':<{width}}  {sum(file.size for file in pushed.files):>13,} bytes"]
    elif pushed.commit is None:
        lines.append(f"all {len(pushed.files)} files are there already, unchanged: no commit was made")
    else:
        lines.append(f"{len(pushed.changed)} of {len(pushed.files)} files in commit {pushed.commit[:12]}")
        lines += [f"removed: {path}, which is not of this upload" for path in pushed.removed]
    lines += [f"left out: {path} ({reason})" for path, reason in pushed.left_out.items()]
    # An id and a relative path look alike: only whoever trained it can tell.
    lines.append(f"base model, as the card names it on the Hub: {pushed.base_model} (else give --base-model)")
    if pushed.private is not None:
        lines.append("the repository is private" if pushed.private else "the repository is public")
    return [*lines, "", pushed.card] if pushed.url is None else lines


def next_step(pushed: Pushed) -> tuple[str, str]:
    """Where the result lies, and what to run next."""
    if pushed.url is None:
        return "nothing was sent: this was a dry run", "the same without --dry-run"
    return f"the repository: {pushed.url}", f"poc-lora merge {pushed.repo_id} OTHER_ADAPTER... --out merged"


@dataclass(frozen=True)
class _Failure:
    """What is told of an error of the library. status: HTTP's, None without an answer. passing: worth another try."""

    what: str
    status: int | None
    passing: bool


@dataclass
class _Upload:
    """One upload, over its attempts.

    first_seen: what the Hub had of our files at the first look. sent: the paths written and removed by a commit whose
    answer may have been lost.
    """

    plan: Pushed
    public: bool
    branch: str
    first_seen: dict[str, str | None] | None = None
    sent: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    api: HfApi = field(default_factory=HfApi)

    def attempt(self) -> Pushed:
        """Look, and commit what differs. Raises what the library raises, and RequestError and HubError."""
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
        changed, removed = self._differing(head)
        seen = replace(self.plan, url=url, private=private)
        if not changed and not removed:
            return replace(seen, commit=head, changed=self.sent[0], removed=self.sent[1]) if self.sent else seen
        self.sent = tuple(file.path for file in changed), tuple(removed)
        commit = self.api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(f.path, f.content) for f in changed),
                *(CommitOperationDelete(path, is_folder=False) for path in removed),
            ],
            commit_message="Upload an adapter with poc-lora",
            revision=self.branch,
            parent_commit=head,
        )
        missing, _ = self._differing(commit.oid)
        if missing:
            what = f"the commit lacks {', '.join(file.path for file in missing)}"
            raise HubError(what, where=repo_id, fix="see whether the repository's .gitignore names them")
        return replace(seen, commit=commit.oid, changed=self.sent[0], removed=self.sent[1])

    def _differing(self, commit: str | None) -> tuple[list[File], list[str]]:
        """Our files that a commit has not or has differently, and the claims there that are not ours."""
        tree = self.api.list_repo_tree(self.plan.repo_id, recursive=True, revision=commit)
        there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        changed = [file for file in self.plan.files if not _is_same(file, there.get(file.path))]
        ours = {file.path for file in self.plan.files}
        seen = {path: _id(there.get(path)) for path in ours}
        before = self.first_seen or seen
        theirs = sorted(file.path for file in changed if seen[file.path] != before[file.path])
        if theirs:
            raise HubError(
                f"another upload has changed {', '.join(theirs)} meanwhile",
                where=self.plan.repo_id,
                fix="look at what is there, and push again if yours is the one to keep",
            )
        self.first_seen = before
        return changed, sorted(path for path in there if _is_claim(path) and path not in ours)


def _until_done(upload: _Upload) -> Pushed:
    """Attempts until one succeeds, with longer and longer waits where another may help."""
    started = time.monotonic()
    for wait in (*WAITS, None):
        done = _told(upload.attempt)
        if isinstance(done, Pushed):
            return done
        if not done.passing or wait is None or time.monotonic() - started > PATIENCE_SECONDS:
            # Raised here, where the library's error is no longer its context.
            raise _as_error(done, upload.plan.repo_id)
        time.sleep(wait)
    raise AssertionError("the last wait is None")


def _told(attempt: Callable[[], Pushed]) -> Pushed | _Failure:
    """What the attempt returns, or what its error says. Our own errors pass."""
    try:
        with _settings():
            return attempt()
    except PocLoraError:
        raise
    except Exception as problem:  # the library raises many kinds
        return _failure(problem)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """The library's shared client gives up within TIMEOUT_SECONDS of silence, and shows no bars but to a terminal."""
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


def _failure(problem: BaseException) -> _Failure:
    chain = [problem]  # failed uploads of large files come wrapped, with the answer in their cause
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return _Failure("the library is set to work offline (HF_HUB_OFFLINE)", None, False)
    answered = next((link for link in chain if getattr(link, "response", None) is not None), None)
    if answered is None:
        lost = any(type(link).__module__.startswith("httpx") for link in chain)
        return _Failure(_line(f"{type(problem).__name__}: {problem}"), None, lost)
    status = int(answered.response.status_code)  # type: ignore[attr-defined]
    said = getattr(answered, "server_message", None) or str(answered)
    return _Failure(_line(said), status, status in (408, 409, 412, 429) or status >= 500)


def _line(text: str) -> str:
    return _without_token(" ".join(text.split()))[:300]


def _without_token(text: str) -> str:
    secrets = [os.environ.get("HF_TOKEN")]
    with contextlib.suppress(Exception):  # it may have to ask for a new one
        secrets.append(get_token())
    for secret in filter(None, secrets):
        text = text.replace(secret.strip() or secret, "<token>")
    return _TOKEN.sub("<token>", text)


def _as_error(failure: _Failure, repo_id: str) -> PocLoraError:
    said = f"{failure.what} (HTTP {failure.status})" if failure.status else failure.what
    if failure.status in (401, 403):
        return RequestError(f"the Hub does not let you upload: {said}", where=repo_id, fix=LOG_IN)
    if failure.status == 404:
        fix = "check the user's or organisation's name, and that your token may write there"
        return RequestError(f"no such place on the Hub: {said}", where=repo_id, fix=fix)
    if failure.status in (409, 412):
        fix = "wait until other uploads to it have ended, and push again"
        return HubError(f"the repository keeps changing: {said}", where=repo_id, fix=fix)
    if failure.passing:
        fix = "try again later: what was sent is not sent again; nothing is visible before all is"
        return HubError(f"the Hub could not be reached, or failed: {said}", where=repo_id, fix=fix)
    return HubError(f"the upload failed: {said}", where=repo_id, fix="see what the Hub says")


def _is_claim(path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, claim) for claim in CLAIMS)


def _is_same(file: File, there: RepoFile | None) -> bool:
    if there is None or there.size != file.size:
        return False
    return file.sha256() == _id(there) if there.lfs else file.blob_id() == _id(there)


def _id(there: RepoFile | None) -> str | None:
    if there is None:
        return None
    return there.lfs.sha256 if there.lfs else there.blob_id
