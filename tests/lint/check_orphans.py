#!/usr/bin/env python3
"""Checks that every source file is built or included, and none is built twice.

    check_orphans.py [ROOT]

- Every .cc and .proto under server/, client/, statistics/, models/, tests/ and proto/ is listed in exactly one target of a
  CMakeLists.txt (a .cc of tests/ may serve several tests), every .h and .inc is included by another file,
  or stands in front of a library's own of that name (#include_next).
- Every source that a CMakeLists.txt lists exists.

CMake is read as text: commands, `foreach` over literal items, `${name}` of such a loop.
"""

import pathlib
import re
import sys

TOPS = ("server", "client", "statistics", "models", "tests", "proto")
# Commands whose arguments are sources to build. Others (set_source_files_properties, ...) only mention files.
BUILDING = {"add_library", "add_executable", "target_sources", "tern_library", "tern_test", "tern_proto_library",
            "tern_isa_source", "tern_fuzzer"}
COMMAND = re.compile(r"([A-Za-z_]\w*)\s*\(((?:[^()\"]|\"(?:[^\"\\]|\\.)*\"|\([^()]*\))*)\)", re.S)
TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|([^\s"()]+)')
INCLUDE_NEXT = re.compile(r"^\s*#\s*include_next\s+<([^>]+)>", re.M)
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)


def commands(text):
    """(name, arguments) in order, with foreach loops unrolled."""
    text = re.sub(r"#.*", "", text)
    flat = [(m.group(1).lower(), [a or b for a, b in TOKEN.findall(m.group(2))]) for m in COMMAND.finditer(text)]

    def unroll(start, variables):
        out = []
        i = start
        while i < len(flat):
            name, arguments = flat[i]
            for variable, value in variables.items():
                arguments = [a.replace("${%s}" % variable, value) for a in arguments]
            if name == "endforeach":
                return out, i
            if name == "foreach" and arguments:
                items = [a for a in arguments[1:] if a not in ("IN", "ITEMS")]
                end = i
                for item in items or [""]:
                    body, end = unroll(i + 1, {**variables, arguments[0]: item})
                    if items:
                        out += body
                i = end
            else:
                out.append((name, arguments))
            i += 1
        return out, i

    return unroll(0, {})[0]


def check(root):
    root = pathlib.Path(root)
    problems = []
    built = {}  # file -> targets' CMakeLists.txt
    for lists in sorted(p for top in TOPS for p in (root / top).rglob("CMakeLists.txt")):
        where = lists.relative_to(root).as_posix()
        for name, arguments in commands(lists.read_text()):
            if name not in BUILDING:
                continue
            for argument in arguments:
                if not argument.endswith((".cc", ".proto")):
                    continue
                argument = argument.replace("${CMAKE_CURRENT_SOURCE_DIR}/", "").replace("${PROJECT_SOURCE_DIR}/", "/")
                if "${" in argument or "$<" in argument:
                    continue
                base = root / "proto" if argument.endswith(".proto") else lists.parent
                path = root / argument[1:] if argument.startswith("/") else base / argument
                if not path.is_file():
                    problems.append(f"{where}: lists {argument}, which does not exist")
                    continue
                built.setdefault(path.resolve().relative_to(root.resolve()).as_posix(), []).append(where)

    files = sorted(p for top in TOPS for p in (root / top).rglob("*") if p.suffix in (".cc", ".h", ".inc", ".proto"))
    included = set()
    for path in files:
        name = path.relative_to(root).as_posix()
        text = path.read_text(errors="replace")
        included |= {i for i in INCLUDE.findall(text) if i != name}
        if any(path.match(i) for i in INCLUDE_NEXT.findall(text)):
            included.add(name)
    for path in files:
        name = path.relative_to(root).as_posix()
        lists = built.get(name, [])
        if path.suffix in (".h", ".inc"):
            if name not in included:
                problems.append(f"{name}: no file includes it")
        elif not lists:
            problems.append(f"{name}: no CMakeLists.txt lists it")
        elif len(lists) > 1 and not name.startswith("tests/"):
            problems.append(f"{name}: listed {len(lists)} times, in {', '.join(sorted(set(lists)))}")
    return problems


def main():
    root = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).resolve().parents[2]
    problems = check(root)
    for problem in problems:
        print(problem)
    print(f"orphans: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
