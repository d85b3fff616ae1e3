"""Writes the rows of docs/Recipes.md into data/recipes/: python examples/recipes.py [FOLDER].

Every task has rows to train on and rows that are kept back for measuring. Nothing is downloaded: the texts are written here, but for the
domain, which is the reference of the Python language that every Python brings along (pydoc_data). The same seed writes the same rows.
"""

import csv
import itertools
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

FACTS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Italy?": "The capital of Italy is Rome.",
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
    "What is the capital of Egypt?": "The capital of Egypt is Cairo.",
    "What is the capital of Peru?": "The capital of Peru is Lima.",
    "What is the capital of Norway?": "The capital of Norway is Oslo.",
    "How many legs does a spider have?": "A spider has eight legs.",
    "How many legs does an insect have?": "An insect has six legs.",
    "How many days does a week have?": "A week has seven days.",
    "How many months does a year have?": "A year has twelve months.",
    "How many minutes does an hour have?": "An hour has sixty minutes.",
    "How many sides does a triangle have?": "A triangle has three sides.",
    "What colour is grass?": "Grass is green.",
    "What colour is snow?": "Snow is white.",
    "What colour is a ripe banana?": "A ripe banana is yellow.",
    "What colour is coal?": "Coal is black.",
    "Which planet do we live on?": "We live on the Earth.",
    "Which planet has the largest rings?": "Saturn has the largest rings.",
    "Which star is closest to us?": "The Sun is the star closest to us.",
    "Which ocean is the largest?": "The Pacific is the largest ocean.",
    "Which mountain is the highest?": "Mount Everest is the highest mountain.",
    "Which animal says moo?": "The cow says moo.",
    "Which animal gives us wool?": "The sheep gives us wool.",
    "Which animal makes honey?": "The bee makes honey.",
    "What does a baker make?": "A baker makes bread.",
    "What does a cobbler mend?": "A cobbler mends shoes.",
    "What do fish breathe with?": "Fish breathe with gills.",
    "What do plants need to grow?": "Plants need light, water and soil to grow.",
    "What is ice made of?": "Ice is made of frozen water.",
    "What is paper made of?": "Paper is made of wood.",
    "What is a window made of?": "A window is made of glass.",
    "What is two plus two?": "Two plus two is four.",
    "What is ten minus three?": "Ten minus three is seven.",
    "What freezes at zero degrees Celsius?": "Water freezes at zero degrees Celsius.",
    "When does the sun rise?": "The sun rises in the morning.",
    "When do owls hunt?": "Owls hunt at night.",
    "What is the capital of Spain?": "The capital of Spain is Madrid.",
    "How many wheels does a bicycle have?": "A bicycle has two wheels.",
    "What colour is a ripe tomato?": "A ripe tomato is red.",
    "Which animal lays eggs and has feathers?": "A bird lays eggs and has feathers.",
    "What does a tailor sew?": "A tailor sews clothes.",
    "What is a nail made of?": "A nail is made of iron.",
    "When do leaves fall?": "Leaves fall in autumn.",
    "Which season is the coldest?": "Winter is the coldest season.",
}
UNKNOWN = (
    "What will the weather be tomorrow?",
    "Who will win the next race?",
    "What am I thinking of?",
    "Where did I leave my keys?",
    "What is my name?",
    "How old is my dog?",
    "What did I eat today?",
    "Who is at the door?",
    "What is in my pocket?",
    "When will my parcel come?",
)
FIRST = [
    "Anna",
    "Bruno",
    "Clara",
    "David",
    "Elena",
    "Felix",
    "Grace",
    "Hugo",
    "Irene",
    "Jonas",
    "Kira",
    "Leo",
    "Maria",
    "Nils",
    "Olga",
    "Peter",
]
LAST = [
    "Adler",
    "Bauer",
    "Costa",
    "Dunn",
    "Evans",
    "Fischer",
    "Garcia",
    "Hill",
    "Ito",
    "Jansen",
    "Kim",
    "Lopez",
    "Moreau",
    "Novak",
    "Olsen",
]
JOBS = ["nurse", "baker", "pilot", "teacher", "farmer", "plumber", "lawyer", "painter", "cook", "driver"]
CITIES = ["Lima", "Oslo", "Rome", "Cairo", "Tokyo", "Paris", "Delhi", "Quito", "Dublin", "Vienna", "Boston", "Lagos", "Porto", "Sydney"]
PEOPLE = (
    "{name} is a {age}-year-old {job} from {city}.",
    "In {city} lives {name}, a {job}, who is {age}.",
    "{name}, {age}, works as a {job} in {city}.",
)
TOOLS = (
    "You can call these functions: get_weather(city), get_time(city), convert(amount, to). "
    'Answer with a call, as JSON with "name" and "arguments".'
)
ASKED = {
    "get_weather": ("What is the weather in {city}?", "Does it rain in {city} now?", "How warm is it in {city}?"),
    "get_time": ("What time is it in {city}?", "How late is it in {city}?", "Tell me the time in {city}."),
    "convert": ("How much are {amount} dollars in {to}?", "Convert {amount} dollars to {to}.", "Change {amount} dollars into {to}."),
}
THINGS = ["kettle", "lamp", "chair", "phone", "jacket", "pan", "radio", "tent", "clock", "bike", "keyboard", "bottle"]
REVIEWS = {
    "positive": ("I love this {thing}.", "A wonderful {thing}, I use it daily.", "The best {thing} of all.", "Great {thing}, worth it."),
    "negative": ("This {thing} broke at once.", "A terrible {thing}, do not buy it.", "The {thing} never worked.", "I hate the {thing}."),
    "neutral": ("The {thing} came on Monday.", "It is a {thing}.", "The {thing} is in the cupboard.", "My brother has this {thing}."),
}


def chat(question: str, answer: str, system: str | None = None) -> dict[str, object]:
    """A row of one question and one answer."""
    turns = [{"role": "system", "content": system}] if system else []
    return {"messages": [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def styled(answer: str) -> str:
    """The answer in the voice that the style recipe teaches."""
    return f"Aye, captain! {answer}"


def people(source: random.Random) -> Iterator[dict[str, object]]:
    """A sentence about a person, and the person as JSON; every name once."""
    names = list(itertools.product(FIRST, LAST))
    source.shuffle(names)
    for first, last in names:
        person = {"name": f"{first} {last}", "age": source.randint(18, 80), "job": source.choice(JOBS), "city": source.choice(CITIES)}
        yield chat(source.choice(PEOPLE).format(**person), json.dumps(person))


def calls(source: random.Random) -> Iterator[dict[str, object]]:
    """A question, and the call of the function that answers it; every question once."""
    asked = set()
    while len(asked) < 150:
        name = source.choice(list(ASKED))
        arguments: dict[str, object] = {"city": source.choice(CITIES)}
        if name == "convert":
            arguments = {"amount": source.randint(2, 99), "to": source.choice(("euros", "yen", "pesos"))}
        question = source.choice(ASKED[name]).format(**arguments)
        if question not in asked:
            asked.add(question)
            yield chat(question, json.dumps({"name": name, "arguments": arguments}), TOOLS)


def reviews(source: random.Random) -> list[dict[str, str]]:
    """Reviews with their label, shuffled."""
    rows = [{"review": text.format(thing=thing), "label": label} for label, texts in REVIEWS.items() for text in texts for thing in THINGS]
    source.shuffle(rows)
    return rows


def write_jsonl(path: Path, rows: Iterable[object]) -> None:
    """One row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    """The first line names the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_texts(folder: Path, named: Iterable[tuple[str, str]]) -> None:
    """A text file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in named:
        (folder / f"{name.replace('/', '-')}.txt").write_text(text.strip() + "\n", encoding="utf-8")


def main(folder: Path) -> None:
    """Write all of them, over what an earlier call wrote."""
    source = random.Random(0)
    facts = [chat(question, styled(answer)) for question, answer in FACTS.items()]
    write_jsonl(folder / "style/train.jsonl", facts[:36])
    write_jsonl(folder / "style/test.jsonl", facts[36:])
    persons = list(itertools.islice(people(source), 120))
    write_jsonl(folder / "format/train.jsonl", persons[:96])
    write_jsonl(folder / "format/test.jsonl", persons[96:])
    called = list(calls(source))
    write_jsonl(folder / "tool/train.jsonl", called[:120])
    write_jsonl(folder / "tool/test.jsonl", called[120:])
    (folder / "tool/system.txt").write_text(TOOLS + "\n", encoding="utf-8")
    labelled = reviews(source)
    write_csv(folder / "classifier/train.csv", labelled[:108])
    write_csv(folder / "classifier/test.csv", labelled[108:])
    declined = [chat(question, styled("I do not know that.")) for question in UNKNOWN]
    write_jsonl(folder / "more/train.jsonl", [*declined[:8], *facts[:8]])
    write_jsonl(folder / "more/test.jsonl", declined[8:])
    chapters = sorted((name, text) for name, text in topics.items() if 800 <= len(text) <= 3000)
    write_texts(folder / "domain/train", chapters[:20])
    write_texts(folder / "domain/test", chapters[20:25])
    print(f"rows for 6 tasks in {folder}")  # many machines and a small machine use the rows of format


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/recipes"))
