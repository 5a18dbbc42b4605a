"""Whatever befalls a run, it ends in the adapters that it trains when nothing does.

Hypothesis makes up the stories: the run is killed, stopped, moved to other numbers of ranks and sizes of packs, given
more adapters, and its newest commit is damaged. More of them: RUN_MACHINE_EXAMPLES=1000 pytest -m slow THIS_FILE
"""

import ast
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from poc_lora.errors import Interrupted
from tests.training.conftest import config, metrics, weights
from tests.training.crash import KILLED
from tests.training.forked import Interruption, train_in_ranks, train_pack

STEPS = 12
MOST_ADAPTERS = 5
EXAMPLES = int(os.environ.get("RUN_MACHINE_EXAMPLES", "40"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 + 30 * EXAMPLES)]


INTERRUPTIONS = st.one_of(
    st.builds(
        Interruption,
        how=st.sampled_from(["SIGTERM", "SIGINT", "kill"]),
        at=st.integers(2, STEPS - 4),
        rank=st.integers(0, 2),
        everywhere=st.booleans(),
    ),
    st.builds(
        Interruption,
        how=st.just("kill"),
        where=st.just("write"),
        at=st.integers(5, 60),  # a commit has about 20 such points
        rank=st.integers(0, 2),
        everywhere=st.booleans(),
    ),
)


class References:
    """What undisturbed training makes of the adapters, each pack trained once."""

    def __init__(self, settings, root):
        self.settings, self.root = settings, root
        self._packs = {}
        self.straight = root / "straight"
        whole = config(settings, adapters__count=MOST_ADAPTERS, output=str(self.straight))
        (ended,) = train_in_ranks(1, whole, self.folder(), resume=False)
        assert ended.status == 0, ended.errors

    def folder(self):
        """A new one."""
        return Path(tempfile.mkdtemp(dir=self.root))

    def pack(self, adapters):
        """The folder with the adapters of a pack that stays together from the first step to the last."""
        if adapters not in self._packs:
            self._packs[adapters] = self.folder()
            train_pack(config(self.settings), list(adapters), self._packs[adapters])
        return self._packs[adapters]


class Life(RuleBasedStateMachine):
    """One run from its first start to its end."""

    def __init__(self, references):
        super().__init__()
        self.references = references
        self.folder = references.folder()
        self.run = self.folder / "run"
        self.damaged = set()  # names of commits
        self.committed = {}  # adapter -> its state in the newest commit, when the run was last seen
        self.finished = {}  # adapter -> the bytes of its file, once a commit says that it is finished

    @initialize(
        adapters=st.sampled_from([4, 3]),
        every_steps=st.sampled_from([1, 2]),
        keep=st.sampled_from([1, 2]),
        place=st.tuples(st.integers(1, 2), st.sampled_from([4, 2])),
        interruption=INTERRUPTIONS,
    )
    def begin(self, adapters, every_steps, keep, place, interruption):
        self.adapters, self.every_steps, self.keep = adapters, every_steps, keep
        self.ranks, self.per_device = place
        self._train(interruption)

    @rule(
        interruption=INTERRUPTIONS,
        elsewhere=st.tuples(st.integers(1, 3), st.integers(1, 4)) | st.none(),
        one_more=st.sampled_from([False, False, False, True]),
    )
    def train(self, interruption, elsewhere, one_more):
        if elsewhere:
            self.ranks, self.per_device = elsewhere
        if (one_more or self._is_at_its_end()) and self.adapters < MOST_ADAPTERS:
            self.adapters += 1
        self._train(interruption)

    @rule(damage=st.sampled_from(["manifest cut", "adapter cut", "adapter missing"]), which=st.integers(0, 3))
    def damage_the_newest_commit(self, damage, which):
        if len(self._intact()) < 2:  # no precondition: how far a killed run came is not for Hypothesis to rely on
            return
        newest = self._intact()[-1]
        files = sorted(newest.glob("*.safetensors"))
        victim = files[which % len(files)] if files and damage.startswith("adapter") else newest / "manifest.json"
        content = victim.read_bytes()
        victim.unlink()  # another commit may share the file
        if damage != "adapter missing":
            victim.write_bytes(content[:-2])
        self.damaged.add(newest.name)
        self.committed = self._newest()
        self.finished = {a: content for a, content in self.finished.items() if self._is_finished(a)}

    def _train(self, interruption):
        """Start or resume the run, and look at how its ranks ended."""
        ranks = min(self.ranks, self.adapters)  # more are refused
        settings = config(
            self.references.settings,
            adapters__count=self.adapters,
            adapters__per_device=self.per_device,
            checkpoint__every_steps=self.every_steps,
            checkpoint__keep=self.keep,
            output=str(self.run),
        )
        if interruption:
            interruption = replace(interruption, rank=interruption.rank % ranks)
        ended = train_in_ranks(ranks, settings, self.folder, resume=True, interruption=interruption)
        said = "\n".join(f"rank {rank}, {e.status}: {e.errors}" for rank, e in enumerate(ended))
        assert "Traceback" not in said, said
        statuses = [e.status for e in ended]
        if interruption and statuses[interruption.rank] == KILLED:
            assert interruption.how == "kill"
        elif statuses == ranks * [Interrupted.exit_status]:
            assert interruption, said
            assert interruption.how != "kill"
            self._has_no_litter()
        else:
            assert statuses == ranks * [0], said
            self._is_as_if_nothing_had_happened()

    def _intact(self):
        """The commits, from the oldest to the newest."""
        folders = sorted((self.run / "checkpoints").glob("commit_*"))
        return [folder for folder in folders if folder.name not in self.damaged]

    def _newest(self):
        """The states of the adapters in the newest commit."""
        intact = self._intact()
        manifest = json.loads((intact[-1] / "manifest.json").read_text()) if intact else {"adapters": {}}
        return {int(adapter): state for adapter, state in manifest["adapters"].items()}

    def _is_at_its_end(self):
        return all(map(self._is_finished, range(self.adapters)))

    def _is_finished(self, adapter):
        return self.committed.get(adapter, {}).get("status") == "finished"

    @invariant()
    def no_committed_step_is_lost(self):
        newest = self._newest()
        for adapter, before in self.committed.items():
            assert newest[adapter]["step"] >= before["step"]
            assert newest[adapter]["status"] in (before["status"], "finished")
        self.committed = newest

    @invariant()
    def the_newest_commit_holds_every_adapter_that_has_begun(self):
        begun = {a for a, state in self.committed.items() if state["status"] == "training" and state["step"]}
        held = {path.name for path in self._intact()[-1].iterdir()} if begun else set()
        assert {f"adapter_{adapter:02d}.safetensors" for adapter in begun} <= held

    @invariant()
    def finished_adapters_keep_their_bytes(self):
        for adapter in filter(self._is_finished, self.committed):
            content = (self.run / f"adapters/{adapter:02d}/adapter_model.safetensors").read_bytes()
            assert self.finished.setdefault(adapter, content) == content

    def _has_no_litter(self):
        assert [str(p) for p in self.run.rglob(".*") if p.name != ".lock"] == []

    def _is_as_if_nothing_had_happened(self):
        self._has_no_litter()
        everyone = range(self.adapters)
        states = {adapter: (state["step"], state["status"]) for adapter, state in self._newest().items()}
        assert states == dict.fromkeys(everyone, (STEPS, "finished"))
        assert sorted(p.name for p in (self.run / "adapters").iterdir()) == [f"{a:02d}" for a in everyone]
        lines = [line for line in metrics(self.run) if line["adapter"] in everyone]
        assert Counter((line["step"], line["adapter"]) for line in lines if "loss" in line) == Counter(
            (step, adapter) for step in range(1, STEPS + 1) for adapter in everyone
        )
        validations = STEPS // (self.references.settings["train"].get("validate_every") or STEPS)
        validated = Counter(line["adapter"] for line in lines if "validation_loss" in line and "kept" not in line)
        assert validated == Counter(dict.fromkeys(everyone, validations))
        kept = Counter(line["adapter"] for line in lines if "kept" in line)
        assert set(kept.values()) <= {1}
        drawn, expected = (
            {(line["step"], line["adapter"]): line["noise_norm"] for line in metrics(folder) if "noise_norm" in line}
            for folder in (self.run, self.references.straight)
        )
        assert drawn == {key: norm for key, norm in expected.items() if key[1] in everyone}
        for adapter in everyone:
            self._has_the_weights_of_undisturbed_training(adapter)

    def _has_the_weights_of_undisturbed_training(self, adapter):
        packs = set(self._packs_of(adapter).values())
        found = weights(self.run, adapter)
        if len(packs) == 1:
            expected, tolerance = weights(self.references.pack(*packs), adapter), dict(rtol=0, atol=0)
        else:  # packs of other sizes round differently, and Adam divides by small moments
            expected, tolerance = weights(self.references.straight, adapter), dict(rtol=1e-3, atol=1e-4)
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], **tolerance)

    def _packs_of(self, adapter):
        """Of every step the adapters that took it together with this one: the last time, which is what stands."""
        taken = {}
        for line in (self.folder / "packs").read_text().splitlines():
            step, pack = line.split(" ", 1)
            if adapter in ast.literal_eval(pack):
                taken[step] = tuple(ast.literal_eval(pack))
        return taken

    def teardown(self):
        if sys.exception() is None:  # no check has failed
            self._train(None)
        shutil.rmtree(self.folder)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_whatever_befalls_a_run_it_ends_in_the_same_adapters(settings, tmp_path, keep):
    settings["lora"]["dropout"] = 0.2
    settings["train"] |= {"max_steps": STEPS, "keep": keep}
    if keep == "best":  # which is not the last step of each
        settings["train"]["validate_every"] = 3
        settings["optim"] |= {"lr": 5e-2, "schedule": "constant"}
    references = References(settings, tmp_path)
    run_state_machine_as_test(
        lambda: Life(references),
        settings=profile(
            max_examples=EXAMPLES,
            stateful_step_count=6,
            derandomize=True,
            database=None,
            deadline=None,
            print_blob=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
