#!/usr/bin/env python3
"""bench/capacity.py: the simulation against closed formulas, the formulas against printed values, and each against the other.

    capacity_test.py --source SOURCE

Seeds are fixed. The bounds are about four standard errors of the simulated means, as other seeds show them.
"""

import argparse
import math
import pathlib
import random
import subprocess
import sys
import unittest

SOURCE = None  # pathlib.Path of the repository
capacity = None  # loaded in main


def exponential(mean, seed):
    draw = random.Random(seed).expovariate
    return lambda n: draw(1 / mean)


def one_by_one(rate, seconds_of, **options):
    return capacity.simulate(rate, seconds_of, **{"max_batch": 1, "max_queue": 10**9, "arrivals": 30_000, "seed": 1, **options})


class Formulas(unittest.TestCase):
    def test_erlang_c_gives_the_values_of_printed_tables(self):
        # By hand: M/M/1 waits with probability rho; M/M/2 with 2 rho^2 / (1 + rho); 10 servers with 8 Erlang: 0.409.
        self.assertAlmostEqual(capacity.erlang_c(1, 0.7), 0.7)
        self.assertAlmostEqual(capacity.erlang_c(2, 1.2), 2 * 0.36 / 1.6)
        self.assertAlmostEqual(capacity.erlang_c(10, 8), 0.409, places=3)
        self.assertEqual(capacity.erlang_c(3, 3), 1)
        self.assertGreater(capacity.erlang_c(1000, 950), 0)  # no overflow

    def test_constant_times_wait_half_as_long_as_exponential_ones(self):
        self.assertAlmostEqual(capacity.md1_mean_wait(0.8, 1), 2)
        self.assertAlmostEqual(capacity.mmc_mean_wait(1, 0.8, 1), 4)
        self.assertAlmostEqual(capacity.mdc_mean_wait(1, 0.8, 1), 2)

    def test_the_quantile_of_the_wait_is_where_the_exponential_tail_says(self):
        # P(W > t) = 0.9 exp(-0.1 t) = 0.01
        self.assertAlmostEqual(capacity.mmc_wait_quantile(1, 0.9, 1, 0.99), 10 * math.log(90))
        self.assertEqual(capacity.mmc_wait_quantile(1, 0.005, 1, 0.99), 0)  # fewer wait at all

    def test_nothing_that_is_overloaded_has_a_finite_wait(self):
        for wait in (capacity.mmc_mean_wait(2, 2, 1), capacity.md1_mean_wait(1, 1), capacity.mdc_mean_wait(2, 3, 1),
                     capacity.mmc_wait_quantile(2, 2, 1, 0.5), capacity.mdc_wait_quantile(2, 2, 1, 0.5)):
            self.assertEqual(wait, math.inf)


class Simulation(unittest.TestCase):
    def near(self, got, want, share):
        self.assertLess(abs(got - want), share * want, f"got {got}, want {want} within {100 * share:.0f} %")

    def test_constant_times_give_md1(self):
        run = one_by_one(0.7, lambda n: 1.0)
        self.near(run.mean_wait_s, capacity.md1_mean_wait(0.7, 1), 0.08)
        self.near(run.busy, 0.7, 0.02)
        self.assertEqual(run.refused, 0)

    def test_exponential_times_give_mm1_in_mean_and_tail(self):
        run = one_by_one(0.6, exponential(1, 2))
        self.near(run.mean_wait_s, capacity.mmc_mean_wait(1, 0.6, 1), 0.12)
        self.near(run.p99_s, math.log(100) / 0.4, 0.2)  # the time in the system of M/M/1 is exponential with mu - rate
        self.near(run.p50_s, math.log(2) / 0.4, 0.08)

    def test_several_workers_give_mmc_and_mdc(self):
        self.near(one_by_one(2.8, exponential(1, 3), workers=4).mean_wait_s, capacity.mmc_mean_wait(4, 2.8, 1), 0.25)
        self.near(one_by_one(2.8, lambda n: 1.0, workers=4).mean_wait_s, capacity.mdc_mean_wait(4, 2.8, 1), 0.12)

    def test_a_bounded_queue_refuses_the_share_of_mm1k(self):
        run = one_by_one(0.9, exponential(1, 4), max_queue=4)
        self.near(run.refused / run.offered, capacity.mm1k_refused(0.9, 1, 5), 0.1)

    def test_an_overloaded_server_answers_full_batches_at_its_peak_and_refuses_the_rest(self):
        run = capacity.simulate(400, capacity.batch_seconds({1: 0.01, 8: 0.04}), max_queue=32, arrivals=20_000)
        self.assertEqual(run.mean_batch, 8)
        self.near(run.images_per_second, 200, 0.01)
        self.near(run.refused / run.offered, 0.5, 0.03)
        self.assertLess(run.p99_s, 32 / 200 + 2 * 0.04)  # a full queue, the batch before it and its own

    def test_batches_carry_a_load_that_single_images_cannot(self):
        times = capacity.batch_seconds({1: 0.010, 8: 0.024})
        alone = capacity.simulate(150, times, max_batch=1, arrivals=5_000)
        together = capacity.simulate(150, times, max_batch=8, arrivals=5_000)
        self.assertGreater(alone.refused, 0)
        self.assertEqual(together.refused, 0)
        self.assertGreater(together.mean_batch, 1)

    def test_what_is_no_number_of_things_is_refused(self):
        for bad in ({"rate": 0}, {"workers": 0}, {"max_batch": 0}, {"max_queue": 0}, {"arrivals": 0}, {"warmup": 1}):
            with self.assertRaises(ValueError):
                capacity.simulate(**{"rate": 1, "seconds_of": lambda n: 1.0, **bad})
        for bad in ({}, {0: 1.0}, {1: 0.0}):
            with self.assertRaises(ValueError):
                capacity.batch_seconds(bad)


class Plan(unittest.TestCase):
    def test_the_replicas_carry_the_load_with_the_spare_ones_away(self):
        # 40 images/s per CPU, 160 per replica, 96 at 60 %: 1000 / 96 = 10.4, so 11, and one more.
        plan = capacity.plan(1000, 25, cpus=4, utilisation=0.6, spare=1, price_per_cpu_hour=0.036)
        self.assertEqual(plan.replicas, 12)
        self.assertAlmostEqual(plan.utilisation_without_spare, 1000 / (11 * 160))
        self.assertAlmostEqual(plan.cost_per_million, 48 * 1e-5 * 1000)  # 48 CPUs at 1e-5 a second, for 1000 s

    def test_a_load_that_fits_exactly_needs_no_replica_more(self):
        self.assertEqual(capacity.plan(960, 25, cpus=4, utilisation=0.6, spare=0).replicas, 10)

    def test_batch_times_are_linear_between_the_sizes_and_go_on_per_image(self):
        seconds = capacity.batch_seconds({1: 1.0, 4: 2.5, 8: 4.0})
        self.assertEqual([seconds(n) for n in (1, 2, 4, 6, 8, 16)], [1.0, 1.5, 2.5, 3.25, 4.0, 8.0])

    def test_the_command_line_says_what_is_wrong(self):
        program = [sys.executable, "-B", str(SOURCE / "bench/capacity.py")]
        for bad in (["plan", "--load", "0", "--ms-per-image", "1"], ["simulate", "--batch-ms", "0:1"], ["simulate", "--batch-ms", "x"]):
            run = subprocess.run([*program, *bad], capture_output=True, text=True, timeout=60)
            self.assertEqual(run.returncode, 1, run.stderr)
            self.assertRegex(run.stderr, r"^capacity\.py: ")


def main():
    global SOURCE, capacity
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", type=pathlib.Path, required=True)
    args, rest = parser.parse_known_args()
    SOURCE = args.source
    sys.path.insert(0, str(SOURCE / "bench"))
    import capacity as module
    capacity = module
    unittest.main(argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    main()
