"""The text the demo model learns from: the documentation that every Python carries.

The language reference's topics (`pydoc_data.topics`), docstrings of what is written in C, and
docstrings and longer comments of the standard library, read from its sources so that nothing is
imported for its side effects. Only prose is kept: examples, grammars and tables are dropped. All of
it is under Python's PSF licence. This file knows neither tokens nor models.
"""

import ast
import builtins
import importlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

SKIPPED = {
    *("test", "tests", "site-packages", "lib2to3", "idlelib", "turtledemo", "ensurepip"),
    *("encodings", "pydoc_data", "__pycache__"),
}
SIGNATURE = re.compile(r"(?:(?:class|classmethod|async) )?([A-Za-z_][\w.]*)\(.*\)")
ITEM = re.compile(r" *(?:\*|-|\d+\.) +")
DANGLING = re.compile(r"(?::|\b(?:to|as|is|are|like|the|by|with|in|of|for|follows))$")
UNWANTED = re.compile(
    r">>>|::=|---|===|\.\.\. \.\.\.|[|{}\\@]|->|</?\w+>|\bself\.|[Cc]opyright|[Ll]icen[cs]e"
    r"|[Nn]ew in version|[Cc]hanged in version|[Dd]eprecated since|XXX|TODO|FIXME"
    r"|https?:|\b(def|lambda|elif)\b.*:"
)
TO_ASCII = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "—": "-", "–": "-", "…": "...", "\xa0": " "}
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the documentation says about one thing."""

    document: str  # entries of one document follow each other in the text
    name: str  # "str.split", "textwrap", "The import statement"
    kind: str  # "topic", "module", "class", "function", "method" or "comment"
    paragraphs: tuple[str, ...]


def entries() -> list[Entry]:
    """Everything this Python says about itself, each paragraph once."""
    seen: set[str] = set()
    kept = []
    for entry in [*_topics(), *_compiled(), *_library()]:
        new = tuple(p for p in dict.fromkeys(entry.paragraphs) if p not in seen)
        seen.update(p for p in new if len(p) > 60)
        if new and new[0] == entry.paragraphs[0]:
            kept.append(replace(entry, paragraphs=new))
    return kept


def _topics() -> Iterator[Entry]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            "expected a Python with pydoc_data.topics, got one without (some distributions leave "
            "it out); write the corpus with another Python (--prepare FILE), pass it as --corpus"
        ) from error
    for key in sorted(topics, key=lambda key: len(topics[key])):  # long topics repeat short ones
        yield from _sections(key, topics[key])


def _sections(key: str, text: str) -> Iterator[Entry]:
    """One entry for each heading and each described method of a topic."""
    text = re.sub(r"^(\S.*)\n([*=\-~^\"])\2{2,}$", "\n\x01\\1\n", text, flags=re.M)
    title, name, outer, blocks = key, key, "", []
    for block in [*re.split(r"\n\s*\n", text.strip("\n")), "\x01"]:
        is_heading, indent = block.startswith("\x01"), len(block) - len(block.lstrip())
        described = SIGNATURE.fullmatch(" ".join(block.split("\n")[-1].split()))
        starts = is_heading or (described and (not indent or outer)) or (outer and not indent)
        if not starts:
            blocks.append(block)
            continue
        if name and (found := _paragraphs(blocks)):
            kind = "topic" if not outer else "method" if "." in name else "class"
            yield Entry(document=f"topic {key}", name=name, kind=kind, paragraphs=found)
        title = _plain(block[1:]) if is_heading else title
        outer = "" if not described else outer if indent else described[1]
        name = _described_name(described[1], outer) if described else title
        blocks = [] if described or is_heading else [block]


def _described_name(name: str, outer: str) -> str:
    """The full name of a described thing; "" for what only looks like a method, as len(d)."""
    if name != outer:
        return f"{outer}.{name}" if hasattr(getattr(builtins, outer, None), name) else ""
    return name if "." in name or inspect.isclass(getattr(builtins, name, None)) else ""


def _compiled() -> Iterator[Entry]:
    """Docstrings of the built-ins and of the modules compiled into the interpreter."""
    for module_name in ["builtins", *sorted(sys.builtin_module_names)]:
        if module_name.startswith(("_test", "xx", "_sre")):
            continue
        prefix = "" if module_name == "builtins" else f"{_public(module_name)}."
        for name, value in vars(importlib.import_module(module_name)).items():
            if name.startswith("_") or not callable(value):
                continue
            document, is_class = f"{module_name}.{name}", inspect.isclass(value)
            kind = "class" if is_class else "function"
            yield from _documented(document, prefix + name, kind, value.__doc__)
            for method, function in vars(value).items() if is_class else ():
                if not method.startswith("_") and callable(function):
                    path = f"{prefix}{name}.{method}"
                    yield from _documented(document, path, "method", function.__doc__)


def _library() -> Iterator[Entry]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.intersection(parts) or any(part.startswith("test_") for part in parts):
            continue
        name = ".".join(part for part in parts if part != "__init__")
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue  # a template, not a module
        yield from _documented(name, _public(name), "module", ast.get_docstring(tree))
        yield from _definitions(name, _public(name), tree)
        for comment in re.findall(r"(?:^[ \t]*#+ .*\n){3,}", source, re.M):
            text = re.sub(r"^[ \t]*#+ ", "", comment, flags=re.M)
            yield from _documented(f"{name} comments", _public(name), "comment", text)


def _definitions(document: str, prefix: str, tree: ast.AST) -> Iterator[Entry]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If | ast.Try):
            yield from _definitions(document, prefix, node)
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_"):
            continue
        path, is_class = f"{prefix}.{node.name}", isinstance(node, ast.ClassDef)
        kind = "class" if is_class else "method" if isinstance(tree, ast.ClassDef) else "function"
        yield from _documented(document, path, kind, ast.get_docstring(node))
        if is_class:
            yield from _definitions(document, path, node)


def _documented(document: str, name: str, kind: str, doc: str | None) -> Iterator[Entry]:
    if not isinstance(doc, str):
        return
    if found := _paragraphs(re.split(r"\n\s*\n", inspect.cleandoc(doc))):
        yield Entry(document=document, name=name, kind=kind, paragraphs=found)


def _public(module: str) -> str:
    return re.sub(r"^_(py)?", "", module)


def _paragraphs(blocks: list[str]) -> tuple[str, ...]:
    """The prose among `blocks`; a sentence that announces a dropped example goes with it."""
    kept: list[str] = []
    for index, block in enumerate([*blocks, ""]):
        items = [_plain(item) for item in re.split(r"\n(?= *(?:\*|-|\d+\.) )", block)]
        if index == 0 and items[0][-1:].isalnum() and not DANGLING.search(items[0]):
            items[0] = f"{items[0][0].upper()}{items[0][1:]}."
        if all(map(_is_prose, items)):
            kept.append("\n".join(items))
        elif kept and DANGLING.search(kept[-1]):
            kept.pop()
    return tuple(kept)


def _plain(text: str) -> str:
    """ASCII without markup, on one line: `"import"`, ``import`` and *import* become import."""
    text = text.translate(TO_ASCII)
    bullet = "- " if ITEM.match(text) else ""
    text = re.sub(r"(\w-)\n\s*(?=\w)", r"\1", ITEM.sub("", text, count=1) if bullet else text)
    text = " ".join(text.split())
    text = re.sub(r"^[\w.]+\([^)]*\)(?: ->[^:]*?)? ?(?:--?|:) |:\w+:(?=`)|\s*\[\d\]", "", text)
    text = re.sub(r"\"(\"?[^\"\s]+\"?)\"|`+~?([^`]+?)[`']+", r"\1\2", text)
    text = re.sub(r"(?<!\w)(\*\*?)(\w[^*]*)\1(?!\w)", r"\2", text).replace("::", ":")
    return bullet + text + ("." if bullet and text[-1:].isalnum() else "")


def _is_prose(text: str) -> bool:
    words = text.removeprefix("- ").split()
    plain = sum(char.isalpha() or char in " ,." for char in text)
    return (
        len(words) >= 3
        and text.isascii()
        and text[-1] in '.:;!?")'
        and plain >= 0.88 * len(text)
        and not UNWANTED.search(text)
    )
