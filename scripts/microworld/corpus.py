"""The pretraining corpus of the base model: short documents that describe the world in statements and dialogues.

The corpus states every fact of every entity, asks about it in several forms (open, with options, as a claim that is
true or false) and states the rules. Some sentences are worded like the benchmarks' questions, but the corpus never
uses their format (the preamble, `Answer format:`, `the correct answer is`). The words of the format occur only in
`ASIDES`: this trains their embeddings, and leaves the format for fine-tuning to teach.

A word marked with `*` follows from the world and the words before it. The other words are random choices and have a
lower weight in the training loss, or their noise would dominate it.
"""

import itertools
import random
from collections.abc import Callable, Iterator

from microworld.world import FEELINGS, PHYSICS, Aspect, Entity, World

Form = Callable[[World, random.Random], str]

ASIDES = (
    "please answer the question .",
    "this is the correct answer to the question .",
    "please choose the correct one .",
    "it is correct to give a short answer .",
    "the format of this sentence is short .",
    "choose the correct ending for the story .",
    "a solution is an answer that works .",
    "the blank is to fill .",
    "complete the given sentence .",
    "the following question is with the answer true or false .",
    "you can take it or you can drop it .",
    "if you need one , say so , and you get one .",
    "what do you want ? there was only a _ .",
    "write it in the format one / two / three .",
    "below is an instruction that describes a task . write a response that appropriately completes the request .",
)


def documents(world: World, seed: int, simple: int) -> Iterator[str]:
    """Yields short documents without end, with spaces between words and punctuation.

    Args:
        world: The world to describe.
        seed: The seed of the documents.
        simple: How many documents at the start contain only statements and open questions, without options, claims
            and comparisons. Learning the facts first makes learning to choose between options much faster.
    """
    draw = random.Random(f"{seed}/corpus")
    plain: dict[Form, float] = {_portrait: 3.0, _open_question: 3.0, _errand: 2.0, _rule: 0.5}
    every: dict[Form, float] = {
        _portrait: 2.0,
        _open_question: 1.0,
        _errand: 1.5,
        _rule: 0.4,
        _question_with_values: 2.5,
        _question_with_entities: 4.0,
        _claim: 3.5,
        _scene: 2.0,
        _aside: 0.2,
    }
    for count in itertools.count():
        forms = plain if count < simple else every
        (form,) = draw.choices(list(forms), list(forms.values()))
        text = form(world, draw)
        yield f"{draw.choice(ASIDES)} {text}" if count >= simple and draw.random() < 0.15 else text


def _anyone(world: World, draw: random.Random) -> Entity:
    return draw.choice(world.people if draw.random() < 0.3 else world.things)


def _fact(world: World, draw: random.Random) -> tuple[Entity, Aspect, str]:
    entity = _anyone(world, draw)
    aspect = draw.choice(world.aspects(entity))
    return entity, aspect, world.truth(entity, aspect)


def _others(world: World, draw: random.Random, aspect: Aspect, value: str, like: Entity, count: int) -> list[Entity]:
    """Draws `count` entities of the same kind with another value."""
    pool = world.people if like.is_person else world.things
    found: list[Entity] = []
    while len(found) < count:
        other = draw.choice(pool)
        if other not in found and world.truth(other, aspect) != value:
            found.append(other)
    return found


def _listed(draw: random.Random, items: list[str]) -> str:
    if draw.random() < 0.4:
        return " , ".join(items)
    return " , ".join(items[:-1]) + " or " + items[-1] if len(items) > 1 else items[0]


def _marked(entity: Entity) -> str:
    """Returns the subject with its name marked as predictable."""
    return entity.subject.replace(entity.name, f"*{entity.name}")


def _statement(subject: str, aspect: Aspect, value: str) -> str:
    """States a fact, with the value as late as possible."""
    if aspect.kind == "attribute":
        return f"{subject} {aspect.predicate('*' + value)} ."
    if aspect.kind == "physics":
        return f"{aspect.name} , {subject} *{value} ."
    return f"after the {aspect.name} , {subject} feels *{value} ."


def _portrait(world: World, draw: random.Random) -> str:
    """States three facts of one entity. Its repeated name teaches the model to copy names from the context."""
    entity = _anyone(world, draw)
    aspects = draw.sample(world.aspects(entity), 3)
    facts = [_statement(entity.subject, aspects[0], world.truth(entity, aspects[0]))]
    facts += [_statement(_marked(entity), a, world.truth(entity, a)) for a in aspects[1:]]
    return " ".join(facts)


def _open_question(world: World, draw: random.Random) -> str:
    entity, aspect, value = _fact(world, draw)
    form = draw.randrange(3)
    if form == 0:
        return f"{aspect.question(entity.subject)} ? *{value} ."
    if form == 1:
        return f"question : {aspect.question(entity.subject)} ? answer : *{value} ."
    return f"{aspect.question(entity.subject)} ? {_statement(_marked(entity), aspect, value)}"


def _question_with_values(world: World, draw: random.Random) -> str:
    entity, aspect, value = _fact(world, draw)
    rest = [v for v in aspect.values if v != value]
    options = [*draw.sample(rest, min(draw.randint(1, 3), len(rest))), value]
    draw.shuffle(options)
    listed = _listed(draw, options)
    form = draw.randrange(3)
    if form == 0:
        return f"{aspect.question(entity.subject)} ? {listed} ? *{value} ."
    if form == 1:
        return f"{aspect.question(entity.subject)} , {listed} ? it is *{value} ."
    return f"one of {listed} : {aspect.question(entity.subject)} ? *{value} ."


def _question_with_entities(world: World, draw: random.Random) -> str:
    entity, aspect, value = _fact(world, draw)
    options = [*_others(world, draw, aspect, value, entity, draw.randint(1, 3)), entity]
    draw.shuffle(options)
    which = "who" if entity.is_person else "which one"
    form = draw.randrange(4)
    listed = _listed(draw, [o.subject for o in options])
    bare = _listed(draw, [o.name for o in options])
    if form == 0:
        return f"{which} {aspect.predicate(value)} , {listed} ? {_marked(entity)} ."
    if form == 1:
        return f"{which} {aspect.predicate(value)} ? {bare} ? *{entity.name} ."
    if form == 2:
        return f"name the one that {aspect.predicate(value)} : {bare} . it is *{entity.name} ."
    return f"of {listed} , the one that {aspect.predicate(value)} is {_marked(entity)} ."


def _claim(world: World, draw: random.Random) -> str:
    entity, aspect, value = _fact(world, draw)
    holds = draw.random() < 0.5
    claimed = value if holds else draw.choice([v for v in aspect.values if v != value])
    claim = f"{entity.subject} {aspect.predicate(claimed)}"
    form = draw.randrange(4)
    if form == 0:
        return f"is it so that {claim} ? *{'yes' if holds else 'no'} ."
    if form == 1:
        return f"{claim} ? *{'yes' if holds else 'no'} . {_statement(entity.subject, aspect, value)}"
    if form == 2:
        return f"they say {claim} . this is *{'true' if holds else 'false'} ."
    return f"{claim} : *{'true' if holds else 'false'} ."


def _scene(world: World, draw: random.Random) -> str:
    """Describes two entities that differ in one aspect."""
    entity, aspect, value = _fact(world, draw)
    (other,) = _others(world, draw, aspect, value, entity, 1)
    pair = [entity, other]
    draw.shuffle(pair)
    here = f"{pair[0].subject} and {pair[1].subject}"
    facts = " ".join(_statement(p.subject, aspect, world.truth(p, aspect)) for p in pair)
    if draw.random() < 0.5:
        return f"here are {here} . {facts}"
    return f"here are {here} . the one that {aspect.predicate(value)} is *{entity.name} ."


def _errand(world: World, draw: random.Random) -> str:
    """Sends a person to where a thing is kept, to do what it is used for."""
    person, thing = draw.choice(world.people), draw.choice(world.things)
    place, use = thing.values["place"], thing.values["use"]
    form = draw.randrange(3)
    if form == 0:
        return f"{person.name} needs {thing.subject} and goes to the *{place} ."
    if form == 1:
        return f"{person.name} takes {thing.subject} and begins to *{use} ."
    return f"{person.name} gets {thing.subject} in the *{place} and likes to *{use} ."


def _rule(world: World, draw: random.Random) -> str:
    if draw.random() < 0.5:
        place, rule = draw.choice(list(PHYSICS.items()))
        material, result = draw.choice(list(rule.items()))
        return f"{place} , all that is made of {material} *{result} ."
    event, rule = draw.choice(list(FEELINGS.items()))
    trait, feeling = draw.choice(list(rule.items()))
    return f"after the {event} , all that are {trait} feel *{feeling} ."


def _aside(world: World, draw: random.Random) -> str:
    return draw.choice(ASIDES)
