#!/usr/bin/env python3
"""The dashboard against Grafana's own types: every field of every panel is one that Grafana reads.

    TERN_GRAFANA_PYTHON=VENV/bin/python grafana_test.py

TERN_GRAFANA_PYTHON is a Python with grafana-foundation-sdk (make_venv.sh); without it, and without that in this one, the
test says so and ends with 77. The kit drops what it does not know, so what comes back must be what went in.
"""

import copy
import json
import os
import pathlib
import sys
import unittest

if os.environ.get("TERN_GRAFANA_PYTHON") and os.environ["TERN_GRAFANA_PYTHON"] != sys.executable:
    os.execv(os.environ["TERN_GRAFANA_PYTHON"], [os.environ["TERN_GRAFANA_PYTHON"], *sys.argv])
try:
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard
except ImportError as error:
    print(f"grafana_test ... skipped '{error.name} is not installed: make an environment with tests/deploy/make_venv.sh and "
          "set TERN_GRAFANA_PYTHON'")
    sys.exit(77)

SOURCE = pathlib.Path(__file__).resolve().parents[2]
# Grafana's data source writes it; the types of dashboards leave variables' queries to data sources.
OF_THE_DATA_SOURCE = ".templating.list[].definition"


def lost(sent, back, where=""):
    """Paths of what is in `sent` and not in `back`."""
    if isinstance(sent, dict) and isinstance(back, dict):
        for key, value in sent.items():
            if key in back:
                yield from lost(value, back[key], f"{where}.{key}")
            else:
                yield f"{where}.{key}"
    elif isinstance(sent, list) and isinstance(back, list) and len(sent) == len(back):
        for one, other in zip(sent, back):
            yield from lost(one, other, where + "[]")
    elif sent != back:
        yield f"{where}: {sent!r} became {back!r}"


def read(dashboard):
    return json.loads(JSONEncoder().encode(Dashboard.from_json(copy.deepcopy(dashboard))))


class Grafana(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        register_default_plugins()
        cls.dashboard = json.loads((SOURCE / "deploy/grafana/tern.json").read_text())

    def test_it_knows_every_field(self):
        self.assertEqual(set(lost(self.dashboard, read(self.dashboard))), {OF_THE_DATA_SOURCE})

    def test_a_wrong_field_would_be_noticed(self):
        for panel in self.dashboard["panels"]:
            if panel["type"] == "row":
                continue
            wrong = {**self.dashboard, "panels": [{**panel, "options": {**panel["options"], "lgend": {}}}]}
            with self.subTest(kind=panel["type"]):
                self.assertIn(".panels[].options.lgend", set(lost(wrong, read(wrong))))


if __name__ == "__main__":
    unittest.main(verbosity=2)
