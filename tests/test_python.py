"""The package as it is met in Python: what completes, what help() lists, paths as strings, and short reprs."""

import pydoc
import subprocess
import sys

import pytest
import torch

import poc_lora
from poc_lora.adapters.factors import Factors
from tests.reporting.run_folder import make_run, results


def test_importing_loads_nothing_heavy_and_yet_completes():
    code = "import sys, poc_lora; print(sorted(dir(poc_lora)), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{sorted(poc_lora.__all__)} False\n"


def test_help_lists_the_whole_api():
    text = pydoc.plain(pydoc.render_doc(poc_lora))
    for name in set(poc_lora.__all__) - {"__version__"}:
        assert f"class {name}" in text or f"    {name}(" in text, name


def test_paths_may_be_strings(tmp_path):
    adapter = poc_lora.Adapter({"layers.0.q_proj": Factors(torch.ones(2, 4), torch.ones(5, 2))}, base_model="org/base")
    for name in ("a", "b"):
        scaled = {path: Factors(f.A * (1 + (name == "b")), f.B) for path, f in adapter.modules.items()}
        poc_lora.write_adapter(poc_lora.Adapter(scaled), f"{tmp_path}/adapters/{name}")
    merged = poc_lora.merge_folders(f"{tmp_path}/adapters", f"{tmp_path}/merged")
    assert [source.name[-1] for source in merged.sources] == ["a", "b"]
    assert poc_lora.read_adapter(f"{tmp_path}/merged").rank("layers.0.q_proj") == 4
    run = make_run(tmp_path / "run")
    assert poc_lora.report(str(run)) == run / "report.html"
    assert (run / "eval/results.md").is_file()
    with pytest.raises(poc_lora.RequestError, match="neither a run nor an adapter"):
        poc_lora.evaluate(str(tmp_path / "adapters"), data=str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(poc_lora.RequestError, match="neither a run nor an adapter"):
        poc_lora.evaluate_rows(str(tmp_path / "adapters"), str(tmp_path / "rows.jsonl"))
    with pytest.raises(poc_lora.RequestError, match="neither a run nor an adapter"):
        poc_lora.evaluate_tasks(str(tmp_path / "adapters"), ["gsm8k"], include_path=str(tmp_path))
    with pytest.raises(poc_lora.RequestError, match="one run is no study"):
        poc_lora.evaluate_study([str(run)], data=str(tmp_path))
    with pytest.raises(poc_lora.RequestError, match="not a run"):
        poc_lora.sample_texts(str(tmp_path), "Where?")


def test_reprs_fit_a_screen():
    factors = Factors(torch.ones(2, 4), torch.ones(5, 2), 2.0)
    assert repr(factors) == "Factors(rank 2, ΔW [5, 4], scale 2)"
    adapter = poc_lora.Adapter(dict.fromkeys("abc", factors), base_model="org/base")
    assert repr(adapter) == "Adapter(3 modules, rank 2, base_model='org/base')"
    report = poc_lora.merge([adapter, adapter]).report
    assert "modules=<3 entries>" in repr(report)
    assert "adapters=<3 entries>" in repr(results())
    assert max(len(repr(thing)) for thing in (report, results())) < 1500
