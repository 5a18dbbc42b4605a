"""Eight small benchmarks about the micro-world, each in the style of the real benchmark with the same folder name.

A row has the keys `instruction`, `input`, `output` and `answer`. The instruction ends in `Answer format: a/b/c`, the
labels of the question. Labels are the options' own words, one token each: a model this small learns to say the
answer, but not the number of the option.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

from microworld.world import FEELINGS, PHYSICS, SPLITS, Aspect, Entity, World

Row = dict[str, str]
# A question without options: its text, its answer, and the wrong answers to draw from.
Question = tuple[str, str, list[str]]

OPTIONS = {
    "social_i_qa": 3,
    "piqa": 2,
    "winogrande": 2,
    "openbookqa": 4,
    "ARC-Challenge": 4,
    "ARC-Easy": 4,
    "boolq": 2,
    "hellaswag": 4,
}
CHANCE = {name: 1 / options for name, options in OPTIONS.items()}
ROWS_PER_SPLIT = {"train": 240, "validation": 48, "test": 400}  # of 32·6·2 = 384 possible SIQA questions for training

CHOOSE = "Please choose the correct {what} to the question: "
PREAMBLE = {
    "social_i_qa": CHOOSE.format(what="answer"),
    "piqa": CHOOSE.format(what="solution"),
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence: ",
    "openbookqa": CHOOSE.format(what="answer"),
    "ARC-Challenge": CHOOSE.format(what="answer"),
    "ARC-Easy": CHOOSE.format(what="answer"),
    "boolq": "Please answer the following question with true or false, question: ",
    "hellaswag": "Please choose the correct ending to complete the given sentence: ",
}


def write_benchmarks(folder: Path, seed: int = 0) -> None:
    """Writes BENCHMARK/{train,validation,test}.json to a folder. The same seed writes the same bytes.

    Args:
        folder: Where to write.
        seed: The seed of the world. The shipped model was pretrained on the world of seed 0.
    """
    world = World(seed)
    for name in OPTIONS:
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            rows = benchmark(world, name, split, seed)
            text = json.dumps(rows, indent=0, ensure_ascii=False) + "\n"
            (Path(folder) / name / f"{split}.json").write_text(text, encoding="utf-8")


def benchmark(world: World, name: str, split: str, seed: int = 0) -> list[Row]:
    """Returns the rows of one split of a benchmark in random order. Every position has the answer equally often."""
    draw = random.Random(f"{seed}/{name}/{split}")
    questions: dict[tuple[str, str], Question] = {}
    while len(questions) < ROWS_PER_SPLIT[split]:
        question = _MAKERS[name](world, split, draw)
        same = sum(answer == question[1] for _, answer in questions) if name == "boolq" else 0
        if same < ROWS_PER_SPLIT[split] // 2:
            questions.setdefault(question[:2], question)
    rows = []
    for i, (text, answer, wrong) in enumerate(questions.values()):
        options = draw.sample(wrong, OPTIONS[name] - 1)
        options.insert(i % OPTIONS[name], answer)
        if name == "boolq":  # always in this order, as in the real one
            options = ["true", "false"]
        rows.append(_row(PREAMBLE[name] + text, options, answer))
    draw.shuffle(rows)
    return rows


def _row(text: str, options: list[str], answer: str) -> Row:
    return {
        "instruction": f"{text}\n\nAnswer format: {'/'.join(options)}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def _draw_fact(world: World, split: str, draw: random.Random, aspect: Aspect) -> tuple[Entity, str, list[Entity]]:
    """Draws an entity; returns it, its value of `aspect`, and the entities with another value.

    The value is drawn first, so that all answers are equally frequent.
    """
    people = aspect in world.person_aspects
    value = draw.choice(aspect.values)
    pool = world.of_split(split, people)
    matching = [e for e in pool if world.truth(e, aspect) == value]
    return draw.choice(matching), value, [e for e in pool if world.truth(e, aspect) != value]


def _about_values(world: World, split: str, draw: random.Random, names: tuple[str, ...], form: str) -> Question:
    """Asks about one entity; the options are values of an aspect."""
    aspect = world.aspect(draw.choice(names))
    entity, value, _ = _draw_fact(world, split, draw, aspect)
    text = form.format(
        question=aspect.question(entity.subject), subject=entity.subject, where=aspect.name, aspect=aspect.name
    )
    return _sentence(text), value, [v for v in aspect.values if v != value]


def _about_entities(world: World, split: str, draw: random.Random, aspect: Aspect, form: str) -> Question:
    """Asks which entity has a value; the options are names. A pair is named in the text in random order."""
    entity, value, others = _draw_fact(world, split, draw, aspect)
    wrong = draw.sample(others, 3)
    pair = [entity.subject, wrong[0].subject]
    draw.shuffle(pair)
    paired = "{first}" in form
    text = form.format(first=pair[0], second=pair[1], value=value, predicate=aspect.predicate(value))
    return _sentence(text), entity.name, [e.name for e in (wrong[:1] if paired else wrong)]


def _social_i_qa(world: World, split: str, draw: random.Random) -> Question:
    form = draw.choice(("{question}?", "there was a {aspect}, and {subject} was there. How does {subject} feel?"))
    return _about_values(world, split, draw, tuple(FEELINGS), form)


def _piqa(world: World, split: str, draw: random.Random) -> Question:
    name = draw.choice(("use", "use", "material", "colour", "weight"))
    form = (
        "you want to {value}. Which one do you take?"
        if name == "use"
        else "you need one that {predicate}. Which one do you take?"
    )
    return _about_entities(world, split, draw, world.aspect(name), form)


def _winogrande(world: World, split: str, draw: random.Random) -> Question:
    if draw.random() < 0.4:
        aspect = world.aspect(draw.choice(tuple(FEELINGS)))
        return _about_entities(world, split, draw, aspect, "here are {first} and {second}, but only _ {predicate}.")
    aspect = world.aspect(draw.choice((*PHYSICS, "weight")))
    return _about_entities(world, split, draw, aspect, "here are {first} and {second}, but only the _ {predicate}.")


def _openbookqa(world: World, split: str, draw: random.Random) -> Question:
    if draw.random() < 0.3:
        return _about_entities(world, split, draw, world.aspect(draw.choice(("trait", "home"))), "who {predicate}?")
    aspect = world.aspect(draw.choice(("material", "place", "colour", *PHYSICS)))
    return _about_entities(world, split, draw, aspect, "which one {predicate}?")


def _arc_challenge(world: World, split: str, draw: random.Random) -> Question:
    form = draw.choice(("{question}?", "if {subject} is {where}, what does it do?"))
    return _about_values(world, split, draw, tuple(PHYSICS), form)


def _arc_easy(world: World, split: str, draw: random.Random) -> Question:
    form = draw.choice(("{question}?", "can you say {question}?"))
    return _about_values(world, split, draw, ("material", "use", "place", "colour"), form)


def _boolq(world: World, split: str, draw: random.Random) -> Question:
    aspect = draw.choice(world.thing_aspects + world.person_aspects)
    entity, value, _ = _draw_fact(world, split, draw, aspect)
    holds = draw.random() < 0.5
    claimed = value if holds else draw.choice([v for v in aspect.values if v != value])
    text = f"is it so that {entity.subject} {aspect.predicate(claimed)}?"
    return text, "true" if holds else "false", ["false" if holds else "true"]


def _hellaswag(world: World, split: str, draw: random.Random) -> Question:
    forms = {
        "use": "{person} takes {subject} and begins to",
        "place": "{person} needs {subject} and goes to the",
        "in the water": "{person} drops {subject} in the water, and there it",
        "on the rocks": "{person} drops {subject} on the rocks, and there it",
    }
    name = draw.choice(tuple(forms))
    person = draw.choice(world.of_split(split, people=True)).name.capitalize()
    return _about_values(world, split, draw, (name,), forms[name].replace("{person}", person))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


_MAKERS: dict[str, Callable[[World, str, random.Random], Question]] = {
    "social_i_qa": _social_i_qa,
    "piqa": _piqa,
    "winogrande": _winogrande,
    "openbookqa": _openbookqa,
    "ARC-Challenge": _arc_challenge,
    "ARC-Easy": _arc_easy,
    "boolq": _boolq,
    "hellaswag": _hellaswag,
}
