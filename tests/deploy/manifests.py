"""What the tests of deploy/ share: YAML that is read as strictly as Kubernetes reads it, and rendered manifests."""

import os
import pathlib
import shutil
import subprocess

import yaml

SOURCE = pathlib.Path(__file__).resolve().parents[2]
CHART = SOURCE / "deploy/helm/tern"
# Of the API types that manifests are checked against; the chart asks which version it is rendered for.
KUBERNETES = "1.35.4"


class StrictLoader(yaml.SafeLoader):
    """YAML takes the last of two equal keys without a word; Kubernetes does not."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def documents(text):
    return [document for document in yaml.load_all(text, StrictLoader) if document is not None]


def run(*command, **options):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, **options)


def tool(name):
    """A program of TERN_DEPLOY_TOOLS (tests/deploy/make_tools.sh), else of the path, else None."""
    path = os.path.join(os.environ.get("TERN_DEPLOY_TOOLS", "/nonexistent"), "bin", name)
    return path if os.access(path, os.X_OK) else shutil.which(name)


def helm_template(*arguments, namespace="serving", kubernetes=KUBERNETES):
    return run(tool("helm"), "template", "release", CHART, "--namespace", namespace, "--kube-version", kubernetes,
               *arguments)


def settings(values):
    return [word for value in values for word in ("--set", value)]


def by_name(objects):
    return {(o["kind"], o["metadata"]["name"]): o for o in objects}


def values_files():
    return sorted((pathlib.Path(__file__).parent / "values").glob("*.yaml"))
