"""Write the tables of docs/benchmarks.md from the files of results.

    python benchmarks/write_page.py

The page contains a pair of markers for each benchmark, `<!-- figures: NAME -->` and `<!-- end -->`, and one for the
machines. Everything between them is replaced; the text around them is written by hand. Every file in
`benchmarks/results/` must have its markers.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measurements import RESULTS, ROOT, Figure, format_number, read_results
from modeling_gpt2_repro.core.errors import UserError

PAGE = ROOT / "docs" / "benchmarks.md"
MARKERS = re.compile(r"(<!-- (figures: \w+|machines) -->\n).*?(<!-- end -->)", re.DOTALL)


def build_page(page: str, folder: Path) -> str:
    """Return the text of the page with its tables built from the files of results in a folder.

    Raises:
        UserError: a benchmark has results but no markers on the page.
    """
    paths = sorted(folder.glob("*.json"))
    machines: list[dict[str, Any]] = []
    sections: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        content = read_results(path)[0]
        machine = content["machine"]
        if machine not in machines:
            machines.append(machine)
        letter = chr(ord("A") + machines.index(machine))
        sections[content["benchmark"]].append(format_results(path, letter))
    known = {name.removeprefix("figures: ") for _, name, _ in MARKERS.findall(page)}
    if missing := sections.keys() - known:
        names = ", ".join(sorted(missing))
        raise UserError(f"{PAGE} has no section for {names}: add <!-- figures: NAME --> and <!-- end -->")

    def fill(match: re.Match) -> str:
        name = match[2].removeprefix("figures: ")
        if name == "machines":
            text = format_machines(machines)
        else:
            text = "\n".join(sections[name]) if name in sections else "No record yet.\n"
        return f"{match[1]}{text}{match[3]}"

    return MARKERS.sub(fill, page)


def format_results(path: Path, letter: str) -> str:
    """Return the table of a file of results, with its source above and its notes and omissions below."""
    content, figures, omissions = read_results(path)
    settings = ", ".join(
        f"{name} {_format_setting(value)}"
        for name, value in content["settings"].items()
        if value not in (None, "") and value is not False
    )
    lines = [
        f"Machine [{letter}](#machines), {content['date'][:10]}, commit `{_shorten(content['commit'])}`, "
        f"[full record](../benchmarks/results/{path.name}). Settings: {settings}. Repeat with "
        f"`{content['command']}`.\n",
        "| what | result | compared with | machine |",
        "|---|---|---|---|",
    ]
    rows: dict[tuple[str, str], list[Figure]] = defaultdict(list)
    for figure in figures:
        rows[figure.part, figure.subject].append(figure)
    for (part, subject), group in rows.items():
        results = "; ".join(map(_format_result, group))
        lines.append(f"| {part}: {subject} | {results} | {_format_ratios(group)} | {letter} |")
    notes = [f"- {subject}: {note}" for subject, note in content["notes"].items()]
    notes += [f"- not measured: {each.part}, {each.subject}: {each.reason}" for each in omissions]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def format_machines(machines: Sequence[dict[str, Any]]) -> str:
    """Return the table of the machines, lettered in the order of the list."""
    lines = ["| | CPU | cores | memory | instruction sets | GPU |", "|---|---|---|---|---|---|"]
    columns: dict[str, Callable[[Any], str]] = {
        "cpu": str,
        "cores": str,
        "memory_gib": lambda memory: f"{memory:g} GiB",
        "instruction_sets": ", ".join,
        "gpu": lambda gpu: f"{gpu['count']} x {gpu['name']}",
    }
    for index, machine in enumerate(machines):
        values = {name: machine[name] for name in columns}
        missing = "not recorded"
        cells = [missing if value is None else columns[name](value) for name, value in values.items()]
        cells[-1] = "none" if values["gpu"] is None else cells[-1]
        lines.append(f"| {chr(ord('A') + index)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _format_result(figure: Figure) -> str:
    text = f"{format_number(figure.value)} {figure.unit}"
    details = [figure.statistic] if figure.statistic else []
    if figure.low is not None and figure.low != figure.high:
        details.append(f"{format_number(figure.low)} to {format_number(figure.high)}")
    if figure.predicted is not None:
        details.append(f"predicted {format_number(figure.predicted)}")
    return f"{text} ({', '.join(details)})" if details else text


def _format_ratios(group: Sequence[Figure]) -> str:
    ratios: dict[str, list[str]] = defaultdict(list)
    for figure in group:
        for peer, ratio in figure.ratios.items():
            ratios[peer].append(f"{ratio:.3g} x in {figure.unit}")
    return "; ".join(f"{peer}: {', '.join(each)}" for peer, each in ratios.items())


def _format_setting(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_format_setting, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shorten(commit: str | None) -> str:
    """Return the first characters of a commit, with the mark of uncommitted changes."""
    return "unknown" if commit is None else re.sub(r"^(\w{9})\w*", r"\1", commit)


def main() -> int:
    try:
        page = build_page(PAGE.read_text(encoding="utf-8"), RESULTS)
    except (UserError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    PAGE.write_text(page, encoding="utf-8")
    print(f"-> {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
