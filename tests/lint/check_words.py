#!/usr/bin/env python3
"""Checks every file of the repository for what must not be committed.

    check_words.py [ROOT]

- markers of unfinished work;
- paths of one machine (home folders, a work folder at the root) and hosts of package registries: the project builds from
  whatever package source its user has configured;
- files above 3 MB.
"""

import pathlib
import re
import subprocess
import sys

MAX_BYTES = 3_000_000
SKIPPED_FOLDERS = {".git", ".cache", "__pycache__", "shared"}
# Written in pieces, so that this file passes its own check.
RULES = [
    (re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX)\b"), "unfinished work"),
    (re.compile(r"(?<![\w.~}/-])(?<!\w[\"'])/(wo" r"rk|ro" r"ot|ho" r"me/\w+|us" r"ers/\w+)(?=/|\b(?![-\w]))", re.I), "a path of one machine"),
    (re.compile(r"\b(deb|security|snapshot|ftp)\.deb" r"ian\.org\b|\bpy" r"pi\.org\b|\bpython" r"hosted\.org\b|\bregistry\.npm"
                r"js\.org\b|\bcrates\." r"io\b|\bproxy\.go" r"lang\.org\b|\bregistry-1\.doc" r"ker\.io\b|\bartifac" r"tory\b",
                re.I), "a package host"),
]


def files(root):
    """What git tracks or would add; outside git every file but build folders."""
    if (root / ".git").exists():
        listed = subprocess.run(["git", "-c", "safe.directory=*", "-C", str(root), "ls-files", "-z", "--cached", "--others",
                                 "--exclude-standard"], capture_output=True, check=True).stdout
        names = [n for n in listed.decode().split("\0") if n]
    else:
        names = [p.relative_to(root).as_posix() for p in root.rglob("*")]
    for name in sorted(set(names)):
        parts = pathlib.PurePosixPath(name).parts
        path = root / name
        if not SKIPPED_FOLDERS.intersection(parts) and not parts[0].startswith("build") and path.is_file() \
                and not path.is_symlink():
            yield name, path


def check(root):
    root = pathlib.Path(root)
    problems = []
    for name, path in files(root):
        size = path.stat().st_size
        if size > MAX_BYTES:
            problems.append(f"{name}: {size} bytes, the limit is {MAX_BYTES}")
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            for pattern, what in RULES:
                match = pattern.search(line)
                if match:
                    problems.append(f"{name}:{number}: {what}: {match.group(0)}")
    return problems


def main():
    root = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).resolve().parents[2]
    problems = check(root)
    for problem in problems:
        print(problem)
    print(f"words: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
