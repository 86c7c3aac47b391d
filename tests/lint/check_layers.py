#!/usr/bin/env python3
"""Checks who includes whom.

    check_layers.py [ROOT]

- A folder of server/ includes only itself, `base` and what tests/lint/layers.txt allows it.
- client/ includes client/, statistics/ and generated messages, nothing of the server.
- statistics/, which server and client share, includes itself and model_proto.
- Nothing outside tests/ includes tests/; only server/app includes the embedded models/.
- A third-party library is included only by the folders that own it.
- layers.txt names every folder of server/, nothing else, and has no cycle; neither have the headers.
"""

import pathlib
import re
import sys

INCLUDE = re.compile(r'^\s*#\s*include\s+(["<])([^">]+)[">]')
SOURCES = {".cc", ".h", ".inc"}

# Prefix of an include path -> the folders that may use the library (tests/ are free).
OWNERS = [
    (("grpc/", "grpc++/", "grpcpp/"), {"server/rpc", "server/app", "client"}),
    (("prometheus/",), {"server/metrics"}),
    (("boost/",), {"server/http"}),
    (("dnnl", "oneapi/"), {"server/engine"}),
    (("onnx/",), {"server/onnx"}),
    (("opencv2/", "turbojpeg.h", "jpeglib.h", "png.h", "webp/", "libexif/"), {"server/image"}),
    (("immintrin.h", "x86intrin.h", "xmmintrin.h", "emmintrin.h", "arm_neon.h"), {"server/kernels"}),
    (("Eigen/",), {"server/quant"}),
    (("CLI/",), {"client", "server/finetune"}),
    (("ATen/", "c10/", "torch/"), {"server/finetune"}),
]
MESSAGES = {"model": "model_proto", "artifact": "artifact_proto"}


def folder_of(path):
    """"server/image" or "client", the unit that rules speak of."""
    parts = path.split("/")
    return "/".join(parts[:2]) if parts[0] == "server" else parts[0]


def message_library(include):
    """The library of a generated header: model_proto, artifact_proto or api_proto of tern/v1, or inference_proto."""
    if include.startswith("inference/"):
        return "inference_proto"
    return MESSAGES.get(pathlib.PurePosixPath(include).name.split(".")[0], "api_proto")


def read_layers(root, problems):
    allowed = {}
    path = root / "tests/lint/layers.txt"
    for number, line in enumerate(path.read_text().splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        name, colon, rest = line.partition(":")
        if not colon or name in allowed:
            problems.append(f"tests/lint/layers.txt:{number}: want one 'folder: names' line per folder: {line}")
            continue
        allowed[name] = set(rest.split())
    folders = {p.name for p in (root / "server").iterdir() if p.is_dir()}
    for name in sorted(folders - allowed.keys()):
        problems.append(f"server/{name}: has no line in tests/lint/layers.txt")
    for name in sorted(allowed.keys() - folders):
        problems.append(f"tests/lint/layers.txt: there is no folder server/{name}")
    known = folders | set(MESSAGES.values()) | {"api_proto", "inference_proto"}
    for name, deps in allowed.items():
        for dep in sorted(deps - known):
            problems.append(f"tests/lint/layers.txt: {name} may include {dep}, which does not exist")
    return allowed


def find_cycle(edges):
    """A list of nodes whose first and last are the same, or None."""
    state = {}
    for start in sorted(edges):
        if start in state:
            continue
        path = [(start, iter(sorted(edges[start])))]
        state[start] = "open"
        while path:
            node, rest = path[-1]
            following = next(rest, None)
            if following is None:
                state[node] = "done"
                path.pop()
            elif state.get(following) == "open":
                nodes = [n for n, _ in path]
                return nodes[nodes.index(following):] + [following]
            elif following not in state and following in edges:
                state[following] = "open"
                path.append((following, iter(sorted(edges[following]))))
    return None


def check(root):
    root = pathlib.Path(root)
    problems = []
    allowed = read_layers(root, problems)
    cycle = find_cycle({name: {d for d in deps if d in allowed and d != name} for name, deps in allowed.items()})
    if cycle:
        problems.append("tests/lint/layers.txt: cycle " + " -> ".join(cycle))

    includes = {}  # file -> project files that it includes
    for top in ("server", "client", "statistics", "models", "tests"):
        for path in sorted((root / top).rglob("*")):
            if path.suffix not in SOURCES:
                continue
            name = path.relative_to(root).as_posix()
            folder = folder_of(name)
            layer = folder.split("/")[1] if "/" in folder else None
            includes[name] = set()
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                match = INCLUDE.match(line)
                if not match:
                    continue
                quoted, include = match.group(1) == '"', match.group(2)
                where = f"{name}:{number}"
                target = folder_of(include)
                if quoted and include.split("/")[0] in ("server", "client", "statistics", "models", "tests"):
                    includes[name].add(include)
                    if not (root / include).is_file():
                        problems.append(f"{where}: {include} does not exist")
                elif quoted and "/" not in include and (path.parent / include).is_file():
                    problems.append(f"{where}: write includes from the root of the repository: {include}")
                if top == "tests":
                    continue
                for prefixes, owners in OWNERS:
                    if include.startswith(prefixes) and folder not in owners:
                        problems.append(f"{where}: {include} belongs to {', '.join(sorted(owners))}")
                if target == "tests":
                    problems.append(f"{where}: includes a test's {include}")
                if target == "models" and folder not in ("models", "server/app"):
                    problems.append(f"{where}: only server/app includes {include}")
                if top == "models" and target.split("/")[0] in ("server", "client"):
                    problems.append(f"{where}: models/ stands alone, but includes {include}")
                if top == "statistics" and (target.split("/")[0] in ("server", "client") or
                                            include.startswith("tern/v1/") and message_library(include) != "model_proto"):
                    problems.append(f"{where}: statistics/ includes only itself and model_proto: {include}")
                if top == "client" and target.startswith("server"):
                    problems.append(f"{where}: the client shares no code with the server: {include}")
                if top == "server" and layer is not None:
                    if target == "client":
                        problems.append(f"{where}: the server shares no code with the client: {include}")
                    wanted = None
                    if target.startswith("server/"):
                        wanted = target.split("/")[1]
                    elif include.startswith(("tern/v1/", "inference/")):
                        wanted = message_library(include)
                    if wanted not in (None, layer, "base") and wanted not in allowed.get(layer, set()):
                        problems.append(f"{where}: server/{layer} may not include {include} "
                                        "(tests/lint/layers.txt)")
    cycle = find_cycle(includes)
    if cycle:
        problems.append("headers include each other: " + " -> ".join(cycle))
    return problems


def main():
    root = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).resolve().parents[2]
    problems = check(root)
    for problem in problems:
        print(problem)
    print(f"layers: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
