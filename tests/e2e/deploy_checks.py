#!/usr/bin/env python3
"""Checks of docker/ and deploy/prometheus: syntax, names of flags, what the image is made of. What needs python3-yaml is
skipped where that is not installed, and says so."""

import argparse
import pathlib
import re
import subprocess
import sys
import unittest

try:
    import yaml
except ImportError:
    yaml = None

SOURCE = None  # pathlib.Path of the repository
needs_yaml = unittest.skipUnless(yaml, "python3-yaml is not installed")


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def load_yaml(path):
    with open(path) as f:
        return list(yaml.load_all(f, UniqueKeyLoader))


if yaml:

    class UniqueKeyLoader(yaml.SafeLoader):
        """YAML takes the last of two equal keys without a word; Kubernetes does not."""

        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=deep) for key, _ in node.value if not key.tag.endswith(":merge")]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", node.start_mark)
            return super().construct_mapping(node, deep)


class Container(unittest.TestCase):

    @needs_yaml
    def test_plain_yaml_parses(self):
        for path in [*(SOURCE / "deploy/prometheus").glob("*.yml"), *(SOURCE / "docker").rglob("*.yaml")]:
            with self.subTest(path=path.name):
                self.assertTrue(load_yaml(path))

    def test_flags_of_the_containers_exist(self):
        flags = set(re.findall(r"ABSL_FLAG\(\s*[^,]+,\s*(\w+),", (SOURCE / "server/app/main.cc").read_text()))
        entry = re.search(r"^ENTRYPOINT .*$", (SOURCE / "docker/Dockerfile").read_text(), re.M)[0]
        command = re.search(r"^    command: .*$", (SOURCE / "docker/compose.yaml").read_text(), re.M)[0]
        used = set(re.findall(r"--([a-z_]+)", entry + command))
        self.assertIn("repository", used)
        self.assertLessEqual(used, flags)

    def test_the_image_is_minimal_and_not_root(self):
        text = (SOURCE / "docker/Dockerfile").read_text()
        runtime = text[text.rindex("\nFROM "):]
        self.assertTrue(runtime.startswith("\nFROM scratch\n"))
        self.assertRegex(runtime, r"\nUSER 65532")
        self.assertNotIn("\nRUN ", runtime)
        self.assertNotIn("VOLUME", runtime)
        self.assertRegex(runtime, r"\nEXPOSE 8500 8501 8502\n")

    def test_every_folder_that_the_build_copies_passes_the_ignore_file(self):
        copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (SOURCE / "docker/Dockerfile").read_text(), re.M)
        kept = set(re.findall(r"^!(\S+)", (SOURCE / "docker/Dockerfile.dockerignore").read_text(), re.M))
        for name in " ".join(copied).split():
            self.assertTrue({name, name.split("/")[0]} & kept, name)
            self.assertTrue((SOURCE / name).exists(), name)

    def test_scripts_parse(self):
        for script in ("build_image.sh", "rootfs.sh"):
            result = run("bash", "-n", str(SOURCE / "docker" / script))
            self.assertEqual(result.returncode, 0, result.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", required=True, type=pathlib.Path)
    arguments, rest = parser.parse_known_args()
    SOURCE = arguments.source.resolve()
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)
