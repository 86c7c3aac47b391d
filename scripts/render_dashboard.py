#!/usr/bin/env python3
"""Draws the dashboard as a picture: the queries of deploy/grafana/tern.json, answered by a running Prometheus.

    render_dashboard.py --prometheus http://127.0.0.1:9090 --output FILE.png [--minutes N] [--rows "Users,Quality"]

It stands in for a screenshot where there is no Grafana, with the same panels in the same places, and says so in its title.
Variables have everything chosen. `--rows` takes beginnings of row titles. Needs Debian's python3-matplotlib. Heat maps, bars,
single values and tables are drawn plainly; Grafana's look is its own.
"""

import argparse
import datetime
import io
import json
import math
import pathlib
import re
import sys
import textwrap
import time
import urllib.parse
import urllib.request

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.dates
    import matplotlib.pyplot as plt
    import matplotlib.ticker
    import PIL.Image
except ImportError:
    sys.exit("render_dashboard.py needs python3-matplotlib")

SOURCE = pathlib.Path(__file__).resolve().parents[1]
CELL = (0.48, 0.24)  # inches of a unit of the dashboard's grid
MOST = 8  # lines in a legend, bars, rows of a table


class Prometheus:

    def __init__(self, url):
        self.url = url.rstrip("/")

    def get(self, path, **arguments):
        url = f"{self.url}/api/v1/{path}?" + urllib.parse.urlencode(arguments)
        with urllib.request.urlopen(url, timeout=30) as reply:
            return json.load(reply)["data"]

    def variables(self, dashboard):
        """What Grafana puts in the place of each variable when everything is chosen."""
        values = {}
        for variable in dashboard["templating"]["list"]:
            if variable["type"] != "query":
                continue
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            found = self.get(f"label/{match[2]}/values", **{"match[]": substitute(match[1], values)})
            chosen = "|".join(map(re.escape, found)).replace("\\", "\\\\")  # inside a string of PromQL
            values[variable["name"]] = variable.get("allValue") or f"({chosen})"
        return values


def substitute(text, values, window="30s"):
    text = text.replace("$__rate_interval", window)
    for name, value in values.items():
        text = text.replace(f"${name}", value)
    return text


def legend(pattern, labels):
    if not pattern:
        return ", ".join(f"{k}={v}" for k, v in sorted(labels.items()) if k != "__name__")
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), pattern)


def human(value, unit):
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        for seconds, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "us")):
            if abs(value) >= seconds:
                return f"{value / seconds:.3g} {name}"
        return f"{value:.3g} s"
    if unit == "bytes":
        for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
            if abs(value) >= size:
                return f"{value / size:.3g} {name}"
    return f"{value:.3g}" + {"dB": " dB", "reqps": "/s"}.get(unit, "")


class Renderer:

    def __init__(self, prometheus, dashboard, minutes):
        self.prometheus = prometheus
        self.values = prometheus.variables(dashboard)
        self.end = time.time()
        self.start = self.end - 60 * minutes

    def instant(self, target):
        query = substitute(target["expr"], self.values)
        found = self.prometheus.get("query", query=query, time=self.end)["result"]
        values = [(item["metric"], float(item["value"][1])) for item in found]
        return [(labels, value) for labels, value in values if not math.isnan(value)]

    def lines(self, target):
        query = substitute(target["expr"], self.values)
        step = max(1, (self.end - self.start) / 240)
        found = self.prometheus.get("query_range", query=query, start=self.start, end=self.end, step=step)["result"]
        return [(item["metric"], [(float(t), float(v)) for t, v in item["values"]]) for item in found]

    def timeseries(self, axes, panel, unit):
        stacked = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
        found = [(legend(t["legendFormat"], labels), points) for t in panel["targets"] for labels, points in self.lines(t)]
        found.sort(key=lambda item: -max((v for _, v in item[1] if not math.isnan(v)), default=0))
        total = {}
        for name, points in found:
            if stacked:
                points = [(t, total.get(t, 0) + (0 if math.isnan(v) else v)) for t, v in points]
                total.update(points)
            times = [datetime.datetime.fromtimestamp(t) for t, _ in points]
            axes.plot(times, [v for _, v in points], linewidth=0.9, label=textwrap.shorten(name, 44, placeholder="..."))
        for step in panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])[1:]:
            if step["value"] <= axes.get_ylim()[1]:
                axes.axhline(step["value"], color="tab:red", linewidth=0.6, linestyle="--")
        if panel["fieldConfig"]["defaults"].get("min") == 0:
            axes.set_ylim(bottom=0)
        axes.set_xlim(datetime.datetime.fromtimestamp(self.start), datetime.datetime.fromtimestamp(self.end))
        axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%H:%M"))
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: human(value, unit)))
        axes.grid(linewidth=0.3, alpha=0.6)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            axes.legend(handles[:MOST], labels[:MOST], fontsize=4.6, loc="upper left", framealpha=0.6, borderpad=0.2,
                        labelspacing=0.15, handlelength=1)

    def heatmap(self, axes, panel):
        buckets = sorted(((float(labels["le"]), dict(points)) for labels, points in self.lines(panel["targets"][0])),
                         key=lambda item: item[0])
        times = sorted({t for _, points in buckets for t in points})
        rows, below = [], {}
        for _, points in buckets:  # the counts of the buckets include those below
            rows.append([max(0.0, points.get(t, 0) - below.get(t, 0)) for t in times])
            below = points
        if times:
            axes.imshow(rows, aspect="auto", origin="lower", cmap="Oranges", interpolation="nearest")
        unit = panel["options"]["yAxis"]["unit"]
        bounds = [human(bound, unit) if math.isfinite(bound) else "more" for bound, _ in buckets]
        shown = range(0, len(bounds), max(1, len(bounds) // 8))
        axes.set_yticks(list(shown), [bounds[i] for i in shown])
        axes.set_xticks([])

    def bars(self, axes, panel, unit):
        found = [(legend(t["legendFormat"], labels), value) for t in panel["targets"] for labels, value in self.instant(t)]
        found = found[:2 * MOST]
        axes.barh(range(len(found)), [value for _, value in found], color="tab:blue", alpha=0.5)
        for i, (name, value) in enumerate(found):
            axes.text(0.01, i, f"{textwrap.shorten(name, 40, placeholder='...')}  {human(value, unit)}", fontsize=4.8, va="center",
                      transform=axes.get_yaxis_transform())
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.set_yticks([])

    def stat(self, axes, panel, unit):
        found = [(legend(t["legendFormat"], labels), value) for t in panel["targets"] for labels, value in self.instant(t)]
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        axes.axis("off")
        for i, (name, value) in enumerate(found[:MOST]):
            color = [step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]
            y = 1 - (i + 0.5) / min(len(found), MOST)
            size = 13 if len(found) < 3 else 7
            axes.text(0.5, y, human(value, unit), fontsize=size, color="tab:" + color, ha="center", va="center",
                      transform=axes.transAxes)
            axes.text(0.5, y - (0.28 if len(found) < 3 else 0.06), textwrap.shorten(name, 40, placeholder="..."), fontsize=4.6,
                      ha="center", va="center", transform=axes.transAxes)

    def table(self, axes, panel):
        found = self.instant(panel["targets"][0])
        names = sorted({name for labels, _ in found for name in labels})
        rows = [[labels.get(name, "") for name in names] + [f"{value:g}"] for labels, value in found][:MOST]
        axes.axis("off")
        if not rows:
            return
        made = axes.table(cellText=rows, colLabels=[*names, "value"], loc="upper center", cellLoc="left", edges="horizontal")
        made.auto_set_font_size(False)
        made.set_fontsize(5)

    def draw(self, axes, panel):
        unit = panel["fieldConfig"]["defaults"]["unit"]
        axes.set_title(panel["title"], fontsize=6.5, loc="left", pad=3, fontweight="bold")
        axes.tick_params(labelsize=5, length=2, pad=1)
        kind = panel["type"]
        if kind == "timeseries":
            self.timeseries(axes, panel, unit)
        elif kind == "heatmap":
            self.heatmap(axes, panel)
        elif kind == "bargauge":
            self.bars(axes, panel, unit)
        elif kind == "stat":
            self.stat(axes, panel, unit)
        else:
            self.table(axes, panel)


def chosen(panels, beginnings):
    """Panels of the rows whose titles begin so, moved up to the top."""
    out, y, taken, height = [], 0, False, 0
    for panel in panels:
        box = panel["gridPos"]
        if panel["type"] == "row":
            y += height
            taken = not beginnings or any(panel["title"].startswith(b) for b in beginnings)
            first, height = box["y"], 0
        if taken:
            height = max(height, box["y"] - first + box["h"])
            out.append({**panel, "gridPos": {**box, "y": y + box["y"] - first}})
    return out, y + height


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--rows", default="", help="separated by commas; empty: all")
    arguments = parser.parse_args()
    dashboard = json.loads((SOURCE / "deploy/grafana/tern.json").read_text())
    renderer = Renderer(Prometheus(arguments.prometheus), dashboard, arguments.minutes)
    panels, height = chosen(dashboard["panels"], [row for row in arguments.rows.split(",") if row])
    top = 1.2  # units, for the title
    width, height = 24, height + top
    figure = plt.figure(figsize=(width * CELL[0], height * CELL[1]), dpi=110)
    figure.text(0.008, 1 - 0.6 / height, "Tern: panels of the dashboard, drawn by scripts/render_dashboard.py from the same "
                "queries (not a screenshot of Grafana)", fontsize=8, va="center")
    for panel in panels:
        box = panel["gridPos"]
        left, bottom = box["x"] / width, 1 - (top + box["y"] + box["h"]) / height
        if panel["type"] == "row":
            figure.text(left + 0.008, bottom + 0.3 / height, panel["title"], fontsize=9, fontweight="bold")
            continue
        renderer.draw(figure.add_axes([left + 0.85 / width, bottom + 0.75 / height, (box["w"] - 1.05) / width,
                                       (box["h"] - 1.75) / height]), panel)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    PIL.Image.open(drawn).convert("RGB").quantize(96).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
