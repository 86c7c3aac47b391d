#!/usr/bin/env python3
"""How many replicas a load needs, what it costs, and how long its requests wait.

    bench/capacity.py plan --load 2000 --ms-per-image 31.6 --cpus 4 --price-per-cpu-hour 0.04
    bench/capacity.py simulate --batch-ms 1:3.1,8:24.8 --workers 1 --max-queue 256 --loads 0.5,0.9,2

`plan` is arithmetic on one figure, the processor time per image. `simulate` plays one replica's batch queue, event by event: Poisson
arrivals, `workers` sessions that each take what waits (at most max_batch images) as soon as they are free, a queue that refuses what
comes beyond max_queue. docs/capacity.md says where the figures come from and how well both agree with measurements.

The formulas are those of queueing theory's textbooks (Kleinrock, Queueing Systems I, 1975): arrivals per second `rate`, served per second and
server `mu`, utilisation rho = rate / (servers * mu).
"""

import argparse
import collections
import heapq
import json
import math
import random
import sys

Result = collections.namedtuple("Result", "offered refused images_per_second mean_wait_s p50_s p99_s mean_batch busy")
Plan = collections.namedtuple("Plan", "images_per_second_per_replica replicas utilisation utilisation_without_spare mean_wait_s "
                                      "p99_wait_s cost_per_million")


def erlang_c(servers, offered):
    """The probability that an arrival waits in M/M/c; `offered` = rate / mu, in servers. 1 from c servers' worth of load on."""
    if offered >= servers:
        return 1.0
    blocking = 1.0  # Erlang B by its recursion: no factorials, so no overflow
    for c in range(1, servers + 1):
        blocking = offered * blocking / (c + offered * blocking)
    return blocking / (1 - offered / servers * (1 - blocking))


def mmc_mean_wait(servers, rate, mu):
    """Seconds in the queue, M/M/c; infinite from capacity on."""
    if rate >= servers * mu:
        return math.inf
    return erlang_c(servers, rate / mu) / (servers * mu - rate)


def mmc_wait_quantile(servers, rate, mu, share):
    """Seconds that `share` (0..1) of the arrivals wait at most, M/M/c: P(W > t) = C exp(-(c mu - rate) t)."""
    if rate >= servers * mu:
        return math.inf
    return max(0.0, math.log(erlang_c(servers, rate / mu) / (1 - share)) / (servers * mu - rate))


def md1_mean_wait(rate, mu):
    """Seconds in the queue, M/D/1: half of M/M/1 (Pollaczek-Khinchine)."""
    return math.inf if rate >= mu else rate / mu / (2 * (mu - rate))


def mdc_mean_wait(servers, rate, mu):
    """Seconds in the queue, M/D/c, to a few per cent (Cosmetatos 1976); exact for one server. Constant times wait about half as long."""
    if rate >= servers * mu:
        return math.inf
    rho = rate / (servers * mu)
    correction = 1 + (1 - rho) * (servers - 1) * (math.sqrt(4 + 5 * servers) - 2) / (16 * rho * servers)
    return mmc_mean_wait(servers, rate, mu) / 2 * correction


def mdc_wait_quantile(servers, rate, mu, share):
    """Seconds that `share` of the arrivals wait at most, M/D/c: as many wait as in M/M/c, and theirs falls exponentially about its mean."""
    if rate >= servers * mu:
        return math.inf
    waiting = erlang_c(servers, rate / mu)
    return max(0.0, math.log(waiting / (1 - share)) * mdc_mean_wait(servers, rate, mu) / waiting)


def mm1k_refused(rate, mu, places):
    """The share refused by M/M/1 with `places` in all, the one in service included."""
    rho = rate / mu
    if rho == 1:
        return 1 / (places + 1)
    return (1 - rho) * rho**places / (1 - rho**(places + 1))


def batch_seconds(table):
    """From {images: seconds}, a function of 1.. images: linear between entries, and beyond the last by its time per image."""
    sizes = sorted(table)
    if not sizes or sizes[0] < 1 or any(not table[n] > 0 for n in sizes):
        raise ValueError(f"batch times: got {table}, want sizes from 1 on with times above 0")

    def seconds(n):
        if n <= sizes[0]:
            return table[sizes[0]]
        for low, high in zip(sizes, sizes[1:]):
            if n <= high:
                return table[low] + (table[high] - table[low]) * (n - low) / (high - low)
        return table[sizes[-1]] * n / sizes[-1]
    return seconds


def simulate(rate, seconds_of, workers=1, max_batch=8, max_queue=256, arrivals=100_000, seed=0, warmup=0.1):
    """One replica: Poisson arrivals of `rate` images per second; a batch of n takes a worker seconds_of(n), asked once per batch.

    The first `warmup` of the arrivals fill the queue and are not counted, rates are those up to the last arrival, and every image that
    was taken is answered. Waits end when the batch begins, latencies when it ends.
    """
    if rate <= 0 or min(workers, max_batch, max_queue, arrivals) < 1 or not 0 <= warmup < 1:
        raise ValueError("simulate: want a rate above 0, at least one worker, place in a batch, place in the queue and arrival, 0 <= warmup < 1")
    random_gap = random.Random(seed).expovariate
    ignored = int(arrivals * warmup)
    waiting, running = collections.deque(), []  # arrival times; (end, its batch's arrival times)
    arrived = refused = in_time = batches = images = 0
    begin = end = 0.0  # of what is counted
    busy_s, waits, latencies = 0.0, [], []
    arrival = random_gap(rate)
    while arrived < arrivals or running:
        counting = ignored < arrived < arrivals
        if arrived < arrivals and (not running or arrival <= running[0][0]):
            now = end = arrival
            if arrived == ignored:
                begin = now
            if len(waiting) < max_queue:
                waiting.append((now, arrived >= ignored))
            elif arrived >= ignored:
                refused += 1
            arrived += 1
            arrival = now + random_gap(rate)
        else:
            now, batch = heapq.heappop(running)
            latencies += [now - at for at, counted in batch if counted]
            in_time += len(batch) if counting else 0
        while waiting and len(running) < workers:
            batch = [waiting.popleft() for _ in range(min(max_batch, len(waiting)))]
            duration = seconds_of(len(batch))
            heapq.heappush(running, (now + duration, batch))
            waits += [now - at for at, counted in batch if counted]
            if counting:
                batches, images, busy_s = batches + 1, images + len(batch), busy_s + duration
    latencies.sort()

    def percentile(percent):  # nearest rank, as ternctl bench
        return latencies[math.ceil(percent * len(latencies) / 100) - 1] if latencies else math.nan
    span = end - begin if end > begin else math.nan
    return Result(offered=arrivals - ignored, refused=refused, images_per_second=in_time / span,
                  mean_wait_s=sum(waits) / len(waits) if waits else math.nan, p50_s=percentile(50), p99_s=percentile(99),
                  mean_batch=images / batches if batches else math.nan, busy=busy_s / (workers * span))


def plan(load, ms_per_image, cpus, utilisation=0.6, spare=1, price_per_cpu_hour=0.0):
    """Replicas for `load` images/s at `utilisation` of their CPUs with `spare` of them away; waits as M/D/c with c = cpus, spare away."""
    if not (load > 0 and ms_per_image > 0 and cpus >= 1 and 0 < utilisation < 1 and spare >= 0 and price_per_cpu_hour >= 0):
        raise ValueError("plan: want load, time and CPUs above 0, 0 < utilisation < 1, spare and price of at least 0")
    mu = 1e3 / ms_per_image
    serving = math.ceil(load / (cpus * mu * utilisation) - 1e-9)
    rate = load / serving
    mean = mdc_mean_wait(cpus, rate, mu)
    return Plan(images_per_second_per_replica=cpus * mu, replicas=serving + spare,
                utilisation=load / ((serving + spare) * cpus * mu), utilisation_without_spare=rate / (cpus * mu), mean_wait_s=mean,
                p99_wait_s=mdc_wait_quantile(cpus, rate, mu, 0.99),
                cost_per_million=cost_per_million(price_per_cpu_hour, (serving + spare) * cpus, load))


def cost_per_million(price_per_cpu_hour, cpus, load):
    """Of `cpus` that are paid for while `load` images per second come, in the price's currency."""
    return price_per_cpu_hour * cpus / 3600 / load * 1e6


def print_simulation(args):
    table = {}
    for entry in args.batch_ms.split(","):
        size, _, ms = entry.partition(":")
        table[int(size)] = (float(ms) + int(size) * args.image_ms) / 1e3
    seconds_of = batch_seconds(table)
    peak = args.workers * args.max_batch / seconds_of(args.max_batch)
    rows = []
    for load in (float(x) for x in args.loads.split(",")):
        run = simulate(load * peak, seconds_of, args.workers, args.max_batch, args.max_queue, args.arrivals, args.seed)
        rows.append({"load": load, "offered_per_second": load * peak, **run._asdict()})
    if args.json:
        print(json.dumps({"peak_images_per_second": peak, "loads": rows}, indent=1))
        return
    print(f"peak {peak:.0f} images/s; a full queue of {args.max_queue} is {1e3 * args.max_queue / peak:.0f} ms\n")
    print("| load | offered/s | answered/s | p50 ms | p99 ms | mean wait ms | mean batch | busy | refused |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['load']:g} | {row['offered_per_second']:.0f} | {row['images_per_second']:.0f} | {1e3 * row['p50_s']:.1f} | "
              f"{1e3 * row['p99_s']:.1f} | {1e3 * row['mean_wait_s']:.1f} | {row['mean_batch']:.1f} | {100 * row['busy']:.0f} % | "
              f"{100 * row['refused'] / row['offered']:.1f} % |")


def print_plan(args):
    result = plan(args.load, args.ms_per_image, args.cpus, args.utilisation, args.spare, args.price_per_cpu_hour)
    figures = {**result._asdict(), "network_mb_per_second": args.load * args.image_kb / 1e3,
               "network_mb_per_second_per_replica": args.load * args.image_kb / 1e3 / result.replicas,
               "prometheus_series": args.series_per_replica * result.replicas}
    if args.json:
        print(json.dumps(figures, indent=1))
        return
    print(f"{result.replicas} replicas of {args.cpus} CPUs, {result.images_per_second_per_replica:.0f} images/s each at most")
    print(f"utilisation {100 * result.utilisation:.0f} %, with {args.spare} away {100 * result.utilisation_without_spare:.0f} %: "
          f"wait {1e3 * result.mean_wait_s:.1f} ms on average, {1e3 * result.p99_wait_s:.1f} ms at p99 (M/D/c, without batching)")
    print(f"cost per million images {result.cost_per_million:.2f} at {args.price_per_cpu_hour:g} per CPU and hour")
    print(f"images {figures['network_mb_per_second']:.0f} MB/s, {figures['network_mb_per_second_per_replica']:.1f} per replica; "
          f"{figures['prometheus_series']} Prometheus series")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("plan", help="replicas, cost and waits for a load")
    command.add_argument("--load", type=float, required=True, help="images per second, of the busiest minute")
    command.add_argument("--ms-per-image", type=float, required=True, help="processor time of the server per image, all in")
    command.add_argument("--cpus", type=int, default=4, help="per replica")
    command.add_argument("--utilisation", type=float, default=0.6, help="of the CPUs, with the spare replicas away")
    command.add_argument("--spare", type=int, default=1, help="replicas that may be away: a restart, a lost node")
    command.add_argument("--price-per-cpu-hour", type=float, default=0.04, help="an example, not an offer")
    command.add_argument("--image-kb", type=float, default=40, help="bytes of an image on the wire, in kB")
    command.add_argument("--series-per-replica", type=int, default=600)
    command.set_defaults(run=print_plan)
    command = commands.add_parser("simulate", help="one replica's batch queue")
    command.add_argument("--batch-ms", required=True, help="SIZE:MS,SIZE:MS,...: what a batch takes a worker; linear between them")
    command.add_argument("--image-ms", type=float, default=0, help="processor time per image outside the batch, on the same CPUs")
    command.add_argument("--workers", type=int, default=1, help="sessions (instances): one per CPU by default")
    command.add_argument("--max-batch", type=int, default=8)
    command.add_argument("--max-queue", type=int, default=256)
    command.add_argument("--loads", default="0.3,0.5,0.7,0.8,0.9,0.95,1,2", help="multiples of the peak")
    command.add_argument("--arrivals", type=int, default=100_000)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=print_simulation)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        args.run(args)
    except ValueError as error:
        sys.exit(f"capacity.py: {error}")


if __name__ == "__main__":
    main()
