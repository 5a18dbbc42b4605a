"""How questions are shared over ranks, and what answers depend on."""

from types import SimpleNamespace

from poc_lora.data.prompts import TEMPLATES
from poc_lora.data.questions import Question
from poc_lora.distributed import Ranks
from poc_lora.evaluation.answers import Answer, Item
from poc_lora.evaluation.evaluator import Evaluator, Protocol


def test_few_questions_keep_many_ranks_busy():
    labels = ("a", "b")
    items = [Item("piqa", "test", row, Question(f"{row}?", "", labels, "a")) for row in range(100)]
    protocol = SimpleNamespace(
        answers=lambda model, tokenizer, part, copies, ranks: [[Answer("a", log_probs=(0.0, -1.0))] * len(part)]
    )
    given = []
    for rank in range(8):
        batches = Evaluator(None, None, protocol, Ranks(rank, 8)).answer_batches(["base"], items)
        given.append({item for batch, answers in batches if answers for item in batch})
    assert sum(map(len, given)) == len(set().union(*given)) == 100
    assert all(7 <= len(answers) <= 14 for answers in given)


def test_answers_depend_on_the_template(monkeypatch):
    before = Protocol("label", "clean").settings
    monkeypatch.setitem(TEMPLATES, "clean", TEMPLATES["bare"])
    assert Protocol("label", "clean").settings != before
