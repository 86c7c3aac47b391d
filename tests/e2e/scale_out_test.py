#!/usr/bin/env python3
"""Restart and loss of one of two servers under load, at small scale, by the program that measures them: bench/scale_out.py.

    scale_out_test.py --ternd TERND --source SOURCE [Client | Haproxy]

The class Haproxy needs Debian's haproxy; without it the test says so and ends with 77. failover_test asks the same of the C++
library with a server at a time; here all servers are replaced in turn, and the load is another process.
"""

import argparse
import pathlib
import sys
import unittest

ARGS = None
scale_out = None  # loaded in main


def arguments():
    return scale_out.parse(["--bin", str(ARGS.ternd.parent), "--data", str(ARGS.source / "models/demo/photos"), "--replicas", "2"])


def event(name, front, retry):
    return scale_out.failures(arguments(), 2, front, name, retry)


class Front:
    """What holds behind every front."""

    def test_a_rolling_restart_fails_no_call(self):
        row = event("restart", self.FRONT, True)
        self.assertEqual(row["failed"], 0, row)
        self.assertEqual(len(row["after_s"]), 2)
        self.assertGreater(row["calls"], 20)

    def test_a_killed_server_fails_no_call_of_a_client_that_retries(self):
        row = event("kill", self.FRONT, True)
        self.assertEqual(row["failed"], 0, row)
        self.assertGreater(row["calls"], 20)


class Client(Front, unittest.TestCase):
    FRONT = "client"

    def test_a_killed_server_fails_the_calls_in_it_without_retries(self):
        # Or the zeros above would say nothing.
        row = event("kill", "client", False)
        self.assertGreater(row["failed"], 0, row)
        self.assertEqual(set(row["errors_by_code"]), {"UNAVAILABLE"})

    def test_a_server_that_does_not_end_well_is_no_restart(self):
        with scale_out.Fleet(arguments(), 1, "client") as fleet:
            fleet.replicas[0].server.process.kill()
            fleet.replicas[0].server.process.wait()
            with self.assertRaisesRegex(RuntimeError, "ended with status -9"):
                scale_out.restart(fleet)


class Haproxy(Front, unittest.TestCase):
    FRONT = "haproxy"


def main():
    global ARGS, scale_out
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ternd", type=pathlib.Path, required=True, help="ternctl lies beside it")
    parser.add_argument("--source", type=pathlib.Path, required=True)
    parser.add_argument("tests", nargs="*", default=["Client", "Haproxy"])
    ARGS = parser.parse_args()
    sys.path.insert(0, str(ARGS.source / "bench"))
    import scale_out as module
    scale_out = module
    if any(test.startswith("Haproxy") for test in ARGS.tests) and not scale_out.haproxy_program():
        print("scale_out_test ... skipped 'servers behind HAProxy: haproxy is not installed (scripts/install-deps.sh full)'")
        sys.exit(77)
    unittest.main(argv=[sys.argv[0], *ARGS.tests], verbosity=2)


if __name__ == "__main__":
    main()
