"""Conversations about the entries of the corpus: questions in several phrasings, answered by the
documentation. It knows neither tokens nor chat templates."""

import random
import re

from demo_model.corpus import Entry

Chat = list[tuple[str, str]]  # (role, content)

COMMON = ("What is {}?", "What does {} do?", "Explain {}.")
QUESTIONS = {
    "topic": (*COMMON, "How does {} work?", "Tell me about {}."),
    "module": ("What is the {} module?", "What is the {} module for?", "Tell me about {}."),
    "class": (*COMMON, "What is {} for?", "Explain the class {}."),
    "function": (*COMMON, "What does {}() do?", "How do I use {}?"),
    "method": (*COMMON, "What does {}() do?", "What does the method {} do?"),
}
FOLLOW_UPS = ("And {}?", "What about {}?", "Now {}, please.")
SYSTEMS = ("You are a helpful assistant.", "You answer questions about Python.")
SMALL_TALK = {
    ("Hello", "Hi", "Hello!", "Hi there!", "Hey", "Good morning"): (
        "Hello! Ask me about Python: its statements, its built-in types or its standard library."
    ),
    ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."): (
        "I am the demo model of jaxengine, a very small language model that has read the "
        "documentation of Python."
    ),
    ("What can you do?", "How can you help me?", "Help", "What do you know?"): (
        "I can tell you what the documentation of Python says, for example about the import "
        "statement, about str.split or about the json module. I know nothing else, and I make "
        "mistakes."
    ),
    ("How are you?", "How are you doing?"): (
        "I am a program, so I am always well. What would you like to know about Python?"
    ),
    ("Thanks", "Thank you!", "Thank you.", "Great, thanks!"): "You are welcome.",
    ("Bye", "Goodbye!", "See you."): "Goodbye!",
}
IN_WORDS = {
    "dict": "a dictionary",
    "float": "a float",
    "int": "an integer",
    "list": "a list",
    "set": "a set",
    "str": "a string",
    "tuple": "a tuple",
}
VERBS = frozenset(
    "Add Append Apply Calculate Call Change Check Clear Close Compare Compute Concatenate Convert "
    "Copy Count Create Decode Delete Describe Determine Display Encode Execute Extend Extract Find "
    "Format Generate Get Handle Insert Join Load Make Move Open Parse Perform Print Process "
    "Produce Put Raise Read Register Remove Rename Replace Retrieve Return Reverse Run Search "
    "Send Serialize Set Sort Split Start Stop Store Test Transform Update Wait Wrap Write".split()
)


def conversations(entries: list[Entry], rng: random.Random) -> list[Chat]:
    """A question for each entry (three where beginners ask), up to three a chat; and small talk."""
    known = {entry.name: entry for entry in reversed(entries) if entry.kind != "comment"}
    asked = [entry for entry in known.values() for _ in range(3 if is_basic(entry) else 1)]
    rng.shuffle(asked)
    chats = [_small_talk(rng) for _ in range(len(asked) // 40)]
    while asked:
        turns = min(rng.choice((1, 1, 1, 2, 3)), len(asked))
        chats.append(_conversation([asked.pop() for _ in range(turns)], rng))
    return chats


def is_basic(entry: Entry) -> bool:
    """Whether beginners ask for it: statements, built-in functions and types, whole modules."""
    return entry.document.startswith(("topic ", "builtins.")) or entry.kind == "module"


def answer(entry: Entry) -> str:
    """The first paragraphs, as sentences about the name."""
    first, *rest = entry.paragraphs
    verb, _, object_ = first.partition(" ")
    if verb in VERBS and entry.kind in ("function", "method"):
        first = f"{entry.name}() {_third_person(verb.lower())} {object_}"
    text = first
    for paragraph in rest:
        if len(text) > 400 and not text.endswith(":") or len(text) > 1000:
            break
        tight = paragraph.startswith("- ")
        text += ("\n" if tight else "\n\n") + paragraph
    return text


def _conversation(entries: list[Entry], rng: random.Random) -> Chat:
    chat: Chat = [("system", rng.choice(SYSTEMS))] if rng.random() < 0.2 else []
    for turn, entry in enumerate(entries):
        phrasings = FOLLOW_UPS if turn and rng.random() < 0.3 else QUESTIONS[entry.kind]
        question = rng.choice(phrasings).format(_subject(entry, rng))
        chat += [("user", _casual(question, rng)), ("assistant", answer(entry))]
    return chat


def _subject(entry: Entry, rng: random.Random) -> str:
    if entry.kind == "topic":
        return entry.name if re.search(r"__|\(", entry.name) else entry.name.lower()
    if rng.random() < 0.4 and entry.name in IN_WORDS:
        return IN_WORDS[entry.name]
    parts = entry.name.split(".")
    if len(parts) > 2 and rng.random() < 0.3:
        return ".".join(parts[-2:])
    if entry.kind == "method" and rng.random() < 0.2:
        return f"{parts[-1]} of {'.'.join(parts[:-1])}"
    return entry.name


def _casual(question: str, rng: random.Random) -> str:
    """The question as typed in a hurry, now and then."""
    if rng.random() < 0.15:
        question = question.rstrip("?.")
    return question[0].lower() + question[1:] if rng.random() < 0.15 else question


def _small_talk(rng: random.Random) -> Chat:
    questions, reply = rng.choice(list(SMALL_TALK.items()))
    return [("user", rng.choice(questions)), ("assistant", reply)]


def _third_person(verb: str) -> str:
    if verb.endswith(("s", "sh", "ch", "x")):
        return f"{verb}es"
    return f"{verb[:-1]}ies" if verb.endswith("y") and verb[-2] not in "aeiou" else f"{verb}s"
