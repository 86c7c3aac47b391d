#!/usr/bin/env python3
"""Writes the dashboard, tern.json, from the list of its panels below.

    dashboard.py [FILE]    # tern.json beside this file; `-` = standard output

In expressions @T stands for the chosen servers, @V for the chosen versions on them, @S for the chosen services.
"""

import json
import pathlib
import sys

TARGET = 'namespace=~"$namespace",job=~"$job",instance=~"$instance"'
MATCHERS = {
    "@V": TARGET + ',model=~"$model",version=~"$version"',
    "@T": TARGET,
    "@S": 'namespace=~"$namespace",job=~"$job"',
}
VERSION = "{{model}} v{{version}}"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Unary calls and requests inside streams. Either may have no series.
CLASSIFYING = ('(rate(tern_requests_total{@T,method=~"(http[.])?(Classify|ModelInfer)"}[$__rate_interval])'
               " or rate(tern_stream_requests_total{@T}[$__rate_interval]))")


def expand(text):
    for token, matchers in MATCHERS.items():
        text = text.replace(token, matchers)
    return text


def panel(kind, title, description, unit, targets, width=6, height=8, options=None, defaults=None, instant=False,
          table=False):
    """`targets`: (expression, legend) each."""
    return {
        "type": kind, "title": title, "description": description, "datasource": SOURCE,
        "gridPos": {"h": height, "w": width},
        "targets": [{"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expand(expression), "legendFormat": legend,
                     **({"instant": True} if instant else {}), **({"format": "table"} if table else {})}
                    for i, (expression, legend) in enumerate(targets)],
        "fieldConfig": {"defaults": {"unit": unit, **(defaults or {})}, "overrides": []},
        "options": options or {},
    }


def series(title, description, unit, *targets, stacked=False, steps=None, low=0, **more):
    """Lines over time. `steps`: values at which a dashed line is drawn."""
    custom = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 30 if stacked else 10, "showPoints": "never",
              "stacking": {"mode": "normal" if stacked else "none", "group": "A"}}
    defaults = {"custom": custom, **({} if low is None else {"min": low})}
    if unit == "percentunit":
        defaults["max"] = 1
    if steps:
        custom["thresholdsStyle"] = {"mode": "dashed"}
        defaults["thresholds"] = {"mode": "absolute", "steps": [{"color": "transparent", "value": None}] + [
            {"color": "red", "value": value} for value in steps]}
    options = {"legend": {"displayMode": "table", "placement": "bottom", "calcs": ["mean", "max", "lastNotNull"]},
               "tooltip": {"mode": "multi", "sort": "desc"}}
    return panel("timeseries", title, description, unit, targets, options=options, defaults=defaults, **more)


def heatmap(title, description, unit, expression, **more):
    """Of a histogram's buckets."""
    options = {"calculate": False, "yAxis": {"unit": unit}, "cellGap": 1,
               "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64}, "legend": {"show": True},
               "tooltip": {"show": True, "yHistogram": True}}
    made = panel("heatmap", title, description, "short", [(expression, "{{le}}")], options=options, **more)
    made["targets"][0]["format"] = "heatmap"
    return made


def reduced():
    return {"calcs": ["lastNotNull"], "fields": "", "values": False}


def stat(title, description, unit, *targets, bad=None, good_above=None, **more):
    """The last values. Red from `bad` on, or below `good_above`."""
    steps = [{"color": "green", "value": None}]
    if bad is not None:
        steps.append({"color": "red", "value": bad})
    if good_above is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": good_above}]
    options = {"reduceOptions": reduced(), "colorMode": "value", "graphMode": "none", "textMode": "auto"}
    return panel("stat", title, description, unit, targets, options=options, instant=True,
                 defaults={"thresholds": {"mode": "absolute", "steps": steps}}, **more)


def bars(title, description, unit, *targets, **more):
    options = {"reduceOptions": reduced(), "orientation": "horizontal", "displayMode": "basic"}
    return panel("bargauge", title, description, unit, targets, options=options, instant=True, **more)


def table(title, description, expression, **more):
    made = panel("table", title, description, "short", [(expression, "")], options={"showHeader": True}, instant=True,
                 table=True, **more)
    made["transformations"] = [{"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": {}}}]
    return made


def ratio(part, whole):
    """Nothing where there is nothing to divide by."""
    return f"{part} / ({whole} > 0)"


def mean(histogram, by, matchers="@V", window="$__rate_interval"):
    return ratio(f"sum by ({by}) (rate({histogram}_sum{{{matchers}}}[{window}]))",
                 f"sum by ({by}) (rate({histogram}_count{{{matchers}}}[{window}]))")


def quantile(q, histogram, by, matchers="@V", window="$__rate_interval"):
    by = ", ".join(["le"] + by.split(", ")) if by else "le"
    return f"histogram_quantile({q}, sum by ({by}) (rate({histogram}_bucket{{{matchers}}}[{window}])))"


def interval(figure, legend):
    return [(f"tern_live_{figure}_ratio{{@V}}", f"{legend} {VERSION} {{{{instance}}}}"),
            (f"tern_live_{figure}_ratio_low{{@V}}", f"low {VERSION} {{{{instance}}}}"),
            (f"tern_live_{figure}_ratio_high{{@V}}", f"high {VERSION} {{{{instance}}}}")]


REQUEST = "tern_version_request_duration_seconds"

ROWS = [
    ("Users: rate, errors, latency", [
        stat("Requests per second", "That classify: calls over gRPC and HTTP, and requests inside streams.", "reqps",
             (f"sum {CLASSIFYING}", "requests"), width=4, height=4),
        stat("Failed", "Share of the requests of the last 5 minutes that failed by the server's fault; the objective is 0.1 %.",
             "percentunit", ("tern:slo_errors:ratio_rate5m{@S}", "{{job}}"), bad=0.001, width=4, height=4),
        stat("Slower than 250 ms", "Share of the answers of the last 5 minutes; the objective is 1 %.", "percentunit",
             ("tern:slo_slow:ratio_rate5m{@S}", "{{job}}"), bad=0.01, width=4, height=4),
        stat("Error budget left", "Of three days. 1 = no failure, 0 = the objective is just met, below: missed.", "percentunit",
             ("1 - tern:slo_errors:ratio_rate3d{@S} / on () group_left () (1 - tern:slo_availability:objective)",
              "{{job}}"), good_above=0, width=4, height=4),
        stat("Latency budget left", "Of three days.", "percentunit",
             ("1 - tern:slo_slow:ratio_rate3d{@S} / on () group_left () (1 - tern:slo_latency:objective)", "{{job}}"),
             good_above=0, width=4, height=4),
        stat("Alerts that fire", "docs/operations.md has the runbooks.", "short",
             ('count(ALERTS{alertname=~"Tern.+",alertstate="firing"}) or vector(0)', "alerts"), bad=1, width=4, height=4),
        series("Images per second", "That went through a network, by version.", "short",
               ("sum by (model, version, scheme) (rate(tern_images_total{@V}[$__rate_interval]))", VERSION + " {{scheme}}"),
               width=8, stacked=True),
        series("Requests per second by method", "Calls on all ports, and requests inside streams.", "reqps",
               ("sum by (method) (rate(tern_requests_total{@T}[$__rate_interval]))", "{{method}}"),
               ("sum by (method) (rate(tern_stream_requests_total{@T}[$__rate_interval]))", "inside {{method}}"), width=8),
        series("Requests per second by code", "That classify, those inside streams included, by gRPC status code.", "reqps",
               (f"sum by (code) {CLASSIFYING}", "{{code}}"), width=8),
        series("Requests per second by version and code", "Of those that a version took.", "reqps",
               ("sum by (model, version, code) (rate(tern_version_requests_total{@V}[$__rate_interval]))",
                VERSION + " {{code}}"), width=8),
        series("Errors by version", "Share of a version's requests that failed, callers' mistakes included.", "percentunit",
               (ratio('(sum by (model, version) (rate(tern_version_requests_total{@V,code!="OK"}[$__rate_interval]))'
                      " or sum by (model, version) (rate(tern_version_requests_total{@V}[$__rate_interval])) * 0)",
                      "sum by (model, version) (rate(tern_version_requests_total{@V}[$__rate_interval]))"), VERSION),
               width=8),
        series("Burn rate of the budgets", "1 spends exactly the budget of 30 days. Alerts: 14.4 over 1 h, 6 over 6 h, 3 over a "
               "day, 1 over three.", "short",
               *[(f"tern:slo_{slo}:ratio_rate{window}{{@S}} / on () group_left () (1 - tern:slo_{objective}:objective)",
                  f"{what} {window} {{{{job}}}}")
                 for slo, objective, what in (("errors", "availability", "errors"), ("slow", "latency", "latency"))
                 for window in ("5m", "1h", "6h")], width=8, steps=[1, 6, 14.4]),
        series("Latency by version", "From the arrival of a request to its answer, successful ones only; from the histogram, so it "
               "adds up over replicas.", "s",
               *[(quantile(q, REQUEST, "model, version"), f"p{100 * q:g} {VERSION}") for q in (0.5, 0.95, 0.99)], width=8),
        heatmap("Latency, all answers", "Answers per second in each bucket, of the chosen models and versions.", "s",
                f"sum by (le) (rate({REQUEST}_bucket{{@V}}[$__rate_interval]))", width=8),
        series("Latency of calls by method", "All outcomes, p99.", "s",
               (quantile(0.99, "tern_request_duration_seconds", "method", "@T"), "{{method}}"), width=8),
    ]),
    ("Stages: where the time goes", [
        series("Mean time per stage", "queue: for decoding and for a batch.", "s",
               (mean("tern_stage_duration_seconds", "stage"), "{{stage}}"), stacked=True),
        series("p99 per stage", "", "s", (quantile(0.99, "tern_stage_duration_seconds", "stage"), "{{stage}}")),
        series("Inference by version", "One batch through the network, median.", "s",
               (quantile(0.5, "tern_stage_duration_seconds", "model, version", '@V,stage="inference"'), VERSION)),
        series("Slowest layers", "Mean time of the ten slowest layers in the batches that are profiled (--profile_every).", "s",
               (f"topk(10, {mean('tern_layer_duration_seconds', 'model, version, layer')})", VERSION + " {{layer}}")),
    ]),
    ("Batching", [
        series("Mean batch size", "Images per batch.", "short", (mean("tern_batch_size", "model, version"), VERSION)),
        heatmap("Batch sizes", "Batches per second of each size.", "short",
                "sum by (le) (rate(tern_batch_size_bucket{@V}[$__rate_interval]))"),
        series("Limits in force", "Most images per batch, and how long a batch waits for company: as configured, or as "
               "--target_p99 chooses.", "short", ("max by (model, version) (tern_batch_limit{@V})", "images " + VERSION),
               ("1000 * max by (model, version) (tern_batch_delay_seconds{@V})", "delay in ms " + VERSION)),
        bars("Time of a batch, learned", "What the scheduler expects of each size.", "s",
             ("max by (model, version, batch_size) (tern_batch_learned_seconds{@V})", VERSION + ", {{batch_size}} images")),
    ]),
    ("Resources: utilisation, saturation, errors", [
        series("CPU: utilisation", "Of the CPUs that the server may use.", "percentunit",
               ("rate(process_cpu_seconds_total{@T}[$__rate_interval]) / tern_cpu_budget_threads{@T}", "{{instance}}")),
        series("CPU: saturation", "Mean time from admission to a batch, beyond the delay in force: what to scale on.", "s",
               ("tern:queue_wait_seconds:mean2m{@T}", "{{instance}} {{model}}")),
        series("CPU: throttling", "Share of the scheduling periods in which the quota ran out, and seconds per second for which "
               "threads were held back. None without a quota.", "percentunit",
               ("rate(tern_cgroup_throttled_periods_total{@T}[$__rate_interval]) / "
                "clamp_min(rate(tern_cgroup_periods_total{@T}[$__rate_interval]), 0.001)", "{{instance}} periods"),
               ("rate(tern_cgroup_throttled_seconds_total{@T}[$__rate_interval])", "{{instance}} held back")),
        series("Brown-out", "Steps below the default version, and answers of other versions than the default.", "short",
               ("max by (model) (tern_brownout_level{@T,model=~\"$model\"})", "{{model}} steps"),
               ("sum by (model, from, to) (rate(tern_degraded_total{@T,model=~\"$model\"}[$__rate_interval]))",
                "{{model}} v{{from}} to v{{to}} per second")),
        series("Memory: utilisation", "Resident, of what the server may use.", "percentunit",
               ("process_resident_memory_bytes{@T} / tern_memory_limit_bytes{@T}", "{{instance}}"), steps=[0.9]),
        series("Memory: what holds it", "", "bytes", ("process_resident_memory_bytes{@T}", "{{instance}} resident"),
               ("sum by (instance) (tern_model_bytes{@T})", "{{instance}} weights"),
               ("tern_waiting_bytes{@T}", "{{instance}} waiting images")),
        series("Queues: images that wait", "For a batch, to be decoded, and altogether until answered.", "short",
               ("max by (model, version) (tern_queue_depth{@V})", "batch " + VERSION),
               ("max by (instance) (tern_decode_queue_depth{@T})", "decode {{instance}}"),
               ("max by (instance) (tern_waiting_images{@T})", "admitted {{instance}}")),
        series("Queues: refused", "Images and requests per second that were turned away.", "short",
               ("sum by (reason) (rate(tern_rejected_total{@T}[$__rate_interval]))", "{{reason}}")),
        series("Connections: utilisation", "File descriptors, of those that the process may open.", "percentunit",
               ("process_open_fds{@T} / process_max_fds{@T}", "{{instance}}"), steps=[0.9]),
        series("Connections: calls in flight", "And clients with images in the server.", "short",
               ("sum by (method) (tern_inflight_requests{@T})", "{{method}}"),
               ("sum by (instance) (tern_clients{@T})", "clients {{instance}}")),
        series("Connections: refused", "Closed for want of descriptors, and calls without the right token, per second.", "short",
               ("sum by (port) (rate(tern_refused_connections_total{@T}[$__rate_interval]))", "closed, {{port}}"),
               ("sum by (port, reason) (rate(tern_auth_failures_total{@T}[$__rate_interval]))", "{{reason}}, {{port}}")),
        stat("Certificates: time left", "Of the certificate that new connections get.", "s",
             ("tern_tls_certificate_expiry_timestamp_seconds{@T} - time()", "{{instance}} {{port}}"),
             good_above=14 * 86400),
    ]),
    ("Quality: is it still right", [
        series("Live top-1 with its 95 % interval", "Over the labels in the window (--live_window), and the lower end of the "
               "interval that the report published.", "percentunit", *interval("top1", "top-1"),
               ("tern_quantization_top1_low{@V}", "published, low " + VERSION), low=None, width=8),
        series("Live top-5 with its 95 % interval", "", "percentunit", *interval("top5", "top-5"), low=None, width=8),
        series("Agreement with float, live, with its 95 % interval", "Shadow comparisons in the window, and the lower end of the "
               "interval that the report published.", "percentunit", *interval("agreement", "agreement"),
               ("tern_quantization_top1_agreement_low{@V}", "published, low " + VERSION), low=None, width=8),
        series("Labels and comparisons in the windows", "Below a hundred the intervals are wide, and no alert fires.", "short",
               ("tern_live_labels{@V}", "labels " + VERSION + " {{instance}}"),
               ("tern_live_comparisons{@V}", "comparisons " + VERSION + " {{instance}}")),
        series("Labels by result", "Per minute.", "short",
               ("60 * sum by (result) (rate(tern_labelled_predictions_total{@V}[$__rate_interval]))", "{{result}}"),
               stacked=True),
        series("Divergence from float, live", "Mean Kullback-Leibler divergence of the outputs, in nats.", "short",
               (mean("tern_shadow_divergence_nats", "model, version", window="1h"), VERSION)),
        series("Shadow comparisons", "Per minute; with those that were not made, by reason.", "short",
               ("60 * sum by (model, version, result) (rate(tern_shadow_comparisons_total{@V}[$__rate_interval]))",
                "{{result}} " + VERSION),
               ("60 * sum by (reason) (rate(tern_shadow_dropped_total{@T}[$__rate_interval]))", "dropped: {{reason}}")),
        series("Confidence", "Mean probability of the best class, against the reference.", "percentunit",
               ("tern_live_confidence_mean{@V}", VERSION + " {{instance}}"),
               ("tern_drift_reference_confidence_mean{@V}", "reference " + VERSION), low=None),
        heatmap("Confidence, all answers", "Answers per second by the probability of their best class.", "percentunit",
                "sum by (le) (rate(tern_prediction_confidence_bucket{@V}[$__rate_interval]))"),
        series("Entropy", "Of the probabilities, in nats, against the reference.", "short",
               ("tern_live_entropy_mean{@V}", VERSION + " {{instance}}"),
               ("tern_drift_reference_entropy_mean{@V}", "reference " + VERSION)),
        series("Class mix against the reference", "Population stability index: below 0.1 no shift, above 0.25 a large one.",
               "short", ("tern_live_class_mix_psi{@V}", VERSION + " {{instance}}"), steps=[0.25]),
        series("Clipping: codes at their limits", "Largest excess of a layer over its share in calibration.", "percentunit",
               ("tern_live_at_limit_excess{@V}", VERSION + " {{instance}}"), low=None, steps=[0.02]),
        bars("Clipping: layers", "The eight with the largest share of codes at their limits, live.", "percentunit",
             ("topk(8, max by (model, version, layer) (tern_live_at_limit_ratio{@V}))", VERSION + " {{layer}}")),
        bars("Answers in the windows, and in the references", "A reference of 0 is still being made.", "short",
             ("tern_live_images{@V}", VERSION + " {{instance}}"),
             ("tern_drift_reference_images{@V}", "reference " + VERSION)),
        table("References of the drift figures", "Which images they are of.",
              "max by (model, version, images_of) (tern_drift_reference_info{@V})"),
    ]),
    ("Quantisation: what the reports promised", [
        bars("Top-1, quantised over float", "On the evaluation images of each version's report.", "percentunit",
             ("max by (model, version, scheme) (tern_quantization_top1_ratio{@V})", VERSION + " {{scheme}}")),
        bars("Top-1 and agreement with float", "", "percentunit",
             ("max by (model, version, scheme) (tern_quantization_top1{@V})", "top-1 " + VERSION + " {{scheme}}"),
             ("max by (model, version, scheme) (tern_quantization_top1_agreement{@V})",
              "agreement " + VERSION + " {{scheme}}")),
        bars("Noisiest layers", "Signal to quantisation noise, the eight lowest.", "dB",
             ("bottomk(8, max by (model, version, layer) (tern_quantization_sqnr_db{@V}))", VERSION + " {{layer}}")),
        bars("Clipping in calibration", "Share of a layer's outputs outside the 8-bit range, and of its codes at their limits; the "
             "five largest of each.", "percentunit",
             ("topk(5, max by (model, version, layer) (tern_activation_clipped_ratio{@V}))", "outside " + VERSION + " {{layer}}"),
             ("topk(5, max by (model, version, layer) (tern_activation_at_limit_ratio{@V}))",
              "at limits " + VERSION + " {{layer}}")),
    ]),
    ("Fleet: versions, instruction sets, self-tests", [
        table("Servers", "Versions of Tern and oneDNN, and instruction sets.",
              "count by (version, isa, onednn) (tern_build_info{@T})"),
        table("Versions in memory", "",
              "count by (model, version, scheme, isa, default) (tern_model_info{@V})", width=10),
        table("Self-tests", "By version and instruction set: the lowest of all servers; 1 = the stored images gave the stored "
              "answers.", "min by (model, version, isa) (tern_model_self_test{@V})", width=8),
        stat("Versions that cannot be served", "`ternctl models` gives the reason.", "short",
             ("sum(1 - tern_model_ready{@V})", "unavailable"), bad=1, width=4),
        stat("Failed self-tests", "", "short", ("sum(1 - tern_model_self_test{@V})", "failed"), bad=1, width=4),
        stat("Uptime", "", "s", ("time() - process_start_time_seconds{@T}", "{{instance}}"), width=4),
        bars("Weights in memory", "", "bytes",
             ("max by (model, version, scheme) (tern_model_bytes{@V})", VERSION + " {{scheme}}")),
        stat("Quantisation jobs, last day", "", "short",
             ("sum by (outcome) (increase(tern_quantize_jobs_total{@T}[1d]))", "{{outcome}}")),
        stat("Time of a quantisation job", "Mean of the last day.", "s", (mean("tern_quantize_seconds", "job", "@T", "1d"), "{{job}}"),
             width=4),
        series("Changes seen in the folder", "By the watch of the repository (--poll_interval), in an hour.", "short",
               ("sum by (event) (increase(tern_watch_events_total{@T}[1h]))", "{{event}}"), width=10),
        series("Fallbacks", "Slower, float or replacement paths that were taken, in an hour.", "short",
               ("sum by (reason) (increase(tern_fallbacks_total{@T}[1h]))", "{{reason}}"), width=10),
    ]),
]


def variable(name, label, query, all_value=None):
    """`all_value`: what "All" means where it is not the list of the values."""
    query = expand(query)
    return {"name": name, "label": label, "type": "query", "datasource": SOURCE, "definition": query,
            "query": {"query": query, "refId": name}, "refresh": 2, "sort": 3, "multi": True, "includeAll": True,
            **({"allValue": all_value} if all_value else {}),
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]}}


VARIABLES = [
    {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1, "current": {}},
    # Outside of Kubernetes there are no namespaces.
    variable("namespace", "Namespace", "label_values(tern_build_info, namespace)", ".*"),
    variable("job", "Job", 'label_values(tern_build_info{namespace=~"$namespace"}, job)'),
    variable("instance", "Instance", "label_values(tern_build_info{@S}, instance)"),
    variable("model", "Model", "label_values(tern_model_ready{@T}, model)", ".*"),
    variable("version", "Version", 'label_values(tern_model_ready{@T,model=~"$model"}, version)', ".*"),
]


def dashboard():
    panels, y = [], 0
    for title, content in ROWS:
        panels.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}})
        x, y, height = 0, y + 1, 0
        for item in content:
            box = item["gridPos"]
            if x + box["w"] > 24:
                x, y, height = 0, y + height, 0
            box["x"], box["y"] = x, y
            x, height = x + box["w"], max(height, box["h"])
            panels.append(item)
        y += height
    for number, item in enumerate(panels, 1):
        item["id"] = number
    return {
        "uid": "tern", "title": "Tern", "tags": ["tern"], "timezone": "", "editable": True, "graphTooltip": 1,
        "description": "Low-precision image classification: users, stages, batching, resources, quality, fleet.",
        "schemaVersion": 38, "version": 1, "refresh": "15s", "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": VARIABLES}, "annotations": {"list": []}, "panels": panels,
    }


if __name__ == "__main__":
    text = json.dumps(dashboard(), indent=1) + "\n"
    where = sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).with_name("tern.json")
    if where == "-":
        sys.stdout.write(text)
    else:
        pathlib.Path(where).write_text(text)
