"""The built-in corpus: documentation of the installed Python packages.

It needs no network, is tens of megabytes of English, and exists on every machine that can run this package: enough to
exercise every part of the reproduction. Its content depends on the installed packages.
"""

import ast
import dataclasses
import gc
import hashlib
import itertools
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

FILES_PER_TASK = 64

# Shorter documents are stubs such as "Package init.", which teach a model little more than document boundaries.
MIN_DOCUMENT_CHARACTERS = 200

# Larger text files are tables or word lists, not documentation.
MAX_TEXT_FILE_BYTES = 2**20

PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
# Fraction of letters and spaces in a paragraph: over four fifths in English text, even with identifiers, and less in
# code examples, tables and paths.
MIN_LETTERS = 0.8
MIN_PARAGRAPH_WORDS = 5

PROSE_SUFFIXES = (".md", ".rst", ".txt")
# Tests are a fifth of all code, which is slow to parse, and have hardly any docstrings.
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "test", "tests", "licenses", "node_modules"}
# Hundreds of packages contain slightly different copies of the same license.
SKIPPED_STEMS = {"license", "licence", "copying", "notice", "authors", "third_party_notices"}


@dataclasses.dataclass(frozen=True)
class DocstringTask:
    """A group of source and documentation files, one document each."""

    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.paths[0]

    def read_batches(self) -> Iterator[pa.LargeStringArray]:
        """Yield the files' documents; files with too little documentation have none."""
        documents = (read_documentation(Path(path)) for path in self.paths)
        yield pa.array([text for text in documents if len(text) >= MIN_DOCUMENT_CHARACTERS], pa.large_string())


def list_docstring_tasks() -> Iterator[DocstringTask]:
    """Yield the corpus's tasks, ordered by path relative to site-packages or the standard library.

    Files identical to an earlier one, mostly vendored copies, are skipped.
    """
    paths = _list_different_files()
    while group := tuple(itertools.islice(paths, FILES_PER_TASK)):
        yield DocstringTask(group)


def describe_packages() -> str:
    """Return a digest that changes when packages are installed, removed or upgraded."""
    names = sorted(name for root in _list_roots("purelib", "platlib") for name in os.listdir(root))
    content = "\n".join([sys.version, *(name for name in names if name != "__pycache__")])
    return hashlib.sha256(content.encode()).hexdigest()


def read_documentation(path: Path) -> str:
    """Return the prose of one file, or "": from a `.py` file's docstrings, the body of `METADATA`, or a text file."""
    content = path.read_bytes()
    if path.suffix == ".py":
        return keep_prose(extract_docstrings(content))
    text = content.decode("utf-8", errors="ignore")
    if path.name == "METADATA":
        text = text.partition("\n\n")[2]
    return keep_prose(text)


def extract_docstrings(source: bytes) -> str:
    """Return the docstrings of a module, its classes and its functions, in source order, separated by blank lines.

    Source that Python cannot parse (templates, Python 2 code) yields "".
    """
    if b'"""' not in source and b"'''" not in source:
        return ""
    # Garbage collection would traverse the growing tree repeatedly, which takes a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    finally:
        if collecting:
            gc.enable()
    found = []
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(ast.get_docstring(node) or "")
        # Definitions occur in statement lists only; descending into expressions would double the time.
        for block in ("finalbody", "orelse", "handlers", "body"):
            statements = getattr(node, block, ())
            if isinstance(statements, list):
                nodes.extend(reversed(statements))
    text = "\n\n".join(docstring for docstring in found if docstring)
    return text.encode("utf-8", errors="ignore").decode()  # drops lone surrogates such as "\ud800"


def keep_prose(text: str) -> str:
    """Return the paragraphs of a text that are prose, each on one line.

    Code examples, tables, parameter lists and signatures are dropped. So are hard line breaks and indentation, for
    which GPT-2's tokenizer uses one token per space.
    """
    paragraphs = (" ".join(paragraph.split()) for paragraph in PARAGRAPH_BREAK.split(text))
    return "\n\n".join(paragraph for paragraph in paragraphs if is_prose(paragraph))


def is_prose(paragraph: str) -> bool:
    """Return whether a paragraph is prose rather than code or a table: mostly letters, and several words."""
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return (
        letters >= MIN_LETTERS * len(paragraph)
        and paragraph.count(" ") + 1 >= MIN_PARAGRAPH_WORDS
        and ">>>" not in paragraph
    )


def _list_roots(*names: str) -> list[str]:
    return list(dict.fromkeys(os.path.realpath(sysconfig.get_path(name)) for name in names))


def _list_different_files() -> Iterator[str]:
    roots = _list_roots("purelib", "platlib", "stdlib")
    seen: set[bytes] = set()
    for _, path in sorted((path[len(root) :], path) for root in roots for path in _walk(root)):
        digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield path


def _walk(root: str) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for name in files:
            stem, suffix = os.path.splitext(name)
            path = os.path.join(folder, name)
            is_text = (suffix in PROSE_SUFFIXES and stem.lower() not in SKIPPED_STEMS) or name == "METADATA"
            # The tree may contain dangling links and unreadable files.
            is_readable = os.path.isfile(path) and os.access(path, os.R_OK)
            if is_readable and (suffix == ".py" or (is_text and os.path.getsize(path) <= MAX_TEXT_FILE_BYTES)):
                yield path
